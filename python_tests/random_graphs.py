"""Random integer networks: one seed, one graph, over everything that MARS takes.

:func:`random_graph` draws a small network, :func:`random_inputs` arrays for it. Requantizations are
fitted to the accumulators that a probe batch really gives, so that codes are spread over their
range instead of dying out after the first layer. :func:`features` names what a graph holds,
:func:`events` what happens when it runs, so that a test can assert its coverage.

Native graphs obey the bounds under which :func:`tvm_mars.onnx_export.to_onnx` is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.quantize import Dequantize, Quantize
from tvm_mars.graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    Input,
    Layer,
    MapType,
    Operand,
    Output,
    Pool,
    Requant,
    Residual,
    accumulate,
    evaluate_layer,
    evaluate_values,
    window_size,
    worst_accumulator,
)

__all__ = ["FOCI", "events", "features", "group_sets", "random_graph", "random_inputs"]

Array = npt.NDArray[Any]
BLOCK = 16  # channels of a kernel block and of a weight-group
MACS = 1_200_000  # per layer: keeps the int64 evaluation within milliseconds
RAW_BITS = 32  # of accumulators that nothing requantizes
FLOAT_GRID = 24  # bits of a float32 significand: native graphs stay inside


def random_graph(
    seed: int,
    *,
    native: bool | None = None,
    paper: bool | None = None,
    focus: str | None = None,
    layers: int | None = None,
) -> Graph:
    """Draw a network.

    Parameters
    ----------
    seed : int
        The same arguments and seed give the same graph.
    native : bool, optional
        Whether all requantizations are eq. 5 (drawn if None). Such graphs export to ONNX.
    paper : bool, optional
        In a native graph, whether all grids are those of eq. 5 to 8 (``P = bits_in + bits_weight -
        1``) or other powers of two as well (drawn if None).
    focus : str, optional
        One of :data:`FOCI`: what the graph is sure to hold (drawn if None).
    layers : int, optional
        How many steps follow the focus; a step adds one to three layers.
    """
    rng = np.random.default_rng([0x4D415253, seed])
    draws = rng.integers(0, 2, 2), rng.integers(len(FOCI)), rng.integers(0, 4)
    (draw_native, draw_paper), draw_focus, draw_layers = draws
    builder = _Builder(
        rng,
        native=bool(draw_native) if native is None else native,
        paper=bool(draw_paper) if paper is None else paper,
        focus=list(FOCI)[draw_focus] if focus is None else focus,
    )
    FOCI[builder.focus](builder)
    for _ in range(int(draw_layers) if layers is None else layers):
        builder.step()
    return builder.finish()


def random_inputs(graph: Graph, seed: int, images: int = 2) -> dict[str, Array]:
    """Draw a batch for every input: spread values, values out of range, exact halves of a step."""
    rng = np.random.default_rng([0x494D4753, seed])
    return {
        entry.name: _random_input(rng, entry.quantize, (images, *entry.shape))
        for entry in graph.inputs
    }


def _random_input(rng: np.random.Generator, quantize: Quantize, shape: tuple[int, ...]) -> Array:
    if quantize.dtype != "float32":
        return rng.integers(quantize.low, quantize.high + 1, shape).astype(quantize.dtype)
    step = quantize.scale / quantize.factor
    low, high = (bound - quantize.zero_point for bound in (quantize.low, quantize.high))
    span = high - low
    steps = rng.uniform(low - 0.1 * span, high + 0.1 * span, shape)
    halves = np.floor(steps) + 0.5
    dyadic = np.round(steps * step * 16) / (16 * step)
    kind = rng.integers(0, 4, shape)
    values = np.select([kind == 0, kind == 1], [halves, dyadic], steps) * step
    return values.astype(np.float32)


# -- what a graph holds ----------------------------------------------------------------------------


def group_sets(term: ConvTerm) -> Array:
    """Count non-zero weights per group-set: ``[kernel blocks, input blocks, taps]``.

    A grouped convolution is laid out as the dense one with zeros elsewhere.
    """
    out_channels, group_channels, height, width = term.weight.shape
    rows, columns = _channels(term.weight.shape, term.groups)
    blocks = (-(-out_channels // BLOCK), -(-group_channels * term.groups // BLOCK))
    counts = np.zeros((*blocks, height * width), np.int64)
    flat = (term.weight != 0).reshape(out_channels, group_channels, -1)
    np.add.at(counts, (rows // BLOCK, columns // BLOCK), flat)
    return counts


def _channels(shape: tuple[int, ...], groups: int) -> tuple[Array, Array]:
    """Output and input channel of every ``weight[o, c]``."""
    rows = np.broadcast_to(np.arange(shape[0])[:, None], shape[:2])
    columns = (rows // (shape[0] // groups)) * shape[1] + np.arange(shape[1])
    return rows, columns


def features(graph: Graph) -> set[str]:
    """Name what a graph holds."""
    found = {"multi-input"} if len(graph.inputs) > 1 else set()
    if len(graph.outputs) > 1:
        found.add("multi-output")
    found |= {f"input-{entry.quantize.dtype}" for entry in graph.inputs}
    if any(kind.zero_point for kind in graph.types.values()):
        found.add("zero-point")
    if len({kind.bits for kind in graph.types.values()} - {RAW_BITS}) > 1:
        found.add("mixed-widths")
    for layer in graph.layers:
        found |= _layer_features(layer, graph)
    return found


def _layer_features(layer: Layer, graph: Graph) -> set[str]:
    found = {layer.kind}
    if layer.requant is not None:
        found.add("native" if layer.requant.native else "multiplier")
        if layer.requant.multiplier.size > 1 or layer.requant.shift.size > 1:
            found.add("per-channel")
    if isinstance(layer, Pool):
        return found | _pool_features(layer, graph)
    if isinstance(layer, Conv):
        for term in layer.terms:
            found |= _term_features(term, graph.types[term.input])
        found |= {"projection"} if len(layer.terms) > 1 else set()
        found |= {"residual"} if layer.residual else set()
        found |= {"raw"} if layer.requant is None else set()
        blocks = sum(np.count_nonzero(group_sets(term), axis=(1, 2)) for term in layer.terms)
        found |= {"empty-block"} if np.any(blocks == 0) else set()
        found |= {"over-64"} if np.any(blocks > 64) else set()
    return found


def _pool_features(layer: Pool, graph: Graph) -> set[str]:
    source = graph.types[layer.input]
    found = set()
    if layer.stride[0] < layer.kernel[0] or layer.stride[1] < layer.kernel[1]:
        found.add("overlapping-pool")
    if any(layer.padding):
        found.add("padded-pool")
        if layer.mode == "avg":
            found.add("count-pad" if layer.count_include_pad else "count-valid")
    if layer.mode == "avg" and layer.kernel == (source.height, source.width):
        found.add("global-pool")
    return found


def _term_features(term: ConvTerm, source: MapType) -> set[str]:
    taps = term.kernel[0] * term.kernel[1]
    top, left, bottom, right = term.padding
    share = np.count_nonzero(group_sets(term)) / group_sets(term).size
    tests = {
        f"w{term.weight_bits}a{source.bits}": True,
        "sub-kernels": taps > 16 or source.channels > 512,
        "large-kernel": taps > 16,
        "wide-input": source.channels > 512,
        "odd-channels": source.channels % BLOCK != 0 or term.weight.shape[0] % BLOCK != 0,
        "depthwise": 1 < term.groups == source.channels,
        "grouped": 1 < term.groups < source.channels,
        "strided": max(term.stride) > 1,
        "dilated": max(term.dilation) > 1,
        "padded": any(term.padding),
        "asymmetric-padding": top != bottom or left != right,
        "aligned-term": term.shift > 0,
        "dense": term.kernel == (source.height, source.width) and not any(term.padding),
        "flattened": taps > 1 and term.kernel == (source.height, source.width),
        "all-zero": share == 0,
        "sparse": 0 < share < 0.5,
        "full": share == 1,
    }
    return {name for name, holds in tests.items() if holds}


def events(graph: Graph, inputs: dict[str, Array]) -> Counter[str]:
    """Count what happens to the codes of a batch: ``tie``, ``low`` and ``high`` saturation."""
    codes = {
        entry.name: entry.quantize.apply(inputs[entry.name]).reshape(-1, *entry.type.shape)
        for entry in graph.inputs
    }
    values = evaluate_values(graph, codes)
    found: Counter[str] = Counter()
    for layer in graph.layers:
        if isinstance(layer, Pool) or layer.requant is None:
            continue
        acc = _accumulators(layer, graph.types, values)
        requant = layer.requant
        product = acc * requant.multiplier.astype(np.int64)[:, None, None]
        divisor = np.int64(1) << requant.shift.astype(np.int64)[:, None, None]
        rest = product & (divisor - 1)
        found["tie"] += int(np.count_nonzero((divisor > 1) & (rest == divisor >> 1)))
        unclamped = (product // divisor) + requant.zero_point
        found["low"] += int(np.count_nonzero(unclamped < requant.low))
        found["high"] += int(np.count_nonzero(unclamped > requant.high))
    return found


def _accumulators(layer: Conv | Add, types: Any, values: dict[str, Array]) -> Array:
    if isinstance(layer, Conv):
        return accumulate(layer, types, values)
    return np.asarray(
        sum(
            (values[operand.input] - types[operand.input].zero_point) * operand.multiplier
            for operand in layer.operands
        )
    )


# -- how it is drawn -------------------------------------------------------------------------------


@attrs.define
class _Builder:
    """A graph that grows layer by layer, with the codes that a probe batch has in it."""

    rng: np.random.Generator
    native: bool
    paper: bool
    focus: str
    inputs: list[Input] = attrs.field(factory=list)
    layers: list[Layer] = attrs.field(factory=list)
    probe: dict[str, Array] = attrs.field(factory=dict)
    types: dict[str, MapType] = attrs.field(factory=dict)
    current: str = ""
    ended: bool = False

    # -- draws --

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def bits(self) -> int:
        return int(self.pick(4, 8, 8))

    @property
    def type(self) -> MapType:
        return self.types[self.current]

    # -- values --

    def add_input(self, channels: int, height: int, width: int) -> str:
        """Add an input and make it the current value."""
        bits = self.bits()
        quantize, zero_point = self._quantize(bits)
        kind = MapType(channels, height, width, bits, zero_point)
        flat = height == width == 1 and self.chance(0.5)
        entry = Input(f"x{len(self.inputs)}", kind, (channels,) if flat else kind.shape, quantize)
        batch = _random_input(self.rng, quantize, (2, *entry.shape))
        self.probe[entry.name] = quantize.apply(batch).reshape(2, *kind.shape).astype(np.int64)
        self.types[entry.name] = kind
        self.inputs.append(entry)
        self.current = entry.name
        return entry.name

    def _quantize(self, bits: int) -> tuple[Quantize, int]:
        top = 2**bits - 1
        if self.native:
            return Quantize(high=top, factor=float(top), clip=(0.0, 1.0)), 0
        dtype = str(self.pick("float32", "uint8", "int8"))
        signed = dtype == "int8" or (dtype == "float32" and self.chance(0.3))
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, top)
        zero = self.pick(0, self.between(low, high), low)
        scale = float(np.float32(self.rng.uniform(0.002, 0.2)))
        if dtype != "float32":
            return Quantize(dtype, low, high, scale, zero), zero - low
        return Quantize("float32", low, high, scale, zero), zero - low

    def add(self, layer: Layer) -> str:
        """Add a layer and make its result the current value."""
        self.types[layer.name] = self._graph(layer).types[layer.name]
        self.probe[layer.name] = evaluate_layer(layer, self.types, self.probe)
        self.layers.append(layer)
        self.current = layer.name
        return layer.name

    def _graph(self, layer: Layer) -> Graph:
        """Give the graph so far with one more layer, for its type and its checks."""
        out = Output(self.inputs[0].name, self.inputs[0].shape, Dequantize())
        return Graph(self.inputs, [*self.layers, layer], [out])

    # -- convolutions --

    def weight(self, shape: tuple[int, int, int, int], groups: int, bits: int) -> Array:
        """Draw weight codes with whole group-sets, and whole kernel blocks, set to zero."""
        limit = 2 ** (bits - 1)
        kind = self.pick("normal", "normal", "uniform", "small")
        if kind == "uniform":
            codes = self.rng.integers(-limit, limit, shape)
        else:
            sigma = 1.0 if kind == "small" else limit / 3
            codes = np.rint(self.rng.normal(0, sigma, shape)).astype(np.int64)
        codes = np.clip(codes, -limit, limit - 1)
        codes[codes == 0] = self.pick(0, 1)
        rows, columns = _channels(shape, groups)
        blocks = (int(rows.max()) // BLOCK + 1, int(columns.max()) // BLOCK + 1)
        density = float(self.pick(0.05, 0.2, 0.5, 0.8, 1.0, 1.0))
        if self.focus == "tall":
            density = 1.0
        keep = self.rng.random((*blocks, shape[2] * shape[3])) < density
        if blocks[0] > 1 and (self.focus == "empty" or self.chance(0.2)):
            keep[self.between(0, blocks[0] - 1)] = False
        if self.chance(0.03):
            keep[:] = False
        elif not keep.any():  # a map that dies early tests nothing after it
            keep[self.between(0, blocks[0] - 1)] = True
        mask = keep[rows // BLOCK, columns // BLOCK].reshape(shape)
        return np.asarray(codes * mask)

    def term(
        self,
        source: str,
        out_channels: int,
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> ConvTerm:
        """Draw the weights of one convolution."""
        bits = self.bits()
        group_channels = self.types[source].channels // groups
        weight = self.weight((out_channels, group_channels, *kernel), groups, bits)
        return ConvTerm(source, weight, bits, stride, padding, dilation, groups)

    def conv(self, terms: list[ConvTerm], residual: str | None = None, raw: bool = False) -> str:
        """Add a convolution layer whose requantization fits its probe accumulators."""
        channels = terms[0].weight.shape[0]
        out_bits = self.bits()
        if self.native and self.paper:
            layer = self._paper_layer(terms, residual)
        else:
            layer = self._free_layer(terms, residual)
        acc = accumulate(layer, self.types, self.probe)
        layer = attrs.evolve(layer, bias=self._bias(acc, channels, layer))
        if raw:
            self.ended = True
            return self.add(layer)
        acc = accumulate(layer, self.types, self.probe)
        if self.native:
            grid = self._paper_grid(terms, residual) if self.paper else self._grid(acc, out_bits)
            return self.add(attrs.evolve(layer, requant=Requant.eq5(out_bits, grid)))
        return self.add(attrs.evolve(layer, requant=self.requant(acc, out_bits, channels)))

    def _term_grid(self, term: ConvTerm) -> int:
        return self.types[term.input].bits + term.weight_bits - 1

    def _paper_grid(self, terms: Sequence[ConvTerm], residual: str | None) -> int:
        grids = [self._term_grid(term) for term in terms]
        return max([*grids, self.types[residual].bits] if residual else grids)

    def _paper_layer(self, terms: list[ConvTerm], residual: str | None) -> Conv:
        """Align by eq. 5 to 8, with weights small enough for the fixed grid."""
        grid = self._paper_grid(terms, residual)
        fitted = []
        for term in terms:
            probe = accumulate(self._bare([term]), self.types, self.probe)
            shift = grid - self._term_grid(term)
            spread = float(np.abs(probe).max()) * 2**shift
            fit = min(1.0, 2**grid * float(self.rng.uniform(0.7, 3)) / max(spread, 1.0))
            fitted.append(attrs.evolve(term, weight=_shrink(term.weight, fit), shift=shift))
        fitted = self._bounded(fitted)
        source = self.types[residual].bits if residual else 0
        return self._bare(fitted, Residual(residual, grid - source) if residual else None)

    def _free_layer(self, terms: list[ConvTerm], residual: str | None) -> Conv:
        """Align by any powers of two that let every part be heard."""
        if len(terms) > 1 and self.chance(0.5):
            loud = self.between(0, len(terms) - 1)
            terms = [
                attrs.evolve(term, shift=self.between(1, 3) if i == loud else 0)
                for i, term in enumerate(terms)
            ]
        if self.native:
            terms = self._bounded(terms)
        added = None
        if residual:
            probe = accumulate(self._bare(terms), self.types, self.probe)
            ratio = max(float(np.std(probe)), 1.0) / 2 ** self.types[residual].bits
            shift = int(np.clip(np.rint(np.log2(max(ratio, 1.0))) + self.between(0, 2), 0, 14))
            added = Residual(residual, shift)
        return self._bare(terms, added)

    def _bounded(self, terms: list[ConvTerm]) -> list[ConvTerm]:
        worst = worst_accumulator(self._bare(terms), self.types)
        fit = min(1.0, 2 ** (FLOAT_GRID - 2) / max(worst, 1))
        return [attrs.evolve(term, weight=_shrink(term.weight, fit)) for term in terms]

    def _bare(self, terms: list[ConvTerm], residual: Residual | None = None) -> Conv:
        bias = np.zeros(terms[0].weight.shape[0], np.int32)
        return Conv(f"conv{len(self.layers)}", terms, bias, residual=residual)

    def _bias(self, acc: Array, channels: int, layer: Conv) -> Array:
        spread = max(float(np.std(acc)), 1.0)
        bias = self.rng.normal(0, spread / 2, channels)
        if self.native:  # without it, half of all codes would be zero
            bias = bias + spread / 2 - np.mean(acc)
        if self.focus == "saturation" and not self.native and self.chance(0.5):
            room = 2**31 - 1 - worst_accumulator(layer, self.types)
            bias[self.between(0, channels - 1)] = self.pick(-1, 1) * room
        if self.focus == "ties" and self.native and self.paper:
            grid = self._paper_grid(layer.terms, layer.residual.input if layer.residual else None)
            bias[self.rng.random(channels) < 0.5] = 2 ** (grid - 1)
        if self.chance(0.1):
            bias[:] = 0
        limit = 2 ** (FLOAT_GRID - 2) if self.native else 2**31 - 1
        return np.clip(np.rint(bias), -limit, limit).astype(np.int64)

    # -- requantizations --

    def _grid(self, acc: Array, bits: int) -> int:
        if self.focus == "ties":
            return self.between(1, 4)
        spread = float(np.percentile(np.abs(acc), 90)) + 1
        if self.focus == "saturation":
            spread /= 8
        return int(np.clip(np.rint(np.log2(spread)), 1, FLOAT_GRID - bits))

    def requant(self, acc: Array, bits: int, channels: int, count: int = 1) -> Requant:
        """Fit multiplier, shift, zero point and clamp to accumulators."""
        top = 2**bits - 1
        zero = int(self.pick(0, 0, self.between(0, top), top // 2))
        relu = self.chance(0.4)
        low = zero if relu else self.pick(0, 0, self.between(0, zero))
        high = self.pick(top, top, self.between(max(zero, low), top))
        spread = max(float(np.std(acc)) * 4, float(np.abs(np.mean(acc))) * 1.5, 1.0) / count
        ratio = (top + 1) / spread * float(self.rng.uniform(0.5, 1.5))
        if self.focus == "saturation":
            ratio *= 8
        per_channel = channels > 1 and self.chance(0.5)
        ratios = ratio * self.rng.uniform(0.6, 1.6, channels if per_channel else 1)
        # Few multiplier bits make exact ties common.
        width = int(self.pick(1, 2, 4) if self.focus == "ties" else self.pick(1, 6, 15, 31, 31))
        if count > 1:
            width = min(width, 15)
        exponent = np.floor(np.log2(ratios)).astype(np.int64)
        shift = np.clip(width - 1 - exponent, 0, 62)
        if per_channel and self.chance(0.5):
            shift = np.array([shift.min()])
        multiplier = np.clip(np.rint(ratios * 2.0**shift), 1, 2**31 - 1).astype(np.int64)
        return Requant(multiplier, shift, bits, zero, low, high)

    # -- layers of a kind --

    def random_conv(self, groups: int = 1, out_channels: int | None = None) -> str:
        """Add a convolution of random geometry."""
        kernel = self.pick((1, 1), (3, 3), (3, 3), (3, 3), (1, 3), (2, 2), (3, 2))
        if out_channels is None:
            out_channels = self.pick(8, 16, 16, 20, 32, 33, 48)
        return self.conv([self.geometry(self.current, out_channels, kernel, groups)])

    def geometry(
        self, name: str, out_channels: int, kernel: tuple[int, int], groups: int = 1
    ) -> ConvTerm:
        """Draw stride, dilation and padding that leave at least one output pixel."""
        source = self.types[name]
        plain = self.chance(0.4)
        stride = (1, 1) if plain else (self.pick(1, 1, 2, 3), self.pick(1, 1, 2))
        dilation = (1, 1) if plain or self.chance(0.7) else (self.pick(1, 2), self.pick(1, 2, 3))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if plain:
            top, left = reach[0] // 2, reach[1] // 2
            padding = [top, left, reach[0] - top, reach[1] - left]
        else:
            padding = [self.between(0, reach[i % 2] // 2 + 1) for i in range(4)]
        for axis, size in enumerate((source.height, source.width)):
            short = reach[axis] + 1 - size - padding[axis] - padding[axis + 2]
            padding[axis] += max(short, 0)
        out_channels = self._affordable(source, out_channels, kernel, stride, padding, dilation)
        out_channels = max(out_channels // groups, 1) * groups
        return self.term(
            name,
            out_channels,
            kernel,
            stride=stride,
            padding=(padding[0], padding[1], padding[2], padding[3]),
            dilation=dilation,
            groups=groups,
        )

    @staticmethod
    def _affordable(
        source: MapType,
        out_channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: list[int],
        dilation: tuple[int, int],
    ) -> int:
        sizes = [
            window_size(size, kernel[i], stride[i], padding[i], padding[i + 2], dilation[i])
            for i, size in enumerate((source.height, source.width))
        ]
        macs = sizes[0] * sizes[1] * kernel[0] * kernel[1] * source.channels
        return max(1, min(out_channels, MACS // macs))

    def same_conv(self, name: str, out_channels: int, stride: int = 1) -> ConvTerm:
        """Draw a 3x3 or 1x1 convolution that keeps the map's size (over the stride)."""
        size = self.pick(1, 3, 3)
        pad = size // 2
        return self.term(
            name,
            out_channels,
            (size, size),
            stride=(stride, stride),
            padding=(pad, pad, pad, pad),
        )

    def narrow(self) -> None:
        """Bring the current map to a size at which residual blocks are cheap."""
        kind = self.type
        if 9 * kind.channels**2 * kind.height * kind.width > MACS:
            pixels = kind.height * kind.width
            fit = max(1, min(int((MACS / 9 / pixels) ** 0.5), MACS // (pixels * kind.channels)))
            self.conv([self.term(self.current, min(fit, 48), (1, 1))])

    def identity_block(self) -> str:
        """Add one or two convolutions whose accumulators take the block's input."""
        self.narrow()
        start = self.current
        channels = self.type.channels
        if self.chance(0.5):
            self.conv([self.same_conv(start, channels)])
        return self.conv([self.same_conv(self.current, channels)], residual=start)

    def projection_block(self) -> str:
        """Add a convolution and a 1x1 projection of the block's input into one accumulator."""
        self.narrow()
        start = self.current
        stride = self.pick(1, 2)
        channels = self.pick(16, 24, 32)
        self.conv([self.same_conv(start, channels, stride)])
        main = self.same_conv(self.current, channels)
        shortcut = self.term(start, channels, (1, 1), stride=(stride, stride))
        both = [main, shortcut] if self.chance(0.7) else [shortcut, main]
        return self.conv(both)

    def depthwise(self) -> str:
        """Add a depthwise convolution, with one or two kernels per channel."""
        kernel = self.pick((3, 3), (3, 3), (5, 5), (2, 3))
        channels = self.type.channels
        term = self.geometry(self.current, channels * self.pick(1, 1, 2), kernel, channels)
        return self.conv([term])

    def grouped(self) -> str:
        """Add a grouped convolution."""
        channels = self.type.channels
        divisors = [g for g in range(2, channels) if channels % g == 0]
        if not divisors:
            return self.random_conv()
        groups = int(self.pick(*divisors))
        return self.random_conv(groups, groups * self.between(1, max(1, 48 // groups)))

    def pool(self, mode: str | None = None) -> str:
        """Add a pool of random window."""
        source = self.type
        mode = mode or str(self.pick("max", "avg"))
        kernel = (
            min(self.pick(2, 2, 3), source.height),
            min(self.pick(2, 2, 3), source.width),
        )
        stride = self.pick(kernel, (1, 1), (2, 2), (2, 1))
        top, left, bottom, right = (
            self.between(0, kernel[i % 2] - 1) if self.chance(0.5) else 0 for i in range(4)
        )
        padding = (top, left, bottom, right)
        name = f"{mode}pool{len(self.layers)}"
        if mode == "max":
            return self.add(Pool(name, "max", self.current, kernel, stride, padding))
        include = self.chance(0.5)
        return self._average(name, kernel, stride, padding, include)

    def global_pool(self) -> str:
        """Add an average pool over the whole map."""
        size = (self.type.height, self.type.width)
        return self._average(f"avgpool{len(self.layers)}", size, (1, 1), (0, 0, 0, 0), False)

    def _average(
        self,
        name: str,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        include: bool,
    ) -> str:
        source, bits = self.type, self.bits()
        if self.native:
            requant = Requant.eq5(bits, source.bits)
        else:
            steps = self.probe[self.current] - source.zero_point
            count = kernel[0] * kernel[1]
            requant = self.requant(steps * count, bits, 1, count)
        return self.add(Pool(name, "avg", self.current, kernel, stride, padding, include, requant))

    def add_maps(self) -> str:
        """Add the sum of two maps of one shape, or requantize one map."""
        shape = self.type.shape
        others = [
            name
            for name, kind in self.types.items()
            if kind.shape == shape and kind.bits != RAW_BITS and name != self.current
        ]
        names = [self.current, *([str(self.pick(*others))] if others else [])]
        bits = self.bits()
        grid = max(self.types[name].bits for name in names)
        if self.native:
            grid += 0 if self.paper else self.between(0, 1)
            factors = [2 ** (grid - self.types[name].bits) for name in names]
            requant = Requant.eq5(bits, grid)
        else:
            factors = [int(self.pick(1, 3, self.between(1, 1000), 2**16 + 1)) for _ in names]
            total = sum(
                (self.probe[name] - self.types[name].zero_point) * factor
                for name, factor in zip(names, factors, strict=True)
            )
            requant = self.requant(np.asarray(total), bits, 1)
        operands = [Operand(*pair) for pair in zip(names, factors, strict=True)]
        return self.add(Add(f"add{len(self.layers)}", operands, requant))

    def dense(self) -> str:
        """Add a layer whose kernel covers its whole input; its result is 1x1."""
        size = (self.type.height, self.type.width)
        affordable = max(1, MACS // (size[0] * size[1] * self.type.channels))
        channels = min(self.pick(5, 10, 16, 40), affordable)
        return self.conv([self.term(self.current, channels, size)], raw=self.chance(0.3))

    # -- the whole --

    def step(self) -> None:
        """Add one more piece, unless the network has ended in raw accumulators."""
        if self.ended:
            return
        pieces: list[Callable[[], str]] = [
            *[self.random_conv] * 5,
            *[self.identity_block] * 3,
            *[self.projection_block] * 2,
            self.depthwise,
            self.grouped,
            *[self.pool] * 2,
            self.add_maps,
            self.dense,
        ]
        self.pick(*pieces)()

    def finish(self) -> Graph:
        """Give the graph, with the last value and sometimes others as outputs."""
        if not self.ended and self.chance(0.2):
            channels = self.pick(3, 10, 16)
            self.conv([self.geometry(self.current, channels, (1, 1))], raw=True)
        names = [self.current]
        earlier = [layer.name for layer in self.layers if layer.name != self.current]
        if earlier and (self.focus == "multi" or self.chance(0.2)):
            names.append(str(self.pick(*earlier)))
        read = {name for layer in self.layers for name in layer.inputs}
        names += [name for name in earlier if name not in read and name not in names]
        return Graph(self.inputs, self.layers, [self._output(name) for name in names])

    def _output(self, name: str) -> Output:
        kind = self.types[name]
        flat = kind.height == kind.width == 1 and self.chance(0.5)
        return Output(name, (kind.channels,) if flat else kind.shape, self._dequantize(name))

    def _dequantize(self, name: str) -> Dequantize:
        kind = self.types[name]
        if kind.bits == RAW_BITS:
            return self._dequantize_raw(name)
        if self.native:
            return self.pick(Dequantize(scale=(2.0**-kind.bits,)), Dequantize("uint8"))
        scale = float(np.float32(self.rng.uniform(0.01, 0.1)))
        signed = Dequantize("int8", low=-(2 ** (kind.bits - 1)))
        real = Dequantize("float32", (scale,), kind.zero_point)
        return self.pick(real, Dequantize("uint8"), signed)

    def _dequantize_raw(self, name: str) -> Dequantize:
        layer = next(layer for layer in self.layers if layer.name == name)
        assert isinstance(layer, Conv)
        if self.native:
            residual = layer.residual.input if layer.residual else None
            grid = self._paper_grid(layer.terms, residual) if self.paper else 11
            return Dequantize(scale=(2.0**-grid,))
        channels = self.types[name].channels
        scales = self.rng.uniform(0.001, 0.01, self.pick(1, channels)).astype(np.float32)
        return self.pick(Dequantize("int32"), Dequantize(scale=tuple(map(float, scales))))


def _shrink(weight: Array, fit: float) -> Array:
    """Scale weight codes down."""
    return np.trunc(weight * fit + np.sign(weight) * 0.5).astype(np.int64) if fit < 1 else weight


# -- what a graph is sure to hold ------------------------------------------------------------------


def _general(builder: _Builder) -> None:
    channels = builder.pick(1, 3, 5, 16, 16, 17, 24, 32, 48)
    builder.add_input(channels, builder.between(1, 12), builder.between(1, 12))
    builder.random_conv()


def _wide_input(builder: _Builder) -> None:
    builder.add_input(
        builder.pick(513, 528, 600, 1040), builder.between(1, 2), builder.between(1, 3)
    )
    kernel = builder.pick((1, 1), (1, 1), (2, 2))
    builder.conv([builder.geometry(builder.current, builder.pick(16, 24), kernel)])


def _large_kernel(builder: _Builder) -> None:
    builder.add_input(builder.pick(2, 3, 16, 20), builder.between(6, 12), builder.between(6, 12))
    kernel = builder.pick((5, 5), (7, 7), (1, 17), (6, 3))
    builder.conv([builder.geometry(builder.current, builder.pick(8, 16, 20), kernel)])


def _tall(builder: _Builder) -> None:
    builder.add_input(builder.pick(128, 130, 160), builder.between(3, 5), builder.between(3, 5))
    builder.conv([builder.geometry(builder.current, builder.pick(16, 17, 32), (3, 3))])


def _spatial(builder: _Builder) -> None:
    sizes = builder.pick((24, 24), (40, 17), (9, 60), (33, 32))
    builder.add_input(builder.pick(3, 8, 16, 32), *sizes)
    builder.conv([builder.same_conv(builder.current, builder.pick(3, 8, 16))])


def _depthwise(builder: _Builder) -> None:
    builder.add_input(
        builder.pick(5, 16, 24, 32, 48), builder.between(3, 10), builder.between(3, 10)
    )
    builder.depthwise()
    builder.conv([builder.term(builder.current, builder.pick(16, 24), (1, 1))])


def _grouped(builder: _Builder) -> None:
    builder.add_input(builder.pick(6, 16, 24, 32, 64), builder.between(3, 8), builder.between(3, 8))
    builder.grouped()


def _identity(builder: _Builder) -> None:
    builder.add_input(builder.pick(3, 16, 16, 32), builder.between(3, 10), builder.between(3, 10))
    builder.identity_block()


def _projection(builder: _Builder) -> None:
    builder.add_input(builder.pick(3, 16, 32), builder.between(3, 10), builder.between(3, 10))
    builder.projection_block()


def _pools(builder: _Builder) -> None:
    builder.add_input(builder.pick(3, 16, 20), builder.between(4, 12), builder.between(4, 12))
    builder.random_conv()
    builder.pool()
    builder.pool()
    if builder.chance(0.5):
        builder.global_pool()


def _dense(builder: _Builder) -> None:
    builder.add_input(builder.pick(3, 16, 24), builder.between(1, 6), builder.between(1, 6))
    if builder.chance(0.5):
        builder.random_conv()
    builder.dense()
    if not builder.ended:
        builder.dense()


def _multi(builder: _Builder) -> None:
    shape = (builder.pick(3, 16, 24), builder.between(2, 8), builder.between(2, 8))
    first = builder.add_input(*shape)
    builder.add_input(*shape)
    builder.add_maps()
    builder.random_conv()
    builder.current = first
    builder.random_conv()


def _empty(builder: _Builder) -> None:
    builder.add_input(builder.pick(16, 32), builder.between(2, 8), builder.between(2, 8))
    builder.conv([builder.same_conv(builder.current, 48)])


FOCI: dict[str, Callable[[_Builder], None]] = {
    "general": _general,
    "wide-input": _wide_input,
    "large-kernel": _large_kernel,
    "tall": _tall,
    "spatial": _spatial,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "identity": _identity,
    "projection": _projection,
    "pools": _pools,
    "dense": _dense,
    "multi": _multi,
    "empty": _empty,
    "ties": _general,
    "saturation": _general,
}
