"""Partitioning of Relax modules: chains become composites, neighbours one region for MARS."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.pattern_registry import get_patterns_with_prefix, register_patterns
from tvm.relax.backend.utils import has_leaking_intermediate_variables

from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError

from ...options import CompileOptions
from ..lower import lower
from ..matching import Composite, Node, match
from ..patterns import CANDIDATES, composites_of, explain
from ..report import Decision, OffloadReport
from ..session import Session, sums_maps
from .modules import COMPOSITE, all_bindings, assemble, attribute, model_functions
from .nodes import OPERATORS, operator, origin, rebuild, recall, to_dpl, tree
from .normal_form import normal_form
from .regions import OPTIONS, is_region, name_ports, name_regions, read_region
from .release import Judge, reads_numbers, release

__all__ = [
    "OPERATOR_NAMES",
    "find_candidates",
    "offload_report",
    "partition_for_mars",
    "register_chains",
]

OPERATOR_NAMES = "mars.operator_names"  # the model's, of a function, by the variables of calls
REPORT = "mars.report"

_LOG = logging.getLogger("tvm_mars")


_SESSION: ContextVar[Session | None] = ContextVar("mars_partition", default=None)


@contextlib.contextmanager
def _session(arch: MarsArch) -> Iterator[Session]:
    session = Session(arch)
    token = _SESSION.set(session)
    try:
        yield session
    finally:
        _SESSION.reset(token)


# -- chains ----------------------------------------------------------------------------------------


def register_chains() -> None:
    """Register the chains with TVM. The later entry wins there, so the order is turned round."""
    chains = composites_of(OPERATORS)
    register_patterns(
        [(entry.name, to_dpl(entry.pattern), {}, _accepts(entry)) for entry in reversed(chains)]
    )


def _accepts(entry: Composite) -> Callable[[Any], bool]:
    def accepts(context: Any) -> bool:
        session = _SESSION.get() or Session(CompileOptions().arch)
        bindings = dict(context.matched_bindings.items())
        node = tree(context.matched_expr, bindings)
        if match(entry.pattern, node) is None:  # a wildcard of TVM's also takes a constant
            return False
        if has_leaking_intermediate_variables(context):
            session.reject(node, "a value within its chain is also used elsewhere")
            return False
        return session.takes(entry, node)

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
        As an importer gives it: not legalized, quantization as quantize and dequantize. One that
        is partitioned already is given back.
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
        If an option is unknown or bad, or the module is partitioned already with another.

    Examples
    --------
    >>> import tvm_mars
    >>> from tvm.relax.frontend.onnx import from_onnx
    >>> from tvm_mars import zoo
    >>> from tvm_mars.onnx_export import to_onnx
    >>> mod = tvm_mars.partition_for_mars(from_onnx(to_onnx(zoo.load("digits"))))
    >>> [name.name_hint for name, func in mod.functions.items() if "Codegen" in func.attrs]
    ['mars_default_0']
    """
    options = CompileOptions.from_mapping(opts)
    if mod.attrs and REPORT in mod.attrs:
        CompileOptions.from_json(str(mod.attrs[OPTIONS])).require_same(options, opts)
        return mod
    if params:
        mod = relax.transform.BindParams("main", dict(params))(mod)
    mod = normal_form(mod)
    candidates = find_candidates(mod)
    with _session(options.arch) as session:
        mod = relax.transform.FuseOpsByPattern(get_patterns_with_prefix("mars."))(mod)
    mod = _bind_shapes(mod)
    mod = release(mod, reads_numbers)
    unreadable = _unreadable(mod)
    if unreadable:
        mod = release(mod, _giving_back(unreadable, session))
    else:
        mod = relax.transform.MergeCompositeFunctions()(mod)
    mod = release(mod, _unworthy(options, session))
    mod = relax.transform.DeadCodeElimination()(mod)
    mod = name_ports(mod)
    report = _report(mod, candidates, session)
    report.log()
    mod = name_regions(mod, mod_name, options, report)
    return mod.with_attrs({REPORT: report.to_json(), OPTIONS: options.to_json()})


def _bind_shapes(mod: tvm.IRModule) -> tvm.IRModule:
    """Take shapes with a symbolic batch back into the composites, out of their parameters.

    FuseOpsByPattern makes a parameter of a reshape's target where it holds a variable; the variable
    is known in the composite as well, by its input's shape.
    """
    kept: dict[Any, list[int]] = {}
    changed: dict[Any, relax.Function] = {}
    fresh: dict[Any, Any] = {}
    for gvar, func in mod.functions_items():
        shapes = {
            param: relax.ShapeExpr(param.ty.values)
            for param in getattr(func, "params", ())
            if isinstance(param.ty, relax.ShapeType)
        }
        if shapes and attribute(func, COMPOSITE) is not None:
            kept[gvar] = [i for i, param in enumerate(func.params) if param not in shapes]
            changed[gvar] = func.bind_params(shapes)
            # A global variable carries the type of its function, so it takes a new one.
            fresh[gvar] = tvm.ir.GlobalVar(gvar.name_hint)
            relax.expr._update_type(fresh[gvar], changed[gvar].ty)

    def without_shapes(binding: Any) -> Iterator[Any]:
        call = binding.value
        if isinstance(call, relax.Call) and call.op in kept:
            args = [call.args[i] for i in kept[call.op]]
            binding = relax.VarBinding(binding.var, recall(call, fresh[call.op], args))
        yield binding

    if not kept:
        return mod
    models = {gvar: rebuild(func, without_shapes) for gvar, func in model_functions(mod)}
    return assemble(mod, models, {fresh[gvar]: func for gvar, func in changed.items()})


def offload_report(mod: tvm.IRModule, **opts: Any) -> OffloadReport:
    """Report for every candidate operator whether it is offloaded, and if not, why.

    Parameters
    ----------
    mod : tvm.IRModule
        Partitioned already, or not: then it is partitioned to see.
    **opts
        Fields of :class:`tvm_mars.CompileOptions`.

    Examples
    --------
    >>> import tvm_mars
    >>> from tvm.relax.frontend.onnx import from_onnx
    >>> from tvm_mars import zoo
    >>> from tvm_mars.onnx_export import to_onnx
    >>> report = tvm_mars.offload_report(from_onnx(to_onnx(zoo.load("digits"))), min_macs=10**9)
    >>> report.summary
    '0 of 12 operators on MARS'
    >>> report.rejected[0].reason
    'its region has 9643264 multiply-accumulates, option min_macs asks for 1000000000'
    """
    mod = partition_for_mars(mod, **opts)
    return OffloadReport.from_json(str(mod.attrs[REPORT]))


def find_candidates(mod: tvm.IRModule) -> dict[str, Node]:
    """Give the operators that the report accounts for, by name, with what surrounds them."""
    found: dict[str, Node] = {}
    for _, func in model_functions(mod):
        bound = {binding.var: binding.value for binding in all_bindings(func)}
        for binding in all_bindings(func):
            if operator(binding.value) not in CANDIDATES:
                continue
            node = tree(binding.value, bound, name=binding.var.name, depth=3)
            if node.op != "add" or sums_maps(node):
                found.setdefault(node.name, node)
    return found


def _report(mod: tvm.IRModule, candidates: Mapping[str, Node], session: Session) -> OffloadReport:
    left = set()
    names: dict[str, Any] = {}
    for _, func in model_functions(mod):
        names.update(attribute(func, OPERATOR_NAMES) or {})
        left |= {
            origin(binding.value)
            for binding in all_bindings(func)
            if operator(binding.value) in CANDIDATES
        }
    decisions = [
        Decision(
            str(names.get(name, name)),
            node.op,
            name not in left,
            session.reasons.get(name, explain(node)) if name in left else "",
        )
        for name, node in candidates.items()
    ]
    regions = sum(is_region(func) for _, func in mod.functions_items())
    return OffloadReport(tuple(decisions), _host_operators(mod), regions)


def _host_operators(mod: tvm.IRModule) -> tuple[str, ...]:
    """Name what ``main`` leaves to the CPU, in order."""
    found: dict[str, None] = {}
    for _, func in model_functions(mod):
        for binding in all_bindings(func):
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
                called = value.args[0] if value.op.name == "relax.call_tir" else value.op
                name = getattr(called, "name_hint", "") or called.name
                found.setdefault(name.removeprefix("relax."))
    return tuple(found)


def _unreadable(mod: tvm.IRModule) -> str:
    """Say what TVM's MergeCompositeFunctions fails on, which ends on two kinds of bindings."""
    for _, func in model_functions(mod):
        for binding in all_bindings(func):
            if isinstance(binding, relax.MatchCast):
                return f"{binding.var.name} has a shape that is only known at run time"
            called = getattr(binding.value, "op", None)
            arguments = getattr(binding.value, "args", ())
            for entry in (called, *arguments):
                if isinstance(entry, relax.ExternFunc):
                    return f"{binding.var.name} calls the packed function {entry.global_symbol}"
    return ""


def _giving_back(why: str, session: Session) -> Judge:
    def judge(func: relax.Function, sources: list[relax.Function | None]) -> bool:
        for binding in all_bindings(func):
            session.reasons[origin(binding.value)] = f"TVM cannot merge regions beside: {why}"
        return True

    return judge


def _unworthy(options: CompileOptions, session: Session) -> Judge:
    def judge(func: relax.Function, sources: list[relax.Function | None]) -> bool:
        if not is_region(func):
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


def _note(region: relax.Function, session: Session, reason: str) -> None:
    """Give a reason to the candidates of a region."""
    for binding in all_bindings(region):
        if not isinstance(binding.value, relax.Function):
            continue
        for inner in all_bindings(binding.value):
            session.reasons[origin(inner.value)] = reason
