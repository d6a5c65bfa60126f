"""Quantized TFLite files, written with the schema's own builders: no TensorFlow is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import flatbuffers
import numpy as np
import numpy.typing as npt
import tflite

__all__ = ["Tensor", "TfliteWriter"]

_TYPES = {"int8": "INT8", "uint8": "UINT8", "int32": "INT32"}


@attrs.frozen(eq=False)
class Tensor:
    """A tensor of the file: where it stands in its lists, and how its codes stand for numbers."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    scale: npt.NDArray[np.float32] | None
    zero: int
    value: npt.NDArray[Any] | None


@attrs.frozen(eq=False)
class _Operator:
    code: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    options: str
    fields: dict[str, Any]


@attrs.define
class TfliteWriter:
    """Operators and tensors of a model in the making; maps are NHWC."""

    tensors: list[Tensor] = attrs.field(factory=list)
    operators: list[_Operator] = attrs.field(factory=list)

    def tensor(
        self, shape: Sequence[int], dtype: str, *, scale: float | None = None, zero: int = 0
    ) -> Tensor:
        """Add what an operator computes, or the input."""
        return self._add(shape, dtype, scale, zero, None)

    def constant(self, value: npt.NDArray[Any], scale: npt.ArrayLike | None = None) -> Tensor:
        """Add a constant, with one scale or one per output channel."""
        return self._add(value.shape, str(value.dtype), scale, 0, value)

    def _add(self, shape: Sequence[int], dtype: str, scale: Any, zero: int, value: Any) -> Tensor:
        scales = None if scale is None else np.atleast_1d(np.asarray(scale, np.float32))
        made = Tensor(len(self.tensors), tuple(shape), dtype, scales, zero, value)
        self.tensors.append(made)
        return made

    def _operator(
        self, code: str, inputs: Sequence[Tensor], output: Tensor, options: str, **fields: Any
    ) -> Tensor:
        self.operators.append(_Operator(code, tuple(inputs), output, options, fields))
        return output

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor, output: Tensor, activation: str = "NONE"
    ) -> Tensor:
        """Add a CONV_2D with padding SAME; weights are OHWI."""
        return self._operator(
            "CONV_2D", (x, weight, bias), output, "Conv2DOptions", **_conv(activation)
        )

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, output: Tensor, activation: str = "NONE"
    ) -> Tensor:
        """Add a DEPTHWISE_CONV_2D with padding SAME; weights are 1HWO."""
        return self._operator(
            "DEPTHWISE_CONV_2D",
            (x, weight, bias),
            output,
            "DepthwiseConv2DOptions",
            DepthMultiplier=1,
            **_conv(activation),
        )

    def add(self, left: Tensor, right: Tensor, output: Tensor, activation: str = "NONE") -> Tensor:
        """Add an ADD."""
        fused = getattr(tflite.ActivationFunctionType, activation)
        return self._operator(
            "ADD", (left, right), output, "AddOptions", FusedActivationFunction=fused
        )

    def max_pool(self, x: Tensor, window: tuple[int, int], output: Tensor) -> Tensor:
        """Add a MAX_POOL_2D of windows side by side."""
        return self._operator("MAX_POOL_2D", (x,), output, "Pool2DOptions", **_pool(window))

    def average_pool(self, x: Tensor, window: tuple[int, int], output: Tensor) -> Tensor:
        """Add an AVERAGE_POOL_2D of windows side by side."""
        return self._operator("AVERAGE_POOL_2D", (x,), output, "Pool2DOptions", **_pool(window))

    def reshape(self, x: Tensor, shape: Sequence[int], output: Tensor) -> Tensor:
        """Add a RESHAPE."""
        target = self.constant(np.asarray(shape, np.int32))
        return self._operator("RESHAPE", (x, target), output, "ReshapeOptions")

    def fully_connected(self, x: Tensor, weight: Tensor, bias: Tensor, output: Tensor) -> Tensor:
        """Add a FULLY_CONNECTED."""
        return self._operator("FULLY_CONNECTED", (x, weight, bias), output, "FullyConnectedOptions")

    def model(self, source: Tensor) -> Any:
        """Assemble the file and read it back; ``source`` is its input, named ``input``."""
        builder = flatbuffers.Builder(1024)
        codes = list(dict.fromkeys(operator.code for operator in self.operators))
        buffers = [self._buffer(builder, None)]
        tensors = []
        for tensor in self.tensors:
            if tensor.value is not None:
                buffers.append(self._buffer(builder, tensor.value))
            number = len(buffers) - 1 if tensor.value is not None else 0
            name = "input" if tensor is source else f"tensor{tensor.index}"
            tensors.append(_tensor(builder, tensor, number, name))
        operators = [_built(builder, one, codes) for one in self.operators]
        graph = _table(
            builder,
            "SubGraph",
            Tensors=_offsets(builder, tensors),
            Inputs=builder.CreateNumpyVector(np.asarray([source.index], np.int32)),
            Outputs=builder.CreateNumpyVector(
                np.asarray([self.operators[-1].output.index], np.int32)
            ),
            Operators=_offsets(builder, operators),
        )
        kinds = [
            _table(
                builder,
                "OperatorCode",
                DeprecatedBuiltinCode=getattr(tflite.BuiltinOperator, code),
                BuiltinCode=getattr(tflite.BuiltinOperator, code),
                Version=1,
            )
            for code in codes
        ]
        root = _table(
            builder,
            "Model",
            Version=3,
            OperatorCodes=_offsets(builder, kinds),
            Subgraphs=_offsets(builder, [graph]),
            Buffers=_offsets(builder, buffers),
        )
        builder.Finish(root, b"TFL3")
        return tflite.Model.GetRootAsModel(bytes(builder.Output()), 0)

    def _buffer(self, builder: Any, value: Any) -> int:
        if value is None:
            return _table(builder, "Buffer")
        data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        return _table(builder, "Buffer", Data=builder.CreateNumpyVector(data))


def _conv(activation: str) -> dict[str, Any]:
    return {
        "Padding": tflite.Padding.SAME,
        "StrideW": 1,
        "StrideH": 1,
        "DilationWFactor": 1,
        "DilationHFactor": 1,
        "FusedActivationFunction": getattr(tflite.ActivationFunctionType, activation),
    }


def _pool(window: tuple[int, int]) -> dict[str, Any]:
    height, width = window
    return {
        "Padding": tflite.Padding.VALID,
        "StrideW": width,
        "StrideH": height,
        "FilterWidth": width,
        "FilterHeight": height,
    }


def _table(builder: Any, kind: str, **fields: Any) -> int:
    """Write a table of the schema; strings, vectors and tables in it are written already."""
    getattr(tflite, f"{kind}Start")(builder)
    for name, value in fields.items():
        add: Callable[[Any, Any], None] = getattr(tflite, f"{kind}Add{name}")
        add(builder, value)
    return int(getattr(tflite, f"{kind}End")(builder))


def _offsets(builder: Any, tables: Sequence[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


def _tensor(builder: Any, tensor: Tensor, buffer: int, name: str) -> int:
    fields: dict[str, Any] = {}
    if tensor.scale is not None:
        zeros = np.full(tensor.scale.shape, tensor.zero, np.int64)
        fields["Quantization"] = _table(
            builder,
            "QuantizationParameters",
            Scale=builder.CreateNumpyVector(tensor.scale),
            ZeroPoint=builder.CreateNumpyVector(zeros),
        )
    return _table(
        builder,
        "Tensor",
        Shape=builder.CreateNumpyVector(np.asarray(tensor.shape, np.int32)),
        Type=getattr(tflite.TensorType, _TYPES[tensor.dtype]),
        Buffer=buffer,
        Name=builder.CreateString(name),
        **fields,
    )


def _built(builder: Any, operator: _Operator, codes: Sequence[str]) -> int:
    inputs = np.asarray([tensor.index for tensor in operator.inputs], np.int32)
    return _table(
        builder,
        "Operator",
        OpcodeIndex=codes.index(operator.code),
        Inputs=builder.CreateNumpyVector(inputs),
        Outputs=builder.CreateNumpyVector(np.asarray([operator.output.index], np.int32)),
        BuiltinOptionsType=getattr(tflite.BuiltinOptions, operator.options),
        BuiltinOptions=_table(builder, operator.options, **operator.fields),
    )
