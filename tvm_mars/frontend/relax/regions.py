"""Regions: reading what is offloaded together, and how it is connected to the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax

from mars_runtime.errors import UnsupportedError

from ...options import CompileOptions
from ..interface import Interface
from ..lower import Call, Region
from ..matching import Node
from ..patterns import CANDIDATES, parse
from ..report import OffloadReport
from .modules import CODEGEN, COMPOSITE, all_bindings, assemble, attribute, model_functions
from .nodes import operator, origin, rebuild, recall, sizes, tree

__all__ = [
    "INPUT_NAMES",
    "INTERFACE",
    "OPTIONS",
    "OUTPUT_NAMES",
    "is_region",
    "name_ports",
    "name_regions",
    "read_region",
]

INPUT_NAMES = "mars.input_names"
INTERFACE = "mars.interface"
OPTIONS = "mars.options"
OUTPUT_NAMES = "mars.output_names"


def is_region(func: Any) -> bool:
    """Whether a function is for MARS."""
    return func is not None and str(attribute(func, CODEGEN)) == "mars"


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
    for binding in all_bindings(func):
        value = binding.value
        if isinstance(value, relax.Function):
            composites[binding.var] = value
        elif isinstance(value, relax.Call) and value.op in composites:
            composite = composites[value.op]
            spec, operands = _parse_composite(composite)
            given = [value.args[node.index] for node in operands]
            arguments = tuple(name(same.get(arg, arg)) for arg in given)
            calls.append(Call(spec, arguments, name(binding.var), _operators(composite)))
        else:
            same[binding.var] = value
    result = func.body.body
    result = same.get(result, result)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    return Region(params, calls, [name(same.get(field, field)) for field in fields])


def _operators(composite: relax.Function) -> tuple[str, ...]:
    """Name the candidate operators of a composite by the variables that they had."""
    values = [binding.value for binding in all_bindings(composite)]
    return tuple(origin(value) for value in values if operator(value) in CANDIDATES)


def _entry(var: Any) -> tuple[str, tuple[int, ...]]:
    shape = sizes(var)[1:]
    if None in shape:
        raise UnsupportedError(f"shape {sizes(var)} is not known", where=str(var.name))
    return str(var.ty.dtype.dtype), tuple(int(size) for size in shape if size is not None)


def _parse_composite(func: relax.Function) -> tuple[Any, tuple[Node, ...]]:
    bound = {binding.var: binding.value for binding in all_bindings(func)}
    params = {var: i for i, var in enumerate(func.params)}
    return parse(str(attribute(func, COMPOSITE)), tree(func.body.body, bound, params))


def name_ports(mod: tvm.IRModule) -> tvm.IRModule:
    """Give functions the names of their inputs and outputs, where the importer did not."""
    changed = {}
    for gvar, func in model_functions(mod):
        names = {
            INPUT_NAMES: [str(var.name) for var in func.params],
            OUTPUT_NAMES: _numbered("output", len(_outputs(func))),
        }
        missing = {name: value for name, value in names.items() if attribute(func, name) is None}
        changed[gvar] = func.with_attrs(missing) if missing else func
    return assemble(mod, changed)


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]


def _outputs(func: relax.Function) -> list[Any]:
    body = func.body.body
    bound = {binding.var: binding.value for binding in all_bindings(func)}
    body = bound.get(body) if isinstance(bound.get(body), relax.Tuple) else body
    return list(body.fields) if isinstance(body, relax.Tuple) else [body]


def name_regions(
    mod: tvm.IRModule, mod_name: str, options: CompileOptions, report: OffloadReport
) -> tvm.IRModule:
    """Give each call of a region a function of its own, with its symbol, interface and options.

    The symbol is ``mars_<mod_name>_<index>``, whatever operators the region holds.
    """
    made: dict[Any, relax.Function] = {}
    changed: dict[Any, relax.Function] = {}
    for gvar, func in model_functions(mod):
        inputs = tuple(str(name) for name in func.attrs[INPUT_NAMES])
        outputs = tuple(str(name) for name in func.attrs[OUTPUT_NAMES])
        names = _value_names(func, inputs, outputs)

        def own(binding: Any) -> Iterator[Any]:
            call = binding.value
            callee: Any = mod[call.op] if _calls_global(call) else None
            if not is_region(callee):
                yield binding
                return
            index = len(made)
            tupled = isinstance(callee.ret_ty, relax.TupleType)
            results = range(len(callee.ret_ty.fields)) if tupled else (None,)
            interface = Interface(
                index,
                tuple(names[arg, None] for arg in call.args),  # noqa: B023  called in this turn
                tuple(names[binding.var, i] for i in results),  # noqa: B023
                inputs,  # noqa: B023
                outputs,  # noqa: B023
                report.host_operators,
                report.host_reasons,
            )
            symbol = f"mars_{mod_name}_{index}"
            fresh = tvm.ir.GlobalVar(symbol)
            relax.expr._update_type(fresh, callee.ty)
            made[fresh] = callee.with_attrs(
                {
                    "global_symbol": symbol,
                    OPTIONS: options.to_json(),
                    INTERFACE: interface.to_json(),
                }
            )
            yield relax.VarBinding(binding.var, recall(call, fresh, call.args))

        changed[gvar] = rebuild(func, own)
    return assemble(mod, changed, made)


def _calls_global(value: Any) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


class _Names(dict[Any, str]):
    """Names of values by (variable, tuple field or None); others are numbered as they are met."""

    def __missing__(self, key: Any) -> str:
        self[key] = f"value{len(self)}"
        return self[key]


def _value_names(func: relax.Function, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> _Names:
    """Name a function's values: the model's names, also where a variable only passes one on."""
    names = _Names({(var, None): name for var, name in zip(func.params, inputs, strict=True)})
    for var, name in zip(_outputs(func), outputs, strict=True):
        names.setdefault((var, None), name)
    for binding in reversed(list(all_bindings(func))):
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            names.setdefault((value.tuple_value, value.index), names[binding.var, None])
        elif isinstance(value, relax.Var):
            names.setdefault((value, None), names[binding.var, None])
    return names
