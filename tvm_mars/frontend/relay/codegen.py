"""From regions to TVM modules: ``relay.ext.mars`` and the target tag.

A region becomes a small TensorIR function with the region's symbol, compiled by LLVM like the rest
of the model. It hands its tensors to the packed functions of ``mars_runtime.tvm_bridge``. Relay
compiles regions one by one, so each carries a program of its own, as base64 text in its constants.
"""

from __future__ import annotations

import contextlib
import sysconfig
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import attrs
import tvm
from tvm import relay

from mars_runtime.errors import UnsupportedError
from mars_runtime.program import Program

from ...graph import Graph
from ...options import CompileOptions
from ..interface import Interface
from ..lower import lower
from .nodes import sizes
from .partition import offload_report, options_of, partition_for_mars
from .regions import INTERFACE, OPTIONS, read_region, regions
from .wrapper import TensorSpec, wrapper

if TYPE_CHECKING:
    from ..partition import Partition

__all__ = [
    "codegen",
    "collect_programs",
    "compiling_for",
    "constant_updater",
    "graphs_of",
    "host_target",
    "partition_of",
    "whole_program",
]


@attrs.frozen(eq=False)
class _Compiled:
    interface: Interface
    program: Program


_TARGET: ContextVar[tvm.target.Target | None] = ContextVar("mars_relay_target", default=None)
_PROGRAMS: ContextVar[list[_Compiled] | None] = ContextVar("mars_relay_programs", default=None)


@contextlib.contextmanager
def collect_programs() -> Iterator[list[_Compiled]]:
    """Collect the programs that are compiled meanwhile in this context."""
    programs: list[_Compiled] = []
    token = _PROGRAMS.set(programs)
    try:
        yield programs
    finally:
        _PROGRAMS.reset(token)


def whole_program(pieces: Sequence[_Compiled]) -> Program | None:
    """Join the programs of a model's regions; None if there is none."""
    if not pieces:
        return None
    ordered = sorted(pieces, key=lambda piece: piece.interface.index)
    interface = ordered[0].interface
    return Program(
        ordered[0].program.arch,
        tuple(region for piece in ordered for region in piece.program.regions),
        interface.model_inputs,
        interface.model_outputs,
        interface.host_operators,
        interface.host_reasons,
    )


def graphs_of(mod: tvm.IRModule) -> list[Graph]:
    """Give the graphs of a partitioned module's regions, in the order in which they run.

    Their channels are in the model's order, whatever the option ``channel_order``.
    """
    arch = options_of(mod).arch
    functions = sorted(regions(mod).values(), key=lambda func: _interface(func).index)
    return [lower(read_region(func), arch).graph for func in functions]


def _interface(func: relay.Function) -> Interface:
    return Interface.from_json(str(func.attrs[INTERFACE]))


def codegen(func: relay.Function) -> Any:
    """Compile a region into a program, and a TVM module that runs it.

    TVM's ``relay.build`` calls this as ``relay.ext.mars``.

    Raises
    ------
    UnsupportedError
        If a shape is known at run time only.
    """
    from ...compiler import NamedGraph, build  # the compiler proper, loaded when it is needed

    options = CompileOptions.from_json(str(func.attrs[OPTIONS]))
    interface = _interface(func)
    symbol = str(func.attrs["global_symbol"])
    for var in func.params:
        if None in sizes(var):
            raise UnsupportedError(
                f"shape {sizes(var)} is not known when it is compiled",
                where=str(var.name_hint),
                hint="give the importer the whole shape of every input, the batch too",
            )
    lowered = lower(read_region(func), options.arch)
    names = tuple(interface.inputs[index] for index in lowered.params)
    program = build(
        [NamedGraph(lowered.graph, names, interface.outputs)],
        options.arch,
        channel_order=options.channel_order,
    )
    collected = _PROGRAMS.get()
    if collected is not None:
        collected.append(_Compiled(interface, program))
    caller = wrapper(
        symbol,
        program.to_bytes(),
        inputs=[spec for var in func.params for spec in _specs(var.checked_type)],
        outputs=_specs(func.body.checked_type),
        order=lowered.params,
    )
    return tvm.build(tvm.IRModule({symbol: caller}), target=host_target())


def partition_of(mod: tvm.IRModule, options: CompileOptions) -> Partition:
    """Partition a module and give its regions as the code generator meets them."""
    from ...compiler import NamedGraph
    from ..partition import Partition, Piece

    mod = partition_for_mars(mod, **attrs.asdict(options, recurse=False))
    pieces = []
    for func in regions(mod).values():
        interface = Interface.from_json(str(func.attrs[INTERFACE]))
        lowered = lower(read_region(func), options.arch)
        names = tuple(interface.inputs[index] for index in lowered.params)
        graph = NamedGraph(lowered.graph, names, interface.outputs)
        pieces.append(Piece(graph, interface, lowered.operators))
    return Partition.of(offload_report(mod), pieces)


def constant_updater(func: relay.Function, symbol: str) -> dict[str, Any]:
    """Tell TVM that a region needs no constants at load time: they are in its program."""
    return {}


@contextlib.contextmanager
def compiling_for(target: tvm.target.Target) -> Iterator[None]:
    """Compile regions for a model's target, which TVM hides from external code generators."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def host_target() -> tvm.target.Target:
    """Give the target that is compiled for: the model's if it is known, or this machine."""
    for target in (_TARGET.get(), tvm.target.Target.current(allow_none=True)):
        if target is not None and str(target.kind) == "llvm":
            return target
    return tvm.target.Target({"kind": "llvm", "mtriple": sysconfig.get_config_var("HOST_GNU_TYPE")})


def _specs(kind: Any) -> list[TensorSpec]:
    """Give the tensors of a type."""
    fields = kind.fields if isinstance(kind, relay.TupleType) else [kind]
    return [TensorSpec(tuple(int(size) for size in f.shape), str(f.dtype)) for f in fields]
