"""Giving chains and regions back to the CPU: their operators in the place of their call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tvm
from tvm import relax, tirx

from .modules import CODEGEN, COMPOSITE, all_bindings, assemble, attribute, model_functions
from .nodes import rebuild, recall

__all__ = ["Judge", "reads_numbers", "release"]

# Says whether a call of a composite or region is given back, seeing the function that it calls
# and the functions that give its arguments, None for one that is no composite's or region's.
Judge = Callable[[relax.Function, "list[relax.Function | None]"], bool]


def reads_numbers(func: relax.Function, sources: list[relax.Function | None]) -> bool:
    """Judge a chain on numbers: inside a region all are codes.

    A quantize goes back if another chain gives its numbers, a reshape of numbers if none does: only
    what leaves a region may be reshaped.
    """
    name = str(attribute(func, COMPOSITE))
    given = any(source is not None and _is_float(source.ret_ty) for source in sources)
    if name == "mars.reshape":
        return _is_float(func.ret_ty) and not given
    return name == "mars.quantize" and given


def _is_float(kind: Any) -> bool:
    return isinstance(kind, relax.TensorType) and str(kind.dtype.dtype).startswith("float")


def release(mod: tvm.IRModule, judge: Judge) -> tvm.IRModule:
    """Put the bodies of functions that a judge gives back in the place of their calls."""
    changed: dict[Any, relax.Function] = {}
    for gvar, func in model_functions(mod):
        inliner = _Inliner(mod, judge)
        new = rebuild(func, inliner.visit)
        if inliner.released:
            changed[gvar] = new
    if not changed:
        return mod
    return relax.transform.CanonicalizeBindings()(assemble(mod, changed))


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
        ours = attribute(func, CODEGEN) is not None or attribute(func, COMPOSITE) is not None
        return func if ours else None

    def inline(
        self, result: Any, func: relax.Function, args: list[Any], composites: Mapping[Any, Any]
    ) -> Iterator[Any]:
        """Give bindings of a function's body, the last one to ``result``."""
        func = _in_terms_of(func, args)
        values = dict(zip(func.params, args, strict=True))
        composites = dict(composites)

        def look(expr: Any) -> Any:
            if isinstance(expr, relax.Tuple):
                return relax.Tuple([look(field) for field in expr.fields])
            return values.get(expr, expr) if isinstance(expr, relax.Var) else expr

        for binding in all_bindings(func):
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


def _in_terms_of(func: relax.Function, args: list[Any]) -> relax.Function:
    """Replace a function's symbolic sizes by those of the arguments that it is called with."""
    sizes: dict[Any, Any] = {}
    for param, arg in zip(func.params, args, strict=True):
        own, given = getattr(param.ty, "shape", None), getattr(arg.ty, "shape", None)
        if own is None or given is None:
            continue
        pairs = zip(own.values, given.values, strict=True)
        sizes.update((a, b) for a, b in pairs if isinstance(a, tirx.Var))
    return func.bind_symbolic_vars(sizes) if sizes else func
