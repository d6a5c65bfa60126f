"""ONNX models as other tools write them: Q/DQ with any scale, and operators that MARS lacks.

What :mod:`tvm_mars.onnx_export` never emits, and importers must take all the same: scales that are
no powers of two, one per channel, zero points, int8 activations, ReLU and Clip, residual additions
that are quantized on their own, Gemm or MatMul, Q/DQ pairs around max pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["ModelWriter", "float_model", "imported_model", "model_inputs"]

Array = npt.NDArray[Any]
OPSET, IR_VERSION = 17, 8


@attrs.define
class ModelWriter:
    """Nodes and constants of a model in the making; tensors are named by a counter."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = attrs.field(factory=list)
    constants: list[onnx.TensorProto] = attrs.field(factory=list)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one result."""
        result = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [result], name=result, **attributes))
        return result

    def name_last(self, name: str) -> None:
        """Name the result of the last node."""
        self.nodes[-1].output[0] = name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Add a constant."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def requantize(self, x: str, low: float, high: float, dtype: str = "uint8") -> str:
        """Quantize a float tensor that lies in ``low .. high``, and dequantize it."""
        info = np.iinfo(dtype)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / (info.max - info.min), 1e-6)
        zero = int(np.clip(round(info.min - low / scale), info.min, info.max))
        names = self.constant(scale), self.constant(zero, dtype)
        codes = self.node("QuantizeLinear", x, *names)
        return self.node("DequantizeLinear", codes, *names)

    def weight(self, values: Array, per_channel: bool, axis: int = 0) -> str:
        """Dequantize int8 weight codes of given real values."""
        others = tuple(i for i in range(values.ndim) if i != axis)
        largest = np.abs(values).max(axis=others if per_channel else None)
        scale = np.maximum(largest, 1e-6) / 127
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        codes = np.rint(values / (scale.reshape(shape) if per_channel else scale))
        inputs = [
            self.constant(codes, np.int8),
            self.constant(scale),
            self.constant(np.zeros_like(scale), np.int8),
        ]
        if per_channel:
            return self.node("DequantizeLinear", *inputs, axis=axis)
        return self.node("DequantizeLinear", *inputs)

    def bias(self, values: Array, grid: float) -> str:
        """Dequantize an int32 bias."""
        codes = self.constant(np.rint(values / grid), np.int32)
        return self.node("DequantizeLinear", codes, self.constant(grid))

    def model(
        self, inputs: dict[str, Sequence[int | str]], outputs: dict[str, Sequence[int | str]]
    ) -> onnx.ModelProto:
        """Assemble and check."""
        graph = helper.make_graph(
            self.nodes,
            "imported",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model


def imported_model(
    seed: int, *, batch: int | str = "N", per_channel: bool | None = None, dtype: str | None = None
) -> onnx.ModelProto:
    """Build a small residual network that was quantized elsewhere.

    Parameters
    ----------
    batch : int or str
        Batch dimension.
    per_channel : bool, optional
        Whether weights have a scale per output channel (drawn if None).
    dtype : str, optional
        ``uint8`` or ``int8`` activations (drawn if None).
    """
    rng = np.random.default_rng([0x514451, seed])
    draws = rng.integers(0, 2, 3)
    per_channel = bool(draws[0]) if per_channel is None else per_channel
    dtype = ("uint8", "int8")[draws[1]] if dtype is None else dtype
    asymmetric = bool(draws[2])
    channels = int(rng.choice([8, 16, 24]))
    size = int(rng.choice([6, 8, 9]))
    writer = ModelWriter(rng)

    def quantized(x: str, relu: bool, spread: float = 3.0) -> str:
        if relu:
            x = writer.node("Relu", x)
        low = 0.0 if relu and not asymmetric else -spread * float(rng.uniform(0.5, 1))
        return writer.requantize(x, low, spread * float(rng.uniform(0.8, 1.2)), dtype)

    def conv(x: str, given: int, out: int, kernel: int, stride: int = 1, group: int = 1) -> str:
        values = rng.normal(0, 1, (out, given // group, kernel, kernel))
        values /= np.sqrt(given // group * kernel**2)
        weight = writer.weight(values, per_channel)
        bias = writer.bias(rng.normal(0, 0.3, out), 1e-4)
        pad = kernel // 2
        return writer.node(
            "Conv", x, weight, bias, strides=[stride] * 2, pads=[pad] * 4, group=group
        )

    x = writer.requantize("image", -1.0, 1.0, dtype)
    stem = quantized(conv(x, 3, channels, 3), relu=True)
    inner = quantized(conv(stem, channels, channels, 3), relu=True)
    outer = quantized(conv(inner, channels, channels, 3), relu=False)
    summed = quantized(writer.node("Add", outer, stem), relu=True)
    pooled = writer.node("MaxPool", summed, kernel_shape=[2, 2], strides=[2, 2])
    deep = quantized(conv(pooled, channels, channels, 3, group=channels), relu=True)
    deep = quantized(conv(deep, channels, 2 * channels, 1), relu=True)
    average = quantized(writer.node("GlobalAveragePool", deep), relu=False, spread=1.5)
    flat = writer.node("Flatten", average, axis=1)
    weight = writer.weight(rng.normal(0, 0.2, (10, 2 * channels)), per_channel)
    bias = writer.bias(rng.normal(0, 0.3, 10), 1e-4)
    writer.node("Gemm", flat, weight, bias, transB=1)
    writer.name_last("logits")
    return writer.model({"image": [batch, 3, size, size]}, {"logits": [batch, 10]})


def float_model(seed: int = 0, batch: int | str = "N") -> onnx.ModelProto:
    """Build a network without any quantization: nothing of it is for MARS."""
    rng = np.random.default_rng(seed)
    writer = ModelWriter(rng)
    weight = writer.constant(rng.normal(0, 0.3, (8, 3, 3, 3)))
    x = writer.node("Conv", "image", weight, pads=[1] * 4)
    writer.node("Sigmoid", x)
    writer.name_last("result")
    return writer.model({"image": [batch, 3, 8, 8]}, {"result": [batch, 8, 8, 8]})


def model_inputs(model: onnx.ModelProto, seed: int, images: int = 2) -> dict[str, Array]:
    """Draw a batch for every input of a model."""
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.uniform(
            -1.2, 1.2, [images, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])]
        ).astype(np.float32)
        for value in model.graph.input
    }
