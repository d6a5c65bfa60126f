"""Regions: reading what is offloaded together, and how it is connected to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import tvm
from tvm import relay

from mars_runtime.errors import UnsupportedError

from ...options import CompileOptions
from ..interface import Interface
from ..lower import Call, Region
from ..matching import Node
from ..patterns import CANDIDATES, parse
from ..report import OffloadReport
from .nodes import operator, origin, post_order, requantization, sizes, tree

__all__ = [
    "COMPILER",
    "COMPOSITE",
    "INTERFACE",
    "OPTIONS",
    "OUTPUT_NAMES",
    "attribute",
    "called",
    "name_regions",
    "ports",
    "read_region",
    "regions",
    "results",
]

COMPILER = "Compiler"
COMPOSITE = "Composite"
INTERFACE = "mars.interface"
OPTIONS = "mars.options"
OUTPUT_NAMES = "mars.output_names"
# How TVM requantized, where an operator does not say, when the region was made.
REQUANTIZATION = "mars.requantization"


def attribute(holder: Any, name: str) -> Any:
    """Give an attribute of a function or module, None if it has none."""
    return holder.attrs[name] if holder.attrs and name in holder.attrs else None


def regions(mod: tvm.IRModule) -> dict[Any, relay.Function]:
    """Give a module's functions for MARS."""
    return {
        gvar: func
        for gvar, func in mod.functions.items()
        if isinstance(func, relay.Function) and str(attribute(func, COMPILER)) == "mars"
    }


def called(mod: tvm.IRModule, call: Any) -> relay.Function | None:
    """Give the composite or region of ours that an expression calls, if it does."""
    if not isinstance(call, relay.Call):
        return None
    func = call.op
    if isinstance(func, tvm.ir.GlobalVar):
        return regions(mod).get(func)
    composite = str(attribute(func, COMPOSITE)) if isinstance(func, relay.Function) else ""
    return func if composite.startswith("mars.") else None


def results(func: relay.Function) -> list[Any]:
    """Give the expressions that a function's results are."""
    return list(func.body.fields) if isinstance(func.body, relay.Tuple) else [func.body]


def read_region(func: relay.Function) -> Region:
    """Read a region's function, whose types are inferred.

    Raises
    ------
    UnsupportedError
        If it holds a chain that MARS does not take, or its inputs have no known shape.
    """
    stored = attribute(func, REQUANTIZATION)
    config = nullcontext()
    if stored is not None:
        config = relay.qnn.op.requantize_config(**json.loads(str(stored)))
    with config:
        return _read(func)


def _read(func: relay.Function) -> Region:
    names: dict[Any, str] = {var: str(var.name_hint) for var in func.params}
    params = {names[var]: _entry(var) for var in func.params}
    calls: list[Call] = []
    for part in post_order(func.body):
        if not isinstance(part, relay.Call):
            continue
        spec, operands = _parse_composite(part.op)
        hint = origin(part.op.body) or "value"
        names[part] = hint if hint not in names.values() else f"{hint}#{len(names)}"
        arguments = tuple(names[part.args[node.index]] for node in operands)
        operators = [inner for inner in post_order(part.op.body) if operator(inner) in CANDIDATES]
        calls.append(Call(spec, arguments, names[part], tuple(map(origin, operators))))
    return Region(params, calls, [names[result] for result in results(func)])


def _entry(var: Any) -> tuple[str, tuple[int, ...]]:
    shape = sizes(var)[1:]
    if None in shape:
        raise UnsupportedError(f"shape {sizes(var)} is not known", where=str(var.name_hint))
    return str(var.checked_type.dtype), tuple(int(size) for size in shape if size is not None)


def _parse_composite(func: relay.Function) -> tuple[Any, tuple[Node, ...]]:
    params = {var: i for i, var in enumerate(func.params)}
    return parse(str(attribute(func, COMPOSITE)), tree(func.body, params))


def ports(main: relay.Function) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the names of a model's inputs and outputs."""
    outputs = attribute(main, OUTPUT_NAMES)
    count = len(results(main))
    if outputs is None:
        outputs = ["output"] if count == 1 else [f"output{i}" for i in range(count)]
    return tuple(str(var.name_hint) for var in main.params), tuple(str(name) for name in outputs)


def name_regions(mod: tvm.IRModule, options: CompileOptions, report: OffloadReport) -> tvm.IRModule:
    """Give each region its interface and options."""
    main = mod["main"]
    inputs, outputs = ports(main)
    names = _Names({(var, None): name for var, name in zip(main.params, inputs, strict=True)})
    for result, name in zip(results(main), outputs, strict=True):
        names.setdefault(_key(result), name)
    made = {}
    for index, (call, func) in enumerate(_calls(mod)):
        count = len(results(func))
        fields = range(count) if isinstance(func.body, relay.Tuple) else (None,)
        interface = Interface(
            index,
            tuple(names[_key(arg)] for arg in call.args),
            tuple(names[call, i] for i in fields),
            inputs,
            outputs,
            report.host_operators,
            report.host_reasons,
        )
        func = func.with_attr(INTERFACE, interface.to_json())
        func = func.with_attr(REQUANTIZATION, json.dumps(requantization()))
        made[call.op] = func.with_attr(OPTIONS, options.to_json())
    for gvar, func in made.items():
        mod.update_func(gvar, func)
    return mod


def _calls(mod: tvm.IRModule) -> Iterator[tuple[Any, relay.Function]]:
    for part in post_order(mod["main"].body):
        func = called(mod, part)
        if func is not None:
            yield part, func


def _key(expr: Any) -> tuple[Any, int | None]:
    if isinstance(expr, relay.TupleGetItem):
        return expr.tuple_value, int(expr.index)
    return expr, None


class _Names(dict[Any, str]):
    """Names of values by (expression, tuple field or None); others are numbered as they are met."""

    def __missing__(self, key: Any) -> str:
        self[key] = f"value{len(self)}"
        return self[key]
