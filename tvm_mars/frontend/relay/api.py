"""One call from a model to something that runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import tvm
from tvm import relay
from tvm.contrib import cc, graph_executor

from mars_runtime.errors import OptionError
from mars_runtime.program import Program

from ..description import Description
from ..ports import InputSpec, in_order, require_linker, written_beside
from ..report import OffloadReport
from .codegen import collect_programs, compiling_for, host_target, whole_program
from .description import describe
from .importer import import_model
from .nodes import sizes
from .partition import offload_report, partition_for_mars
from .regions import ports

__all__ = ["CompiledModel", "build_for_cpu", "compile"]


@attrs.frozen(eq=False)
class CompiledModel:
    """A model compiled for MARS and, where MARS does not take an operator, for the CPU.

    Parameters
    ----------
    library : GraphExecutorFactoryModule or tvm.runtime.Module
        What TVM built, or loaded.
    program : Program or None
        What MARS runs; None if nothing was offloaded.
    report : OffloadReport
        What became of each operator.
    timings : mapping of str to float
        Seconds of each stage.
    """

    library: Any
    program: Program | None
    report: OffloadReport
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    timings: Mapping[str, float]
    _executor: list[Any] = attrs.field(factory=list, init=False, repr=False)

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
        if not self._executor:
            self._executor.append(graph_executor.GraphModule(self.library["default"](tvm.cpu())))
        return _execute(self._executor[0], self.input_names, arrays)

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
            self.library.export_library(os.fspath(built))


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
    source : path, onnx.ModelProto or tvm.IRModule
        A quantized network: an ONNX file or model, or an imported Relay module.
    target : str or tvm.target.Target
        ``"mars"``, or a TVM target for what stays on the CPU.
    shape : mapping of str to sequence of int, optional
        Shapes of inputs that an ONNX model leaves open: Relay compiles for one batch size.
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
        If an input's shape is open.
    """
    target = _target(target)
    timings: dict[str, float] = {}
    with _timed(timings, "import"):
        mod = import_model(source, shape)
    with _timed(timings, "partition"), target:  # by which TVM chooses how it requantizes
        mod = partition_for_mars(mod, **options)
        report = offload_report(mod)
    main = mod["main"]
    _, output_names = ports(main)
    inputs = tuple(
        InputSpec(str(var.name_hint), sizes(var), str(var.checked_type.dtype))
        for var in main.params
    )
    context = tvm.transform.PassContext(opt_level=3)
    with collect_programs() as programs, _timed(timings, "build"), compiling_for(target), context:
        library = relay.build(mod, target=target)
        describe(library, Description(inputs, output_names, report), target)
    program = whole_program(programs)
    return CompiledModel(library, program, report, inputs, output_names, timings)


def build_for_cpu(
    source: Any, shape: Mapping[str, Sequence[int]] | None = None
) -> Callable[..., npt.NDArray[Any]]:
    """Build a model without partitioning, for the CPU alone; gives its first result."""
    mod = import_model(source, shape)
    names, _ = ports(mod["main"])
    library = relay.build(mod, target=host_target())
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    return lambda *arrays: _execute(executor, names, arrays)[0]


def _execute(
    executor: Any, names: Sequence[str], arrays: Sequence[npt.ArrayLike]
) -> tuple[npt.NDArray[Any], ...]:
    for name, array in zip(names, arrays, strict=True):
        executor.set_input(name, np.asarray(array))
    executor.run()
    return tuple(executor.get_output(i).numpy() for i in range(executor.get_num_outputs()))


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start


def _target(target: Any) -> Any:
    if isinstance(target, str):
        try:
            target = tvm.target.Target(target)
        except ValueError as error:
            raise OptionError(
                f"{target!r} is no TVM target: {error}", where="option target", hint='try "mars"'
            ) from None
    if str(target.kind) == "llvm" and "mtriple" not in target.attrs:
        # The default of an LLVM build need not be the machine that it runs on.
        triple = host_target().attrs["mtriple"]
        target = tvm.target.Target({**target.export(), "mtriple": triple})
    return target
