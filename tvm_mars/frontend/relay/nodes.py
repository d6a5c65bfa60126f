"""Relay expressions as trees that chains are matched and parsed on; chains as Relay patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm import relay
from tvm.relay import dataflow_pattern as dfp

from ..matching import Const, Either, Node, Op, Pattern, Value

__all__ = [
    "OPERATORS",
    "has_control_flow",
    "op_name",
    "operator",
    "origin",
    "post_order",
    "recall",
    "requantization",
    "rewrite",
    "sizes",
    "to_dfp",
    "tree",
    "with_origin",
]

_NAMES = {
    "add": "add",
    "cast": "cast",
    "clip": "clip",
    "maximum": "maximum",
    "mean": "mean",
    "minimum": "minimum",
    "multiply": "multiply",
    "nn.avg_pool2d": "avg_pool2d",
    "nn.conv2d": "conv2d",
    "nn.dense": "matmul",
    "nn.global_avg_pool2d": "mean",
    "nn.max_pool2d": "max_pool2d",
    "nn.pad": "pad",
    "nn.relu": "relu",
    "qnn.add": "qnn.add",
    "qnn.conv2d": "qnn.conv2d",
    "qnn.dense": "qnn.dense",
    "qnn.dequantize": "dequantize",
    "qnn.quantize": "quantize",
    "qnn.requantize": "requantize",
    "reshape": "reshape",
    "transpose": "permute_dims",
}
_RELAY_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
_RELAY_NAMES["mean"] = "mean"
OPERATORS = tuple(_RELAY_NAMES)
# What a chain ends in, and what may follow within the chain.
_ENDS = ("qnn.add", "quantize", "requantize")
_LIMITS = ("cast", "clip", "maximum", "minimum", "relu")
_AVERAGES = ("avg_pool2d", "mean")  # of integers that were requantized for it
# How far a chain reaches: no pattern is deeper.
_DEPTH = 16


def op_name(expr: Any) -> str:
    """Give Relay's name of the operator that an expression calls, or nothing."""
    called = isinstance(expr, relay.Call) and isinstance(expr.op, tvm.ir.Op)
    return str(expr.op.name) if called else ""


def operator(expr: Any) -> str | None:
    """Give our name of the operator that an expression calls, if it has one."""
    name = op_name(expr)
    if name == "mean" and expr.attrs.exclude:
        return None
    if name == "nn.pad" and not isinstance(expr.args[1], relay.Constant):
        return None
    if name == "nn.global_avg_pool2d" and expr.attrs.layout != "NCHW":
        return None
    if name == "transpose" and (expr.attrs.axes is None or len(expr.attrs.axes) != 2):
        return None
    return _NAMES.get(name)


def sizes(expr: Any) -> tuple[int | None, ...]:
    """Give a tensor's shape, None for each size that is not known."""
    kind = expr.checked_type
    shape = kind.shape if isinstance(kind, relay.TensorType) else ()
    return tuple(int(size) if isinstance(size, tvm.tir.IntImm) else None for size in shape)


def _padding(attributes: Any) -> tuple[int, ...]:
    """Give top, left, bottom, right of Relay's one, two or four sizes."""
    given = tuple(int(size) for size in attributes.padding)
    return given * (4 // len(given))


def _window(attributes: Any) -> dict[str, Any]:
    return {
        "strides": attributes.strides,
        "padding": _padding(attributes),
        "dilation": attributes.dilation,
    }


def _attributes(op: str, call: Any) -> dict[str, Any]:
    given = call.attrs
    if op in ("avg_pool2d", "max_pool2d"):
        found = {**_window(given), "pool_size": given.pool_size, "layout": given.layout}
        if op == "avg_pool2d":
            found["count_include_pad"] = given.count_include_pad
        return found
    if op in ("conv2d", "qnn.conv2d"):
        keys = ("groups", "data_layout", "kernel_layout")
        return {**_window(given), **{key: getattr(given, key) for key in keys}}
    if op in ("dequantize", "quantize"):
        return {"axis": given.axis}
    if op == "requantize":
        return {"axis": given.axis, **requantization(given.rounding, given.compute_dtype)}
    if op == "qnn.add":
        return requantization()
    if op == "mean":
        axis = (2, 3) if op_name(call) == "nn.global_avg_pool2d" else given.axis
        return {"axis": axis}
    if op == "clip":
        return {"min": given.a_min, "max": given.a_max}
    if op == "pad":
        return {
            "pad_width": [int(size) for pair in given.pad_width for size in pair],
            "pad_value": call.args[1].data.numpy().item(),
            "pad_mode": given.pad_mode,
        }
    return {}


def requantization(rounding: str = "None", compute_dtype: str = "None") -> dict[str, str]:
    """Give how TVM requantizes: as an operator says, or by the configuration that holds now."""
    current = relay.qnn.op.qnn.current_requantize_config()  # empty where nothing was configured
    default = relay.qnn.op.requantize_config()  # by the current target
    given = {"rounding": str(rounding), "compute_dtype": str(compute_dtype)}
    return {
        name: str(getattr(current, name) or getattr(default, name)) if value == "None" else value
        for name, value in given.items()
    }


def tree(
    expr: Any, params: Mapping[Any, int] | None = None, *, depth: int = _DEPTH, root: bool = True
) -> Node:
    """Give an expression as a tree, down to where a chain may begin.

    Parameters
    ----------
    params : mapping of Var to int, optional
        Variables that are operands, and which.
    depth : int
        How many calls deep to look.
    root : bool
        Whether a quantize may be looked through: within a chain it is another one's result, unless
        only limits or an average follow it.
    """
    name = origin(expr)
    if isinstance(expr, relay.Constant):
        value = expr.data.numpy()
        return Node("const", shape=value.shape, dtype=str(value.dtype), value=value, name=name)
    kind = expr.checked_type
    dtype = str(kind.dtype) if isinstance(kind, relay.TensorType) else ""
    op = operator(expr)
    if op is None or depth == 0 or (op in _ENDS and not root):
        index = (params or {}).get(expr, -1)
        name = str(expr.name_hint) if isinstance(expr, relay.Var) else name
        return Node("value", shape=sizes(expr), dtype=dtype, index=index, name=name)
    given = expr.args[:1] if op == "pad" else expr.args
    inner = (root and op in _LIMITS) or op in _AVERAGES
    args = [tree(arg, params, depth=depth - 1, root=inner) for arg in given]
    if op == "matmul":
        args[1] = _transposed(args[1])
    return Node(op, tuple(args), sizes(expr), dtype, _attributes(op, expr), name=name)


def _transposed(node: Node) -> Node:
    """Give the right factor of a product, of the weight that Relay's dense transposes."""
    if node.op == "permute_dims":
        return node.args[0]
    return Node("permute_dims", (node,), node.shape[::-1], node.dtype, name=node.name)


# -- walking and rebuilding ------------------------------------------------------------------------


def _parts(expr: Any) -> list[Any]:
    if isinstance(expr, relay.Call):
        return list(expr.args)
    if isinstance(expr, relay.Tuple):
        return list(expr.fields)
    return [expr.tuple_value] if isinstance(expr, relay.TupleGetItem) else []


def post_order(expr: Any) -> Iterator[Any]:
    """Give an expression's parts, each once and after its own parts; not those of callees."""
    seen: set[Any] = set()
    stack = [(expr, False)]
    while stack:
        part, done = stack.pop()
        if done:
            yield part
        elif part not in seen:
            seen.add(part)
            stack.append((part, True))
            stack += [(inner, False) for inner in reversed(_parts(part))]


def has_control_flow(expr: Any) -> bool:
    """Whether an expression holds something else than calls and tuples."""
    plain = (relay.Call, relay.Constant, relay.Tuple, relay.TupleGetItem, relay.Var)
    return not all(isinstance(part, plain) for part in post_order(expr))


def recall(call: Any, args: Sequence[Any], op: Any = None, span: Any = None) -> Any:
    """Give a call with other arguments, the call itself if nothing is other."""
    same = all(new.same_as(old) for new, old in zip(args, call.args, strict=True))
    if same and op is None and span is None:
        return call
    return relay.Call(op or call.op, list(args), call.attrs, call.type_args, span or call.span)


def rewrite(expr: Any, visit: Callable[[Any, list[Any]], Any]) -> Any:
    """Give an expression with its calls replaced: ``visit`` gets each with its new arguments."""
    done: dict[Any, Any] = {}
    for part in post_order(expr):
        new = [done[inner] for inner in _parts(part)]
        if isinstance(part, relay.Call):
            done[part] = visit(part, new)
        elif isinstance(part, relay.Tuple):
            done[part] = relay.Tuple(new, part.span)
        elif isinstance(part, relay.TupleGetItem):
            done[part] = relay.TupleGetItem(new[0], part.index)
        else:
            done[part] = part
    return done[expr]


def origin(expr: Any) -> str:
    """Give the name that an importer or :func:`with_origin` stored in an expression, or nothing."""
    source = getattr(getattr(expr, "span", None), "source_name", None)
    # The ONNX importer writes the output's name before the node's.
    return str(source.name).rpartition("@@")[2] if source is not None else ""


def with_origin(call: Any, args: Sequence[Any], name: str) -> Any:
    """Let a call remember a name."""
    return recall(call, args, span=tvm.ir.Span(tvm.ir.SourceName(name), 0, 0, 0, 0))


# -- patterns --------------------------------------------------------------------------------------


def to_dfp(pattern: Pattern) -> dfp.DFPattern:
    """Translate a pattern; parts that it holds twice stay one part."""
    done: dict[int, dfp.DFPattern] = {}

    def translate(part: Pattern) -> dfp.DFPattern:
        if id(part) not in done:
            done[id(part)] = _TRANSLATE[type(part)](part, translate)
        return done[id(part)]

    return translate(pattern)


Translate = Callable[[Pattern], dfp.DFPattern]


def _op(part: Op, translate: Translate) -> dfp.DFPattern:
    arguments = [translate(arg) for arg in part.args]
    if part.op == "pad":
        arguments.append(dfp.is_constant())  # the value
    found = dfp.is_op(_RELAY_NAMES[part.op])(*arguments)
    if part.op == "mean":
        return found | dfp.is_op("nn.global_avg_pool2d")(*arguments)
    return found


def _either(part: Either, translate: Translate) -> dfp.DFPattern:
    first, *others = (translate(option) for option in part.options)
    for other in others:
        first = first | other
    return first


_TRANSLATE: Mapping[type, Callable[[Any, Translate], dfp.DFPattern]] = {
    Const: lambda part, translate: dfp.is_constant(),
    Either: _either,
    Op: _op,
    Value: lambda part, translate: dfp.wildcard(),
}
