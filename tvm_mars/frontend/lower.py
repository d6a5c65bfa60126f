"""From the specs of a region to a :class:`tvm_mars.graph.Graph`.

The layers are ordered and named by a walk from the region's outputs, and its inputs by the same
walk, so that the graph does not depend on the importer or on the order of an IR's bindings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.rounding import MAX_SHIFT

from ..constraints import check_layer, check_spec
from ..graph import (
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
    window_size,
)
from .rescale import express, fixed_point, limited, rescale
from .spec import (
    AddSpec,
    AverageSpec,
    AvgPoolSpec,
    Codes,
    ConvSpec,
    DequantizeSpec,
    MaxPoolSpec,
    Quantizer,
    QuantizeSpec,
    Requantizer,
    Rescale,
    ReshapeSpec,
    Spec,
    SumSpec,
    TermSpec,
    code_range,
)

__all__ = ["Call", "Lowered", "Region", "check", "lower"]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

# The multipliers of an addition: 255 * 2**22 twice stays below 2**31 in any accumulator.
_ADD_BITS = 22


@attrs.frozen(eq=False)
class Call:
    """One spec applied to values of a region, each named by its defining entity.

    ``operators`` names the candidate operators of its chain, as the report knows them.
    """

    spec: Spec
    operands: tuple[str, ...]
    result: str
    operators: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Region:
    """What is offloaded together.

    Parameters
    ----------
    params : mapping of str to (dtype, shape per image)
        What enters, in the order of the IR's function.
    calls : sequence of Call
        In any topological order.
    results : sequence of str
        What leaves, in order.
    """

    params: Mapping[str, tuple[str, Shape]]
    calls: Sequence[Call]
    results: Sequence[str]


@attrs.frozen(eq=False)
class Lowered:
    """A graph, and how it is connected.

    Parameters
    ----------
    params : tuple of int
        For each of the graph's inputs the index of the region's parameter that feeds it.
    operators : mapping of str to tuple of str
        For each layer the operators that it comes from (see :class:`Call`).
    """

    graph: Graph
    params: tuple[int, ...]
    operators: Mapping[str, tuple[str, ...]]


@attrs.frozen
class _Map:
    """A value that is a map: its name in the graph, its shape for the caller, its lowest code."""

    name: str
    shape: Shape
    low: int
    dtype: str


@attrs.frozen
class _Numbers:
    """A value of float32 numbers: a map or accumulators, and what they stand for."""

    name: str
    shape: Shape
    dequantize: Dequantize


def lower(region: Region, arch: MarsArch) -> Lowered:
    """Lower a region.

    Raises
    ------
    UnsupportedError
        If a layer breaks a limit, or values inside the region cannot be codes.
    """
    return _Lowering(region, arch).run()


def check(spec: Spec, arch: MarsArch, where: str = "") -> None:
    """Check whether MARS takes a spec, before it is known what surrounds it.

    Raises
    ------
    UnsupportedError
        If not, with the reason.
    """
    if isinstance(spec, ReshapeSpec) and spec.numbers:
        check_spec(spec, where)  # whose numbers they are shows in the region
        return
    names = [f"p{i}" for i in range(len(_operand_types(spec)))]
    params = dict(zip(names, _operand_types(spec), strict=True))
    region = Region(params, [Call(spec, tuple(names), "r")], ["r"])
    try:
        lower(region, arch)
    except UnsupportedError as error:
        raise UnsupportedError(error.problem, where=where, hint=error.hint) from None


def _operand_types(spec: Spec) -> list[tuple[str, Shape]]:
    if isinstance(spec, ConvSpec):
        found = [(term.data.dtype, term.data_shape) for term in spec.terms]
        residual = [(spec.residual.dtype, spec.out_shape)] if spec.residual else []
        return found + residual
    if isinstance(spec, (AddSpec, SumSpec)):
        return [(c.dtype, shape) for c, shape in zip(spec.operands, spec.shapes, strict=True)]
    if isinstance(spec, (AverageSpec, MaxPoolSpec, ReshapeSpec, QuantizeSpec)):
        return [(spec.dtype, spec.data_shape)]
    if isinstance(spec, AvgPoolSpec):
        return [(spec.data.dtype, spec.data_shape)]
    return [(spec.codes.dtype, spec.data_shape)]


# -- numbers ---------------------------------------------------------------------------------------


def _exponent(value: float) -> int | None:
    """Give e of a power of two 2**e, else None."""
    mantissa, exponent = np.frexp(value)
    return int(exponent) - 1 if mantissa == 0.5 else None


def _shift(grid: Array, finest: Array) -> int | None:
    """Give the left shift from one grid to a finer one, if it is one for all channels."""
    exponents = {_exponent(float(ratio)) for ratio in np.unique(grid / finest)}
    shift = exponents.pop()
    return shift if not exponents and shift is not None and 0 <= shift <= 31 else None


def _stored_range(quantizer: Quantizer) -> tuple[int, int, int, int]:
    """Give (lowest code of the stored range, bits, clamp low, clamp high), in the caller's codes.

    A quantizer whose clip leaves no more than the codes of 4 bits stores 4 bits.
    """
    found = code_range(quantizer.codes.dtype)
    assert found is not None  # map_codes_are_integers
    zero = int(quantizer.codes.zero_point[0])
    # In float32, as ONNX does it: a bound may lie in the middle between two codes.
    bounds = np.asarray(quantizer.clip, np.float32) * np.float32(quantizer.factor)
    steps = np.rint(bounds / np.float32(quantizer.codes.scale[0]))
    low, high = (int(np.clip(float(step) + zero, *found)) for step in steps)
    return (*_storage(quantizer.codes.dtype, low, high), low, high)


def _storage(dtype: str, low: int, high: int) -> tuple[int, int]:
    """Give the code that is stored as 0, and the bits, of codes ``low .. high`` of a type."""
    found = code_range(dtype)
    assert found is not None  # map_codes_are_integers
    for base in (0, -8):
        if base >= found[0] and base <= low and high <= base + 15:
            return base, 4
    return found[0], 8


def _requant(quantizer: Quantizer, grid: Array) -> tuple[Requant, int]:
    """Give the requantization from accumulators on a grid, and the lowest code."""
    base, bits, low, high = _stored_range(quantizer)
    exponent = _exponent(float(grid[0])) if len(set(grid.tolist())) == 1 else None
    if quantizer.eq5 and exponent is not None and 0 <= -exponent <= MAX_SHIFT:
        return Requant.eq5(bits, -exponent), base
    real = grid * (quantizer.factor / quantizer.codes.scale[0])
    multiplier, shift = fixed_point(real)
    zero = int(quantizer.codes.zero_point[0]) - base
    if not 0 <= zero < 2**bits:
        raise UnsupportedError(f"zero point {zero + base} outside the codes of {bits} bits")
    return Requant(multiplier, shift, bits, zero, low - base, high - base), base


# -- the walk --------------------------------------------------------------------------------------


class _Lowering:
    def __init__(self, region: Region, arch: MarsArch) -> None:
        self.region = region
        self.arch = arch
        self.calls = {call.result: call for call in region.calls}
        self.values: dict[str, _Map | _Numbers] = {}
        self.inputs: list[Input] = []
        self.params: list[int] = []
        self.layers: list[Layer] = []
        self.types: dict[str, MapType] = {}
        self.operators: dict[str, tuple[str, ...]] = {}

    def run(self) -> Lowered:
        for name in self._order():
            call = self.calls[name]
            self._check_numbers(call)
            check_spec(call.spec, name)
            known = len(self.layers)
            self.values[name] = getattr(self, f"_{call.spec.kind}")(call)
            self.operators.update((layer.name, call.operators) for layer in self.layers[known:])
        outputs = [self._output(name) for name in self.region.results]
        graph = Graph(self.inputs, self.layers, outputs)
        return Lowered(graph, tuple(self.params), self.operators)

    def _order(self) -> list[str]:
        """Give the calls in depth-first order from the results, operands first."""
        order: dict[str, None] = {}
        stack = list(reversed(self.region.results))
        while stack:
            name = stack[-1]
            waiting = [
                operand
                for operand in self.calls[name].operands
                if operand in self.calls and operand not in order
            ]
            if waiting:
                stack += reversed(waiting)
                continue
            order.setdefault(stack.pop())
        return list(order)

    def _check_numbers(self, call: Call) -> None:
        for operand in call.operands:
            numbers = isinstance(self.values.get(operand), _Numbers)
            if numbers and not isinstance(call.spec, ReshapeSpec):
                raise UnsupportedError(
                    "reads numbers that are no codes inside a region", where=call.result
                )

    # -- values --

    def _param(self, name: str) -> tuple[int, str, Shape]:
        index = list(self.region.params).index(name)
        return (index, *self.region.params[name])

    def _add_input(self, index: int, kind: MapType, shape: Shape, quantize: Quantize) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(name, kind, shape, quantize))
        self.params.append(index)
        self.types[name] = kind
        return name

    def _codes(self, name: str, codes: Codes | None) -> _Map:
        """Give an operand as a map; one that enters becomes an input with the zero point read."""
        if name not in self.values:
            index, dtype, shape = self._param(name)
            low, high = code_range(dtype) or (0, 0)
            bits = 4 if high - low == 15 else 8
            # Only its readers know what code of an integer tensor is zero.
            zero = int(codes.zero_point[0]) - low if codes is not None else self._zero(name) - low
            if not 0 <= zero < 2**bits:
                raise UnsupportedError(f"zero point {zero + low} of {dtype} codes", where=name)
            kind = _map_type(shape, bits, zero, name)
            stored = self._add_input(index, kind, shape, Quantize(dtype, low, high))
            self.values[name] = _Map(stored, shape, low, dtype)
        value = self.values[name]
        assert isinstance(value, _Map)  # _check_numbers
        if codes is not None:
            zero = int(codes.zero_point[0]) - value.low
            if zero != self.types[value.name].zero_point:
                raise UnsupportedError(
                    f"reads codes whose zero is {self.types[value.name].zero_point + value.low} "
                    f"as if it were {zero + value.low}",
                    where=name,
                )
        return value

    def _zero(self, name: str) -> int:
        """Find the zero point of codes that enter a pool or reshape: that of a later reader."""
        pending, seen = [name], set()
        while pending:
            current = pending.pop()
            for call in self.region.calls:
                if current not in call.operands or call.result in seen:
                    continue
                seen.add(call.result)
                if isinstance(call.spec, (MaxPoolSpec, ReshapeSpec)) or (
                    isinstance(call.spec, AverageSpec) and call.spec.data is None
                ):
                    pending.append(call.result)
                    continue
                codes = _operand_codes(call.spec, call.operands.index(current))
                if codes is not None:
                    return int(codes.zero_point[0])
        low, _ = code_range(self.region.params[name][0]) or (0, 0)
        return low

    def _plain(self, name: str, codes: Codes | None) -> str:
        """Give an operand's map where the reader needs its rows and columns."""
        value = self._codes(name, codes)
        kind = self.types[value.name]
        if value.shape != kind.shape and (*value.shape, 1, 1) != kind.shape:
            raise UnsupportedError(f"reads {kind} as shape {value.shape}", where=name)
        return value.name

    def _layer(self, layer: Layer, kind: MapType, where: str) -> str:
        types = {name: self.types[name] for name in layer.inputs}
        check_layer(layer, {**types, layer.name: kind}, self.arch, where)
        self.layers.append(layer)
        self.types[layer.name] = kind
        return layer.name

    def _name(self, kind: str) -> str:
        return f"{kind}{len(self.layers)}"

    def _output(self, name: str) -> Output:
        value = self.values[name]
        if isinstance(value, _Numbers):
            return Output(value.name, value.shape, value.dequantize)
        return Output(value.name, value.shape, Dequantize(value.dtype, low=value.low))

    # -- one method for each kind of spec --

    def _conv(self, call: Call) -> _Map | _Numbers:
        spec: ConvSpec = call.spec  # type: ignore[assignment]
        if isinstance(spec.quantizer, Requantizer):
            return self._requantized(call, spec, spec.quantizer)
        finest, known = _finest(spec, call.result)
        terms: list[ConvTerm] = []
        bias = np.zeros(spec.out_shape[0], np.int64)
        for term, operand in zip(spec.terms, call.operands, strict=False):
            shift = _shift(term.grid, finest)
            assert shift is not None  # _finest
            terms += self._terms(term, operand, shift, spec.op)
            bias += _bias(term, finest, known)
        residual = None
        if spec.residual is not None:
            shift = _shift(spec.residual.scale, finest)
            assert shift is not None
            source = self._codes(call.operands[-1], spec.residual)
            residual = Residual(source.name, shift)
        if np.abs(bias).max() >= 2**31:
            raise UnsupportedError(
                f"Accumulators fit signed 32 bit whatever the input: a bias is "
                f"{np.abs(bias).max()}",
                where=call.result,
            )
        requant, low = _requant(spec.quantizer, finest) if spec.quantizer else (None, 0)
        layer = Conv(self._name("conv"), terms, bias, requant, residual)
        name = self._layer(layer, self._conv_type(layer), call.result)
        if requant is None:
            scale = tuple(finest.astype(np.float32).astype(float).tolist())
            scale = scale[:1] if len(set(scale)) == 1 else scale
            return _Numbers(name, spec.out_shape, Dequantize(scale=scale))
        assert spec.quantizer is not None
        return _Map(name, spec.out_shape, low, spec.quantizer.codes.dtype)

    def _requantized(self, call: Call, spec: ConvSpec, quantizer: Requantizer) -> _Map:
        """Lower a convolution of integers, whose accumulators and bias are what they are."""
        (term,) = spec.terms
        quantizer = limited(quantizer)
        bias = np.zeros(spec.out_shape[0], np.int64)
        if term.bias is not None:
            bias = bias + term.bias.astype(np.int64)
        low, high = _steps(term.data)
        weight = term.weight.reshape(len(term.weight), -1).astype(np.int64)
        ends = (weight * low, weight * high)
        lowest = bias + np.minimum(*ends).sum(1)
        highest = bias + np.maximum(*ends).sum(1)
        base, bits = _storage(quantizer.codes.dtype, quantizer.low, quantizer.high)
        if max(np.abs(lowest).max(), np.abs(highest).max()) >= 2**31:
            raise UnsupportedError(
                "Accumulators fit signed 32 bit whatever the input: they may reach "
                f"{max(np.abs(lowest).max(), np.abs(highest).max())}",
                where=call.result,
            )
        found = express(quantizer, lowest, highest, base, bits)
        layer = Conv(
            self._name("conv"),
            tuple(self._terms(term, call.operands[0], found.lift, spec.op)),
            (bias << found.lift) + found.offset,
            found.requant,
        )
        name = self._layer(layer, self._conv_type(layer), call.result)
        return _Map(name, spec.out_shape, base, quantizer.codes.dtype)

    def _terms(self, term: TermSpec, operand: str, shift: int, op: str) -> Iterator[ConvTerm]:
        """Give a term, and a second one for what a zero point moves out of -128..127."""
        weight = term.weight
        if op == "dense":
            name = self._codes(operand, term.data).name
            weight = weight.reshape(len(weight), *self.types[name].shape)
        else:
            name = self._plain(operand, term.data)
        whole = ConvTerm(
            name,
            weight if weight.dtype == np.int8 else np.clip(weight, -128, 127),
            4 if _fits(weight, 4) else 8,
            term.stride,
            term.padding,
            term.dilation,
            term.groups,
            shift,
        )
        yield whole
        if not _fits(weight, 8):
            yield attrs.evolve(whole, weight=weight - whole.weight)

    def _conv_type(self, layer: Conv) -> MapType:
        term = layer.terms[0]
        source = self.types[term.input]
        size = [
            window_size(n, k, s, before, after, d)
            for n, k, s, before, after, d in zip(
                source.shape[1:],
                term.kernel,
                term.stride,
                term.padding[:2],
                term.padding[2:],
                term.dilation,
                strict=True,
            )
        ]
        channels = len(layer.bias)
        if layer.requant is None:
            return MapType(channels, size[0], size[1], 32)
        return MapType(channels, size[0], size[1], layer.requant.bits, layer.requant.zero_point)

    def _add(self, call: Call) -> _Map:
        spec: AddSpec = call.spec  # type: ignore[assignment]
        sources = [
            self._codes(name, codes)
            for name, codes in zip(call.operands, spec.operands, strict=True)
        ]
        types = {self.types[source.name].shape for source in sources}
        if len(types) != 1:
            raise UnsupportedError(f"adds maps of shapes {sorted(types)}", where=call.result)
        scales = [float(codes.scale[0]) for codes in spec.operands]
        multipliers, grid = _common_grid(scales)
        requant, low = _requant(spec.quantizer, np.asarray([grid]))
        operands = [
            Operand(source.name, multiplier)
            for source, multiplier in zip(sources, multipliers, strict=True)
        ]
        layer = Add(self._name("add"), operands, requant)
        kind = attrs.evolve(
            self.types[sources[0].name], bits=requant.bits, zero_point=requant.zero_point
        )
        name = self._layer(layer, kind, call.result)
        return _Map(name, spec.shapes[0], low, spec.quantizer.codes.dtype)

    def _sum(self, call: Call) -> _Map:
        spec: SumSpec = call.spec  # type: ignore[assignment]
        sources = [
            self._codes(name, codes)
            for name, codes in zip(call.operands, spec.operands, strict=True)
        ]
        types = {self.types[source.name].shape for source in sources}
        if len(types) != 1:
            raise UnsupportedError(f"adds maps of shapes {sorted(types)}", where=call.result)
        base, bits = _storage(spec.codes.dtype, spec.low, spec.high)
        if len(sources) == 1:
            quantizer = Requantizer(spec.rescales[0], spec.codes, spec.low, spec.high)
            name = self._rescaled(sources[0].name, quantizer, base, bits, call.result)
            return _Map(name, spec.shapes[0], base, spec.codes.dtype)
        codes = spec.codes
        zero = int(codes.zero_point[0]) - base
        rounded = [
            rescale(one, np.arange(*_steps(source, 1))[:, None])[:, 0]
            for source, one in zip(spec.operands, spec.rescales, strict=True)
        ]
        pieces: list[str] = []
        for i, other in enumerate(reversed(rounded)):
            # What would leave the range of the sum whatever is added need not be told apart.
            low = spec.low - int(codes.zero_point[0]) - int(other.max())
            high = spec.high - int(codes.zero_point[0]) - int(other.min())
            steps = np.clip(rounded[i], min(low, 0), max(high, 0))
            pieces += self._rounded(sources[i].name, spec.rescales[i], steps, call.result)
        requant = Requant([1], [0], bits, zero, spec.low - base, spec.high - base)
        layer: Layer
        if len(pieces) == 2:
            layer = Add(self._name("add"), [Operand(name, 1) for name in pieces], requant)
        else:
            layer = self._identity(pieces, requant)
        kind = attrs.evolve(self.types[pieces[0]], bits=bits, zero_point=zero)
        name = self._layer(layer, kind, call.result)
        return _Map(name, spec.shapes[0], base, codes.dtype)

    def _rounded(self, source: str, spec: Rescale, steps: Array, where: str) -> Iterator[str]:
        """Give maps that sum to what an operand is rounded to: ``steps``, by its codes.

        A map holds 256 steps; others go on where it ends.
        """
        zero = self.types[source].zero_point
        if np.array_equal(steps, np.arange(len(steps)) - zero):
            yield source
            return
        bottom, top = int(steps.min()), int(steps.max())
        start = max(bottom, -255)
        firsts = [*range(start, max(top, start + 1), 255), *range(start - 255, bottom - 255, -255)]
        for first in firsts:
            low, high = max(bottom - first, 0), min(top - first, 255)
            whole = Requantizer(spec, Codes("uint8", spec.out_scale, -first), low, high)
            yield self._rescaled(source, whole, 0, 8, where)

    def _rescaled(
        self, source: str, quantizer: Requantizer, base: int, bits: int, where: str
    ) -> str:
        """Requantize a map."""
        kind = self.types[source]
        low, high = -kind.zero_point, 2**kind.bits - 1 - kind.zero_point
        found = express(quantizer, np.asarray([low]), np.asarray([high]), base, bits)
        layer: Layer
        if found.offset.any():  # only a convolution adds a constant
            layer = self._identity([source], found.requant, found.lift, int(found.offset[0]))
        else:
            operand = Operand(source, 1 << found.lift)
            layer = Add(self._name("add"), [operand], found.requant)
        result = attrs.evolve(kind, bits=bits, zero_point=found.requant.zero_point)
        return self._layer(layer, result, where)

    def _identity(
        self,
        sources: Sequence[str],
        requant: Requant,
        lift: int = 0,
        constant: int = 0,
        weights: Sequence[int] = (),
    ) -> Conv:
        """Give a layer that sums maps, and a constant, each channel by itself."""
        channels = self.types[sources[0]].channels
        terms = [
            ConvTerm(source, _per_channel(channels, weight), groups=channels, shift=lift)
            for source, weight in zip(sources, weights or [1] * len(sources), strict=True)
        ]
        return Conv(self._name("conv"), terms, np.full(channels, constant), requant)

    def _average(self, call: Call) -> _Map:
        """Lower an average that is cut off, not rounded: by convolutions of equal weights.

        With n integers of sum S, ``floor(S / n) = round((2 S + 1 - n) / (2 n))``, and no half
        occurs. A negative average is cut off upwards: what the two signs leave of the sum goes into
        a map each, and these are joined.
        """
        spec: AverageSpec = call.spec  # type: ignore[assignment]
        source = self._plain(call.operands[0], spec.data)
        value = self.values[call.operands[0]]
        assert isinstance(value, _Map)
        kind, end = self.types[source], spec.requantizer
        # The integers that are averaged: steps of maps, whose zero is the integer `zero`.
        pieces, zero = [source], kind.zero_point + value.low
        lowest, highest = value.low, value.low + 2**kind.bits - 1
        if spec.entry is not None:
            steps = rescale(spec.entry, np.arange(2**kind.bits)[:, None] - kind.zero_point)[:, 0]
            pieces = list(self._rounded(source, spec.entry, steps, call.result))
            zero = spec.entry_zero
            lowest, highest = zero + int(steps.min()), zero + int(steps.max())
        if any(spec.padding) and zero != 0:
            raise UnsupportedError(
                f"pads with code 0, MARS with the code of zero, {zero}", where=call.result
            )
        low, high, dtype = spec.low, spec.high, value.dtype
        if end is not None and _changes_nothing(end, zero):
            low, high, dtype, end = end.low, end.high, end.codes.dtype, None
        if end is not None and spec.entry is not None:
            raise UnsupportedError(
                "an average that is requantized before it, and to another scale after it",
                where=call.result,
            )
        base, bits = _storage(dtype, low, high)
        average = Requant(*_reciprocal(spec.kernel), bits, zero - base, low - base, high - base)
        if lowest >= 0:
            name = self._averaged(call, pieces, 1, 0, average)
        else:
            # Neither sign's map holds more than the result can show.
            ends = [min(highest, max(high, 0)), min(-lowest, max(-low, 0))]
            if max(ends) > 255:
                raise UnsupportedError(f"averages up to {max(ends)}, above 255", where=call.result)
            signs = [
                self._averaged(
                    call,
                    pieces,
                    sign,
                    zero,
                    attrs.evolve(average, bits=8, zero_point=0, low=0, high=end),
                )
                for sign, end in zip((1, -1), ends, strict=True)
            ]
            joined = attrs.evolve(average, multiplier=[1], shift=[0])
            layer = self._identity(signs, joined, constant=-zero, weights=(1, -1))
            name = self._layer(layer, self._conv_type(layer), call.result)
        if end is None:
            return _Map(name, spec.out_shape, base, dtype)
        base, bits = _storage(end.codes.dtype, end.low, end.high)
        name = self._rescaled(name, end, base, bits, call.result)
        return _Map(name, spec.out_shape, base, end.codes.dtype)

    def _averaged(
        self, call: Call, sources: Sequence[str], sign: int, zero: int, requant: Requant
    ) -> str:
        """Give the average of the sum of maps plus ``zero``, times a sign, rounded down."""
        spec: AverageSpec = call.spec  # type: ignore[assignment]
        channels = self.types[sources[0]].channels
        terms = [
            ConvTerm(
                source,
                _per_channel(channels, 2 * sign, spec.kernel),
                stride=spec.stride,
                padding=spec.padding,
                groups=channels,
            )
            for source in sources
        ]
        count = spec.kernel[0] * spec.kernel[1]
        bias = np.full(channels, 2 * sign * zero * count + 1 - count)
        layer = Conv(self._name("conv"), terms, bias, requant)
        return self._layer(layer, self._conv_type(layer), call.result)

    def _maxpool(self, call: Call) -> _Map:
        spec: MaxPoolSpec = call.spec  # type: ignore[assignment]
        source = self._plain(call.operands[0], None)
        layer = Pool(self._name("maxpool"), "max", source, spec.kernel, spec.stride, spec.padding)
        _, height, width = spec.out_shape
        kind = attrs.evolve(self.types[source], height=height, width=width)
        name = self._layer(layer, kind, call.result)
        value = self.values[call.operands[0]]
        assert isinstance(value, _Map)
        return attrs.evolve(value, name=name, shape=spec.out_shape)

    def _avgpool(self, call: Call) -> _Map:
        spec: AvgPoolSpec = call.spec  # type: ignore[assignment]
        source = self._plain(call.operands[0], spec.data)
        kind = self.types[source]
        quantizer = _with_implied_clip(spec.quantizer, kind, float(spec.data.scale[0]))
        requant, low = _requant(quantizer, spec.data.scale)
        layer = Pool(
            self._name("avgpool"),
            "avg",
            source,
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.count_include_pad,
            requant,
        )
        size = [
            window_size(n, k, s, before, after)
            for n, k, s, before, after in zip(
                kind.shape[1:],
                spec.kernel,
                spec.stride,
                spec.padding[:2],
                spec.padding[2:],
                strict=True,
            )
        ]
        result = MapType(kind.channels, size[0], size[1], requant.bits, requant.zero_point)
        name = self._layer(layer, result, call.result)
        return _Map(name, spec.out_shape, low, spec.quantizer.codes.dtype)

    def _reshape(self, call: Call) -> _Map | _Numbers:
        spec: ReshapeSpec = call.spec  # type: ignore[assignment]
        value = self.values.get(call.operands[0])
        if not isinstance(value, _Numbers):
            value = self._codes(call.operands[0], None)
        return attrs.evolve(value, shape=spec.out_shape)

    def _quantize(self, call: Call) -> _Map:
        spec: QuantizeSpec = call.spec  # type: ignore[assignment]
        index, _, shape = self._param(call.operands[0])
        quantizer, dtype = spec.quantizer, spec.quantizer.codes.dtype
        base, bits, _, _ = _stored_range(quantizer)
        zero = int(quantizer.codes.zero_point[0])
        quantize = Quantize(
            "float32",
            base,
            base + 2**bits - 1,
            float(quantizer.codes.scale[0]),
            zero,
            quantizer.factor,
            None if quantizer.clip == (-np.inf, np.inf) else quantizer.clip,
        )
        kind = _map_type(shape, bits, zero - base, call.result)
        return _Map(self._add_input(index, kind, shape, quantize), shape, base, dtype)

    def _dequantize(self, call: Call) -> _Numbers:
        spec: DequantizeSpec = call.spec  # type: ignore[assignment]
        source = self._codes(call.operands[0], spec.codes)
        zero = self.types[source.name].zero_point
        form = Dequantize("float32", (float(spec.codes.scale[0]),), zero)
        return _Numbers(source.name, source.shape, form)


def _steps(codes: Codes, past: int = 0) -> tuple[int, int]:
    """Give the least and the greatest step that codes stand for, or what is ``past`` the latter."""
    low, high = code_range(codes.dtype) or (0, 0)
    zero = int(codes.zero_point[0])
    return low - zero, high - zero + past


def _changes_nothing(end: Requantizer, zero: int) -> bool:
    """Whether a requantization of integers with a zero point only limits them."""
    return bool((end.rescale.ratio == 1).all()) and int(end.codes.zero_point[0]) == zero


def _reciprocal(kernel: tuple[int, int]) -> tuple[Array, Array]:
    """Give what multiplies by one over twice the size of a window."""
    return fixed_point(np.asarray([0.5 / (kernel[0] * kernel[1])]))


def _per_channel(channels: int, value: int, kernel: tuple[int, int] = (1, 1)) -> Array:
    """Give the weights of a convolution that sums each channel by itself."""
    return np.full((channels, 1, *kernel), value, np.int8)


def _fits(weight: Array, bits: int) -> bool:
    limit = 2 ** (bits - 1)
    return bool(weight.size) and -limit <= int(weight.min()) and int(weight.max()) < limit


def _operand_codes(spec: Spec, index: int) -> Codes | None:
    if isinstance(spec, ConvSpec):
        return spec.terms[index].data if index < len(spec.terms) else spec.residual
    if isinstance(spec, (AddSpec, SumSpec)):
        return spec.operands[index]
    if isinstance(spec, (AvgPoolSpec, AverageSpec)):
        return spec.data
    return spec.codes if isinstance(spec, DequantizeSpec) else None


def _map_type(shape: Shape, bits: int, zero: int, where: str) -> MapType:
    if len(shape) not in (1, 3):
        raise UnsupportedError(f"a map of shape {shape}, not (C, H, W) or (C,)", where=where)
    channels, height, width = (*shape, 1, 1)[:3]
    return MapType(channels, height, width, bits, zero)


def _finest(spec: ConvSpec, where: str) -> tuple[Array, bool]:
    """Give the grid on which all that a layer sums lies exactly, and whether biases set it.

    A bias that is stored as an integer on a power of two (the native export's) takes part; one on
    the product of two scales was rounded in float32 and belongs to its term's grid.
    """
    grids = [term.grid for term in spec.terms]
    if spec.residual is not None:
        grids.append(spec.residual.scale)
    dyadic = all(_exponent(float(value)) is not None for grid in grids for value in grid)
    if dyadic:
        grids += [term.bias_scale for term in spec.terms if term.bias_scale is not None]
    smallest = min(grids, key=lambda grid: float(grid.min()))
    if max(grid.size for grid in grids) > smallest.size:
        smallest = np.broadcast_to(smallest, (max(grid.size for grid in grids),))
    for grid in grids:
        if _shift(grid, smallest) is None:
            ratio = float((grid / smallest).max())
            raise UnsupportedError(
                "what is added into the accumulators unquantized lies on grids whose ratio is "
                f"no power of two: {ratio:g}",
                where=where,
                hint="quantize the operands of the addition",
            )
    return np.asarray(smallest), dyadic


def _bias(term: TermSpec, finest: Array, dyadic: bool) -> Array:
    """Give a term's bias on the layer's grid: rounded on its own grid, half to even."""
    if term.bias is None:
        return np.zeros(1, np.int64)
    if term.bias_scale is None:
        own, steps = term.grid, np.rint(term.bias.astype(np.float64) / term.grid)
    elif dyadic:
        own, steps = term.bias_scale, term.bias.astype(np.float64)
    elif np.allclose(term.bias_scale, term.grid, rtol=1e-6, atol=0):
        own, steps = term.grid, term.bias.astype(np.float64)
    else:
        own, steps = term.grid, np.rint(term.bias * term.bias_scale / term.grid)
    limit = 2.0**31 - 1
    shift = _shift(own, finest)
    assert shift is not None
    return np.clip(steps, -limit, limit).astype(np.int64) << shift


def _common_grid(scales: Sequence[float]) -> tuple[list[int], float]:
    """Give integers and a grid with ``scale = integer * grid``, exact where all are dyadic."""
    exponents = [_exponent(scale) for scale in scales]
    known = [exponent for exponent in exponents if exponent is not None]
    if len(known) == len(scales) and max(known) - min(known) < _ADD_BITS:
        return [2 ** (exponent - min(known)) for exponent in known], 2.0 ** min(known)
    if len(set(scales)) == 1:
        return [1] * len(scales), scales[0]
    _, top = np.frexp(max(scales))
    grid = 2.0 ** (int(top) - _ADD_BITS)
    return [int(np.rint(scale / grid)) for scale in scales], grid


def _with_implied_clip(quantizer: Quantizer, kind: MapType, scale: float) -> Quantizer:
    """Add the clip to 0..1 where an average of such codes cannot leave it anyway."""
    low, high = quantizer.clip
    if kind.zero_point == 0 and (2**kind.bits - 1) * scale <= 1 and low <= 0 and high >= 1:
        return attrs.evolve(quantizer, clip=(0.0, 1.0))
    return quantizer
