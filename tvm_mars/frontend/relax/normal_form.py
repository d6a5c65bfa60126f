"""The form in which chains are matched: the same function, its quantization easier to see.

One walk over each dataflow block:

- every operator of a chain gets a dequantize of its own, so that no two chains share one;
- max pool, reshape, squeeze and padding move from dequantized numbers to the codes before (a
  dequantize with one positive scale is monotone and works on each element by itself);
- a quantize of just dequantized codes with the same scale and zero point is those codes (the
  float32 quotient is within half a step of the integer);
- a reshape of numbers moves behind the clip, multiply and quantize that follow it;
- the TensorIR functions that the ONNX importer makes of Clip and Pad become operators again;
- the result of a dropout is its input.

Nothing here depends on what MARS takes; what it does not take computes the same on the CPU.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import tvm
from tvm import relax, tirx

from .nodes import is_constant, operator, rebuild, sizes, with_origin

__all__ = ["normal_form"]

_ELEMENTWISE = ("clip", "maximum", "minimum", "multiply", "quantize", "relu")
_CHAIN = (*_ELEMENTWISE, "add", "avg_pool2d", "conv2d", "matmul", "mean", "permute_dims")
_RESHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")


def normal_form(mod: tvm.IRModule) -> tvm.IRModule:
    """Bring every Relax function of a module into the normal form."""
    mod = relax.transform.ConvertToDataflow()(mod)
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
            mod[gvar] = rebuild(func, _Walk(mod).visit)
    mod = relax.transform.CanonicalizeBindings()(mod)
    return relax.transform.DeadCodeElimination()(mod)


def _is_first(value: Any) -> bool:
    return isinstance(value, relax.TupleGetItem) and value.index == 0


@attrs.frozen(eq=False)
class _Numbers:
    """Dequantized codes that no binding holds yet: ``pad`` are the widths of a padding before."""

    codes: Any
    call: Any
    pad: tuple[int, ...] = ()

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and zero point hold for all and order is kept: elements may move."""
        scale = self.call.args[1]
        return not is_constant(self.codes) and _size(scale) == 1 and _numpy(scale).item() > 0


@attrs.frozen(eq=False)
class _Reshaped:
    """Numbers in another shape that no binding holds yet."""

    base: Any
    call: Any


class _Walk:
    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod = mod
        self.builder = relax.BlockBuilder(mod)
        self.late: dict[Any, _Numbers | _Reshaped] = {}
        self.scalars: dict[Any, Any] = {}
        self.same: dict[Any, Any] = {}
        self.dropouts: dict[Any, Any] = {}
        self.bindings: list[Any] = []

    def visit(self, binding: Any) -> list[Any]:
        """Give the bindings that take a binding's place, now or because it is read now."""
        self.bindings = []
        value = binding.value
        if _is_first(value) and value.tuple_value in self.dropouts:
            self.pass_on(binding.var, self.dropouts[value.tuple_value])
        elif isinstance(binding, relax.VarBinding) and isinstance(value, relax.Call):
            self.call(binding.var, value)
        else:
            self.keep(binding)
        return [with_origin(entry) for entry in self.bindings]

    # -- emitting --

    def emit(self, name: str, call: Any) -> Any:
        call = self.builder.normalize(call)
        var = relax.DataflowVar(name, call.ty)
        self.bindings.append(relax.VarBinding(var, call))
        return var

    def bind(self, var: Any, value: Any) -> None:
        self.bindings.append(relax.VarBinding(var, self.builder.normalize(value)))

    def keep(self, binding: Any) -> None:
        """Keep a binding as it is; what it reads must be bound by now."""
        used: list[Any] = []
        relax.analysis.post_order_visit(binding.value, used.append)
        for var in used:
            self.settle(var)
        self.bindings.append(binding)

    def settle(self, var: Any) -> None:
        """Bind a late value to its own variable."""
        if not isinstance(var, relax.Var) or var not in self.late:
            return
        value = self.late.pop(var)
        self.bind(var, self.expression(var.name, value))
        if isinstance(value, _Numbers):
            self.same[var] = value  # chains may still have a dequantize of their own

    def expression(self, name: str, value: _Numbers | _Reshaped) -> Any:
        if isinstance(value, _Reshaped):
            return relax.op.reshape(value.base, value.call.ty.shape)
        codes = value.codes
        if value.pad:
            zero = int(_numpy(value.call.args[2]).reshape(-1)[0])
            codes = self.emit(name, relax.op.nn.pad(codes, list(value.pad), pad_value=zero))
        attributes = value.call.attrs
        return relax.op.dequantize(
            codes,
            value.call.args[1],
            value.call.args[2],
            axis=attributes.axis,
            out_dtype=attributes.out_dtype,
        )

    def own(self, arg: Any) -> Any:
        """Give a chain's argument: late numbers get a binding for this reader alone."""
        value = self.late_numbers(arg)
        if value is not None:
            return self.emit(arg.name, self.expression(arg.name, value))
        self.settle(arg)
        return self.scalars.get(arg, arg)

    def late_numbers(self, arg: Any) -> _Numbers | None:
        if not isinstance(arg, relax.Var):
            return None
        value = self.late.get(arg, self.same.get(arg))
        return value if isinstance(value, _Numbers) else None

    def later(self, var: Any, value: _Numbers | _Reshaped) -> None:
        self.late[var] = value
        if not isinstance(var, relax.DataflowVar):  # read outside the block
            self.settle(var)

    def pass_on(self, var: Any, source: Any) -> None:
        """Let a variable be another."""
        value = self.late.get(source, self.same.get(source))
        if value is not None:
            self.later(var, value)
        else:
            self.bind(var, source)

    # -- the rules --

    def call(self, var: Any, call: Any) -> None:
        call = self.operator_again(call)
        if operator(call) == "dequantize":
            self.settle(call.args[0])
            self.later(var, _Numbers(call.args[0], call))
            return
        name = call.op.name if isinstance(call.op, tvm.ir.Op) else ""
        if name == "relax.nn.dropout":
            self.dropouts[var] = call.args[0]
        if self.folded(var, call, name) or self.on_codes(var, call, name):
            return
        if name in _RESHAPES and None not in sizes(call)[1:]:
            self.settle(call.args[0])
            self.later(var, _Reshaped(call.args[0], call))
        elif operator(call) not in _CHAIN:
            self.keep(relax.VarBinding(var, call))
        elif not self.before_reshape(var, call):
            args = [self.own(arg) for arg in call.args]
            self.bind(var, relax.Call(call.op, args, call.attrs, call.ty_args))

    def folded(self, var: Any, call: Any, name: str) -> bool:
        """Fold what guards a clip's constant bound against NaN."""
        args = [self.scalars.get(arg, arg) for arg in call.args]
        if name == "relax.isnan" and is_constant(args[0]) and _size(args[0]) == 1:
            self.scalars[var] = relax.const(np.isnan(_numpy(args[0])))
        elif name == "relax.where" and all(is_constant(a) and _size(a) == 1 for a in args):
            self.scalars[var] = args[1] if _numpy(args[0]).item() else args[2]
        else:
            return False
        self.bind(var, self.scalars[var])
        return True

    def on_codes(self, var: Any, call: Any, name: str) -> bool:
        """Move an operator from dequantized numbers to their codes."""
        source = self.late_numbers(call.args[0]) if call.args else None
        if source is None or not source.per_tensor:
            return False
        hint = var.name
        if name == "relax.nn.pad":
            if call.attrs.pad_mode != "constant" or call.attrs.pad_value != 0 or source.pad:
                return False
            self.later(var, attrs.evolve(source, pad=tuple(call.attrs.pad_width)))
        elif name == "relax.quantize":
            if not _same_quantization(call, source.call):
                return False
            self.bind(var, self.expression(hint, source).args[0])
        elif source.pad:
            return False
        elif name == "relax.nn.max_pool2d":
            codes = self.emit(hint, relax.Call(call.op, [source.codes], call.attrs, []))
            self.later(var, attrs.evolve(source, codes=codes))
        elif name in _RESHAPES and sizes(call)[:1] == sizes(source.codes)[:1]:
            codes = self.emit(hint, relax.op.reshape(source.codes, call.ty.shape))
            self.later(var, attrs.evolve(source, codes=codes))
        else:
            return False
        return True

    def before_reshape(self, var: Any, call: Any) -> bool:
        """Apply an elementwise operator before the reshape that its argument is."""
        source, *others = call.args
        if operator(call) not in _ELEMENTWISE:
            return False
        others = [self.scalars.get(arg, arg) for arg in others]
        value = self.late.get(source)
        if not isinstance(value, _Reshaped):
            return False
        if any(is_constant(arg) and _size(arg) != 1 for arg in others):
            return False
        if any(isinstance(arg, relax.Var) for arg in others):
            return False
        attributes = call.attrs
        if operator(call) == "quantize":  # its axis counted in the other shape, and means nothing
            attributes = relax.op.quantize(
                value.base, *others, axis=0, out_dtype=attributes.out_dtype
            ).attrs
        base = self.emit(var.name, relax.Call(call.op, [value.base, *others], attributes, []))
        reshaped = _Reshaped(base, call)
        if operator(call) == "quantize":
            self.bind(var, self.expression(var.name, reshaped))
        else:
            self.later(var, reshaped)
        return True

    # -- TensorIR that was an operator --

    def operator_again(self, call: Any) -> Any:
        if not isinstance(call.op, tvm.ir.Op) or call.op.name != "relax.call_tir":
            return call
        func, given = self.mod[call.args[0]], call.args[1]
        store = _only_store(func)
        if store is None or not isinstance(given, relax.Tuple):
            return call
        args = list(given.fields)
        found = _read_bound(store) or _read_pad(store)
        if found is None:
            return call
        if isinstance(found, _Bound):
            other = relax.const(found.value, "float32") if len(args) == 1 else args[1]
            other = self.scalars.get(other, other)
            if not is_constant(other):
                return call
            op = relax.op.maximum if found.op == "maximum" else relax.op.minimum
            return self.builder.normalize(op(args[0], other))
        pad = self._pad_again(call, found, args)
        return call if pad is None else pad

    def _pad_again(self, call: Any, found: _Pad, args: list[Any]) -> Any | None:
        inner, outer = sizes(args[0]), sizes(call)
        widths: list[int] = []
        for size, whole, before in zip(inner, outer, found.before, strict=True):
            if size is None or whole is None:
                if before or size is not whole:
                    return None
                widths += [0, 0]
            else:
                widths += [before, whole - size - before]
        if len(args) != 1 or min(widths) < 0:
            return None
        pad = relax.op.nn.pad(args[0], widths, pad_value=found.value)
        return self.builder.normalize(pad)


@attrs.frozen
class _Bound:
    """``maximum`` or ``minimum`` with a scalar: the second argument, or ``value``."""

    op: str
    value: float


@attrs.frozen
class _Pad:
    """A constant padding: widths before each axis, and the value."""

    before: tuple[int, ...]
    value: float


def _only_store(func: Any) -> Any | None:
    """Give the one store of a function that is one loop nest around it."""
    node = func.body if isinstance(func, tirx.PrimFunc) else None
    while node is not None and not isinstance(node, tirx.BufferStore):
        inner = "block" if hasattr(node, "block") else "body"
        node = getattr(node, inner, None)
    return node


def _read_bound(store: Any) -> _Bound | None:
    value = store.value
    if not isinstance(value, (tirx.Max, tirx.Min)) or not isinstance(value.a, tvm.ir.TensorLoad):
        return None
    loaded = [a.same_as(b) for a, b in zip(value.a.indices, store.indices, strict=True)]
    if not all(loaded):
        return None
    op = "maximum" if isinstance(value, tirx.Max) else "minimum"
    if isinstance(value.b, tirx.FloatImm):
        return _Bound(op, float(value.b.value))
    scalar = isinstance(value.b, tvm.ir.TensorLoad) and len(value.b.indices) == 0
    return _Bound(op, 0.0) if scalar else None


def _read_pad(store: Any) -> _Pad | None:
    value = store.value
    if not isinstance(value, tvm.ir.Call) or value.op.name != "prim.if_then_else":
        return None
    _, inside, outside = value.args
    constant = isinstance(outside, (tirx.FloatImm, tirx.IntImm))
    if not constant or not isinstance(inside, tvm.ir.TensorLoad):
        return None
    before = []
    for index, loaded in zip(store.indices, inside.indices, strict=True):
        shifted = isinstance(loaded, tirx.Sub) and isinstance(loaded.b, tirx.IntImm)
        if not (loaded.a if shifted else loaded).same_as(index):
            return None
        before.append(int(loaded.b) if shifted else 0)
    return _Pad(tuple(before), float(outside.value))


def _numpy(constant: Any) -> Any:
    return np.from_dlpack(constant.value)


def _size(constant: Any) -> int:
    return int(np.prod(constant.value.shape)) if is_constant(constant) else -1


def _same_quantization(quantize: Any, dequantize: Any) -> bool:
    """Whether a quantize undoes a dequantize."""
    for ours, theirs in zip(quantize.args[1:], dequantize.args[1:], strict=True):
        if not (is_constant(ours) and is_constant(theirs)):
            return False
        a, b = _numpy(ours).reshape(-1), _numpy(theirs).reshape(-1)
        if a.dtype != b.dtype or a.size != 1 or not np.array_equal(a, b):
            return False
    return bool(a.dtype.itemsize == 1)  # float32 does not hold every wider code
