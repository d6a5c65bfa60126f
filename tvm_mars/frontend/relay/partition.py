"""Partitioning of Relay modules: chains become composites, neighbours one region for MARS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relay
from tvm.relay.build_module import bind_params_by_name

from mars_runtime.errors import UnsupportedError

from ...options import CompileOptions
from ..lower import lower
from ..matching import Composite, Node, match
from ..patterns import CANDIDATES, composites_of, explain
from ..report import Decision, OffloadReport
from ..session import Session, sums_maps
from .nodes import (
    OPERATORS,
    has_control_flow,
    op_name,
    operator,
    origin,
    post_order,
    recall,
    rewrite,
    to_dfp,
    tree,
    with_origin,
)
from .normal_form import normal_form
from .regions import COMPOSITE, OPTIONS, attribute, called, name_regions, read_region, regions

__all__ = [
    "find_candidates",
    "offload_report",
    "options_of",
    "partition_for_mars",
    "pattern_table",
]

REPORT = "mars.report"

_LOG = logging.getLogger("tvm_mars")

# Says whether a call of a composite or region is given back, seeing the function that it calls
# and the functions that give its arguments, None for one that is no composite's or region's.
Judge = Callable[[relay.Function, "list[relay.Function | None]"], bool]


# -- chains ----------------------------------------------------------------------------------------


def pattern_table(session: Session | None = None) -> list[tuple[str, Any, Callable[[Any], bool]]]:
    """Give the chains for MergeComposite, in order of priority.

    Parameters
    ----------
    session : Session, optional
        The machine, and where to note why a chain is refused.
    """
    session = session or Session(CompileOptions().arch)
    return [
        (entry.name, to_dfp(entry.pattern), _accepts(entry, session))
        for entry in composites_of(OPERATORS)
    ]


def _accepts(entry: Composite, session: Session) -> Callable[[Any], bool]:
    def accepts(call: Any) -> bool:
        node = tree(call)
        if match(entry.pattern, node) is None:  # a wildcard of TVM's also takes a constant
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
        As an importer gives it, quantization as ``qnn.quantize`` and ``qnn.dequantize``. One that
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
        Its functions with the attribute ``Compiler`` ``"mars"`` are compiled by ``relay.ext.mars``
        in ``relay.build``; the rest stays on the CPU, for the reasons that :func:`offload_report`
        gives.

    Raises
    ------
    OptionError
        If an option is unknown or bad, or the module is partitioned already with another.
    """
    options = CompileOptions.from_mapping(opts)
    if attribute(mod, REPORT) is not None:
        options_of(mod).require_same(options, opts)
        return mod
    session = Session(options.arch)
    mod = _bound(mod, params)
    obstacle = _obstacle(mod)
    if obstacle:
        _LOG.warning("nothing was offloaded to MARS: %s", obstacle)
        return _labelled(mod, OffloadReport(()), options)
    mod = _named(normal_form(_channels_first(mod)))
    candidates = find_candidates(mod)
    mod = relay.transform.MergeComposite(pattern_table(session))(mod)
    mod = _release(relay.transform.InferType()(mod), _reads_numbers)
    passes = [
        relay.transform.AnnotateTarget("mars", include_non_call_ops=False),
        relay.transform.MergeCompilerRegions(),
        relay.transform.PartitionGraph(mod_name),
        relay.transform.InferType(),
    ]
    mod = tvm.transform.Sequential(passes)(mod)
    mod = _release(mod, _unworthy(options, session))
    report = _report(mod, candidates, session)
    report.log()
    mod = relay.transform.InferType()(name_regions(mod, options, report))
    return _labelled(mod, report, options)


def options_of(mod: tvm.IRModule) -> CompileOptions:
    """Give the options that a module was partitioned with."""
    return CompileOptions.from_json(str(mod.attrs[OPTIONS]))


def _bound(mod: tvm.IRModule, params: Mapping[str, Any] | None) -> tvm.IRModule:
    """Make parameters constants, and what importers compute of constants, such as zero points."""
    if params:
        mod = tvm.IRModule(mod.functions, mod.type_definitions, attrs=mod.attrs)
        mod["main"] = bind_params_by_name(mod["main"], dict(params))
    passes = [relay.transform.InferType(), relay.transform.FoldConstant()]
    return tvm.transform.Sequential(passes)(mod)


# Operators with a layout, and the layouts that MARS takes.
_LAYOUTS = {
    "nn.avg_pool2d": ["NCHW"],
    "nn.conv2d": ["NCHW", "OIHW"],
    "nn.global_avg_pool2d": ["NCHW"],
    "nn.max_pool2d": ["NCHW"],
    "qnn.conv2d": ["NCHW", "OIHW"],
}


def _channels_first(mod: tvm.IRModule) -> tvm.IRModule:
    """Convert the layout of operators that have another, as TFLite's importer gives them."""
    calls = [part for part in post_order(mod["main"].body) if op_name(part) in _LAYOUTS]
    keys = ("data_layout", "layout")
    layouts = {str(getattr(call.attrs, key)) for call in calls for key in keys if _has(call, key)}
    if layouts <= {"NCHW"}:
        return mod
    passes = [
        relay.transform.CanonicalizeOps(),  # no layout passes a bias_add
        relay.transform.InferType(),
        relay.transform.ConvertLayout(_LAYOUTS),
        relay.transform.FoldConstant(),
        relay.transform.InferType(),
    ]
    for apply in passes:  # in a Sequential some of them wait for opt_level=3
        mod = apply(mod)
    return mod


def _has(call: Any, key: str) -> bool:
    return key in call.attrs.keys()  # noqa: SIM118  (attributes are no mapping)


def _obstacle(mod: tvm.IRModule) -> str:
    """Say what keeps a module from being partitioned, if something does."""
    if has_control_flow(mod["main"].body):
        return "the model holds control flow or closures; MARS takes calls and tuples"
    others = [gvar.name_hint for gvar in mod.functions if gvar.name_hint != "main"]
    if others:
        return f"the model calls functions of its own ({others[0]}); inline them first"
    return ""


def _labelled(mod: tvm.IRModule, report: OffloadReport, options: CompileOptions) -> tvm.IRModule:
    for name, value in ((REPORT, report.to_json()), (OPTIONS, options.to_json())):
        mod = mod.with_attr(name, tvm.runtime.String(value))
    return mod


def _named(mod: tvm.IRModule) -> tvm.IRModule:
    """Give every candidate operator of ``main`` a name of its own, by which the report knows it."""
    taken: set[str] = set()

    def visit(call: Any, args: list[Any]) -> Any:
        if operator(call) not in CANDIDATES or not _is_candidate(call):
            return recall(call, args)
        name = stem = origin(call) or op_name(call).rpartition(".")[2]
        count = 1
        while name in taken:
            count += 1
            name = f"{stem}#{count}"
        taken.add(name)
        return with_origin(call, args, name)

    return _with_main(mod, rewrite(mod["main"].body, visit))


def _with_main(mod: tvm.IRModule, body: Any) -> tvm.IRModule:
    main = mod["main"]
    mod = tvm.IRModule(mod.functions, mod.type_definitions, attrs=mod.attrs)
    mod["main"] = relay.Function(main.params, body, None, main.type_params, main.attrs)
    return relay.transform.InferType()(mod)


def _is_candidate(call: Any) -> bool:
    return operator(call) != "add" or sums_maps(tree(call, depth=3))


def offload_report(mod: tvm.IRModule, **opts: Any) -> OffloadReport:
    """Report for every candidate operator whether it is offloaded, and if not, why.

    Parameters
    ----------
    mod : tvm.IRModule
        Partitioned already, or not: then it is partitioned to see.
    **opts
        Fields of :class:`tvm_mars.CompileOptions`.
    """
    mod = partition_for_mars(mod, **opts)
    return OffloadReport.from_json(str(mod.attrs[REPORT]))


def find_candidates(mod: tvm.IRModule) -> dict[str, Node]:
    """Give the operators that the report accounts for, by name, with what surrounds them."""
    found: dict[str, Node] = {}
    for part in post_order(mod["main"].body):
        if operator(part) in CANDIDATES and _is_candidate(part):
            found[origin(part)] = tree(part, depth=3)
    return found


def _report(mod: tvm.IRModule, candidates: Mapping[str, Node], session: Session) -> OffloadReport:
    left = {origin(part) for part in post_order(mod["main"].body) if operator(part) in CANDIDATES}
    decisions = [
        Decision(
            name,
            node.op,
            name not in left,
            session.reasons.get(name, explain(node)) if name in left else "",
        )
        for name, node in candidates.items()
    ]
    return OffloadReport(tuple(decisions), _host_operators(mod), len(regions(mod)))


def _host_operators(mod: tvm.IRModule) -> tuple[str, ...]:
    """Name what ``main`` leaves to the CPU, in order."""
    names = (op_name(part) for part in post_order(mod["main"].body))
    return tuple(dict.fromkeys(name.removeprefix("qnn.") for name in names if name))


# -- giving back -----------------------------------------------------------------------------------


def _release(mod: tvm.IRModule, judge: Judge) -> tvm.IRModule:
    """Put the bodies of functions that a judge gives back in the place of their calls."""
    sources: dict[Any, relay.Function] = {}
    released: set[Any] = set()

    def visit(call: Any, args: list[Any]) -> Any:
        func = called(mod, call)
        if func is None:
            return recall(call, args)
        if judge(func, [sources.get(arg) for arg in args]):
            released.add(call.op)
            return _inlined(func, args)
        new = recall(call, args)
        sources[new] = func
        return new

    main = mod["main"]
    body = rewrite(main.body, visit)
    if not released:
        return mod
    kept = {gvar: func for gvar, func in mod.functions.items() if gvar not in released}
    return _with_main(tvm.IRModule(kept, mod.type_definitions, attrs=mod.attrs), body)


def _inlined(func: relay.Function, args: list[Any]) -> Any:
    """Give a function's body on arguments, that of its composites as well."""
    values = dict(zip(func.params, args, strict=True))

    def visit(call: Any, given: list[Any]) -> Any:
        if isinstance(call.op, relay.Function):
            return _inlined(call.op, given)
        return recall(call, given)

    return relay.bind(rewrite(func.body, visit), values)


def _reads_numbers(func: relay.Function, sources: list[relay.Function | None]) -> bool:
    """Judge a chain on numbers: inside a region all are codes.

    A quantize goes back if another chain gives its numbers, a reshape of numbers if none does: only
    what leaves a region may be reshaped.
    """
    name = str(attribute(func, COMPOSITE))
    given = any(source is not None and _is_float(source) for source in sources)
    if name == "mars.reshape":
        return _is_float(func) and not given
    return name == "mars.quantize" and given


def _is_float(func: relay.Function) -> bool:
    kind = func.ret_type
    return isinstance(kind, relay.TensorType) and str(kind.dtype).startswith("float")


def _unworthy(options: CompileOptions, session: Session) -> Judge:
    def judge(func: relay.Function, sources: list[relay.Function | None]) -> bool:
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


def _note(region: relay.Function, session: Session, reason: str) -> None:
    """Give a reason to the candidates of a region."""
    for part in post_order(region.body):
        if isinstance(part, relay.Call):
            for inner in post_order(part.op.body):
                session.reasons[origin(inner)] = reason
