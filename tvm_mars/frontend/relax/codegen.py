"""From regions to TVM modules: ``relax.ext.mars``, the pipeline and the target tag.

A region becomes a small TensorIR function with the region's symbol, compiled by LLVM like the rest
of the model. It hands its tensors to the packed functions of ``mars_runtime.tvm_bridge``. The
program travels as base64 text in the module's constants, once for all regions, and is decoded once
for each process: the functions name it by its digest, never by a pointer or a symbol.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import attrs
import tvm
from tvm import relax, te, tirx

from mars_runtime.program import Program

from ...graph import Graph
from ...options import CompileOptions
from ..interface import Interface
from ..lower import Lowered, lower
from .modules import attribute, model_functions
from .partition import OPERATOR_NAMES, offload_report, partition_for_mars
from .regions import INTERFACE, OPTIONS, is_region, read_region

if TYPE_CHECKING:
    from ..partition import Partition

__all__ = ["codegen", "collect_programs", "graphs_of", "partition_of", "pipeline", "run_codegen"]

_CONSTANTS = "const_name_to_constant"
_PROGRAMS: ContextVar[list[Program] | None] = ContextVar("mars_programs", default=None)


@attrs.frozen(eq=False)
class _Piece:
    """A region's function, its graph and how it is connected."""

    func: relax.Function
    lowered: Lowered
    interface: Interface

    @property
    def symbol(self) -> str:
        return str(self.func.attrs["global_symbol"])

    @property
    def input_names(self) -> tuple[str, ...]:
        """The interface's names in the order of the graph's inputs."""
        return tuple(self.interface.inputs[index] for index in self.lowered.params)


@contextlib.contextmanager
def collect_programs() -> Iterator[list[Program]]:
    """Collect the programs that are compiled meanwhile in this context."""
    programs: list[Program] = []
    token = _PROGRAMS.set(programs)
    try:
        yield programs
    finally:
        _PROGRAMS.reset(token)


def graphs_of(mod: tvm.IRModule) -> list[Graph]:
    """Give the graphs of a partitioned module's regions, in the order in which they run.

    Their channels are in the model's order, whatever the option ``channel_order``.
    """
    options = CompileOptions.from_json(str(mod.attrs[OPTIONS]))
    functions = [func for _, func in mod.functions_items() if is_region(func)]
    return [piece.lowered.graph for piece in _pieces(functions, options)]


def codegen(
    functions: Sequence[relax.Function], options: Mapping[str, Any], names: Mapping[Any, str]
) -> list[Any]:
    """Compile all regions of a module into one program, and a TVM module that runs it.

    TVM's ``RunCodegen`` calls this as ``relax.ext.mars``.

    Parameters
    ----------
    functions : sequence of relax.Function
        The regions.
    options : mapping
        Fields of :class:`tvm_mars.CompileOptions`, instead of those of the partitioning.
    names : mapping
        TVM's names of the constants, which stay unused: programs hold their own.

    Returns
    -------
    list of tvm.runtime.Module
        One module with a function for each region.
    """
    settings = _options(functions, options)
    pieces = _pieces(functions, settings)
    program = _program(pieces, settings)
    collected = _PROGRAMS.get()
    if collected is not None:
        collected.append(program)
    data = program.to_bytes()
    digest = hashlib.sha256(data).hexdigest()
    text = base64.b64encode(data).decode("ascii")
    wrappers = {
        piece.symbol: _wrapper(piece, region, digest, text) for region, piece in enumerate(pieces)
    }
    target = tvm.target.Target.current(allow_none=True) or tvm.target.Target("llvm")
    return [tvm.compile(tvm.IRModule(wrappers), target=target).mod]


def partition_of(mod: tvm.IRModule, options: CompileOptions) -> Partition:
    """Partition a module and give its regions as the code generator meets them."""
    from ...compiler import NamedGraph
    from ..partition import Partition, Piece

    mod = partition_for_mars(mod, **attrs.asdict(options, recurse=False))
    names: dict[str, str] = {}
    for _, func in model_functions(mod):
        names.update((str(k), str(v)) for k, v in (attribute(func, OPERATOR_NAMES) or {}).items())
    pieces = []
    for piece in _pieces([func for _, func in mod.functions_items() if is_region(func)], options):
        operators = {
            layer: tuple(names.get(name, name) for name in found)
            for layer, found in piece.lowered.operators.items()
        }
        graph = NamedGraph(piece.lowered.graph, piece.input_names, piece.interface.outputs)
        pieces.append(Piece(graph, piece.interface, operators))
    return Partition.of(offload_report(mod), pieces)


def _options(functions: Sequence[relax.Function], given: Mapping[str, Any]) -> CompileOptions:
    if given:
        return CompileOptions.from_mapping({str(key): value for key, value in given.items()})
    return CompileOptions.from_json(str(functions[0].attrs[OPTIONS]))


def _pieces(functions: Sequence[relax.Function], options: CompileOptions) -> list[_Piece]:
    """Read regions, in the order in which they run."""
    pieces = (
        _Piece(
            func,
            lower(read_region(func), options.arch),
            Interface.from_json(str(func.attrs[INTERFACE])),
        )
        for func in functions
    )
    return sorted(pieces, key=lambda piece: piece.interface.index)


def _program(pieces: Sequence[_Piece], options: CompileOptions) -> Program:
    from ...compiler import NamedGraph, build  # the compiler proper, loaded when it is needed

    graphs = [
        NamedGraph(piece.lowered.graph, piece.input_names, piece.interface.outputs)
        for piece in pieces
    ]
    interface = pieces[0].interface
    return build(
        graphs,
        options.arch,
        channel_order=options.channel_order,
        inputs=interface.model_inputs,
        outputs=interface.model_outputs,
        host_operators=interface.host_operators,
        host_reasons=interface.host_reasons,
    )


def _wrapper(piece: _Piece, region: int, digest: str, text: str) -> tirx.PrimFunc:
    """Give the TensorIR function that hands a region's tensors to the runtime."""
    params = [
        te.placeholder(list(var.ty.shape.values), _dtype(var.ty), name=f"x{i}")
        for i, var in enumerate(piece.func.params)
    ]
    kind = piece.func.ret_ty
    results = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]

    def body(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        given = [inputs[index] for index in piece.lowered.params]
        known = tirx.call_packed("mars.runtime.knows", digest)
        load = tirx.Evaluate(tirx.call_packed("mars.runtime.load", digest, text))
        run = tirx.call_packed("mars.runtime.run", digest, region, len(given), *given, *outputs)
        return tirx.SeqStmt(
            [
                tirx.IfThenElse(tirx.Cast("int32", known) == 0, load, None),
                tirx.Evaluate(run),
            ]
        )

    made = te.extern(
        [list(result.shape.values) for result in results],
        params,
        body,
        name=piece.symbol,
        dtype=[_dtype(result) for result in results],
    )
    made = list(made) if isinstance(made, (list, tuple)) else [made]
    func = te.create_prim_func([*params, *made])
    return func.with_attr("global_symbol", piece.symbol)


def _dtype(kind: Any) -> str:
    return str(kind.dtype.dtype)


def run_codegen(mod: tvm.IRModule) -> tvm.IRModule:
    """Run TVM's RunCodegen, and drop the weights that it would store a second time.

    It lists every constant of a region for the executable, for code generators that ask for them at
    load time; ours are in the program.
    """
    mod = relax.transform.RunCodegen()(mod)
    constants = dict(mod.attrs.get(_CONSTANTS, {})) if mod.attrs else {}
    others = {name: value for name, value in constants.items() if "_mars_const_" not in name}
    if len(others) == len(constants):
        return mod
    return mod.with_attr(_CONSTANTS, others)


def pipeline(**opts: Any) -> tvm.transform.Pass:
    """Give the pipeline ``mars``: partition, compile the regions, build the rest for the CPU.

    Parameters
    ----------
    **opts
        Fields of :class:`tvm_mars.CompileOptions`.
    """
    CompileOptions.from_mapping(opts)  # a bad option is an error here, not in the first module

    def passes(mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        mod = run_codegen(partition_for_mars(mod, **opts))
        return relax.get_pipeline("default_build")(mod)

    return tvm.transform.module_pass(passes, opt_level=0, name="mars")
