"""One call from a model to something that runs."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.support import cc

from mars_runtime.errors import OptionError, UnsupportedError
from mars_runtime.program import Program

from ..description import Description
from ..onnx_file import input_shapes, read_onnx
from ..onnx_form import plain_form
from ..ports import InputSpec, in_order, require_linker, written_beside
from ..report import OffloadReport
from .codegen import collect_programs, run_codegen
from .description import describe
from .nodes import sizes
from .onnx_names import onnx_names
from .partition import OPERATOR_NAMES, find_candidates, offload_report, partition_for_mars
from .regions import INPUT_NAMES, OUTPUT_NAMES

__all__ = ["CompiledModel", "InputSpec", "build_for_cpu", "compile", "import_model"]


@attrs.frozen(eq=False)
class CompiledModel:
    """A model compiled for MARS and, where MARS does not take an operator, for the CPU.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        What TVM built.
    program : Program or None
        What MARS runs; None if nothing was offloaded.
    report : OffloadReport
        What became of each operator.
    timings : mapping of str to float
        Seconds of each stage.
    """

    executable: Any
    program: Program | None
    report: OffloadReport
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    timings: Mapping[str, float]
    _machine: list[Any] = attrs.field(factory=list, init=False, repr=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The model's names of its inputs."""
        return tuple(entry.name for entry in self.inputs)

    def run(self, inputs: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        """Run the model on arrays by the model's input names; gives them by output names.

        Raises
        ------
        InputError
            If an array is missing or unknown, of another shape or dtype, or holds NaN.
        """
        results = self(*in_order(self.inputs, inputs))
        return dict(zip(self.output_names, results, strict=True))

    def __call__(self, *arrays: npt.ArrayLike) -> tuple[npt.NDArray[Any], ...]:
        """Run the model on arrays in the order of its inputs."""
        if not self._machine:
            self._machine.append(relax.VirtualMachine(self.executable, tvm.cpu()))
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        results = self._machine[0]["main"](*tensors)
        if isinstance(results, tvm.runtime.Tensor):
            results = [results]
        return tuple(result.numpy() for result in results)

    def export_library(self, path: str | os.PathLike[str]) -> None:
        """Write, atomically, a library that TVM loads in a process with ``mars_runtime``.

        Raises
        ------
        UnsupportedError
            If there is no C++ compiler, with which TVM links it.
        """
        target = Path(path)
        require_linker(cc.get_cc(), target)
        with written_beside(target) as built:
            self.executable.export_library(os.fspath(built))


def compile(
    source: Any,
    target: Any = "mars",
    *,
    shape: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> CompiledModel:
    """Compile a model.

    Parameters
    ----------
    source : path, onnx.ModelProto, tvm.IRModule or torch.export.ExportedProgram
        A quantized network: an ONNX file or model, an imported module, or an exported program.
    target : str or tvm.target.Target
        ``"mars"``, or a TVM target for what stays on the CPU.
    shape : mapping of str to sequence of int, optional
        Shapes of inputs that an ONNX model leaves open. Relax compiles for any batch as well.
    **options
        Fields of :class:`tvm_mars.CompileOptions`.

    Returns
    -------
    CompiledModel
        Runs, and can be exported.

    Raises
    ------
    OptionError
        If an option or the target is not known.
    UnsupportedError
        If the source is of no known kind.
    InputError
        If a shape is given that the model does not have.

    Examples
    --------
    >>> import numpy as np
    >>> import tvm_mars
    >>> from tvm_mars import zoo
    >>> from tvm_mars.onnx_export import to_onnx
    >>> model = tvm_mars.compile(to_onnx(zoo.load("digits")), target="mars", arch="mars")
    >>> model.report.summary
    '12 of 12 operators on MARS'
    >>> model.run({"x0": np.zeros((2, 1, 16, 16), np.float32)})["y0"].shape
    (2, 10)
    """
    target = _target(target)
    timings: dict[str, float] = {}
    with _timed(timings, "import"):
        mod = import_model(source, shape)
    with _timed(timings, "partition"):
        mod = partition_for_mars(mod, **options)
        report = offload_report(mod)
    inputs, output_names = _ports(mod["main"])
    with collect_programs() as programs, _timed(timings, "program"), target:
        mod = run_codegen(mod)
    with _timed(timings, "build"):
        mod = describe(mod, Description(inputs, output_names, report))
        executable = tvm.compile(mod, target=target, relax_pipeline="default_build")
    program = programs[0] if programs else None
    return CompiledModel(executable, program, report, inputs, output_names, timings)


def build_for_cpu(
    source: Any, shape: Mapping[str, Sequence[int]] | None = None
) -> Callable[..., npt.NDArray[Any]]:
    """Build a model without partitioning, for the CPU alone; gives its first result."""
    machine = relax.VirtualMachine(tvm.compile(import_model(source, shape), "llvm"), tvm.cpu())

    def run(*arrays: npt.ArrayLike) -> npt.NDArray[Any]:
        results = machine["main"](*(tvm.runtime.tensor(np.asarray(array)) for array in arrays))
        first = results if isinstance(results, tvm.runtime.Tensor) else results[0]
        return np.asarray(first.numpy())

    return run


def _ports(main: relax.Function) -> tuple[tuple[InputSpec, ...], tuple[str, ...]]:
    inputs = tuple(
        InputSpec(str(name), sizes(var), str(var.ty.dtype.dtype))
        for name, var in zip(main.attrs[INPUT_NAMES], main.params, strict=True)
    )
    return inputs, tuple(str(name) for name in main.attrs[OUTPUT_NAMES])


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start


def _target(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    try:
        return tvm.target.Target(target)
    except ValueError as error:
        raise OptionError(
            f"{target!r} is no TVM target: {error}", where="option target", hint='try "mars"'
        ) from None


def import_model(source: Any, shape: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """Import a model into Relax; attributes keep its names, of operators only an ONNX model's.

    ``shape`` gives shapes of inputs that an ONNX model leaves open.
    """
    if isinstance(source, tvm.IRModule):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _import_onnx(read_onnx(Path(source)), shape or {})
    module = type(source).__module__
    if module.startswith("onnx"):
        return _import_onnx(source, shape or {})
    if module.startswith("torch"):
        from .exported_program import import_exported_program

        return import_exported_program(source)
    raise UnsupportedError(
        f"a {type(source).__name__}",
        where="model",
        hint="give an .onnx file, an onnx.ModelProto, an IRModule or an ExportedProgram",
    )


# TVM's importer converts operator by operator, and each refuses in its own way.
_IMPORTER_RAISES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def _import_onnx(model: Any, shape: Mapping[str, Sequence[int]]) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    shapes = input_shapes(model.graph, shape)
    given = {name: list(shapes[name]) for name in shape}
    model = plain_form(model)
    with warnings.catch_warnings():
        # It renames inputs to identifiers; we keep the model's names beside.
        warnings.filterwarnings("ignore", message="Renaming name")
        try:
            mod = from_onnx(model, given)
        except _IMPORTER_RAISES as error:
            raise UnsupportedError(
                f"TVM's importer does not take it: {str(error).strip()}",
                where="model",
                hint="give static shapes but for the batch, and quantize in the Q/DQ format: "
                "QuantizeLinear and DequantizeLinear around the operators",
            ) from error
    constants = {entry.name for entry in model.graph.initializer}
    inputs = [entry.name for entry in model.graph.input if entry.name not in constants]
    outputs = [entry.name for entry in model.graph.output]
    operators = onnx_names(model.graph, find_candidates(mod))
    mod["main"] = mod["main"].with_attrs(
        {INPUT_NAMES: inputs, OUTPUT_NAMES: outputs, OPERATOR_NAMES: operators}
    )
    return mod
