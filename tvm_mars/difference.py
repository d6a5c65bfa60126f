"""The first layer, pixel and channel at which two engines give other codes, with its operands.

An engine gives the codes of layers' maps, region by region: ONNX Runtime on the model as it is, the
NumPy reference, the program on the machine. Each sees the maps that it can: of a pool that the
machine does in a convolution's write only the pool's, of ONNX Runtime those that a QuantizeLinear
gives and what leaves the model. Compared is what both see, layer by layer in the graph's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import InputError, MarsArch, Program, ProgramError, run
from mars_runtime.maps import RAW_BITS
from mars_runtime.watch import watch

from .compiler import NamedGraph, build
from .graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    Layer,
    Pool,
    Requant,
    accumulate,
    evaluate_layer,
    evaluate_values,
)
from .verification import watched

__all__ = [
    "ENGINES",
    "Comparison",
    "Difference",
    "Engine",
    "Layers",
    "Machine",
    "OnnxRuntime",
    "Operands",
    "Reference",
    "Window",
    "compare_engines",
]

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
Place: TypeAlias = tuple[int, int, int, int]

#: Engines by the names that a user gives.
ENGINES: Mapping[str, str] = {
    "onnxruntime": "ONNX Runtime on the CPU, on the model as it is",
    "reference": "the integer reference in NumPy, which is the meaning of a network",
    "machine": "the program's instructions on the simulated machine",
    "layers": "the exact engine, on the model compiled with every map as an output",
}


class Engine(Protocol):
    """What gives the codes of a region's layers."""

    def maps(self, region: int, given: Arrays) -> Arrays:
        """Give codes ``[N, C, H, W]`` by layer, from what the caller passes by graph inputs."""


# -- engines ---------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Reference:
    """:func:`tvm_mars.graph.evaluate_values`."""

    graphs: Sequence[Graph]

    def maps(self, region: int, given: Arrays) -> Arrays:
        """Give all layers' codes."""
        graph = self.graphs[region]
        return evaluate_values(graph, _stored(graph, given))


@attrs.frozen(eq=False)
class Machine:
    """A program, executed; its maps are shown in the model's order of channels."""

    program: Program
    graphs: Sequence[Graph]

    def maps(self, region: int, given: Arrays) -> Arrays:
        """Give the codes of the maps that the program writes."""
        graph = self.graphs[region]
        codes = _stored(graph, given)
        arrays = [codes[entry.name] for entry in graph.inputs]
        made = self.program.regions[region]
        maps = watch(made, self.program.arch, graph.types, arrays)
        for order in made.orders:
            kind = graph.types.get(order.layer)
            if kind is None or len(order.channels) != kind.channels:
                raise ProgramError(
                    f"its order of {order.layer!r} does not fit the network",
                    where=f"program, region {region}",
                    hint="compile the model again",
                )
            if order.layer in maps:
                maps[order.layer] = maps[order.layer][:, np.argsort(order.channels)]
        return maps


@attrs.frozen(eq=False)
class Layers:
    """The exact engine, on programs that write every map out as well."""

    graphs: Sequence[Graph]
    arch: MarsArch

    def maps(self, region: int, given: Arrays) -> Arrays:
        """Give all layers' codes."""
        graph = watched(self.graphs[region])
        program = build([NamedGraph.of(graph)], self.arch)
        results = run(program, given, engine="layers")
        return {
            out.value: np.rint(
                np.asarray(result, np.float64).reshape(-1, *graph.types[out.value].shape)
                / np.asarray(out.dequantize.scale, np.float64)[:, None, None]
            ).astype(np.int64)
            for out, result in zip(graph.outputs, results.values(), strict=True)
        }


@attrs.frozen(eq=False)
class OnnxRuntime:
    """ONNX Runtime on a model's file, with the tensors that hold layers' codes as outputs.

    Parameters
    ----------
    model : onnx.ModelProto
        The model.
    graphs : sequence of NamedGraph
        Of the regions.
    operators : sequence of mapping
        For each region the model's operators by layer.
    inputs : mapping of str to array
        The model's.
    """

    model: Any
    graphs: Sequence[NamedGraph]
    operators: Sequence[Mapping[str, Sequence[str]]]
    inputs: Arrays
    _found: list[Arrays] = attrs.field(factory=list, init=False)

    def maps(self, region: int, given: Arrays) -> Arrays:
        """Give the codes of the layers that were found in the model."""
        if not self._found:
            self._found.extend(self._run())
        return self._found[region]

    def _run(self) -> Iterator[Arrays]:
        from .frontend.onnx_layers import Quantized, layer_tensors

        wanted = [
            layer_tensors(self.model.graph, graph.graph, names)
            for graph, names in zip(self.graphs, self.operators, strict=True)
        ]
        tensors = {found.tensor for layers in wanted for found in layers.values()}
        names = [out.name for out in self.model.graph.output]
        results = _run_onnx(self.model, self.inputs, sorted(tensors | set(names)))
        for graph, layers in zip(self.graphs, wanted, strict=True):
            maps: dict[str, Array] = {}
            for out, name in zip(graph.graph.outputs, graph.outputs, strict=True):
                # What leaves as numbers: accumulators on a grid that a float holds exactly.
                if name in names and out.dequantize.dtype == "float32":
                    kind = graph.graph.types[out.value]
                    scale = np.asarray(out.dequantize.scale, np.float64)[:, None, None]
                    real = results[name].reshape(-1, *kind.shape).astype(np.float64)
                    maps[out.value] = np.rint(real / scale).astype(np.int64)
                    maps[out.value] += out.dequantize.zero_point
            for layer, found in layers.items():
                assert isinstance(found, Quantized)
                kind = graph.graph.types[layer]
                codes = results[found.tensor].astype(np.int64) - found.zero_point + kind.zero_point
                maps[layer] = codes.reshape(-1, *kind.shape)
            yield maps


def _run_onnx(model: Any, inputs: Arrays, wanted: Sequence[str]) -> dict[str, Array]:
    """Run a model on a batch, by images where it takes no other."""
    import onnx
    import onnxruntime

    known = {out.name for out in model.graph.output}
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    watching.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in known
    )
    session = onnxruntime.InferenceSession(
        watching.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    count = len(next(iter(inputs.values())))
    sizes = {entry.shape[0] for entry in session.get_inputs()}
    fixed = [size for size in sizes if isinstance(size, int)]
    step = fixed[0] if fixed else count
    if count % step:
        raise InputError(f"{count} images, the model takes {step} at a time", where="inputs")
    parts = [
        session.run(list(wanted), {name: array[at : at + step] for name, array in inputs.items()})
        for at in range(0, count, step)
    ]
    columns = zip(*parts, strict=True)
    return {name: np.concatenate(found) for name, found in zip(wanted, columns, strict=True)}


def _stored(graph: Graph, given: Arrays) -> dict[str, Array]:
    """Give the inputs' stored codes ``[N, C, H, W]``."""
    return {
        entry.name: entry.quantize.apply(given[entry.name], entry.name).reshape(
            -1, *entry.type.shape
        )
        for entry in graph.inputs
    }


# -- what was found --------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Window:
    """What one result reads of one map.

    Parameters
    ----------
    source : str
        The map.
    codes : int64 array ``[C, KH, KW]``
        Its stored codes, padding included.
    weights : int64 array ``[C, KH, KW]`` or None
        None where nothing is multiplied.
    zero_point, shift, total : int
        ``total = sum((codes - zero_point) * weights) << shift``, for a residual likewise.
    """

    source: str
    codes: Array
    weights: Array | None
    zero_point: int
    shift: int
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        weights = None if self.weights is None else self.weights.tolist()
        return {**attrs.asdict(self), "codes": self.codes.tolist(), "weights": weights}


@attrs.frozen(eq=False)
class Operands:
    """What leads to one code of a layer, by the integer specification.

    Parameters
    ----------
    windows : tuple of Window
        What is summed, or compared by a max pool.
    bias, accumulator : int or None
        None for a pool or an addition; None for a max pool.
    divisor : (int, int) or None
        ``code = clamp(round_half_even(accumulator * divisor[0] / divisor[1]) + zero, low, high)``;
        None where nothing requantizes.
    zero_point, low, high : int
        Of that; 0 where nothing requantizes.
    tie : bool
        Whether the quotient lies exactly between two integers.
    code : int
        What results.
    reaching : mapping of str to (int, int) or None
        For each engine the accumulators that would have given its code; None if none would.
    """

    layer: str
    kind: str
    windows: tuple[Window, ...]
    bias: int | None
    accumulator: int | None
    divisor: tuple[int, int] | None
    zero_point: int
    low: int
    high: int
    tie: bool
    code: int
    reaching: Mapping[str, tuple[int, int] | None]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        windows = [window.to_dict() for window in self.windows]
        return {**attrs.asdict(self, recurse=False), "windows": windows}


@attrs.frozen(eq=False)
class Difference:
    """The first place at which an engine gives another code than the first engine.

    Parameters
    ----------
    region : int
        The program's region.
    layer : str
        The layer.
    operators : tuple of str
        The model's operators that it comes from.
    image, row, column, channel : int
        Where in the layer's map: of the first pixel, in this order, the first channel.
    codes : mapping of str to int
        The two engines' codes.
    differing, compared : int
        Codes of this layer's map that differ, of all.
    operands : tuple of Operands
        Of the code, from the first engine's maps; of a pool in a convolution's write also those of
        the pooled pixel with the largest code.
    """

    region: int
    layer: str
    operators: tuple[str, ...]
    image: int
    row: int
    column: int
    channel: int
    codes: Mapping[str, int]
    differing: int
    compared: int
    operands: tuple[Operands, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        operands = [one.to_dict() for one in self.operands]
        return {**attrs.asdict(self, recurse=False), "operands": operands}


@attrs.frozen(eq=False)
class Comparison:
    """What became of a comparison.

    Parameters
    ----------
    engines : tuple of str
        The first is the one that the others are compared with.
    images : int
        Of the batch.
    compared : mapping of str to int
        Codes that each other engine was compared in.
    unseen : mapping of str to tuple of str
        Layers that could not be compared with each other engine, as either does not show them.
    skipped : mapping of int to str
        Regions that were not compared at all, and why.
    differences : mapping of str to Difference
        For each engine that differs, where it first does.
    """

    engines: tuple[str, ...]
    images: int
    compared: Mapping[str, int]
    unseen: Mapping[str, tuple[str, ...]]
    skipped: Mapping[int, str]
    differences: Mapping[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data for JSON."""
        differences = {name: one.to_dict() for name, one in self.differences.items()}
        return {**attrs.asdict(self, recurse=False), "differences": differences}


# -- comparing -------------------------------------------------------------------------------------


def compare_engines(
    engines: Mapping[str, Engine],
    graphs: Sequence[NamedGraph],
    inputs: Arrays,
    *,
    operators: Sequence[Mapping[str, Sequence[str]]] = (),
    on_region: Callable[[int], None] = lambda region: None,
) -> Comparison:
    """Compare engines with the first of them.

    Parameters
    ----------
    engines : mapping of str to Engine
        Two or more.
    graphs : sequence of NamedGraph
        Of the regions, in the order in which they run.
    inputs : mapping of str to array
        The model's, ``[N, ...]``.
    operators : sequence of mapping
        For each region the model's operators by layer.
    on_region : callable
        Told of each region that is done.

    Raises
    ------
    InputError
        If there are fewer than two engines, or an array is missing or of another shape.
    """
    if len(engines) < 2:
        raise InputError("fewer than two engines", where="engines", hint=f"of {', '.join(ENGINES)}")
    first, *others = engines
    found: dict[str, Difference] = {}
    compared = dict.fromkeys(others, 0)
    unseen: dict[str, list[str]] = {name: [] for name in others}
    skipped: dict[int, str] = {}
    values = dict(inputs)
    reference = Reference([named.graph for named in graphs])
    for number, named in enumerate(graphs):
        missing = [name for name in named.inputs if name not in values]
        if missing:
            skipped[number] = f"reads {missing[0]}, which the CPU computes"
            continue
        graph = named.graph
        given = {
            entry.name: _checked(values[name], entry.shape, name)
            for entry, name in zip(graph.inputs, named.inputs, strict=True)
        }
        base = engines[first].maps(number, given)
        for name in others:
            maps = engines[name].maps(number, given)
            place = f"{number}:" if len(graphs) > 1 else ""
            for layer in graph.layers:
                if layer.name not in base or layer.name not in maps:
                    unseen[name].append(place + layer.name)
                    continue
                compared[name] += base[layer.name].size
                if name in found or np.array_equal(base[layer.name], maps[layer.name]):
                    continue
                names = operators[number] if operators else {}
                pair = {first: base, name: maps}
                found[name] = _difference(graph, layer, number, pair, names, given)
        values.update(_leaving(named, reference.maps(number, given)))
        on_region(number)
    return Comparison(
        tuple(engines),
        len(next(iter(inputs.values()))),
        compared,
        {name: tuple(layers) for name, layers in unseen.items()},
        skipped,
        found,
    )


def _checked(array: Array, shape: tuple[int, ...], name: str) -> Array:
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        raise InputError(
            f"shape {array.shape}, expected (N, {', '.join(map(str, shape))})",
            where=f"input {name}",
        )
    return array


def _leaving(named: NamedGraph, maps: Arrays) -> Iterator[tuple[str, Array]]:
    for out, name in zip(named.graph.outputs, named.outputs, strict=True):
        yield name, out.dequantize.apply(maps[out.value]).reshape(-1, *out.shape)


def _difference(
    graph: Graph,
    layer: Layer,
    region: int,
    pair: Mapping[str, Arrays],
    names: Mapping[str, Sequence[str]],
    given: Arrays,
) -> Difference:
    base, other = pair.values()
    unequal = base[layer.name] != other[layer.name]
    # By image, row, column, then channel.
    image, row, column, channel = (int(i) for i in np.argwhere(unequal.transpose(0, 2, 3, 1))[0])
    place = (image, channel, row, column)
    codes = {name: int(maps[layer.name][place]) for name, maps in pair.items()}
    seen = {name for name in base if name in other}
    values = _values(graph, base, given, image, layer)
    at = (0, channel, row, column)
    operands = [_operands(graph, layer, values, at, codes)]
    if isinstance(layer, Pool) and layer.mode == "max" and layer.input not in seen:
        operands += _pooled(graph, layer, values, at, codes)
    return Difference(
        region,
        layer.name,
        tuple(names.get(layer.name, ())),
        image,
        row,
        column,
        channel,
        codes,
        int(unequal.sum()),
        unequal.size,
        tuple(operands),
    )


def _values(
    graph: Graph, base: Arrays, given: Arrays, image: int, until: Layer
) -> dict[str, Array]:
    """Give one image's maps before a layer: an engine's, or computed where it shows none."""
    part = slice(image, image + 1)
    values = {
        name: codes.astype(np.int64)
        for name, codes in _stored(graph, {key: x[part] for key, x in given.items()}).items()
    }
    for layer in graph.layers:
        if layer.name == until.name:
            break
        values[layer.name] = (
            np.asarray(base[layer.name][part], np.int64)
            if layer.name in base
            else evaluate_layer(layer, graph.types, values)
        )
    return values


# -- operands --------------------------------------------------------------------------------------


def _operands(
    graph: Graph, layer: Layer, values: Arrays, at: Place, codes: Mapping[str, int]
) -> Operands:
    code = int(evaluate_layer(layer, graph.types, values)[at])
    if isinstance(layer, Conv):
        windows = tuple(_conv_windows(graph, layer, values, at))
        total = int(accumulate(layer, graph.types, values)[at])
        bias = int(layer.bias[at[1]])
        return _requantized(layer, layer.requant, windows, bias, total, 1, code, at[1], codes)
    if isinstance(layer, Add):
        windows = tuple(
            _point(graph, operand.input, values, at, multiplier=operand.multiplier)
            for operand in layer.operands
        )
        total = sum(window.total for window in windows)
        return _requantized(layer, layer.requant, windows, None, total, 1, code, at[1], codes)
    window = _pool_window(graph, layer, values, at)
    if layer.mode == "max":
        return Operands(
            layer.name, layer.kind, (window,), None, None, None, 0, 0, 0, False, code, {}
        )
    inside = window.codes.size if layer.count_include_pad else int(_inside(graph, layer, at).sum())
    return _requantized(
        layer, layer.requant, (window,), None, window.total, inside, code, at[1], codes
    )


def _requantized(
    layer: Layer,
    requant: Requant | None,
    windows: tuple[Window, ...],
    bias: int | None,
    total: int,
    count: int,
    code: int,
    channel: int,
    codes: Mapping[str, int],
) -> Operands:
    if requant is None:
        reaching: dict[str, tuple[int, int] | None] = {
            name: (value, value) for name, value in codes.items()
        }
        return Operands(
            layer.name, layer.kind, windows, bias, total, None, 0, 0, 0, False, code, reaching
        )
    multiplier = int(requant.multiplier[channel if requant.multiplier.size > 1 else 0])
    divisor = count << int(requant.shift[channel if requant.shift.size > 1 else 0])
    reaching = {
        name: _reaching(multiplier, divisor, requant, value) for name, value in codes.items()
    }
    return Operands(
        layer.name,
        layer.kind,
        windows,
        bias,
        total,
        (multiplier, divisor),
        requant.zero_point,
        requant.low,
        requant.high,
        2 * (total * multiplier % divisor) == divisor,
        code,
        reaching,
    )


def _code_of(acc: int, multiplier: int, divisor: int, requant: Requant) -> int:
    """Requantize one accumulator, in Python's integers."""
    quotient, rest = divmod(acc * multiplier, divisor)
    quotient += 2 * rest > divisor or (2 * rest == divisor and quotient % 2 == 1)
    return min(max(quotient + requant.zero_point, requant.low), requant.high)


def _reaching(multiplier: int, divisor: int, requant: Requant, code: int) -> tuple[int, int] | None:
    """Give the accumulators of 32 bits that are requantized to a code."""
    if multiplier <= 0:
        return None
    low, high = -(2 ** (RAW_BITS - 1)), 2 ** (RAW_BITS - 1)

    def from_on(least: int) -> int:
        return _first(low, high, lambda acc: _code_of(acc, multiplier, divisor, requant) >= least)

    first, stop = from_on(code), from_on(code + 1)
    return (first, stop - 1) if first < stop else None


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Give the least of ``low .. high - 1`` from which on a condition holds, else ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _conv_windows(graph: Graph, layer: Conv, values: Arrays, at: Place) -> Iterator[Window]:
    for term in layer.terms:
        zero = graph.types[term.input].zero_point
        weights = term.weight[at[1]].astype(np.int64)
        codes = _window(
            _group(term, values[term.input], at[1]),
            zero,
            term.kernel,
            term.stride,
            term.padding,
            term.dilation,
            at,
        )
        total = int(((codes - zero) * weights).sum()) << term.shift
        yield Window(term.input, codes, weights, zero, term.shift, total)
    if layer.residual:
        yield _point(graph, layer.residual.input, values, at, shift=layer.residual.shift)


def _group(term: ConvTerm, codes: Array, channel: int) -> Array:
    """Give the input channels that a kernel reads."""
    size = term.weight.shape[1]
    group = channel // (len(term.weight) // term.groups)
    return codes[:, group * size : (group + 1) * size]


def _point(
    graph: Graph, source: str, values: Arrays, at: Place, *, multiplier: int = 1, shift: int = 0
) -> Window:
    zero = graph.types[source].zero_point
    code = int(values[source][at])
    weights = None if multiplier == 1 else np.full((1, 1, 1), multiplier)
    total = (code - zero) * multiplier << shift
    return Window(source, np.full((1, 1, 1), code), weights, zero, shift, total)


def _pool_window(graph: Graph, layer: Pool, values: Arrays, at: Place) -> Window:
    zero = graph.types[layer.input].zero_point if layer.mode == "avg" else -1
    codes = _window(
        values[layer.input][:, at[1] : at[1] + 1],
        zero,
        layer.kernel,
        layer.stride,
        layer.padding,
        (1, 1),
        at,
    )
    total = int((codes - zero).sum()) if layer.mode == "avg" else int(codes.max())
    return Window(layer.input, codes, None, max(zero, 0), 0, total)


def _inside(graph: Graph, layer: Pool, at: Place) -> Array:
    """Say which places of a pool's window lie inside its map."""
    ones = np.ones((1, 1, *graph.types[layer.input].shape[1:]), np.int64)
    place = (0, 0, at[2], at[3])
    return _window(ones, 0, layer.kernel, layer.stride, layer.padding, (1, 1), place)


def _window(
    codes: Array,
    fill: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    at: Place,
) -> Array:
    """Give what one output pixel meets ``[C, KH, KW]``."""
    found = np.full((codes.shape[1], *kernel), fill, np.int64)
    for r in range(kernel[0]):
        for c in range(kernel[1]):
            y = at[2] * stride[0] + r * dilation[0] - padding[0]
            x = at[3] * stride[1] + c * dilation[1] - padding[1]
            if 0 <= y < codes.shape[2] and 0 <= x < codes.shape[3]:
                found[:, r, c] = codes[at[0], :, y, x]
    return found


def _pooled(
    graph: Graph, pool: Pool, values: Arrays, at: Place, codes: Mapping[str, int]
) -> Iterator[Operands]:
    """Give the operands of the largest of a window's codes, which a convolution gives."""
    source = next((one for one in graph.layers if one.name == pool.input), None)
    if not isinstance(source, Conv):
        return
    window = _pool_window(graph, pool, values, at).codes[0]
    r, c = divmod(int(window.argmax()), window.shape[1])
    y = at[2] * pool.stride[0] + r - pool.padding[0]
    x = at[3] * pool.stride[1] + c - pool.padding[1]
    yield _operands(graph, source, values, (0, at[1], y, x), codes)
