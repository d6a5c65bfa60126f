"""The form in which chains are matched: the same function, its quantization easier to see.

One walk over each function:

- every reader of dequantized numbers gets a dequantize of its own, so that no two chains share one;
- max pool, reshape, squeeze, flattening and padding move from dequantized numbers to the codes
  before (a dequantize with one positive scale is monotone and works on each element by itself);
- a quantize of just dequantized codes with the same scale and zero point is those codes (the
  float32 quotient is within half a step of the integer);
- a reshape of numbers moves behind the clip, multiply and quantize that follow it;
- a bias is added as any other constant, requantized at once if it is to be requantized;
- a map of one pixel in another layout is a reshape of it, and so is a reshape of a reshape;
- the result of a dropout is its input.

Nothing here depends on what MARS takes; what it does not take computes the same on the CPU.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import tvm
from tvm import relay

from .nodes import has_control_flow, op_name, operator, post_order, recall, sizes

__all__ = ["normal_form"]

_ELEMENTWISE = ("clip", "maximum", "minimum", "multiply", "quantize", "relu")
_RESHAPES = ("reshape", "squeeze", "expand_dims", "nn.batch_flatten")


def normal_form(mod: tvm.IRModule) -> tvm.IRModule:
    """Bring every function of a module into the normal form, but those with control flow."""
    mod = relay.transform.InferType()(mod)
    changed = tvm.IRModule(mod.functions, mod.type_definitions, attrs=mod.attrs)
    for gvar, func in mod.functions.items():
        if isinstance(func, relay.Function) and not has_control_flow(func.body):
            changed[gvar] = relay.Function(
                func.params, _Walk().run(func.body), func.ret_type, func.type_params, func.attrs
            )
    return relay.transform.InferType()(changed)


@attrs.frozen(eq=False)
class _Numbers:
    """Dequantized codes that nothing reads yet: ``pad`` are the widths of a padding before."""

    codes: Any
    call: Any
    pad: tuple[tuple[int, int], ...] = ()

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and zero point hold for all and order is kept: elements may move."""
        scale, zero = self.call.args[1:]
        constant = isinstance(self.codes, relay.Constant)
        return not constant and _size(scale) == _size(zero) == 1 and scale.data.numpy().item() > 0


@attrs.frozen(eq=False)
class _Reshaped:
    """Numbers in another shape that nothing reads yet."""

    base: Any
    shape: tuple[int, ...]


class _Walk:
    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}

    def run(self, body: Any) -> Any:
        for expr in post_order(body):
            self.values[expr] = self.visit(expr)
        return self.read(body)

    def read(self, expr: Any) -> Any:
        """Give a value as an expression, late numbers with a dequantize for this reader alone."""
        value = self.values[expr]
        if isinstance(value, _Reshaped):
            return relay.reshape(value.base, value.shape)
        if not isinstance(value, _Numbers):
            return value
        codes = value.codes
        if value.pad:
            zero = value.call.args[2].data.numpy().item()
            codes = relay.nn.pad(codes, value.pad, relay.const(zero, _dtype(value.call.args[0])))
        call = value.call
        return relay.Call(call.op, [codes, *call.args[1:]], call.attrs, call.type_args, call.span)

    def visit(self, expr: Any) -> Any:
        if isinstance(expr, relay.Call):
            return self.call(expr)
        if isinstance(expr, relay.Tuple):
            return relay.Tuple([self.read(field) for field in expr.fields], expr.span)
        if not isinstance(expr, relay.TupleGetItem):
            return expr
        if op_name(expr.tuple_value) == "nn.dropout" and expr.index == 0:
            return self.values[expr.tuple_value.args[0]]
        return relay.TupleGetItem(self.read(expr.tuple_value), expr.index)

    def call(self, call: Any) -> Any:
        name = op_name(call)
        if name == "qnn.dequantize":
            return _Numbers(self.read(call.args[0]), call)
        moved = self.on_codes(call, name) or self.before_reshape(call)
        if moved is not None:
            return moved
        reshapes = name in _RESHAPES or (name == "layout_transform" and _is_pixel(call))
        shape = _target(call) if reshapes else None
        if shape is not None:
            source = self.values[call.args[0]]
            base = source.base if isinstance(source, _Reshaped) else self.read(call.args[0])
            return _Reshaped(base, shape)
        args = [self.read(arg) for arg in call.args]
        if name == "qnn.requantize" and isinstance(args[0], relay.Constant):
            return relay.transform.FoldConstantExpr(call, tvm.IRModule(), fold_qnn=True)
        return self.biased(call, args) if name == "nn.bias_add" else recall(call, args)

    # -- the rules --

    def on_codes(self, call: Any, name: str) -> Any | None:
        """Move an operator from dequantized numbers to their codes."""
        source = self.values[call.args[0]] if call.args else None
        if not isinstance(source, _Numbers) or not source.per_tensor:
            return None
        if name == "nn.pad":
            value = call.args[1]
            zero = _size(value) == 1 and value.data.numpy().item() == 0
            if call.attrs.pad_mode != "constant" or not zero or source.pad:
                return None
            widths = tuple((int(a), int(b)) for a, b in call.attrs.pad_width)
            return attrs.evolve(source, pad=widths)
        if source.pad:
            return None
        if name == "qnn.quantize":
            return source.codes if _same_quantization(call, source.call) else None
        if name == "nn.max_pool2d":
            codes = relay.Call(call.op, [source.codes], call.attrs, span=call.span)
            return attrs.evolve(source, codes=codes)
        shape = _target(call) if name in _RESHAPES else None
        if shape is None or sizes(call)[:1] != sizes(call.args[0])[:1]:
            return None
        return attrs.evolve(source, codes=relay.reshape(source.codes, shape))

    def before_reshape(self, call: Any) -> Any | None:
        """Apply an elementwise operator before the reshape that its argument is."""
        if operator(call) not in _ELEMENTWISE:
            return None
        source, others = self.values[call.args[0]], list(call.args[1:])
        if not isinstance(source, _Reshaped) or any(_size(arg) != 1 for arg in others):
            return None
        if operator(call) == "quantize":  # its axis counted in the other shape, and means nothing
            base = relay.qnn.op.quantize(
                source.base, *others, axis=0, out_dtype=call.attrs.out_dtype
            )
        else:
            base = relay.Call(call.op, [source.base, *others], call.attrs, span=call.span)
        return attrs.evolve(source, base=base)

    def biased(self, call: Any, args: list[Any]) -> Any:
        """Give a bias_add as an add."""
        rank = len(sizes(call))
        behind = rank - 1 - int(call.attrs.axis) % rank
        data, bias = args
        if behind:
            bias = relay.reshape(bias, [-1, *[1] * behind])
        return relay.add(data, bias)


def _target(call: Any) -> tuple[int, ...] | None:
    """Give the shape that a reshape makes, -1 for a batch known at run time only."""
    shape = sizes(call)
    if None in shape[1:]:
        return None
    return tuple(-1 if size is None else size for size in shape)


def _is_pixel(call: Any) -> bool:
    """Whether a change of layout moves nothing: all sizes but the batch and one are 1."""
    return sum(size != 1 for size in sizes(call)[1:]) <= 1


def _dtype(expr: Any) -> str:
    return str(expr.checked_type.dtype)


def _size(expr: Any) -> int:
    return int(np.prod(expr.data.shape)) if isinstance(expr, relay.Constant) else -1


def _same_quantization(quantize: Any, dequantize: Any) -> bool:
    """Whether a quantize undoes a dequantize."""
    for ours, theirs in zip(quantize.args[1:], dequantize.args[1:], strict=True):
        if not _size(ours) == _size(theirs) == 1:
            return False
        if ours.data.numpy().item() != theirs.data.numpy().item():
            return False
    dtype = _dtype(quantize)
    return dtype == _dtype(dequantize.args[0]) and dtype in ("int8", "uint8")
