"""Relax expressions as trees that chains are matched and parsed on; chains as Relax patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import dpl

from ..matching import Const, Either, Node, Op, Pattern, Value

__all__ = [
    "OPERATORS",
    "is_constant",
    "operator",
    "origin",
    "rebuild",
    "recall",
    "sizes",
    "to_dpl",
    "tree",
    "with_origin",
]

_NAMES = {
    "relax.add": "add",
    "relax.clip": "clip",
    "relax.dequantize": "dequantize",
    "relax.matmul": "matmul",
    "relax.maximum": "maximum",
    "relax.mean": "mean",
    "relax.minimum": "minimum",
    "relax.multiply": "multiply",
    "relax.nn.avg_pool2d": "avg_pool2d",
    "relax.nn.conv2d": "conv2d",
    "relax.nn.max_pool2d": "max_pool2d",
    "relax.nn.pad": "pad",
    "relax.nn.relu": "relu",
    "relax.permute_dims": "permute_dims",
    "relax.quantize": "quantize",
    "relax.reshape": "reshape",
}
_RELAX_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
OPERATORS = tuple(_RELAX_NAMES)

_POOL = ("strides", "padding", "dilation", "pool_size", "count_include_pad", "layout")
_ATTRS = {
    "avg_pool2d": _POOL,
    "conv2d": ("strides", "padding", "dilation", "groups", "data_layout", "kernel_layout"),
    "dequantize": ("axis",),
    "max_pool2d": _POOL,
    "mean": ("axis", "keepdims"),
    "pad": ("pad_width", "pad_value", "pad_mode"),
    "quantize": ("axis",),
}
# Arguments that no pattern mentions: the shape of a reshape, the bounds of a clip.
_EXTRA_ARGUMENTS = ("clip", "reshape")


def is_constant(expr: Any) -> bool:
    """Whether an expression is a constant tensor."""
    return isinstance(expr, tvm.ir.GenericConst)


def operator(expr: Any) -> str | None:
    """Give our name of the operator that an expression calls, if it has one."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return _NAMES.get(expr.op.name)
    return None


def sizes(expr: Any) -> tuple[int | None, ...]:
    """Give a tensor's shape, None for each size that is not known."""
    kind = expr.ty
    if not isinstance(kind, relax.TensorType) or not isinstance(kind.shape, relax.ShapeExpr):
        return (None,) * max(getattr(kind, "ndim", 0), 0)
    return tuple(
        int(size) if isinstance(size, tvm.tirx.IntImm) else None for size in kind.shape.values
    )


def tree(
    expr: Any,
    bindings: Mapping[Any, Any],
    params: Mapping[Any, int] | None = None,
    *,
    name: str = "",
    depth: int = 64,
) -> Node:
    """Give an expression as a tree, looking through the variables in ``bindings``.

    Parameters
    ----------
    params : mapping of Var to int, optional
        Variables that are operands, and which.
    depth : int
        How many calls deep to look.
    """
    while isinstance(expr, relax.Var) and expr in bindings:
        name = expr.name
        expr = bindings[expr]
    name = origin(expr) or name
    if is_constant(expr):
        value = np.from_dlpack(expr.value)
        return Node("const", shape=value.shape, dtype=str(value.dtype), value=value, name=name)
    shape, dtype = sizes(expr), _dtype(expr)
    op = operator(expr)
    if op is None or depth == 0:
        index = (params or {}).get(expr, -1)
        name = expr.name if isinstance(expr, relax.Var) else name
        return Node("value", shape=shape, dtype=dtype, index=index, name=name)
    args = tuple(
        tree(arg, bindings, params, depth=depth - 1)
        for arg in expr.args
        if isinstance(arg, (relax.Var, relax.Call, tvm.ir.GenericConst))
    )
    attrs = {key: getattr(expr.attrs, key) for key in _ATTRS.get(op, ())}
    if op == "clip":
        attrs = {"min": expr.args[1].value, "max": expr.args[2].value}
    return Node(op, args, shape, dtype, attrs, name=name)


def _dtype(expr: Any) -> str:
    kind = expr.ty
    return str(kind.dtype.dtype) if isinstance(kind, relax.TensorType) else ""


def rebuild(func: relax.Function, visit: Callable[[Any], Iterable[Any]]) -> relax.Function:
    """Give a function with other bindings: ``visit`` gives those that replace a binding.

    Only dataflow blocks are visited: nowhere else does TVM look for chains.
    """
    blocks = []
    for block in func.body.blocks:
        if isinstance(block, relax.DataflowBlock):
            block = relax.DataflowBlock([n for binding in block.bindings for n in visit(binding)])
        blocks.append(block)
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def recall(call: relax.Call, op: Any, args: Sequence[Any], span: Any = None) -> relax.Call:
    """Give a call of the same type to another function or with other arguments."""
    new = relax.Call(op, list(args), call.attrs, call.ty_args, span or call.span)
    relax.expr._update_type(new, call.ty)
    return new


def with_origin(binding: Any) -> Any:
    """Let a call remember the variable that it is bound to now; passes rename variables."""
    call = binding.value
    if not isinstance(call, relax.Call):
        return binding
    span = tvm.ir.Span(tvm.ir.SourceName(binding.var.name), 0, 0, 0, 0)
    return relax.VarBinding(binding.var, recall(call, call.op, call.args, span))


def origin(call: Any) -> str:
    """Give the name that :func:`with_origin` stored, or nothing."""
    span = call.span if isinstance(call, relax.Call) else None
    return str(span.source_name.name) if span is not None else ""


def to_dpl(pattern: Pattern) -> dpl.DFPattern:
    """Translate a pattern; parts that it holds twice stay one part."""
    done: dict[int, dpl.DFPattern] = {}

    def translate(part: Pattern) -> dpl.DFPattern:
        if id(part) not in done:
            done[id(part)] = _TRANSLATE[type(part)](part, translate)
        return done[id(part)]

    return translate(pattern)


Translate = Callable[[Pattern], dpl.DFPattern]


def _op(part: Op, translate: Translate) -> dpl.DFPattern:
    arguments = [translate(arg) for arg in part.args]
    extra = part.op in _EXTRA_ARGUMENTS
    return dpl.is_op(_RELAX_NAMES[part.op])(*arguments, varg_default_wildcard=extra)


def _either(part: Either, translate: Translate) -> dpl.DFPattern:
    first, *others = (translate(option) for option in part.options)
    for other in others:
        first = dpl.OrPattern(first, other)
    return first


_TRANSLATE: Mapping[type, Callable[[Any, Translate], dpl.DFPattern]] = {
    Const: lambda part, translate: dpl.is_const(),
    Either: _either,
    Op: _op,
    Value: lambda part, translate: dpl.wildcard(),
}
