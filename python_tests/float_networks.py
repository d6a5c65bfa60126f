"""Small float networks as exporters write them, and what others make of them by quantization.

Weights are random but scaled as a trained network's are (He et al.), batch normalizations have
statistics that are not 0 and 1, and every convolution in front of one lacks a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["FLOAT_NETWORKS", "float_network", "images", "quantize_static"]

Array = npt.NDArray[Any]
IR_VERSION = 8


@attrs.define
class Float:
    """Nodes and weights of a float network in the making."""

    rng: np.random.Generator
    opset: int
    channels: int = 3
    nodes: list[onnx.NodeProto] = attrs.field(factory=list)
    weights: list[onnx.TensorProto] = attrs.field(factory=list)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator of one result."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weight(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        """Add a constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, *shape: int) -> str:
        """Add weights of variance 2 / inputs."""
        return self.weight(self.rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape))

    def conv(
        self, x: str, given: int, out: int, kernel: int = 3, stride: int = 1, group: int = 1
    ) -> str:
        """Add a convolution without bias and its batch normalization."""
        pad = kernel // 2
        weight = self.normal(out, given // group, kernel, kernel)
        y = self.node(
            "Conv", x, weight, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
            group=group,
        )  # fmt: skip
        draw = self.rng.uniform
        parts = (draw(0.5, 1.5, out), draw(-0.3, 0.3, out), draw(-0.3, 0.3, out), draw(0.5, 2, out))
        return self.node("BatchNormalization", y, *map(self.weight, parts))

    def relu(self, x: str) -> str:
        """Add a ReLU."""
        return self.node("Relu", x)

    def relu6(self, x: str) -> str:
        """Add a clamp to 0..6."""
        return self.node("Clip", x, self.weight(0.0), self.weight(6.0))

    def dense(self, x: str, given: int, out: int) -> str:
        """Add a dense layer, as PyTorch exports it."""
        bias = self.weight(self.rng.normal(0, 0.1, out))
        return self.node("Gemm", x, self.normal(out, given), bias, transB=1)

    def head(self, x: str, given: int) -> str:
        """Add a global average and a dense layer."""
        x = self.node("GlobalAveragePool", x)
        return self.dense(self.node("Flatten", x, axis=1), given, 10)

    def model(self, size: int) -> onnx.ModelProto:
        """Assemble and check; the last node gives the result."""
        self.nodes[-1].output[0] = "scores"
        graph = helper.make_graph(
            self.nodes,
            "float",
            [helper.make_tensor_value_info("image", 1, ["N", self.channels, size, size])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 10])],
            self.weights,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def _plain(f: Float) -> None:
    """VGG's kind: a max pool behind a ReLU, an average pool, two dense layers."""
    x = f.relu(f.conv("image", 3, 16))
    x = f.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = f.relu(f.conv(x, 16, 24))
    x = f.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = f.node("Flatten", x, axis=1)
    f.dense(f.relu(f.dense(x, 24 * 9, 32)), 32, 10)


def _residual(f: Float) -> None:
    """ResNet's kind: an identity and a projection."""
    x = f.relu(f.conv("image", 3, 16))
    x = f.relu(f.node("Add", f.conv(f.relu(f.conv(x, 16, 16)), 16, 16), x))
    y = f.conv(f.relu(f.conv(x, 16, 32, stride=2)), 32, 32)
    x = f.relu(f.node("Add", y, f.conv(x, 16, 32, kernel=1, stride=2)))
    f.head(x, 32)


def _inverted(f: Float) -> None:
    """MobileNetV2's kind: ReLU6, depthwise convolutions, a residual without a ReLU."""
    x = f.relu6(f.conv("image", 3, 8))
    y = f.relu6(f.conv(x, 8, 24, kernel=1))
    y = f.relu6(f.conv(y, 24, 24, group=24))
    x = f.node("Add", x, f.conv(y, 24, 8, kernel=1))
    y = f.relu6(f.conv(x, 8, 24, kernel=1))
    y = f.relu6(f.conv(y, 24, 24, stride=2, group=24))
    f.head(f.relu6(f.conv(y, 24, 16, kernel=1)), 16)


def _dense(f: Float) -> None:
    """An MLP; its last layer is a MatMul and an Add."""
    x = f.node("Flatten", "image", axis=1)
    x = f.relu(f.dense(x, 3 * 144, 40))
    x = f.node("MatMul", x, f.weight(f.rng.normal(0, 0.2, (40, 10))))
    f.node("Add", x, f.weight(f.rng.normal(0, 0.1, 10)))


def _branches(f: Float) -> None:
    """Inception's kind: two branches, concatenated."""
    x = f.relu(f.conv("image", 3, 16))
    branches = f.relu(f.conv(x, 16, 16, kernel=1)), f.relu(f.conv(x, 16, 16))
    f.head(f.relu(f.conv(f.node("Concat", *branches, axis=1), 32, 16)), 16)


FLOAT_NETWORKS: dict[str, Callable[[Float], None]] = {
    "branches": _branches,
    "plain": _plain,
    "residual": _residual,
    "inverted": _inverted,
    "dense": _dense,
}
SIZE = 12


def float_network(kind: str, *, seed: int = 0, opset: int = 17) -> onnx.ModelProto:
    """Build a float network for images ``[N, 3, 12, 12]``."""
    made = Float(np.random.default_rng([0x464C54, seed]), opset)
    FLOAT_NETWORKS[kind](made)
    return made.model(SIZE)


def images(count: int, seed: int) -> Array:
    """Draw images of zero mean, smooth as photographs are."""
    rng = np.random.default_rng([0x494D47, seed])
    coarse = rng.normal(size=(count, 3, SIZE // 3, SIZE // 3)).repeat(3, 2).repeat(3, 3)
    return (0.7 * coarse + 0.3 * rng.normal(size=coarse.shape)).astype(np.float32)


def quantize_static(model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    """Quantize by onnxruntime, as its guide says: preprocess (which folds BN), calibrate, quantize.

    Parameters
    ----------
    **options
        Of ``onnxruntime.quantization.quantize_static``.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Array] = iter([images(16, 100 + i) for i in range(3)])

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch}

    paths = [str(folder / name) for name in ("float.onnx", "folded.onnx", "quantized.onnx")]
    onnx.save(model, paths[0])
    quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
    quantize_static(paths[1], paths[2], Batches(), **options)
    return onnx.load(paths[2])
