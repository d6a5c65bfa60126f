"""ONNX models in the form that importers and chains take, whoever quantized them.

What tools write between a quantizer and an operator, and a chain does not hold, is rewritten
without changing what is computed (a folded normalization: but for the rounding of float32):

- a QuantizeLinear or Clip of constants, as Brevitas puts before weights, is its result;
- 4-bit constants become 8-bit ones, which TVM's importers read;
- a Clip of just quantized codes becomes one of the numbers before: quantizing is monotone;
- equal quantizers of one tensor become one;
- a quantizer behind a max pool of numbers, and what is monotone between them, goes before it;
- a BatchNormalization behind a quantized convolution or Gemm goes into the scales of its weights,
  one for each channel, and its bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["plain_form"]

Array: TypeAlias = npt.NDArray[Any]

_WIDER = {"INT4": np.int8, "UINT4": np.uint8}


def plain_form(model: Any) -> Any:
    """Rewrite an ``onnx.ModelProto``; the given one stays as it is."""
    import onnx

    form = _Form(model.graph)
    form.run()
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    plain.graph.node.extend(form.made.values())
    plain.graph.initializer.extend(form.added)
    _drop_unread(plain.graph, {entry.name for entry in model.graph.initializer})
    return plain


def _drop_unread(graph: Any, constants: set[str]) -> None:
    """Drop constants that nothing reads any more: importers would read them all the same."""
    read = {name for node in graph.node for name in node.input}
    read |= {entry.name for entry in graph.output}
    for entries in (graph.initializer, graph.input):
        for i in reversed(range(len(entries))):
            if entries[i].name in constants and entries[i].name not in read:
                del entries[i]


class _Form:
    """A graph while it is rewritten: ``made`` holds the nodes so far, in order, by first result."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.made: dict[str, Any] = {}
        self.added: list[Any] = []
        self.constants = {entry.name: entry for entry in graph.initializer}
        self.renamed: dict[str, str] = {}
        self.quantized: dict[tuple[Any, ...], str] = {}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.outputs = {entry.name for entry in graph.output}

    def run(self) -> None:
        """Go through the graph's nodes."""
        for given in self.graph.node:
            node = type(given)()
            node.CopyFrom(given)
            for i, name in enumerate(node.input):
                node.input[i] = self.renamed.get(name, name)
            if node.op_type == "Constant":
                self.constants.update(_constant(node))
            if not _RULES.get(node.op_type, _keep)(self, node):
                self.emit(node)

    # -- reading --

    def value(self, node: Any, index: int) -> Array | None:
        """Give a constant argument."""
        from onnx import numpy_helper

        entry = self.entry(node, index)
        return None if entry is None else np.asarray(numpy_helper.to_array(entry))

    def entry(self, node: Any, index: int) -> Any | None:
        """Give a constant argument as it is stored."""
        return self.constants.get(node.input[index]) if len(node.input) > index else None

    def wider(self, node: Any, index: int) -> npt.DTypeLike | None:
        """Give the 8-bit type for a constant argument of 4 bits."""
        entry = self.entry(node, index)
        return None if entry is None else _WIDER.get(entry.DataType.Name(entry.data_type))

    def source(self, node: Any, *kinds: str) -> Any | None:
        """Give the operator of some kinds whose one result nothing else reads."""
        name = node.input[0]
        made = self.made.get(name)
        if made is None or made.op_type not in kinds or len(made.output) > 1:
            return None
        return None if self.readers[name] > 1 or name in self.outputs else made

    # -- writing --

    def emit(self, node: Any) -> None:
        self.made[node.output[0]] = node

    def node(self, kind: str, inputs: list[str], output: str, given: Any) -> None:
        """Emit an operator with the name and attributes of a given one."""
        node = type(given)(op_type=kind, name=given.name, input=inputs, output=[output])
        node.attribute.extend(given.attribute)
        self.emit(node)

    def constant(self, value: Array, name: str) -> str:
        """Add a constant."""
        from onnx import numpy_helper

        entry = numpy_helper.from_array(value, name)
        self.constants[name] = entry
        self.added.append(entry)
        return name

    def before(self, earlier: Any, later: Any) -> None:
        """Let the later of two operators come first."""
        gone = earlier.output[0]
        del self.made[gone]
        self.quantized = {key: name for key, name in self.quantized.items() if name != gone}
        between = f"{later.output[0]}.before"
        self.readers[between] = 1
        self.node(later.op_type, [earlier.input[0], *later.input[1:]], between, later)
        self.node(earlier.op_type, [between, *earlier.input[1:]], later.output[0], earlier)


def _keep(_form: _Form, _node: Any) -> bool:
    return False


def _constant(node: Any) -> Mapping[str, Any]:
    return {name: e.t for name in node.output for e in node.attribute if e.name == "value"}


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


# -- rules: they emit what takes the node's place and say so ---------------------------------------


def _quantize(form: _Form, node: Any) -> bool:
    name = node.output[0]
    x, scale, zero = (form.value(node, i) for i in range(3))
    if scale is None or zero is None or scale.size != 1 or form.wider(node, 2):
        return _pool_last(form, node)
    if x is not None and name not in form.outputs:
        limits = np.iinfo(zero.dtype)
        steps = np.rint(x / scale) + zero.astype(np.float32)
        form.constant(np.clip(steps, limits.min, limits.max).astype(zero.dtype), name)
        return True
    key = (node.input[0], str(zero.dtype), scale.item(), zero.item())
    if key in form.quantized and name not in form.outputs:
        form.renamed[name] = form.quantized[key]
        form.readers[form.quantized[key]] += form.readers[name]
        return True
    form.quantized[key] = name
    return _pool_last(form, node)


def _clip(form: _Form, node: Any) -> bool:
    low, high = (form.value(node, i) for i in (1, 2))
    x = form.value(node, 0)
    if low is None or high is None:
        return _pool_last(form, node)
    if x is not None and x.dtype.kind in "iu" and node.output[0] not in form.outputs:
        form.constant(np.clip(x, low, high), node.output[0])
        return True
    quantizer = form.source(node, "QuantizeLinear")
    if quantizer is None:
        return _pool_last(form, node)
    scale, zero = form.value(quantizer, 1), form.value(quantizer, 2)
    if scale is None or zero is None or scale.size != 1:
        return False
    # Numbers within these bounds are those whose codes are within the given ones.
    bounds = [(b.astype(np.int64) - zero.astype(np.int64)) * scale for b in (low, high)]
    for i, bound in enumerate(bounds):
        name = f"{node.output[0]}.bound{i}"
        node.input[1 + i] = form.constant(bound.astype(np.float32).reshape(()), name)
    form.before(quantizer, node)
    return True


def _pool_last(form: _Form, node: Any) -> bool:
    pool = form.source(node, "MaxPool")
    numbers = form.made.get(pool.input[0]) if pool is not None else None
    if pool is None or (numbers is not None and numbers.op_type == "DequantizeLinear"):
        return False  # codes are pooled as they are
    form.before(pool, node)
    return True


def _dequantize(form: _Form, node: Any) -> bool:
    wider, codes = form.wider(node, 0), form.value(node, 0)
    if wider is None or codes is None or _attribute(node, "block_size", 0):
        return False
    name = node.output[0]
    node.input[0] = form.constant(codes.astype(wider), f"{name}.codes")
    zero = form.value(node, 2)
    if zero is not None:
        node.input[2] = form.constant(zero.astype(wider), f"{name}.zero_point")
    return False


def _normalization(form: _Form, node: Any) -> bool:
    product = form.source(node, "Conv", "Gemm")
    values = [form.value(node, i) for i in range(1, 5)]
    if product is None or any(value is None for value in values):
        return False
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight = form.made.get(product.input[1])
    bias = _numbers(form, product, len(gamma))
    plain = product.op_type == "Conv" or all(
        entry.f == 1 for entry in product.attribute if entry.name in ("alpha", "beta")
    )
    if weight is None or bias is None or not plain or _attribute(node, "training_mode", 0):
        return False
    axis = 1 if product.op_type == "Gemm" and not _attribute(product, "transB", 0) else 0
    name = node.output[0]
    scaled = _scaled(form, weight, factor, axis, name)
    if scaled is None:
        return False
    moved = form.constant((bias * factor + beta - mean * factor).astype(np.float32), f"{name}.bias")
    del form.made[product.output[0]]
    form.node(product.op_type, [product.input[0], scaled, moved], name, product)
    return True


def _numbers(form: _Form, product: Any, channels: int) -> Array | None:
    """Give an operator's bias, if it is known."""
    if len(product.input) < 3 or not product.input[2]:
        return np.zeros(channels)
    value = form.value(product, 2)
    if value is not None:
        return value.astype(np.float64)
    made = form.made.get(product.input[2])
    if made is None or made.op_type != "DequantizeLinear":
        return None
    codes, scale, zero = (form.value(made, i) for i in range(3))
    if codes is None or scale is None:
        return None
    steps = codes.astype(np.float64) - (0 if zero is None else zero)
    return np.asarray(steps * scale)


def _scaled(form: _Form, weight: Any, factor: Array, axis: int, name: str) -> str | None:
    """Emit dequantized weights times a factor for each output channel; a sign goes into codes."""
    codes, scale, zero = (form.value(weight, i) for i in range(3))
    if weight.op_type != "DequantizeLinear" or codes is None or scale is None:
        return None
    per_channel = scale.size > 1
    if per_channel and _attribute(weight, "axis", 1) % codes.ndim != axis:
        return None
    scales = (scale.astype(np.float64).reshape(-1) * factor).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    zeros = np.zeros((), codes.dtype) if zero is None else zero
    steps = codes.astype(np.int64) - zeros.astype(np.int64).reshape(shape if zeros.size > 1 else ())
    zeros = np.broadcast_to(zeros.reshape(-1), scales.shape)
    signed = steps * np.sign(scales).astype(np.int64).reshape(shape)
    signed = signed + zeros.astype(np.int64).reshape(shape)
    if not np.array_equal(signed.astype(codes.dtype), signed):
        return None
    # A channel that the normalization makes constant keeps a scale, which must not be zero.
    scales = np.where(scales == 0, np.float32(1), np.abs(scales))
    inputs = [
        form.constant(signed.astype(codes.dtype), f"{name}.codes"),
        form.constant(scales, f"{name}.scale"),
        form.constant(np.ascontiguousarray(zeros), f"{name}.zero_point"),
    ]
    output = f"{name}.weight"
    node = type(weight)(op_type="DequantizeLinear", name=output, input=inputs, output=[output])
    entry = node.attribute.add()
    entry.name, entry.type, entry.i = "axis", entry.INT, axis
    form.emit(node)
    return output


_RULES: Mapping[str, Callable[[_Form, Any], bool]] = {
    "BatchNormalization": _normalization,
    "Clip": _clip,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Relu": _pool_last,
}
