"""Reading and rebuilding modules: what the passes over Relax modules share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tvm
from tvm import relax

__all__ = [
    "CODEGEN",
    "COMPOSITE",
    "all_bindings",
    "assemble",
    "attribute",
    "called",
    "model_functions",
]

CODEGEN = "Codegen"
COMPOSITE = "Composite"


def attribute(func: Any, name: str) -> Any:
    """Give an attribute of a function, None if it has none."""
    return func.attrs[name] if func.attrs and name in func.attrs else None


def model_functions(mod: tvm.IRModule) -> list[tuple[Any, relax.Function]]:
    """Give the functions that are the model's own, in the order of their names."""
    found = [
        (gvar, func)
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function)
        and isinstance(func.body, relax.SeqExpr)
        and attribute(func, CODEGEN) is None
        and attribute(func, COMPOSITE) is None
    ]
    return sorted(found, key=lambda item: str(item[0].name_hint))


def all_bindings(func: relax.Function) -> Iterator[Any]:
    """Give the bindings of a function in order."""
    for block in func.body.blocks:
        yield from block.bindings


def called(func: Any) -> list[Any]:
    """Give the global functions that a function calls by name."""
    if not isinstance(func, relax.Function) or not isinstance(func.body, relax.SeqExpr):
        return []
    calls = (binding.value for binding in all_bindings(func))
    return [
        call.op
        for call in calls
        if isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.GlobalVar)
    ]


def assemble(
    mod: tvm.IRModule, changed: Mapping[Any, Any], made: Mapping[Any, Any] | None = None
) -> tvm.IRModule:
    """Give a module with some functions changed, others made, and without those left uncalled.

    Only composites and regions are dropped: nothing but a call needs them.
    """
    known = {**dict(mod.functions_items()), **changed, **(made or {})}
    kept = {
        gvar: func
        for gvar, func in known.items()
        if attribute(func, CODEGEN) is None and attribute(func, COMPOSITE) is None
    }
    waiting: list[Iterable[Any]] = [called(func) for func in kept.values()]
    while waiting:
        for gvar in waiting.pop():
            if gvar not in kept:
                kept[gvar] = known[gvar]
                waiting.append(called(known[gvar]))
    return tvm.IRModule(kept, attrs=mod.attrs, global_infos=mod.global_infos)
