"""Partitioning of Relax modules: chains become composites, neighbours one region for MARS."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import attrs
import tvm
from tvm import relax
from tvm.relax.backend.pattern_registry import get_patterns_with_prefix, register_patterns
from tvm.relax.backend.utils import has_leaking_intermediate_variables

from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError

from ...options import CompileOptions
from ..interface import Interface
from ..lower import Call, Region, check, lower
from ..patterns import CANDIDATES, COMPOSITES, Composite, Node, explain, parse
from ..report import Decision, OffloadReport
from .nodes import operator, rebuild, recall, sizes, to_dpl, tree
from .normal_form import normal_form

__all__ = [
    "INTERFACE",
    "OPTIONS",
    "offload_report",
    "partition_for_mars",
    "read_region",
    "register_chains",
]

CODEGEN = "Codegen"
COMPOSITE = "Composite"
INTERFACE = "mars.interface"
OPTIONS = "mars.options"
OUTPUT_NAMES = "mars.output_names"
REPORT = "mars.report"

_LOG = logging.getLogger("tvm_mars")


@attrs.define
class _Session:
    """What the checks of one partitioning share: the machine, and why they said no."""

    arch: MarsArch
    reasons: dict[str, str] = attrs.field(factory=dict)

    def reject(self, node: Node, reason: str) -> None:
        """Note the first reason for each candidate of a chain."""
        if node.op in CANDIDATES:
            self.reasons.setdefault(node.name, reason)
        for arg in node.args:
            self.reject(arg, reason)


_SESSION: ContextVar[_Session | None] = ContextVar("mars_partition", default=None)


@contextlib.contextmanager
def _session(arch: MarsArch) -> Iterator[_Session]:
    session = _Session(arch)
    token = _SESSION.set(session)
    try:
        yield session
    finally:
        _SESSION.reset(token)


# -- chains ----------------------------------------------------------------------------------------


def register_chains() -> None:
    """Register the chains with TVM. The later entry wins there, so the order is turned round."""
    register_patterns([
        (entry.name, to_dpl(entry.pattern), {}, _accepts(entry)) for entry in reversed(COMPOSITES)
    ])


def _accepts(entry: Composite) -> Callable[[Any], bool]:
    def accepts(context: Any) -> bool:
        session = _SESSION.get() or _Session(CompileOptions().arch)
        bindings = dict(context.matched_bindings.items())
        name = context.value_to_bound_var[context.matched_expr].name
        node = tree(context.matched_expr, bindings, name=name)
        if has_leaking_intermediate_variables(context):
            session.reject(node, "a value within its chain is also used elsewhere")
            return False
        try:
            spec, _ = parse(entry.name, node)
            check(spec, session.arch, name)
        except UnsupportedError as error:
            session.reject(node, error.problem)
            return False
        return True

    return accepts


# -- partitioning ----------------------------------------------------------------------------------


def partition_for_mars(
    mod: tvm.IRModule,
    params: Mapping[str, Any] | None = None,
    mod_name: str = "default",
    **opts: Any,
) -> tvm.IRModule:
    """Partition a module: what MARS takes goes into functions of their own.

    Parameters
    ----------
    mod : tvm.IRModule
        As an importer gives it: not legalized, quantization as quantize and dequantize.
    params : mapping of str to array, optional
        Parameters of ``main`` that become constants; MARS needs its weights constant.
    mod_name : str
        Prefix of the new functions' symbols.
    **opts
        Fields of :class:`tvm_mars.CompileOptions`.

    Returns
    -------
    tvm.IRModule
        Its functions with the attribute ``Codegen`` ``"mars"`` are for ``RunCodegen``; the rest
        stays on the CPU, for the reasons that :func:`offload_report` gives.

    Raises
    ------
    OptionError
        If an option is unknown or bad.
    """
    options = CompileOptions.from_mapping(opts)
    if params:
        mod = relax.transform.BindParams("main", dict(params))(mod)
    mod = normal_form(mod)
    candidates = _candidates(mod)
    with _session(options.arch) as session:
        mod = relax.transform.FuseOpsByPattern(get_patterns_with_prefix("mars."))(mod)
    mod = _bind_shapes(mod)
    mod = _release(mod, _reads_numbers)
    mod = relax.transform.MergeCompositeFunctions()(mod)
    mod = _release(mod, _unworthy(options, session))
    mod = relax.transform.DeadCodeElimination()(mod)
    mod = _name_regions(mod, mod_name, options)
    report = _report(mod, candidates, session)
    report.log()
    return mod.with_attr(REPORT, report.to_json())


def _bind_shapes(mod: tvm.IRModule) -> tvm.IRModule:
    """Take shapes with a symbolic batch back into the composites, out of their parameters.

    FuseOpsByPattern makes a parameter of a reshape's target where it holds a variable; the variable
    is known in the composite as well, by its input's shape.
    """
    kept: dict[Any, list[int]] = {}
    changed: dict[Any, relax.Function] = {}
    for gvar, func in mod.functions_items():
        shapes = {
            param: relax.ShapeExpr(param.ty.values)
            for param in getattr(func, "params", ())
            if isinstance(param.ty, relax.ShapeType)
        }
        if shapes and _has(func, COMPOSITE):
            kept[gvar] = [i for i, param in enumerate(func.params) if param not in shapes]
            changed[gvar] = func.bind_params(shapes)
    return _replaced(mod, changed, lambda call: [call.args[i] for i in kept[call.op]])


def offload_report(mod: tvm.IRModule, **opts: Any) -> OffloadReport:
    """Report for every candidate operator whether it is offloaded, and if not, why.

    Parameters
    ----------
    mod : tvm.IRModule
        Partitioned already, or not: then it is partitioned to see.
    **opts
        Fields of :class:`tvm_mars.CompileOptions`, for a module that is not partitioned.
    """
    if not (mod.attrs and REPORT in mod.attrs):
        mod = partition_for_mars(mod, **opts)
    return OffloadReport.from_json(str(mod.attrs[REPORT]))


def _functions(mod: tvm.IRModule) -> Iterator[tuple[Any, relax.Function]]:
    """Give the functions that are the model's own, in the order of their names."""
    found = [
        (gvar, func)
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function)
        and isinstance(func.body, relax.SeqExpr)
        and not _has(func, CODEGEN)
        and not _has(func, COMPOSITE)
    ]
    yield from sorted(found, key=lambda item: str(item[0].name_hint))


def _has(func: Any, name: str) -> bool:
    return bool(func.attrs) and name in func.attrs


def _bindings(func: relax.Function) -> Iterator[Any]:
    for block in func.body.blocks:
        yield from block.bindings


def _candidates(mod: tvm.IRModule) -> dict[str, Node]:
    """Give the operators that the report accounts for, by name, with what surrounds them."""
    found: dict[str, Node] = {}
    for _, func in _functions(mod):
        bound = {binding.var: binding.value for binding in _bindings(func)}
        for binding in _bindings(func):
            if operator(binding.value) not in CANDIDATES:
                continue
            node = tree(binding.value, bound, name=binding.var.name, depth=3)
            if node.op != "add" or _sums_maps(node):
                found.setdefault(node.name, node)
    return found


def _sums_maps(node: Node) -> bool:
    """Whether an addition is none of a bias."""
    for arg in node.args:
        while arg.op in ("reshape", "dequantize"):
            arg = arg.args[0]
        if arg.op == "const":
            return False
    return True


def _report(
    mod: tvm.IRModule, candidates: Mapping[str, Node], session: _Session
) -> OffloadReport:
    left = set()
    for _, func in _functions(mod):
        left |= {
            binding.var.name
            for binding in _bindings(func)
            if operator(binding.value) in CANDIDATES
        }
    decisions = [
        Decision(
            name,
            node.op,
            name not in left,
            session.reasons.get(name, explain(node)) if name in left else "",
        )
        for name, node in candidates.items()
    ]
    regions = sum(_has(func, CODEGEN) for _, func in mod.functions_items())
    return OffloadReport(decisions, _host_operators(mod), regions)


def _host_operators(mod: tvm.IRModule) -> tuple[str, ...]:
    """Name what ``main`` leaves to the CPU, in order."""
    found: dict[str, None] = {}
    for _, func in _functions(mod):
        for binding in _bindings(func):
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
                called = value.args[0] if value.op.name == "relax.call_tir" else value.op
                name = getattr(called, "name_hint", "") or called.name
                found.setdefault(name.removeprefix("relax."))
    return tuple(found)


# -- giving back to the CPU ------------------------------------------------------------------------

# Says whether a call of a composite or region is given back, seeing the function that it calls
# and where each of its arguments comes from.
Judge = Callable[[relax.Function, list[relax.Function | None]], bool]


def _reads_numbers(func: relax.Function, sources: list[relax.Function | None]) -> bool:
    """Give back a quantize of numbers that another chain gives: inside a region all are codes."""
    if str(func.attrs[COMPOSITE]) != "mars.quantize":
        return False
    return any(source is not None and _is_float(source.ret_ty) for source in sources)


def _is_float(kind: Any) -> bool:
    return isinstance(kind, relax.TensorType) and str(kind.dtype.dtype).startswith("float")


def _unworthy(options: CompileOptions, session: _Session) -> Judge:
    def judge(func: relax.Function, sources: list[relax.Function | None]) -> bool:
        if str(func.attrs[CODEGEN]) != "mars":
            return False
        try:
            graph = lower(read_region(func), options.arch).graph
        except UnsupportedError as error:
            _note(func, session, str(error))
            return True
        if graph.macs() < options.min_macs:
            _note(
                func,
                session,
                f"its region has {graph.macs()} multiply-accumulates, option min_macs asks for "
                f"{options.min_macs}",
            )
            return True
        return not graph.layers

    return judge


def _note(region: relax.Function, session: _Session, reason: str) -> None:
    """Give a reason to the candidates of a region."""
    for binding in _bindings(region):
        if not isinstance(binding.value, relax.Function):
            continue
        for inner in _bindings(binding.value):
            session.reasons.setdefault(inner.var.name, reason)


def _release(mod: tvm.IRModule, judge: Judge) -> tvm.IRModule:
    """Put the bodies of functions that a judge gives back in place of their calls."""
    changed: dict[Any, relax.Function] = {}
    for gvar, func in _functions(mod):
        inliner = _Inliner(mod, judge)
        new = rebuild(func, inliner.visit)
        if inliner.released:
            changed[gvar] = new
    if not changed:
        return mod
    mod = mod.clone()
    for gvar, func in changed.items():
        mod[gvar] = func
    return relax.transform.DeadCodeElimination()(mod)


class _Inliner:
    def __init__(self, mod: tvm.IRModule, judge: Judge) -> None:
        self.mod = mod
        self.judge = judge
        self.released = 0
        self.sources: dict[Any, relax.Function] = {}
        self.builder = relax.BlockBuilder(mod)

    def visit(self, binding: Any) -> Iterator[Any]:
        called = self.called(binding.value)
        if called is None:
            yield binding
            return
        args = list(binding.value.args)
        if self.judge(called, [self.sources.get(arg) for arg in args]):
            self.released += 1
            yield from self.inline(binding.var, called, args, {})
        else:
            self.sources[binding.var] = called
            yield binding

    def called(self, value: Any) -> relax.Function | None:
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.GlobalVar):
            return None
        func = self.mod[value.op]
        offloaded = _has(func, CODEGEN) or _has(func, COMPOSITE)
        return func if offloaded else None

    def inline(
        self, result: Any, func: relax.Function, args: list[Any], composites: Mapping[Any, Any]
    ) -> Iterator[Any]:
        """Give bindings of a function's body, the last one to ``result``."""
        values = dict(zip(func.params, args, strict=True))
        composites = dict(composites)

        def look(expr: Any) -> Any:
            if isinstance(expr, relax.Tuple):
                return relax.Tuple([look(field) for field in expr.fields])
            return values.get(expr, expr) if isinstance(expr, relax.Var) else expr

        for binding in _bindings(func):
            value = binding.value
            if isinstance(value, relax.Function):
                composites[binding.var] = value
                continue
            values[binding.var] = inner = relax.DataflowVar(binding.var.name, binding.var.ty)
            if isinstance(value, relax.Call) and value.op in composites:
                given = [look(arg) for arg in value.args]
                yield from self.inline(inner, composites[value.op], given, composites)
                continue
            if isinstance(value, relax.Call):
                value = recall(value, value.op, [look(arg) for arg in value.args])
            yield relax.VarBinding(inner, self.builder.normalize(look(value)))
        yield relax.VarBinding(result, self.builder.normalize(look(func.body.body)))


# -- regions ---------------------------------------------------------------------------------------


def read_region(func: relax.Function) -> Region:
    """Read a region's function.

    Raises
    ------
    UnsupportedError
        If it holds a chain that MARS does not take.
    """
    names: dict[Any, str] = {}

    def name(var: Any) -> str:
        if var not in names:
            hint = str(var.name)
            names[var] = hint if hint not in names.values() else f"{hint}#{len(names)}"
        return names[var]

    params = {name(var): _entry(var) for var in func.params}
    composites: dict[Any, relax.Function] = {}
    calls: list[Call] = []
    same: dict[Any, Any] = {}
    for binding in _bindings(func):
        value = binding.value
        if isinstance(value, relax.Function):
            composites[binding.var] = value
        elif isinstance(value, relax.Call) and value.op in composites:
            composite = composites[value.op]
            spec, operands = _parse_composite(composite)
            arguments = [same.get(value.args[node.index], value.args[node.index]) for node in operands]
            calls.append(Call(spec, tuple(name(arg) for arg in arguments), name(binding.var)))
        else:
            same[binding.var] = value
    result = func.body.body
    result = same.get(result, result)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    return Region(params, calls, [name(same.get(field, field)) for field in fields])


def _entry(var: Any) -> tuple[str, tuple[int, ...]]:
    shape = sizes(var)[1:]
    if None in shape:
        raise UnsupportedError(f"shape {sizes(var)} is not known", where=str(var.name))
    return str(var.ty.dtype.dtype), tuple(int(size) for size in shape if size is not None)


def _parse_composite(func: relax.Function) -> tuple[Any, tuple[Node, ...]]:
    bound = {binding.var: binding.value for binding in _bindings(func)}
    params = {var: i for i, var in enumerate(func.params)}
    return parse(str(func.attrs[COMPOSITE]), tree(func.body.body, bound, params))


def _name_regions(
    mod: tvm.IRModule, mod_name: str, options: CompileOptions
) -> tvm.IRModule:
    """Give regions topological symbols, their interface and the options."""
    named: dict[Any, relax.Function] = {}
    host = _host_operators(mod)
    for _, func in _functions(mod):
        outputs = _outputs(func)
        names = _output_names(func, len(outputs))
        values: dict[Any, str] = {var: str(var.name) for var in func.params}
        values.update(dict(zip(outputs, names, strict=True)))
        model_inputs = tuple(str(var.name) for var in func.params)
        for binding in _bindings(func):
            value = binding.value
            if isinstance(value, relax.TupleGetItem) and value.tuple_value in values:
                values.setdefault(binding.var, f"{values[value.tuple_value]}.{value.index}")
            if not isinstance(value, relax.Call) or value.op not in _regions(mod):
                values.setdefault(binding.var, f"host{len(values)}")
                continue
            index = len(named)
            region = mod[value.op]
            values.setdefault(binding.var, f"region{index}")
            interface = Interface(
                index,
                tuple(values[arg] for arg in value.args),
                _region_outputs(func, binding.var, values, region),
                model_inputs,
                names,
                host,
            )
            region = region.with_attr("global_symbol", f"mars_{mod_name}_{index}")
            region = region.with_attr(OPTIONS, options.to_json())
            named[value.op] = region.with_attr(INTERFACE, interface.to_json())
    return _replaced(mod, named, lambda call: call.args)


def _regions(mod: tvm.IRModule) -> set[Any]:
    return {
        gvar
        for gvar, func in mod.functions_items()
        if _has(func, CODEGEN) and str(func.attrs[CODEGEN]) == "mars"
    }


def _outputs(func: relax.Function) -> list[Any]:
    body = func.body.body
    bound = {binding.var: binding.value for binding in _bindings(func)}
    body = bound.get(body) if isinstance(bound.get(body), relax.Tuple) else body
    return list(body.fields) if isinstance(body, relax.Tuple) else [body]


def _output_names(func: relax.Function, count: int) -> tuple[str, ...]:
    if _has(func, OUTPUT_NAMES):
        return tuple(str(name) for name in func.attrs[OUTPUT_NAMES])
    return tuple(f"output{i}" for i in range(count)) if count > 1 else ("output",)


def _region_outputs(
    func: relax.Function, var: Any, values: dict[Any, str], region: relax.Function
) -> tuple[str, ...]:
    """Name a region's results; those of several are picked from a tuple later on."""
    if not isinstance(region.ret_ty, relax.TupleType):
        return (values[var],)
    names = [f"{values[var]}.{i}" for i in range(len(region.ret_ty.fields))]
    for binding in _bindings(func):
        value = binding.value
        if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(var):
            names[value.index] = values.setdefault(binding.var, names[value.index])
    return tuple(names)


def _replaced(
    mod: tvm.IRModule,
    functions: Mapping[Any, relax.Function],
    arguments: Callable[[relax.Call], Any],
) -> tvm.IRModule:
    """Put functions in the place of others, named as their symbols if they have any.

    A global variable carries the type of its function, so they get new ones.
    """
    fresh: dict[Any, Any] = {}
    for old, func in functions.items():
        symbol = func.attrs["global_symbol"] if _has(func, "global_symbol") else old.name_hint
        fresh[old] = tvm.ir.GlobalVar(str(symbol))
        relax.expr._update_type(fresh[old], func.ty)

    def renamed(binding: Any) -> Iterator[Any]:
        call = binding.value
        if isinstance(call, relax.Call) and call.op in fresh:
            call = recall(call, fresh[call.op], arguments(call))
            binding = relax.VarBinding(binding.var, call)
        yield binding

    if not functions:
        return mod
    kept = {gvar: func for gvar, func in mod.functions_items() if gvar not in functions}
    kept.update({gvar: rebuild(func, renamed) for gvar, func in _functions(mod)})
    kept.update({fresh[old]: func for old, func in functions.items()})
    return tvm.IRModule(kept, attrs=mod.attrs, global_infos=mod.global_infos)
