"""Running programs on batches of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arch import MarsArch
from .engine import Engine, engine_of, thread_count
from .errors import InputError, OptionError, ProgramError
from .machine import Machine
from .maps import WORD_BYTES
from .program import Program, Region

__all__ = ["ENGINES", "run", "run_region"]

Array = npt.NDArray[Any]

# Images are simulated together up to this much memory for their maps.
_BATCH_BYTES = 256 * 2**20


#: What executes a program: see :func:`run`.
ENGINES = ("auto", "layers", "machine")


def run(
    program: Program, inputs: Mapping[str, npt.ArrayLike], *, engine: str | None = None
) -> dict[str, Array]:
    """Run a whole program.

    Every engine gives the same codes. ``machine`` executes the instructions on the simulated
    memories. ``layers`` lifts whole layers off the program, which the machine checks without
    images meanwhile, and computes them with the processor's dot-product instructions.

    Parameters
    ----------
    program : Program
        One whose operators are all on MARS.
    inputs : mapping of str to array
        For each model input a batch ``[N, ...]``.
    engine : str, optional
        ``layers``, ``machine``, or ``auto``: ``layers`` where a program is a sequence of whole
        layers, as every compiled one is, else ``machine``. The environment variable
        ``MARS_ENGINE`` names it if None; ``auto`` if there is none.

    Returns
    -------
    dict of str to array
        The model's outputs.

    Raises
    ------
    InputError
        If an array is missing, unknown, or of another shape or dtype.
    ProgramError
        If the model also needs operators on the CPU, or is not for the engine.
    OptionError
        If there is no such engine.

    Examples
    --------
    >>> import mars_runtime
    >>> program = mars_runtime.Program.load("net.mars")  # doctest: +SKIP
    >>> mars_runtime.run(program, {"x": images})["logits"]  # doctest: +SKIP
    """
    if program.host_operators:
        raise ProgramError(
            f"needs {len(program.host_operators)} operators on the CPU: "
            f"{', '.join(program.host_operators)}",
            where="program",
            hint="run the library that was compiled with it (mars compile -o net.so)",
        )
    if inputs.keys() != set(program.inputs):
        unknown = sorted(set(inputs) - set(program.inputs))
        missing = sorted(set(program.inputs) - set(inputs))
        raise InputError(
            f"missing {missing or 'none'}, unknown {unknown or 'none'}",
            where="inputs",
            hint=f"the program takes {', '.join(program.inputs)}",
        )
    values: dict[str, Array] = {name: np.asarray(array) for name, array in inputs.items()}
    for number, region in enumerate(program.regions):
        arrays = [_named(values, port.name) for port in region.inputs]
        results = run_region(program, number, arrays, engine=engine)
        values.update(zip((port.name for port in region.outputs), results, strict=True))
    return {name: _named(values, name) for name in program.outputs}


def _named(values: Mapping[str, Array], name: str) -> Array:
    if name not in values:
        raise ProgramError(f"nothing gives {name!r}: its regions do not connect", where="program")
    return values[name]


def run_region(
    program: Program, number: int, inputs: Sequence[Array], *, engine: str | None = None
) -> list[Array]:
    """Run one region on a batch.

    Parameters
    ----------
    inputs : sequence of arrays
        For each port ``[N, *shape]`` of its dtype.
    engine : str, optional
        As for :func:`run`.

    Raises
    ------
    InputError
        If an array has another shape or dtype, holds NaN, or batches differ.
    """
    region = program.regions[number]
    found = _engine(region, program.arch, engine)
    images = _check(region, inputs)
    results = [np.empty((images, *port.shape), port.dequantize.dtype) for port in region.outputs]

    def take(part: slice, outputs: Sequence[Array]) -> None:
        for port, codes, result in zip(region.outputs, outputs, results, strict=True):
            real = port.dequantize.apply(codes[:, : port.type.channels])
            result[part] = real.reshape(-1, *port.shape)

    if found is not None:
        found.run(inputs, take, thread_count())
        return results
    words = region.offchip_words + program.arch.banks * program.arch.bank_words
    step = max(1, _BATCH_BYTES // (words * WORD_BYTES))
    for at in range(0, images, step):
        part = slice(at, min(images, at + step))
        codes = [
            port.quantize.apply(array[part], f"input {port.name}").reshape(-1, *port.type.shape)
            for port, array in zip(region.inputs, inputs, strict=True)
        ]
        take(part, _execute(region, program.arch, codes))
    return results


def _engine(region: Region, arch: MarsArch, wanted: str | None) -> Engine | None:
    """Give the engine of whole layers, or None for the machine."""
    name = wanted or os.environ.get("MARS_ENGINE") or "auto"
    if name not in ENGINES:
        raise OptionError(
            f"{name!r} is no engine", where="engine", hint=f"one of {', '.join(ENGINES)}"
        )
    if name == "machine":
        return None
    found = engine_of(region, arch)
    if found is None and name == "layers":
        raise ProgramError(
            "is no sequence of whole layers", where="region", hint="run it with engine='machine'"
        )
    return found


def _execute(region: Region, arch: MarsArch, codes: Sequence[Array]) -> list[Array]:
    """Run some images on the machine."""
    machine = Machine(region, arch, images=len(codes[0]))
    for port, array in enumerate(codes):
        machine.write_input(port, array)
    machine.run()
    return [machine.read_output(port) for port in range(len(region.outputs))]


def _check(region: Region, inputs: Sequence[Array]) -> int:
    """Refuse arrays of other shapes; give the size of the batch."""
    if len(inputs) != len(region.inputs):
        raise InputError(f"{len(inputs)} arrays for {len(region.inputs)} inputs", where="region")
    for port, array in zip(region.inputs, inputs, strict=True):
        if array.ndim != len(port.shape) + 1 or array.shape[1:] != port.shape:
            raise InputError(
                f"shape {array.shape}, expected (N, {', '.join(map(str, port.shape))})",
                where=f"input {port.name}",
            )
    if len({len(array) for array in inputs}) > 1:
        raise InputError(f"batches of {[len(array) for array in inputs]} images", where="inputs")
    return len(inputs[0])
