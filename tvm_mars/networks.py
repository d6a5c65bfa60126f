"""Synthetic native networks of well-known shapes, with random weights at given densities.

They are what a machine can be measured on without training: the layers, group-sets and code
widths of the real thing, and codes that stay spread over their range through the whole depth. For
that, each layer's weights and bias are drawn to give its accumulators a known mean and deviation,
from a sample of the distribution of its input that travels along while the network is built.

Sources: VGG16 and ResNet-18 as in Sie et al., TCAD 2022 (Tables I, II and IV); the 32x32 forms are
those that are common for CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.quantize import Dequantize, Quantize

from . import paper
from .graph import (
    Conv,
    ConvTerm,
    Graph,
    Input,
    Layer,
    MapType,
    Output,
    Pool,
    Requant,
    Residual,
    window_size,
)

__all__ = [
    "TABLE_IV",
    "Density",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet50",
    "vgg16",
]

#: Share of non-zero group-sets by input and output channels: VGG16 on CIFAR-10 (Table IV).
TABLE_IV: Mapping[tuple[int, int], float] = {
    (row.inputs, row.outputs): row.density for row in paper.TABLE_IV
}

#: Share of non-zero group-sets: of every layer, or by input and output channels (others full).
Density: TypeAlias = float | Mapping[tuple[int, int], float]

Array: TypeAlias = npt.NDArray[Any]

BLOCK = 16  # channels of a kernel block and of a weight-group
SAMPLES = 4096
# Accumulators in units of one: clamped to 0..1, about a sixth becomes 0 and a thirtieth saturates.
MEAN, DEVIATION = 0.35, 0.35


def vgg16(
    density: Density = TABLE_IV,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 10,
    seed: int = 0,
) -> Graph:
    """Build the VGG16 for 32x32 images: 13 convolutions, 5 max pools, one dense layer.

    Parameters
    ----------
    density : float or mapping
        Share of group-sets that are not zero; the stem and the classifier are full.
    weight_bits, activation_bits : int
        4 or 8.
    """
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.input(3, 32, 32)
    for stage, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        for i in range(count):
            value = net.conv(value, channels, full=stage == i == 0)
        value = net.max_pool(value, 2, 2)
    return net.classify(value, classes)


def resnet18(
    density: Density = 0.1,
    *,
    size: int = 32,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 10,
    seed: int = 0,
) -> Graph:
    """Build ResNet-18: at 224 pixels with the 7x7 stem and its max pool, below with a 3x3 stem.

    Parameters
    ----------
    density : float or mapping
        Share of group-sets that are not zero; the stem and the classifier are full.
    size : int
        Height and width of the image.
    """
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.input(3, size, size)
    if size >= 128:
        value = net.conv(value, 64, kernel=7, stride=2, full=True)
        value = net.max_pool(value, 3, 2, 1)
    else:
        value = net.conv(value, 64, full=True)
    value = net.stages(value, [(64, 2), (128, 2), (256, 2), (512, 2)])
    return net.classify(net.global_pool(value), classes)


def resnet20(
    density: Density = 0.3,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 10,
    seed: int = 0,
) -> Graph:
    """Build ResNet-20 for 32x32 images (projections where the map shrinks)."""
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.conv(net.input(3, 32, 32), 16, full=True)
    value = net.stages(value, [(16, 3), (32, 3), (64, 3)])
    return net.classify(net.global_pool(value), classes)


def resnet50(
    density: Density = 0.1,
    *,
    size: int = 224,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 1000,
    seed: int = 0,
) -> Graph:
    """Build ResNet-50: bottlenecks of 1x1, 3x3 (which has the stride) and 1x1 convolutions.

    Parameters
    ----------
    density : float or mapping
        Share of group-sets that are not zero; the stem and the classifier are full.
    size : int
        Height and width of the image.
    """
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.conv(net.input(3, size, size), 64, kernel=7, stride=2, full=True)
    value = net.max_pool(value, 3, 2, 1)
    for stage, (channels, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for i in range(blocks):
            start = value
            value = net.conv(start, channels, kernel=1)
            value = net.conv(value, channels, stride=2 if stage and not i else 1)
            value = net.conv(
                value,
                4 * channels,
                kernel=1,
                residual=start if i else None,
                shortcut=None if i else start,
            )
    return net.classify(net.global_pool(value), classes)


def mobilenet_v1(
    density: Density = 0.3,
    *,
    size: int = 32,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 10,
    seed: int = 0,
) -> Graph:
    """Build MobileNet v1: depthwise 3x3 and pointwise convolutions; ``density`` is the latter's.

    Below 128 pixels the stem and the first reductions keep the size, as is usual for CIFAR.
    """
    large = size >= 128
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.conv(net.input(3, size, size), 32, stride=2 if large else 1, full=True)
    strides = [1, 2 if large else 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    widths = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for channels, stride in zip(widths, strides, strict=True):
        value = net.conv(value, net.shape(value)[0], stride=stride, depthwise=True)
        value = net.conv(value, channels, kernel=1)
    return net.classify(net.global_pool(value), classes)


def mobilenet_v2(
    density: Density = 0.3,
    *,
    size: int = 32,
    weight_bits: int = 8,
    activation_bits: int = 8,
    classes: int = 10,
    seed: int = 0,
) -> Graph:
    """Build MobileNet v2: inverted residuals; ``density`` is that of their pointwise convolutions.

    Where the original's bottlenecks are linear, these requantize to unsigned codes, as every map of
    MARS does. Below 128 pixels the stem and the first reduction keep the size.
    """
    large = size >= 128
    net = _Network(density, weight_bits, activation_bits, seed)
    value = net.conv(net.input(3, size, size), 32, stride=2 if large else 1, full=True)
    stages = [
        (1, 16, 1, 1),
        (6, 24, 2, 2 if large else 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for expansion, channels, blocks, stride in stages:
        for i in range(blocks):
            start, given = value, net.shape(value)[0]
            if expansion > 1:
                value = net.conv(value, expansion * given, kernel=1)
            inner = net.shape(value)[0]
            value = net.conv(value, inner, stride=1 if i else stride, depthwise=True)
            value = net.conv(value, channels, kernel=1, residual=start if i else None)
    value = net.conv(value, 1280, kernel=1)
    return net.classify(net.global_pool(value), classes)


@attrs.define
class _Network:
    """A graph in the making; ``spread`` holds a sample of each value's distribution, in 0..1."""

    density: Density
    weight_bits: int
    activation_bits: int
    seed: int
    rng: np.random.Generator = attrs.field(init=False)
    inputs: list[Input] = attrs.field(factory=list)
    layers: list[Layer] = attrs.field(factory=list)
    shapes: dict[str, tuple[int, int, int]] = attrs.field(factory=dict)
    spread: dict[str, Array] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    @property
    def grid(self) -> int:
        """Exponent of the accumulators' grid (eq. 5 to 8)."""
        return self.activation_bits + self.weight_bits - 1

    def shape(self, value: str) -> tuple[int, int, int]:
        """Give channels, height and width of a value."""
        return self.shapes[value]

    def _add(self, layer: Layer, shape: tuple[int, int, int], spread: Array) -> str:
        self.layers.append(layer)
        self.shapes[layer.name] = shape
        self.spread[layer.name] = spread
        return layer.name

    def input(self, channels: int, height: int, width: int) -> str:
        """Add the image."""
        top = 2**self.activation_bits - 1
        kind = MapType(channels, height, width, self.activation_bits)
        quantize = Quantize(high=top, factor=float(top), clip=(0.0, 1.0))
        self.inputs.append(Input("x0", kind, kind.shape, quantize))
        self.shapes["x0"] = kind.shape
        self.spread["x0"] = self.rng.random(SAMPLES)
        return "x0"

    def conv(
        self,
        source: str,
        channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        full: bool = False,
        depthwise: bool = False,
        residual: str | None = None,
        shortcut: str | None = None,
    ) -> str:
        """Add a convolution that keeps the map's size (over the stride), and eq. 5.

        ``residual`` is added as it is; ``shortcut`` through a 1x1 convolution without ReLU, of the
        stride that brings it to the same size.
        """
        height = window_size(self.shape(source)[1], kernel, stride, kernel // 2, kernel // 2)
        deviation = DEVIATION
        if residual:
            deviation = math.sqrt(max(DEVIATION**2 - self.spread[residual].var(), 0.04))
        if shortcut:
            deviation /= math.sqrt(2)
        terms = [self._term(source, channels, kernel, stride, deviation, full, depthwise)]
        if shortcut:
            ratio = self.shape(shortcut)[1] // height
            terms.append(self._term(shortcut, channels, 1, ratio, deviation, full, False))
        mean = MEAN - (float(self.spread[residual].mean()) if residual else 0.0)
        requant = Requant.eq5(self.activation_bits, self.grid)
        added = Residual(residual, self.grid - self.activation_bits) if residual else None
        name = f"conv{len(self.layers)}"
        layer = Conv(name, terms, self._bias(terms, mean), requant, added)
        spread = np.clip(self.rng.normal(MEAN, DEVIATION, SAMPLES), 0, 1)
        return self._add(layer, (channels, height, height), spread)

    def _term(
        self,
        source: str,
        channels: int,
        kernel: int,
        stride: int,
        deviation: float,
        full: bool,
        depthwise: bool,
    ) -> ConvTerm:
        given = self.shape(source)[0]
        taps, limit = kernel**2, 2 ** (self.weight_bits - 1)
        scale = limit * deviation / float(self.spread[source].std())
        if depthwise:
            shape = (channels, 1, kernel, kernel)
            weight = _codes(self.rng, shape, scale / math.sqrt(taps), limit)
        else:
            keep = _placed(
                self.rng, given, channels, taps, 1.0 if full else self._share(given, channels)
            )
            inputs = max(1, min(BLOCK * keep.sum() / len(keep), given * taps))
            weight = _scatter(self.rng, keep, scale / math.sqrt(inputs), limit)
            weight = weight[:channels, :given].reshape(channels, given, kernel, kernel)
        pad = kernel // 2
        return ConvTerm(
            source,
            weight,
            self.weight_bits,
            (stride, stride),
            (pad, pad, pad, pad),
            groups=channels if depthwise else 1,
        )

    def _share(self, given: int, channels: int) -> float:
        if isinstance(self.density, Mapping):
            return self.density.get((given, channels), 1.0)
        return float(self.density)

    def _bias(self, terms: Sequence[ConvTerm], mean: float) -> Array:
        """Bring the accumulators' mean to ``mean``, of which the inputs' mean gives a share."""
        bias = np.full(len(terms[0].weight), mean * 2**self.grid)
        for term in terms:
            codes = self.spread[term.input].mean() * 2**self.activation_bits
            bias = bias - term.weight.sum(axis=(1, 2, 3), dtype=np.int64) * codes
        return np.asarray(np.rint(bias).astype(np.int64))

    def stages(self, value: str, stages: Sequence[tuple[int, int]]) -> str:
        """Add stages of residual blocks; each but the first halves the map."""
        for stage, (channels, blocks) in enumerate(stages):
            for i in range(blocks):
                shrink = stage > 0 and i == 0
                start = value
                value = self.conv(start, channels, stride=2 if shrink else 1)
                skip = {"shortcut": start} if shrink else {"residual": start}
                value = self.conv(value, channels, **skip)  # type: ignore[arg-type]
        return value

    def max_pool(self, source: str, kernel: int, stride: int, pad: int = 0) -> str:
        """Add a max pool."""
        channels, height, _ = self.shape(source)
        size = window_size(height, kernel, stride, pad, pad)
        layer = Pool(
            f"maxpool{len(self.layers)}",
            "max",
            source,
            (kernel, kernel),
            (stride, stride),
            (pad, pad, pad, pad),
        )
        seen = self.rng.choice(self.spread[source], (kernel**2, SAMPLES)).max(axis=0)
        return self._add(layer, (channels, size, size), seen)

    def global_pool(self, source: str) -> str:
        """Add an average pool over the whole map."""
        channels, height, width = self.shape(source)
        layer = Pool(
            f"avgpool{len(self.layers)}",
            "avg",
            source,
            (height, width),
            (1, 1),
            requant=Requant.eq5(self.activation_bits, self.activation_bits),
        )
        seen = self.rng.choice(self.spread[source], (height * width, SAMPLES)).mean(axis=0)
        return self._add(layer, (channels, 1, 1), seen)

    def classify(self, source: str, classes: int) -> Graph:
        """Add the dense layer to raw logits and finish."""
        _, height, _ = self.shape(source)
        terms = [self._term(source, classes, height, 1, DEVIATION, True, False)]
        terms = [attrs.evolve(term, padding=(0, 0, 0, 0)) for term in terms]
        name = f"conv{len(self.layers)}"
        self.layers.append(Conv(name, terms, self._bias(terms, 0.0)))
        out = Output(name, (classes,), Dequantize(scale=(2.0**-self.grid,)))
        return Graph(self.inputs, self.layers, (out,))


def _placed(
    rng: np.random.Generator, given: int, channels: int, taps: int, density: float
) -> Array:
    """Choose non-zero group-sets ``[kernel blocks, input blocks, taps]``.

    Their number is ``density`` times all, rounded; kernel blocks differ by one at most.
    """
    blocks, places = -(-channels // BLOCK), -(-given // BLOCK) * taps
    total = round(density * blocks * places)
    quota = np.full(blocks, total // blocks)
    quota[rng.permutation(blocks)[: total % blocks]] += 1
    order = rng.random((blocks, places)).argsort(axis=1).argsort(axis=1)
    return np.asarray((order < quota[:, None]).reshape(blocks, -1, taps))


def _codes(rng: np.random.Generator, shape: tuple[int, ...], sigma: float, limit: int) -> Array:
    """Draw weight codes of a deviation; below one step, by how often a code is not zero."""
    drawn = rng.standard_normal(shape, np.float32)
    if sigma >= 1:
        codes = np.rint(drawn * np.float32(sigma))
    else:
        codes = np.sign(drawn) * (rng.random(shape, np.float32) < sigma**2)
    return np.asarray(np.clip(codes, -limit, limit - 1).astype(np.int8))


def _scatter(rng: np.random.Generator, keep: Array, sigma: float, limit: int) -> Array:
    """Draw the weights of the chosen group-sets: ``[channels, inputs, taps]``, whole blocks."""
    out_blocks, in_blocks, taps = keep.shape
    codes = _codes(rng, (int(keep.sum()), BLOCK, BLOCK), sigma, limit)
    codes[~codes.any(axis=(1, 2)), 0, 0] = 1  # a chosen group-set is not zero
    weight = np.zeros((out_blocks, in_blocks, taps, BLOCK, BLOCK), np.int8)
    weight[keep] = codes
    return weight.transpose(0, 3, 1, 4, 2).reshape(out_blocks * BLOCK, in_blocks * BLOCK, taps)
