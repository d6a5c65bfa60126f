"""The integer layer graph and its NumPy evaluation, which is the meaning of a network.

A :class:`Graph` is what a frontend produces and what every later stage reads. Its values are maps
of unsigned codes: a code ``c`` of a map with zero point ``z`` stands for ``c - z`` steps. All
arithmetic is on integers; where a division rounds, it rounds half to even. :func:`evaluate` runs a
graph in int64 and is the specification to which every other engine is held, code for code.

Source of the arithmetic: Sie et al., TCAD 2022, eq. 5 to 8, in the integer form::

    acc  = sum over terms of (conv(codes - z, weights) << term.shift) + bias + (residual << shift)
    code = clamp(round_half_even(acc * multiplier / 2**shift) + zero_point, low, high)

A network quantized by eq. 5 has multiplier ``2**bits - 1``, zero point 0 and the full range: the
machine then needs no multiplier (a shift, a subtraction, a rounding), see :attr:`Requant.native`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, MarsError
from mars_runtime.maps import RAW_BITS, MapType
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.rounding import MAX_SHIFT, divide_half_even

__all__ = [
    "EXACT",
    "Add",
    "Conv",
    "ConvTerm",
    "Graph",
    "GraphError",
    "Input",
    "Layer",
    "MapType",
    "Operand",
    "Output",
    "Pool",
    "Requant",
    "Residual",
    "evaluate",
    "evaluate_values",
]

IntArray: TypeAlias = npt.NDArray[Any]


EXACT = 2**24  # float32 holds every integer up to here


class GraphError(MarsError, ValueError):
    """A graph contradicts itself."""


def _int8_array(value: npt.ArrayLike) -> IntArray:
    return _array(value, np.int8)


def _int32_array(value: npt.ArrayLike) -> IntArray:
    return _array(value, np.int32)


def _array(value: npt.ArrayLike, dtype: npt.DTypeLike) -> IntArray:
    """Give a read-only array of the type, or refuse values that do not fit it."""
    given = np.asarray(value)
    array: IntArray = given.astype(dtype, order="C")
    if not np.array_equal(array, given):
        raise GraphError(f"values do not fit {np.dtype(dtype)}")
    array.flags.writeable = False
    return array


def _array_repr(array: IntArray) -> str:
    return f"{array.dtype}{list(array.shape)}"


_BY_VALUE = attrs.cmp_using(eq=np.array_equal)


@attrs.frozen
class Requant:
    """Requantization of accumulators to codes.

    ``code = clamp(round_half_even(acc * multiplier / (count * 2**shift)) + zero_point, low, high)``
    where ``count`` is 1, or the number of codes that an average pool sums.

    Parameters
    ----------
    multiplier, shift : int32 array, int8 array
        One for all channels (length 1) or one per output channel. ``0 <= shift <= 62``.
    bits, zero_point : int
        Width and zero point of the resulting codes.
    low, high : int
        Clamp of the codes, within ``0 .. 2**bits - 1``; a ReLU is ``low = zero_point``.
    """

    multiplier: IntArray = attrs.field(converter=_int32_array, eq=_BY_VALUE, repr=_array_repr)
    shift: IntArray = attrs.field(converter=_int8_array, eq=_BY_VALUE, repr=_array_repr)
    bits: int
    zero_point: int
    low: int
    high: int

    @classmethod
    def eq5(cls, bits: int, shift: int) -> Requant:
        """Eq. 5 for accumulators on the grid ``2**-shift``."""
        top = 2**bits - 1
        return cls([top], [shift], bits, 0, 0, top)

    @property
    def native(self) -> bool:
        """Whether this is eq. 5, which the machine does by shift and subtraction."""
        top = 2**self.bits - 1
        return (
            self.multiplier.size == self.shift.size == 1
            and int(self.multiplier[0]) == top
            and (self.zero_point, self.low, self.high) == (0, 0, top)
        )

    def apply(self, acc: IntArray, count: int | IntArray = 1) -> IntArray:
        """Requantize accumulators ``[N, C, H, W]`` (int64) to codes (int64)."""
        multiplier = self.multiplier.astype(np.int64)[:, None, None]
        divisor = np.int64(1) << self.shift.astype(np.int64)[:, None, None]
        code = divide_half_even(acc * multiplier, divisor * count) + self.zero_point
        return np.asarray(np.clip(code, self.low, self.high))

    def __str__(self) -> str:
        if self.native:
            return f"eq5 >>{int(self.shift[0])} u{self.bits}"
        per = "tensor" if self.multiplier.size == 1 else "channel"
        return f"multiplier per {per} u{self.bits} z{self.zero_point} clamp {self.low}..{self.high}"


@attrs.frozen
class ConvTerm:
    """One convolution whose result is added into the accumulators of a :class:`Conv`.

    Parameters
    ----------
    input : str
        The map that it reads.
    weight : int8 array ``[O, C / groups, KH, KW]``
        Weight codes.
    weight_bits : int
        4 or 8.
    stride, dilation : (int, int)
        Vertical, horizontal.
    padding : (int, int, int, int)
        Top, left, bottom, right, in pixels of the input's zero point.
    shift : int
        Left shift that aligns this term's grid with the layer's.
    """

    input: str
    weight: IntArray = attrs.field(converter=_int8_array, eq=_BY_VALUE, repr=_array_repr)
    weight_bits: int = 8
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shift: int = 0

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return (self.weight.shape[2], self.weight.shape[3])


@attrs.frozen
class Residual:
    """A map that is added to the accumulators, shifted to their grid: ``(code - z) << shift``."""

    input: str
    shift: int


@attrs.frozen
class Conv:
    """Convolutions into the same accumulators, bias, residual, one requantization.

    A dense layer is a convolution whose kernel covers its whole input. ``requant`` is None where
    the accumulators themselves are the result (a network's logits).
    """

    name: str
    terms: tuple[ConvTerm, ...] = attrs.field(converter=tuple[ConvTerm, ...])
    bias: IntArray = attrs.field(converter=_int32_array, eq=_BY_VALUE, repr=_array_repr)
    requant: Requant | None = None
    residual: Residual | None = None

    kind = "conv"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The maps that it reads, the residual last."""
        names = tuple(term.input for term in self.terms)
        return names + ((self.residual.input,) if self.residual else ())


@attrs.frozen
class Pool:
    """Max or average pooling.

    A max pool passes codes (padding never wins) and has no requant. An average pool requantizes
    the sum of its codes divided by their count (with ``count_include_pad`` the padding counts).
    """

    name: str
    mode: Literal["max", "avg"]
    input: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = False
    requant: Requant | None = None

    @property
    def kind(self) -> str:
        """``maxpool`` or ``avgpool``."""
        return f"{self.mode}pool"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The map that it reads."""
        return (self.input,)


@attrs.frozen
class Operand:
    """A map and the integer that its codes are multiplied with before an :class:`Add` sums."""

    input: str
    multiplier: int


@attrs.frozen
class Add:
    """Sum of one or two maps on a common grid, requantized (one operand: a requantization)."""

    name: str
    operands: tuple[Operand, ...] = attrs.field(converter=tuple[Operand, ...])
    requant: Requant

    kind = "add"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The maps that it reads."""
        return tuple(operand.input for operand in self.operands)


Layer: TypeAlias = Conv | Pool | Add


@attrs.frozen
class Input:
    """A map that enters: its type, and how the array that the caller passes becomes codes.

    Parameters
    ----------
    shape : tuple of int
        What the caller passes per image: ``(C, H, W)``, or ``(C,)`` for a 1x1 map.
    quantize : Quantize
        From the caller's array to stored codes.
    """

    name: str
    type: MapType
    shape: tuple[int, ...]
    quantize: Quantize


@attrs.frozen
class Output:
    """A map that leaves: ``shape`` per image and the conversion to what the caller receives."""

    value: str
    shape: tuple[int, ...]
    dequantize: Dequantize


@attrs.frozen
class Graph:
    """Integer layers in topological order.

    Values are named by position, never by an importer: inputs ``x0, x1, ...``; layer ``i`` of kind
    ``conv`` defines ``conv<i>``, and so on. The same network gives the same graph from any
    importer.

    Raises
    ------
    GraphError
        If a name is unknown or out of order, or shapes, widths or ranges contradict each other.
    """

    inputs: tuple[Input, ...] = attrs.field(converter=tuple[Input, ...])
    layers: tuple[Layer, ...] = attrs.field(converter=tuple[Layer, ...])
    outputs: tuple[Output, ...] = attrs.field(converter=tuple[Output, ...])
    types: Mapping[str, MapType] = attrs.field(init=False, eq=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.outputs)  # arrays have none; graphs that are alike are told apart by value

    def __attrs_post_init__(self) -> None:
        types: dict[str, MapType] = {}
        for i, entry in enumerate(self.inputs):
            _require(entry.name == f"x{i}", entry.name, f"input {i} must be named x{i}")
            _require(
                entry.type.bits in (4, 8)
                and 0 <= entry.type.zero_point < 2**entry.type.bits
                and int(np.prod(entry.shape)) == int(np.prod(entry.type.shape)),
                entry.name,
                f"type {entry.type} does not fit shape {entry.shape}",
            )
            types[entry.name] = entry.type
        for i, layer in enumerate(self.layers):
            expected = f"{layer.kind}{i}"
            _require(layer.name == expected, layer.name, f"layer {i} must be named {expected}")
            for name in layer.inputs:
                _require(name in types, layer.name, f"reads {name!r}, which is not defined before")
                _require(types[name].bits != RAW_BITS, layer.name, f"reads accumulators {name!r}")
            types[layer.name] = _result_type(layer, types)
        for out in self.outputs:
            _require(out.value in types, out.value, "an output that is not defined")
            _require(
                int(np.prod(out.shape)) == int(np.prod(types[out.value].shape)),
                out.value,
                f"type {types[out.value]} does not fit output shape {out.shape}",
            )
        _require(bool(self.outputs), "graph", "has no output")
        object.__setattr__(self, "types", types)

    def consumers(self) -> dict[str, tuple[str, ...]]:
        """For each value, the layers that read it, in order."""
        found: dict[str, list[str]] = {name: [] for name in self.types}
        for layer in self.layers:
            for name in dict.fromkeys(layer.inputs):
                found[name].append(layer.name)
        return {name: tuple(layers) for name, layers in found.items()}

    def macs(self) -> int:
        """Multiply-accumulates of the dense network, per image."""
        return sum(layer_macs(layer, self.types) for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(_text(self))


def layer_macs(layer: Layer, types: Mapping[str, MapType]) -> int:
    """Dense multiply-accumulates of one layer, per image."""
    if not isinstance(layer, Conv):
        return 0
    out = types[layer.name]
    return sum(term.weight.size * out.height * out.width for term in layer.terms)


def _require(good: bool, where: str, problem: str) -> None:
    if not good:
        raise GraphError(problem, where=where)


def window_size(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1
) -> int:
    """Output positions of a sliding window, rounded down."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _window_shape(
    source: MapType,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    top, left, bottom, right = padding
    return (
        window_size(source.height, kernel[0], stride[0], top, bottom, dilation[0]),
        window_size(source.width, kernel[1], stride[1], left, right, dilation[1]),
    )


def _check_requant(where: str, requant: Requant, channels: int) -> None:
    sizes = {requant.multiplier.size, requant.shift.size}
    _require(sizes <= {1, channels}, where, f"requantizes {sizes} channels of {channels}")
    _require(requant.bits in (4, 8), where, f"codes of {requant.bits} bits")
    _require(
        bool(np.all(requant.shift >= 0) and np.all(requant.shift <= MAX_SHIFT)),
        where,
        f"requantization shift is not within 0..{MAX_SHIFT}",
    )
    top = 2**requant.bits - 1
    _require(
        0 <= requant.low <= requant.high <= top and 0 <= requant.zero_point <= top,
        where,
        f"clamp {requant.low}..{requant.high}, zero point {requant.zero_point}, top {top}",
    )


def _result_type(layer: Layer, types: Mapping[str, MapType]) -> MapType:
    if isinstance(layer, Conv):
        return _conv_type(layer, types)
    if isinstance(layer, Pool):
        return _pool_type(layer, types)
    shapes = {types[name].shape for name in layer.inputs}
    _require(len(shapes) == 1 and len(layer.operands) <= 2, layer.name, f"adds shapes {shapes}")
    worst = sum(_reach(types[o.input]) * abs(o.multiplier) for o in layer.operands)
    _require(worst < 2**31, layer.name, f"sums may reach {worst}, above 2**31 - 1")
    channels, height, width = shapes.pop()
    _check_requant(layer.name, layer.requant, channels)
    _require(
        layer.requant.multiplier.size == 1 == layer.requant.shift.size,
        layer.name,
        "an addition requantizes all channels alike",
    )
    return MapType(channels, height, width, layer.requant.bits, layer.requant.zero_point)


def _conv_type(layer: Conv, types: Mapping[str, MapType]) -> MapType:
    where = layer.name
    _require(bool(layer.terms), where, "has no term")
    shapes = set()
    for term in layer.terms:
        source, weight = types[term.input], term.weight
        _require(weight.ndim == 4 and weight.size > 0, where, f"weight shape {weight.shape}")
        out_channels, group_channels = weight.shape[:2]
        _require(
            term.groups >= 1
            and out_channels % term.groups == 0
            and group_channels * term.groups == source.channels,
            where,
            f"weight {weight.shape} in {term.groups} groups on {source.channels} channels",
        )
        _require(
            min(*term.stride, *term.dilation) >= 1 and min(term.padding) >= 0,
            where,
            f"stride {term.stride}, dilation {term.dilation}, padding {term.padding}",
        )
        limit = 2 ** (term.weight_bits - 1)
        _require(
            term.weight_bits in (4, 8)
            and -limit <= int(weight.min())
            and int(weight.max()) < limit,
            where,
            f"weight codes do not fit {term.weight_bits} bits",
        )
        _require(0 <= term.shift <= 31, where, f"alignment shift {term.shift}")
        shape = _window_shape(source, term.kernel, term.stride, term.padding, term.dilation)
        _require(min(shape) >= 1, where, f"kernel {term.kernel} is larger than its input {source}")
        shapes.add((out_channels, *shape))
    _require(len(shapes) == 1, where, f"terms of different shapes {sorted(shapes)}")
    channels, height, width = shapes.pop()
    _require(layer.bias.shape == (channels,), where, f"bias of shape {layer.bias.shape}")
    if layer.residual:
        _require(
            types[layer.residual.input].shape == (channels, height, width)
            and 0 <= layer.residual.shift <= 31,
            where,
            f"residual {types[layer.residual.input]} on {channels}x{height}x{width}",
        )
    worst = worst_accumulator(layer, types)
    _require(worst < 2**31, where, f"accumulators may reach {worst}, above 2**31 - 1")
    if layer.requant is None:
        return MapType(channels, height, width, RAW_BITS)
    _check_requant(where, layer.requant, channels)
    return MapType(channels, height, width, layer.requant.bits, layer.requant.zero_point)


def worst_accumulator(layer: Conv, types: Mapping[str, MapType]) -> int:
    """Largest magnitude that any accumulator of a layer can reach, in any order of summation.

    Taken over stored codes, as the machine accumulates: the correction of a zero point is part of
    the bias there.
    """
    worst = np.abs(layer.bias.astype(np.int64))
    for term in layer.terms:
        source = types[term.input]
        magnitude = np.abs(term.weight.astype(np.int64)).sum(axis=(1, 2, 3))
        worst = worst + ((magnitude * _top(source)) << term.shift)
    if layer.residual:
        worst = worst + (_top(types[layer.residual.input]) << layer.residual.shift)
    return int(worst.max())


def _top(source: MapType) -> int:
    """Bound a stored code plus the correction of its zero point."""
    return int(2**source.bits - 1 + source.zero_point)


def _reach(source: MapType) -> int:
    """Bound the steps that a code stands for."""
    return max(source.zero_point, int(2**source.bits - 1 - source.zero_point))


def _pool_type(layer: Pool, types: Mapping[str, MapType]) -> MapType:
    source = types[layer.input]
    _require(
        min(*layer.stride, *layer.kernel) >= 1
        and min(layer.padding) >= 0
        and max(layer.padding[0], layer.padding[2]) < layer.kernel[0]
        and max(layer.padding[1], layer.padding[3]) < layer.kernel[1],
        layer.name,
        f"kernel {layer.kernel}, stride {layer.stride}, padding {layer.padding}",
    )
    height, width = _window_shape(source, layer.kernel, layer.stride, layer.padding)
    _require(min(height, width) >= 1, layer.name, f"window {layer.kernel} larger than {source}")
    if layer.mode == "max":
        _require(layer.requant is None, layer.name, "a max pool passes codes, it has no requant")
        return attrs.evolve(source, height=height, width=width)
    _require(layer.requant is not None, layer.name, "an average pool needs a requantization")
    assert layer.requant is not None
    _check_requant(layer.name, layer.requant, source.channels)
    _require(
        layer.requant.multiplier.size == 1 == layer.requant.shift.size,
        layer.name,
        "an average pool requantizes all channels alike",
    )
    count = layer.kernel[0] * layer.kernel[1]
    worst = count * _reach(source)
    _require(worst < 2**31, layer.name, f"sums may reach {worst}, above 2**31 - 1")
    divisor = count << int(layer.requant.shift[0])
    _require(divisor < 2**62, layer.name, f"divides by {divisor}, above 2**62")
    return MapType(source.channels, height, width, layer.requant.bits, layer.requant.zero_point)


# -- evaluation ------------------------------------------------------------------------------------


def evaluate(graph: Graph, inputs: Mapping[str, npt.ArrayLike]) -> tuple[npt.NDArray[Any], ...]:
    """Evaluate a graph on a batch.

    Parameters
    ----------
    inputs : mapping of str to array
        For each input ``x<i>`` an array ``[N, *shape]`` of the dtype that its quantizer takes.

    Returns
    -------
    tuple of arrays
        The outputs in order, ``[N, *shape]``.

    Raises
    ------
    InputError
        If an array is missing, of another shape or dtype, or holds NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from tvm_mars import zoo
    >>> (logits,) = evaluate(zoo.load("digits"), {"x0": np.zeros((2, 1, 16, 16), np.float32)})
    >>> logits.shape
    (2, 10)
    """
    codes = {}
    for entry in graph.inputs:
        if entry.name not in inputs:
            raise InputError(f"missing; given are {sorted(inputs)}", where=f"input {entry.name}")
        array = np.asarray(inputs[entry.name])
        if array.shape[1:] != entry.shape or array.ndim != len(entry.shape) + 1:
            raise InputError(
                f"shape {array.shape}, expected (N, {', '.join(map(str, entry.shape))})",
                where=f"input {entry.name}",
            )
        stored = entry.quantize.apply(array, entry.name)
        codes[entry.name] = stored.reshape(-1, *entry.type.shape)
    values = evaluate_values(graph, codes)
    return tuple(
        out.dequantize.apply(values[out.value]).reshape(-1, *out.shape) for out in graph.outputs
    )


def evaluate_values(graph: Graph, codes: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Evaluate on stored codes and give every value as int64 ``[N, C, H, W]``."""
    values = {name: np.asarray(array, np.int64) for name, array in codes.items()}
    for layer in graph.layers:
        values[layer.name] = evaluate_layer(layer, graph.types, values)
    return values


def evaluate_layer(
    layer: Layer, types: Mapping[str, MapType], values: Mapping[str, IntArray]
) -> IntArray:
    """Evaluate one layer on the int64 codes of its inputs."""
    if isinstance(layer, Conv):
        acc = accumulate(layer, types, values)
        return acc if layer.requant is None else layer.requant.apply(acc)
    if isinstance(layer, Pool):
        return _pool(layer, types[layer.input], values[layer.input])
    total = sum(
        (values[operand.input] - types[operand.input].zero_point) * operand.multiplier
        for operand in layer.operands
    )
    return layer.requant.apply(np.asarray(total))


def accumulate(
    layer: Conv, types: Mapping[str, MapType], values: Mapping[str, IntArray]
) -> IntArray:
    """Give a layer's accumulators before requantization, int64 ``[N, O, H, W]``."""
    acc: IntArray = layer.bias.astype(np.int64)[:, None, None]
    for term in layer.terms:
        steps = values[term.input] - types[term.input].zero_point
        acc = acc + (_convolve(steps, term) << term.shift)
    if layer.residual:
        zero = types[layer.residual.input].zero_point
        acc = acc + ((values[layer.residual.input] - zero) << layer.residual.shift)
    return acc


def _pad(steps: IntArray, padding: Sequence[int], fill: int) -> IntArray:
    top, left, bottom, right = padding
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    return np.pad(steps, widths, constant_values=fill)


def _taps(
    padded: IntArray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    out: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> Iterator[tuple[int, int, IntArray]]:
    """Yield for each tap (row, column) the input pixels that meet it, ``[N, C, H_out, W_out]``."""
    for r in range(kernel[0]):
        for c in range(kernel[1]):
            y, x = r * dilation[0], c * dilation[1]
            yield (
                r,
                c,
                padded[
                    :,
                    :,
                    y : y + (out[0] - 1) * stride[0] + 1 : stride[0],
                    x : x + (out[1] - 1) * stride[1] + 1 : stride[1],
                ],
            )


def _convolve(steps: IntArray, term: ConvTerm) -> IntArray:
    padded = _pad(steps, term.padding, 0)
    images, channels, height, width = padded.shape
    out = tuple(
        window_size(size, k, s, 0, 0, d)
        for size, k, s, d in zip(
            (height, width), term.kernel, term.stride, term.dilation, strict=True
        )
    )
    weight = term.weight.astype(np.int64)
    grouped = weight.reshape(term.groups, -1, *weight.shape[1:])
    acc = np.zeros((images, term.groups, grouped.shape[1], out[0] * out[1]), np.int64)
    for r, c, pixels in _taps(padded, term.kernel, term.stride, (out[0], out[1]), term.dilation):
        columns = pixels.reshape(images, term.groups, channels // term.groups, -1)
        acc += grouped[None, :, :, :, r, c] @ columns
    return acc.reshape(images, weight.shape[0], *out)


def _pool(layer: Pool, source: MapType, codes: IntArray) -> IntArray:
    out = _window_shape(source, layer.kernel, layer.stride, layer.padding)
    if layer.mode == "max":
        padded = _pad(codes, layer.padding, -1)  # below every code
        best = np.full((*codes.shape[:2], *out), -1, np.int64)
        for _, _, pixels in _taps(padded, layer.kernel, layer.stride, out):
            best = np.maximum(best, pixels)
        return best
    assert layer.requant is not None
    padded = _pad(codes - source.zero_point, layer.padding, 0)
    inside = np.ones((1, 1, *codes.shape[2:]), np.int64)
    inside = _pad(inside, layer.padding, int(layer.count_include_pad))
    total = np.zeros((*codes.shape[:2], *out), np.int64)
    count = np.zeros((1, 1, *out), np.int64)
    for _, _, pixels in _taps(padded, layer.kernel, layer.stride, out):
        total += pixels
    for _, _, pixels in _taps(inside, layer.kernel, layer.stride, out):
        count += pixels
    return layer.requant.apply(total, count)


# -- text ------------------------------------------------------------------------------------------


def _text(graph: Graph) -> Iterator[str]:
    for entry in graph.inputs:
        yield f"{entry.name}: {entry.type} = input {entry.quantize}"
    for layer in graph.layers:
        yield f"{layer.name}: {graph.types[layer.name]} = {_layer_text(layer)}"
    for out in graph.outputs:
        yield f"return {out.value} {out.dequantize}"


def _layer_text(layer: Layer) -> str:
    if isinstance(layer, Pool):
        return f"{layer.mode}pool({layer.input}) {layer.kernel} stride {layer.stride}"
    if isinstance(layer, Add):
        terms = (f"{operand.multiplier}*{operand.input}" for operand in layer.operands)
        return f"{' + '.join(terms)}; {layer.requant}"
    parts = [_term_text(term) for term in layer.terms]
    if layer.residual:
        parts.append(f"({layer.residual.input} << {layer.residual.shift})")
    return f"{' + '.join(parts)}; {layer.requant or 'accumulators'}"


def _term_text(term: ConvTerm) -> str:
    kernel = f"{term.kernel[0]}x{term.kernel[1]}"
    groups = f" groups {term.groups}" if term.groups > 1 else ""
    shift = f" << {term.shift}" if term.shift else ""
    return f"conv({term.input}, {kernel} w{term.weight_bits} stride {term.stride}{groups}){shift}"
