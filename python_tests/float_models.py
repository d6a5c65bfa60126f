"""Float ONNX models with batch norms, as they are before quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from python_tests.onnx_models import ModelWriter

__all__ = [
    "FloatWriter",
    "digits_classifier",
    "float_image_model",
    "float_network_model",
    "run_onnx",
]

Array = npt.NDArray[Any]


class FloatWriter(ModelWriter):
    """Convolutions and batch norms with random numbers."""

    def conv(
        self, x: str, given: int, channels: int, kernel: int = 3, stride: int = 1, group: int = 1
    ) -> str:
        """Add a convolution without bias."""
        values = self.rng.normal(0, 1, (channels, given // group, kernel, kernel))
        weight = self.constant(values * np.sqrt(2 / (given // group * kernel**2)))
        pad = kernel // 2
        return self.node("Conv", x, weight, strides=[stride] * 2, pads=[pad] * 4, group=group)

    def norm(self, x: str, mean: npt.ArrayLike, variance: npt.ArrayLike) -> str:
        """Add a batch norm of given statistics, gamma and beta at random."""
        channels = np.size(mean)
        gamma, beta = self.rng.uniform(0.5, 1.5, channels), self.rng.normal(0, 0.3, channels)
        names = [self.constant(value) for value in (gamma, beta, mean, variance)]
        return self.node("BatchNormalization", x, *names)

    def some_norm(self, x: str, channels: int) -> str:
        """Add a batch norm of random statistics."""
        mean, variance = self.rng.normal(0, 0.1, channels), self.rng.uniform(0.2, 0.6, channels)
        return self.norm(x, mean, variance)

    def dense(self, x: str, weight: Array, bias: Array) -> str:
        """Add a dense layer, weights ``[O, I]``."""
        return self.node("Gemm", x, self.constant(weight), self.constant(bias), transB=1)


def run_onnx(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    """Run a model in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, inputs))


def float_network_model(seed: int = 0, batch: int | str = 4) -> onnx.ModelProto:
    """Build a network with everything that quantization takes.

    Batch norms, an identity and a projection shortcut, a depthwise convolution, ReLU6, all pools.
    """
    writer = FloatWriter(np.random.default_rng([0x666C74, seed]))
    stem = writer.node("Relu", writer.some_norm(writer.conv("image", 3, 16), 16))
    inner = writer.node("Relu", writer.some_norm(writer.conv(stem, 16, 16), 16))
    outer = writer.some_norm(writer.conv(inner, 16, 16), 16)
    first = writer.node("Relu", writer.node("Add", outer, stem))
    inner = writer.node("Relu", writer.some_norm(writer.conv(first, 16, 24, stride=2), 24))
    outer = writer.some_norm(writer.conv(inner, 24, 24), 24)
    short = writer.some_norm(writer.conv(first, 16, 24, 1, 2), 24)
    second = writer.node("Relu", writer.node("Add", outer, short))
    pooled = writer.node("MaxPool", second, kernel_shape=[2, 2], strides=[2, 2])
    bounds = writer.constant(0), writer.constant(6)
    deep = writer.some_norm(writer.conv(pooled, 24, 24, group=24), 24)
    deep = writer.node("Clip", deep, *bounds)
    plain = writer.node("Relu", writer.conv(deep, 24, 32, 1))
    average = writer.node("AveragePool", plain, kernel_shape=[2, 2], strides=[1, 1])
    flat = writer.node("Flatten", writer.node("GlobalAveragePool", average), axis=1)
    writer.dense(flat, writer.rng.normal(0, 0.3, (10, 32)), writer.rng.normal(0, 0.3, 10))
    writer.name_last("scores")
    return writer.model({"image": [batch, 3, 12, 12]}, {"scores": [batch, 10]})


def float_image_model() -> onnx.ModelProto:
    """Build a small network for images ``[N, 1, 16, 16]``."""
    writer = FloatWriter(np.random.default_rng(0))
    x = writer.node("Relu", writer.some_norm(writer.conv("image", 1, 16), 16))
    x = writer.node("Flatten", writer.node("GlobalAveragePool", x), axis=1)
    writer.dense(x, writer.rng.normal(0, 0.3, (10, 16)), np.zeros(10))
    writer.name_last("scores")
    return writer.model({"image": ["N", 1, 16, 16]}, {"scores": ["N", 10]})


def digits_classifier(images: Array, labels: Array, batch: int) -> onnx.ModelProto:
    """Build a network for ``[N, 1, 16, 16]`` digits: random filters, a classifier that is fitted.

    The batch norms hold the statistics of the images.
    """
    from sklearn.linear_model import RidgeClassifier

    writer = FloatWriter(np.random.default_rng(0))

    def given(name: str, shape: list[Any]) -> Array:
        """Run what there is so far."""
        part = writer.model({"image": ["N", 1, 16, 16]}, {name: shape})
        return run_onnx(part, {"image": images})[0]

    x = "image"
    for before, channels, stride in ((1, 32, 1), (32, 48, 2), (48, 64, 2)):
        x = writer.conv(x, before, channels, 3, stride)
        y = given(x, ["N", channels, None, None])
        x = writer.node("Relu", writer.norm(x, y.mean((0, 2, 3)), y.var((0, 2, 3))))
    x = writer.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = writer.node("Flatten", x, axis=1)
    fitted = RidgeClassifier(alpha=10.0).fit(given(x, ["N", 256]), labels)
    writer.dense(x, fitted.coef_, fitted.intercept_)
    writer.name_last("scores")
    return writer.model({"image": [batch, 1, 16, 16]}, {"scores": [batch, 10]})
