"""Running programs on batches of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, ProgramError
from .machine import Machine
from .maps import WORD_BYTES
from .program import Program, Region

__all__ = ["run", "run_region"]

Array = npt.NDArray[Any]

# Images are simulated together up to this much memory for their maps.
_BATCH_BYTES = 256 * 2**20


def run(program: Program, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    """Run a whole program.

    Parameters
    ----------
    program : Program
        One whose operators are all on MARS.
    inputs : mapping of str to array
        For each model input a batch ``[N, ...]``.

    Returns
    -------
    dict of str to array
        The model's outputs.

    Raises
    ------
    InputError
        If an array is missing, unknown, or of another shape or dtype.
    ProgramError
        If the model also needs operators on the CPU.

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
    unknown = sorted(set(inputs) - set(program.inputs))
    missing = sorted(set(program.inputs) - set(inputs))
    if unknown or missing:
        raise InputError(
            f"missing {missing or 'none'}, unknown {unknown or 'none'}",
            where="inputs",
            hint=f"the program takes {', '.join(program.inputs)}",
        )
    values: dict[str, Array] = {name: np.asarray(array) for name, array in inputs.items()}
    for number, region in enumerate(program.regions):
        arrays = [_named(values, port.name) for port in region.inputs]
        results = run_region(program, number, arrays)
        values.update(zip((port.name for port in region.outputs), results, strict=True))
    return {name: _named(values, name) for name in program.outputs}


def _named(values: Mapping[str, Array], name: str) -> Array:
    if name not in values:
        raise ProgramError(f"nothing gives {name!r}: its regions do not connect", where="program")
    return values[name]


def run_region(program: Program, number: int, inputs: Sequence[Array]) -> list[Array]:
    """Run one region on a batch.

    Parameters
    ----------
    inputs : sequence of arrays
        For each port ``[N, *shape]`` of its dtype.

    Raises
    ------
    InputError
        If an array has another shape or dtype, holds NaN, or batches differ.
    """
    region = program.regions[number]
    codes = _codes(region, inputs)
    images = len(codes[0])
    words = region.offchip_words + program.arch.banks * program.arch.bank_words
    step = max(1, _BATCH_BYTES // (words * WORD_BYTES))
    # Each starts with no image, so that an empty batch gives an empty batch.
    parts = [[np.zeros((0, *port.type.shape), np.uint8)] for port in region.outputs]
    for at in range(0, images, step):
        machine = Machine(region, program.arch, images=min(step, images - at))
        for port, array in enumerate(codes):
            machine.write_input(port, array[at : at + step])
        machine.run()
        for port in range(len(region.outputs)):
            parts[port].append(machine.read_output(port))
    return [
        port.dequantize.apply(np.concatenate(found)).reshape(-1, *port.shape)
        for port, found in zip(region.outputs, parts, strict=True)
    ]


def _codes(region: Region, inputs: Sequence[Array]) -> list[Array]:
    if len(inputs) != len(region.inputs):
        raise InputError(f"{len(inputs)} arrays for {len(region.inputs)} inputs", where="region")
    found = []
    for port, array in zip(region.inputs, inputs, strict=True):
        where = f"input {port.name}"
        if array.ndim != len(port.shape) + 1 or array.shape[1:] != port.shape:
            raise InputError(
                f"shape {array.shape}, expected (N, {', '.join(map(str, port.shape))})",
                where=where,
            )
        found.append(port.quantize.apply(array, where).reshape(-1, *port.type.shape))
    if len({len(codes) for codes in found}) > 1:
        raise InputError(f"batches of {[len(codes) for codes in found]} images", where="inputs")
    return found
