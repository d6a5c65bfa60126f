"""Quantization after training: a float network, calibration images, an integer graph.

Three runs over the calibration images:

1. the float network, for samples of its maps and the means and variances of its convolutions;
2. each map's range (:mod:`tvm_mars.ptq.ranges`);
3. layer by layer on quantized maps: the statistics that eq. 7 folds, then the codes.

Two methods differ in what the codes compensate.

``paper`` is eq. 5 to 8 as they stand, with statistics of conv(x, W^) on the quantized maps: what
:func:`tvm_mars.qat.calibrate` starts training from, code for code but for float rounding.

``corrected`` is for use without training:

- eq. 5 stores ``round(a * (2**b - 1))`` and takes it as steps of ``2**-b``, eq. 8 likewise, so that
  every layer shrinks what it computes by up to 1/256 (8 bits) or 1/8 (4 bits), and BN's additive
  part not with it: gammas and ranges take that up;
- weights reach their largest code whatever their map's range, by a power of two for each
  convolution, which the shift of the requantization takes up;
- a kernel keeps the statistics of its batch norm, scaled by what quantization did to the variance
  of conv(x, W^) on the calibration images, so that few images do; its bias makes the mean of the
  quantized convolution that of the float one. A kernel without a batch norm is treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, OptionError
from mars_runtime.maps import RAW_BITS
from mars_runtime.quantize import Dequantize, Quantize

from .. import graph as ir
from ..validators import one_of
from .arithmetic import convolve, mean_windows, pool, product_of_means
from .fold import Freedom, group_peak, per_kernel, quantize_weight, round_bias
from .network import Addition, FloatLayer, FloatNetwork, FloatPool, Sum, Term
from .ranges import Kernels, RangedMap, choose_ranges, result_range, sample_stride

__all__ = ["Method", "Options", "Quantized", "quantize_network"]

Array: TypeAlias = npt.NDArray[Any]
Method: TypeAlias = Literal["corrected", "paper"]

WIDTHS = (4, 8)
CHUNK = 2**24  # elements of the largest map that are computed together
# A variance that changed more than this is one that quantization silenced, and tells nothing.
DRIFT = 4.0
_TINY = 1e-12


def _a_range(_: object, attribute: Any, value: tuple[float, float] | None) -> None:
    if value is None:
        return
    low, high = value
    if not (np.isfinite(low) and np.isfinite(high) and low <= 0 < high):
        raise OptionError(
            f"{low:g}..{high:g} does not hold 0 and more",
            where=f"option {attribute.name}",
            hint="padding is zero, so the range of an input includes it",
        )


def _pair(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = value
        return float(low), float(high)
    except (TypeError, ValueError):
        raise OptionError(f"{value!r} is no pair of numbers", where="option input_range") from None


@attrs.frozen(kw_only=True)
class Options:
    """How a float network is quantized.

    Parameters
    ----------
    weight_bits, activation_bits, input_bits : int
        4 or 8.
    first_weight_bits, last_weight_bits : int or None
        Of the layers that read an input and give an output; None: as the others.
    input_range : (float, float) or None
        Lowest and highest value of the inputs. 0..1 is quantized by eq. 5, another range by a scale
        and a zero point. None: 0..1 if the calibration images lie in it, else what they span.
    method : str
        ``corrected``, or ``paper``; see :mod:`tvm_mars.ptq.quantize`.
    group : int
        Kernels that share the largest magnitude of eq. 6.
    """

    weight_bits: int = attrs.field(default=8, validator=one_of(*WIDTHS, kind="option "))
    activation_bits: int = attrs.field(default=8, validator=one_of(*WIDTHS, kind="option "))
    input_bits: int = attrs.field(default=8, validator=one_of(*WIDTHS, kind="option "))
    first_weight_bits: int | None = attrs.field(
        default=None, validator=one_of(None, *WIDTHS, kind="option ")
    )
    last_weight_bits: int | None = attrs.field(
        default=None, validator=one_of(None, *WIDTHS, kind="option ")
    )
    input_range: tuple[float, float] | None = attrs.field(
        default=None, converter=_pair, validator=_a_range
    )
    method: Method = attrs.field(
        default="corrected", validator=one_of(*get_args(Method), kind="option ")
    )
    group: int = attrs.field(default=16, validator=attrs.validators.ge(1))


@attrs.frozen(eq=False)
class Quantized:
    """A quantized network.

    Parameters
    ----------
    graph : tvm_mars.graph.Graph
        Its inputs and outputs in the float network's order.
    names : mapping of str to str
        The float network's operators by the graph's layers.
    """

    graph: ir.Graph
    names: Mapping[str, str]


def quantize_network(
    network: FloatNetwork, calibration: Mapping[str, npt.ArrayLike], options: Options
) -> Quantized:
    """Quantize a float network to eq. 5 to 8.

    Parameters
    ----------
    calibration : mapping of str to array
        For each input some hundred typical images, float ``[N, *shape]``.

    Raises
    ------
    InputError
        If an array of the calibration is missing, of another shape, empty or not finite.
    GraphError
        If accumulators may leave int32.
    """
    images = _checked(network, calibration)
    borders = {entry.name: _border(images[entry.name], options) for entry in network.inputs}
    observed = _observe(network, images, borders)
    ranges = _ranges(network, observed, borders, options)
    return _Builder(network, options, observed, ranges, borders).run(images)


# -- calibration images ----------------------------------------------------------------------------


def _checked(network: FloatNetwork, calibration: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    """Give float32 images ``[N, C, H, W]`` by input."""
    names = [entry.name for entry in network.inputs]
    unknown = sorted(set(calibration) - set(names))
    if unknown:
        raise InputError(
            f"no such input; there are {names}",
            where=f"calibration for {unknown[0]}",
            hint=f"write it by numpy.savez('images.npz', **{{{names[0]!r}: images}})",
        )
    found: dict[str, Array] = {}
    for entry in network.inputs:
        where = f"calibration for input {entry.name}"
        if entry.name not in calibration:
            raise InputError(f"missing; given are {sorted(calibration)}", where=where)
        array = np.asarray(calibration[entry.name])
        if array.shape[1:] != entry.shape or array.ndim != len(entry.shape) + 1 or not len(array):
            wanted = ", ".join(map(str, ("N", *entry.shape)))
            raise InputError(
                f"shape {array.shape}, expected ({wanted})",
                where=where,
                hint="some hundred typical images",
            )
        if array.dtype.kind not in "fui" or not np.isfinite(array).all():
            raise InputError(
                f"dtype {array.dtype}, or values that are not finite",
                where=where,
                hint="give float32 as the network takes it",
            )
        found[entry.name] = array.astype(np.float32).reshape(-1, *network.shapes[entry.name])
    counts = {name: len(array) for name, array in found.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{counts} images; give as many for each input", where="calibration")
    return found


@attrs.frozen(eq=False)
class _Border:
    """How an input is quantized, and what ``2**bits`` of its steps stand for."""

    kind: ir.MapType
    quantize: Quantize
    unit: float

    @property
    def signed(self) -> bool:
        return self.kind.zero_point > 0


def _border(images: Array, options: Options) -> _Border:
    bits = options.input_bits
    channels, height, width = images.shape[1:]
    top = 2**bits - 1
    low, high = options.input_range or _span(images)
    if (low, high) == (0.0, 1.0):
        quantize = Quantize(high=top, factor=float(top), clip=(0.0, 1.0))
        unit = 1.0 if options.method == "paper" else 2**bits / top
        return _Border(ir.MapType(channels, height, width, bits), quantize, unit)
    scale = float(np.float32((high - low) / top))
    zero = round(-low / scale)
    clip = (float(np.float32(-zero * scale)), float(np.float32((top - zero) * scale)))
    quantize = Quantize(high=top, scale=scale, zero_point=zero, clip=clip)
    return _Border(ir.MapType(channels, height, width, bits, zero), quantize, scale * 2**bits)


def _span(images: Array) -> tuple[float, float]:
    low, high = min(float(images.min()), 0.0), max(float(images.max()), 0.0)
    return (0.0, 1.0) if low == 0 and high <= 1 else (low, high or 1.0)


# -- the float network -----------------------------------------------------------------------------


@attrs.define(eq=False)
class _Moments:
    """Means and variances of a convolution without its bias, per kernel, gathered by chunks."""

    count: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, y: Array) -> None:
        self.count += y.size // y.shape[1]
        self.total = self.total + y.sum((0, 2, 3), dtype=np.float64)
        self.squares = self.squares + np.square(y, dtype=np.float64).sum((0, 2, 3))

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / self.count)

    @property
    def variance(self) -> Array:
        """The biased one."""
        return np.asarray(np.maximum(self.squares / self.count - np.square(self.mean), 0))


@attrs.frozen(eq=False)
class _Observed:
    """What the float network shows on the calibration images.

    ``samples``: some values of each map, before a ReLU's ceiling; ``squares``: the mean square of
    each map; ``moments``: of each term.
    """

    samples: Mapping[str, Array]
    squares: Mapping[str, float]
    moments: Mapping[str, _Moments]


def _chunks(network: FloatNetwork, count: int) -> list[slice]:
    largest = max(int(np.prod(shape)) for shape in network.shapes.values())
    step = max(1, CHUNK // largest)
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


def _observe(
    network: FloatNetwork, images: Mapping[str, Array], borders: Mapping[str, _Border]
) -> _Observed:
    count = len(next(iter(images.values())))
    samples: dict[str, list[Array]] = {layer.name: [] for layer in network.layers}
    squares = dict.fromkeys(network.shapes, 0.0)
    moments = {term.name: _Moments() for term in network.terms()}
    dead = network.last_readers()
    for chunk in _chunks(network, count):
        values = {name: array[chunk] for name, array in images.items()}
        for name, array in values.items():
            squares[name] += float(np.square(array, dtype=np.float64).mean()) * len(array) / count
        for layer in network.layers:
            y = _evaluate(layer, values, moments)
            samples[layer.name].append(_sampled(y, chunk.start, count))
            values[layer.name] = y = np.minimum(y, _ceiling(layer))
            squares[layer.name] += float(np.square(y, dtype=np.float64).mean()) * len(y) / count
            for name in dead[layer.name]:
                del values[name]
    joined = {name: np.concatenate(parts) for name, parts in samples.items()}
    return _Observed(joined, squares, moments)


def _sampled(y: Array, start: int, count: int) -> Array:
    """Give every so many-th value, counted over all chunks."""
    size = y[0].size
    stride = sample_stride(size * count, size)
    return np.array(y.reshape(-1)[-(start * size) % stride :: stride])


def _evaluate(
    layer: FloatLayer, values: Mapping[str, Array], moments: Mapping[str, _Moments]
) -> Array:
    """Compute a layer as the float network does, but for a ReLU's ceiling."""
    if isinstance(layer, FloatPool):
        return pool(values[layer.input], layer)
    if isinstance(layer, Addition):
        return values[layer.inputs[0]] + values[layer.inputs[1]]
    total: Any = 0.0 if layer.residual is None else values[layer.residual]
    for term in layer.terms:
        y = convolve(values[term.input], term.weight, term)
        moments[term.name].add(y)
        scale, bias = (part.astype(np.float32)[:, None, None] for part in term.affine())
        total = total + y * scale + bias
    return np.asarray(np.maximum(total, 0) if layer.relu else total)


def _ceiling(layer: FloatLayer) -> float:
    return layer.ceiling if isinstance(layer, Sum) else np.inf


# -- ranges ----------------------------------------------------------------------------------------


def _ranges(
    network: FloatNetwork,
    observed: _Observed,
    borders: Mapping[str, _Border],
    options: Options,
) -> dict[str, float]:
    bits = options.activation_bits
    growth = 1.0 if options.method == "paper" else 2**bits / (2**bits - 1)
    maps = [RangedMap(entry.name, options.input_bits, fixed=True) for entry in network.inputs]
    for layer in network.layers:
        kernels: tuple[Kernels, ...] = ()
        if isinstance(layer, Sum):
            if not layer.relu:
                continue
            kernels = tuple(_kernels(network, layer, term, options) for term in layer.terms)
        passed = isinstance(layer, FloatPool)
        maps.append(
            RangedMap(
                layer.name,
                bits,
                None if passed else observed.samples[layer.name],
                kernels,
                layer.tied,
                1.0 if isinstance(layer, FloatPool) and layer.mode == "max" else growth,
                _ceiling(layer),
            )
        )
    ranges = choose_ranges(maps, observed.squares)
    room = {} if options.method == "paper" else {"room": 1.0}  # nothing grows without training
    for layer in network.layers:
        if isinstance(layer, Sum) and not layer.relu:
            peaks = [
                float((np.abs(scale) * group_peak(term.weight, 1)).max()) * before
                for term in layer.terms
                for scale in [term.affine()[0]]
                for before in [ranges[term.input]]
            ]
            ranges[layer.name] = result_range(peaks, **room)
    return ranges


def _kernels(network: FloatNetwork, layer: Sum, term: Term, options: Options) -> Kernels:
    bits = _weight_bits(network, layer, term, options)
    peak = group_peak(term.weight, options.group)
    normalized = term.weight / per_kernel(peak, term.weight)
    scale = (term.affine()[0] * peak).astype(np.float32)
    gamma = None if term.norm is None else term.norm.gamma
    freedom = _freedom(network, layer, term, options)
    return Kernels(term.input, normalized, scale, bits, gamma, freedom)


def _freedom(network: FloatNetwork, layer: Sum, term: Term, options: Options) -> Freedom | None:
    """What a term's weights may be divided by: a result's range is a power of two itself."""
    if options.method == "paper" or not layer.relu:
        return None
    entry = any(term.input == given.name for given in network.inputs)
    given = options.input_bits if entry else options.activation_bits
    return Freedom.of(given, _weight_bits(network, layer, term, options), options.activation_bits)


def _weight_bits(network: FloatNetwork, layer: Sum, term: Term, options: Options) -> int:
    first = any(term.input == entry.name for term in layer.terms for entry in network.inputs)
    if not layer.relu and options.last_weight_bits is not None:
        return options.last_weight_bits
    if first and options.first_weight_bits is not None:
        return options.first_weight_bits
    return options.weight_bits


# -- the quantized network -------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Folded:
    """Eq. 7 and 8 of a term.

    ``weight``: multiples of ``2**-(bits-1)``, to be multiplied by ``2**exponent``; ``bias``: over
    the range of the map.
    """

    weight: Array
    bias: Array
    exponent: int = 0


class _Builder:
    """Quantizes layer by layer, each on the codes that those before it give."""

    def __init__(
        self,
        network: FloatNetwork,
        options: Options,
        observed: _Observed,
        ranges: Mapping[str, float],
        borders: Mapping[str, _Border],
    ) -> None:
        self.network, self.options, self.observed = network, options, observed
        self.ranges, self.borders = ranges, borders
        self.exact = options.method == "corrected"
        self.units = {name: border.unit for name, border in borders.items()}
        self.names: dict[str, str] = {}
        self.types: dict[str, ir.MapType] = {}
        self.layers: list[ir.Layer] = []
        self.codes: dict[str, Array] = {}  # as stored, by the float network's names
        self.count = 0

    def run(self, images: Mapping[str, Array]) -> Quantized:
        """Quantize."""
        self.count = len(next(iter(images.values())))
        inputs = []
        for i, entry in enumerate(self.network.inputs):
            border = self.borders[entry.name]
            name = self.names[entry.name] = f"x{i}"
            self.types[name] = border.kind
            inputs.append(ir.Input(name, border.kind, entry.shape, border.quantize))
            self.codes[entry.name] = border.quantize.apply(images[entry.name], entry.name)
        dead = self.network.last_readers()
        for layer in self.network.layers:
            if isinstance(layer, Sum):
                self.sum(layer)
            else:
                self.plain(layer)
            for name in dead[layer.name]:
                self.codes.pop(name, None)
        outputs = [
            ir.Output(self.names[out.value], out.shape, self.leaving(out.value))
            for out in self.network.outputs
        ]
        graph = ir.Graph(inputs, self.layers, outputs)
        return Quantized(graph, {ours: theirs for theirs, ours in self.names.items()})

    def append(self, layer: FloatLayer, made: ir.Layer) -> None:
        """Append a layer of the graph."""
        self.layers.append(made)
        self.names[layer.name] = made.name
        kind = self.types[made.name] = ir._result_type(made, self.types)
        if kind.bits == RAW_BITS:
            self.units[layer.name] = self.ranges[layer.name]
        elif isinstance(made, ir.Pool) and made.requant is None:
            self.units[layer.name] = self.units[layer.inputs[0]]
        else:
            growth = 2**kind.bits / (2**kind.bits - 1) if self.exact else 1.0
            self.units[layer.name] = self.ranges[layer.name] * growth

    def leaving(self, value: str) -> Dequantize:
        """How a map becomes numbers again."""
        kind, unit = self.types[self.names[value]], self.units[value]
        if kind.bits != RAW_BITS:
            return Dequantize(scale=(float(np.float32(unit * 2.0**-kind.bits)),))
        (made,) = [layer for layer in self.layers if layer.name == self.names[value]]
        assert isinstance(made, ir.Conv)
        return Dequantize(scale=(unit * 2.0 ** -self.grid(made.terms),))

    def grid(self, terms: Sequence[ir.ConvTerm]) -> int:
        """Give the exponent of the grid on which terms are added."""
        term = min(terms, key=lambda term: term.shift)
        return self.types[term.input].bits + term.weight_bits - 1 + term.shift

    def stored(self, name: str, chunk: slice) -> Array:
        """Give a map's codes as eq. 5 takes them, ``(code - zero) / 2**bits``, float32."""
        kind = self.types[self.names[name]]
        steps = self.codes[name][chunk].astype(np.float32) - kind.zero_point
        return np.asarray(steps / 2**kind.bits)

    def chunks(self) -> list[slice]:
        """Give the parts of the calibration images that are computed together."""
        return _chunks(self.network, self.count)

    # -- layers --

    def plain(self, layer: FloatPool | Addition) -> None:
        """Append a pool or an addition; its codes are the graph's own."""
        bits, name = self.options.activation_bits, f"{layer.kind}{len(self.layers)}"
        sources = [self.names[source] for source in layer.inputs]
        kinds = [self.types[source] for source in sources]
        made: ir.Layer
        if isinstance(layer, Addition):
            grid = max(kind.bits for kind in kinds)
            operands = [
                ir.Operand(source, 1 << (grid - kind.bits))
                for source, kind in zip(sources, kinds, strict=True)
            ]
            made = ir.Add(name, operands, ir.Requant.eq5(bits, grid))
        else:
            requant = ir.Requant.eq5(bits, kinds[0].bits) if layer.mode == "avg" else None
            made = ir.Pool(
                name,
                layer.mode,
                sources[0],
                layer.kernel,
                layer.stride,
                layer.padding,
                layer.count_include_pad,
                requant,
            )
        values = dict(zip(sources, (self.codes[source] for source in layer.inputs), strict=True))
        self.append(layer, made)
        parts = [
            ir.evaluate_layer(
                made, self.types, {n: v[chunk].astype(np.int64) for n, v in values.items()}
            ).astype(np.uint8)
            for chunk in self.chunks()
        ]
        self.codes[layer.name] = np.concatenate(parts)

    def sum(self, layer: Sum) -> None:
        """Fold a layer's terms, append it, and give its codes."""
        bits = [_weight_bits(self.network, layer, term, self.options) for term in layer.terms]
        kinds = [self.types[self.names[term.input]] for term in layer.terms]
        folded = [self.fold(layer, term, w) for term, w in zip(layer.terms, bits, strict=True)]
        running, kept = zip(*folded, strict=True)
        grids = [
            kind.bits + width - 1 - fold.exponent
            for kind, width, fold in zip(kinds, bits, kept, strict=True)
        ]
        residual_bits = self.types[self.names[layer.residual]].bits if layer.residual else 0
        grid = max(*grids, residual_bits)
        terms = [
            self.term(term, fold.weight, width, grid - own)
            for term, fold, width, own in zip(layer.terms, kept, bits, grids, strict=True)
        ]
        bias = round_bias(_total([fold.bias for fold in kept]), grid)
        residual = None
        if layer.residual:
            residual = ir.Residual(self.names[layer.residual], grid - residual_bits)
        width = self.options.activation_bits
        requant = ir.Requant.eq5(width, grid) if layer.relu else None
        made = ir.Conv(f"conv{len(self.layers)}", terms, bias, requant, residual)
        if layer.relu:
            self.codes[layer.name] = self.requantized(layer, running, grid, width)
        self.append(layer, made)

    def term(self, term: Term, weight: Array, bits: int, shift: int) -> ir.ConvTerm:
        """Make a term of the graph."""
        read = self.names[term.input]
        codes = np.rint(weight * 2 ** (bits - 1)).astype(np.int8)
        if term.dense:
            codes = codes.reshape(len(codes), *self.types[read].shape)
        return ir.ConvTerm(
            read, codes, bits, term.stride, term.padding, term.dilation, term.groups, shift
        )

    def requantized(self, layer: Sum, folded: Sequence[_Folded], grid: int, bits: int) -> Array:
        """Give the codes of a layer on the calibration images."""
        steps = 2.0**grid
        bias = (round_bias(_total([fold.bias for fold in folded]), grid) / steps).astype(np.float32)
        parts = []
        for chunk in self.chunks():
            total: Any = bias[:, None, None]
            for term, fold in zip(layer.terms, folded, strict=True):
                weight = fold.weight * 2.0**fold.exponent
                total = total + convolve(self.stored(term.input, chunk), weight, term)
            if layer.residual:
                total = total + self.stored(layer.residual, chunk)
            top = np.float32(2**bits - 1)
            parts.append(np.rint(np.clip(total, 0, 1) * top).astype(np.uint8))
        return np.concatenate(parts)

    # -- eq. 6 to 8 --

    def fold(self, layer: Sum, term: Term, bits: int) -> tuple[_Folded, _Folded]:
        """Give a term's weights and bias, by the statistics of these images and as they are kept.

        They differ where moving averages do: these keep the unbiased variance.
        """
        peak = group_peak(term.weight, self.options.group)
        normalized = term.weight / per_kernel(peak, term.weight)
        found = _Moments()
        if term.norm is not None or self.exact:
            for chunk in self.chunks():
                found.add(convolve(self.stored(term.input, chunk), normalized, term))
        span, unit = self.ranges[layer.name], self.units[term.input]
        if self.exact:
            freedom = _freedom(self.network, layer, term, self.options)
            both = self.corrected(term, bits, peak, normalized, found, span, unit, freedom)
            return both, both
        if term.norm is None:
            scale = peak * unit / span
            both = _Folded(quantize_weight(normalized, scale, bits), term.bias / span)
            return both, both
        unbiased = found.count / max(found.count - 1, 1)
        running, kept = (
            self.by_statistics(term.norm, bits, normalized, found.mean, variance, span)
            for variance in (found.variance, found.variance * unbiased)
        )
        return running, kept

    def by_statistics(
        self, norm: Any, bits: int, normalized: Array, mean: Array, variance: Array, span: float
    ) -> _Folded:
        """Eq. 7 with given statistics of conv(x, W^)."""
        scale = norm.gamma / span / np.sqrt(variance + norm.epsilon)
        return _Folded(quantize_weight(normalized, scale, bits), norm.beta / span - scale * mean)

    def corrected(
        self,
        term: Term,
        bits: int,
        peak: Array,
        normalized: Array,
        found: _Moments,
        span: float,
        unit: float,
        freedom: Freedom | None,
    ) -> _Folded:
        """Eq. 7 with the model's own statistics, and what quantization changed taken up."""
        given, half = self.observed.moments[term.name], 2 ** (bits - 1)
        gain, bias = term.affine()
        # Of conv(x, W^) with x in real units, before and after quantization.
        before = given.variance / np.square(peak.astype(np.float64)) + _TINY
        after = found.variance * unit**2 + _TINY
        scale = gain * peak * np.sqrt(np.clip(before / after, 1 / DRIFT, DRIFT)) * (unit / span)
        exponent = 0
        if freedom is not None:
            gamma = None if term.norm is None else term.norm.gamma
            exponent = freedom.exponent(normalized * per_kernel(scale, normalized), bits, gamma)
        weight = quantize_weight(normalized, scale * (half / (half - 1) / 2.0**exponent), bits)
        wanted = (bias + gain * given.mean) / span
        mean = product_of_means(weight, self.means(term), term) * 2.0**exponent
        return _Folded(weight, wanted - mean, exponent)

    def means(self, term: Term) -> Array:
        """Give the means of what a term's weights meet on the calibration images."""
        return _total(
            [
                mean_windows(self.stored(term.input, chunk), term)
                * ((chunk.stop - chunk.start) / self.count)
                for chunk in self.chunks()
            ]
        )


def _total(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
