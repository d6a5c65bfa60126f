"""Quantization after training: its arithmetic, its ranges, what it refuses; no TVM, no PyTorch."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from mars_runtime.errors import InputError, OptionError
from tvm_mars.graph import Add, Conv, Graph, Pool, evaluate
from tvm_mars.ptq import (
    Addition,
    FloatInput,
    FloatNetwork,
    FloatOutput,
    FloatPool,
    Norm,
    Options,
    Sum,
    Term,
    quantize_network,
)
from tvm_mars.ptq.fold import group_peak, quantize_weight, round_bias
from tvm_mars.ptq.ranges import Kernels, RangedMap, choose_ranges, result_range, sample_stride

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    global RNG
    RNG = np.random.default_rng(7)


def norm(channels: int) -> Norm:
    return Norm(
        "bn",
        RNG.uniform(0.5, 1.5, channels),
        RNG.normal(0, 0.2, channels),
        RNG.normal(0, 0.2, channels),
        RNG.uniform(0.3, 0.8, channels),
    )


def conv(
    source: str, given: int, channels: int, kernel: int = 3, stride: int = 1, **more: Any
) -> Term:
    groups = more.get("groups", 1)
    weight = RNG.normal(0, 1, (channels, given // groups, kernel, kernel))
    weight /= np.sqrt(given // groups) * kernel
    pad = (kernel // 2,) * 4
    fields = {"norm": norm(channels), "stride": (stride, stride), "padding": pad, **more}
    return Term(f"{source}-{channels}", source, weight, RNG.normal(0, 0.1, channels), **fields)


def network(size: int = 8, entry: FloatInput | None = None) -> FloatNetwork:
    """Everything: shortcuts, a depthwise and a strided layer, an addition of maps, pools, dense."""
    entry = entry or FloatInput("image", (3, size, size))
    dense = Term("fc", "gap", RNG.normal(0, 0.3, (5, 24)), RNG.normal(0, 0.3, 5))
    layers = [
        Sum("stem", [conv("image", 3, 16)]),
        Sum("block", [conv("stem", 16, 16)], "stem"),
        Sum("short", [conv("block", 16, 24, 3, 2), conv("stem", 16, 24, 1, 2)]),
        Sum("depth", [conv("short", 24, 24, groups=24)], ceiling=2.0),
        Sum("wide", [conv("depth", 24, 24, 1, norm=None)]),
        Addition("both", ("wide", "short")),
        FloatPool("max", "max", "both", (2, 2), (1, 1), (1, 1, 0, 0)),
        FloatPool("avg", "avg", "max", (3, 3), (1, 1), (1, 1, 1, 1)),
        FloatPool("gap", "avg", "avg", (4, 4), (4, 4)),
        Sum("fc", [dense], relu=False),
    ]
    outputs = [FloatOutput("scores", "fc", (5,)), FloatOutput("map", "both", (24, 4, 4))]
    return FloatNetwork([entry], layers, outputs)


def exact(given: FloatNetwork, images: np.ndarray) -> dict[str, np.ndarray]:
    """Compute a network in float64, by the definition of each layer."""
    values = {given.inputs[0].name: images.astype(np.float64)}
    for layer in given.layers:
        if isinstance(layer, Addition):
            values[layer.name] = values[layer.inputs[0]] + values[layer.inputs[1]]
            continue
        if isinstance(layer, FloatPool):
            values[layer.name] = pooled(values[layer.input], layer)
            continue
        total: Any = 0 if layer.residual is None else values[layer.residual]
        for term in layer.terms:
            y = convolved(values[term.input], term) + term.bias.reshape(-1, 1, 1)
            if term.norm is not None:
                parts = (term.norm.gamma, term.norm.beta, term.norm.mean, term.norm.variance)
                gamma, beta, mean, variance = (part.reshape(-1, 1, 1) for part in parts)
                y = gamma * (y - mean) / np.sqrt(variance + term.norm.epsilon) + beta
            total = total + y
        values[layer.name] = np.clip(total, 0, layer.ceiling) if layer.relu else total
    return values


def windows(x: np.ndarray, kernel: Any, stride: Any, padding: Any, fill: float) -> np.ndarray:
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3))
    return found[:, :, :: stride[0], :: stride[1]]


def convolved(x: np.ndarray, term: Term) -> np.ndarray:
    if term.dense:
        return (x.reshape(len(x), -1) @ term.weight.T)[:, :, None, None]
    seen = windows(x, term.weight.shape[2:], term.stride, term.padding, 0)
    seen = seen.reshape(len(x), term.groups, -1, *seen.shape[2:])
    weight = term.weight.reshape(term.groups, -1, *term.weight.shape[1:])
    found = np.einsum("ngchwrs,gocrs->ngohw", seen, weight)
    return found.reshape(len(x), -1, *found.shape[3:])


def pooled(x: np.ndarray, layer: FloatPool) -> np.ndarray:
    if layer.mode == "max":
        return windows(x, layer.kernel, layer.stride, layer.padding, -np.inf).max((4, 5))
    inside = windows(np.ones_like(x), layer.kernel, layer.stride, layer.padding, 0)
    seen = windows(x, layer.kernel, layer.stride, layer.padding, 0)
    return seen.sum((4, 5)) / inside.sum((4, 5))


def images(count: int = 48, low: float = 0, high: float = 1, size: int = 8) -> np.ndarray:
    return RNG.uniform(low, high, (count, 3, size, size)).astype(np.float32)


def relative_error(graph: Graph, given: FloatNetwork, x: np.ndarray) -> float:
    values = exact(given, x)
    errors = []
    for found, out in zip(evaluate(graph, {"x0": x}), given.outputs, strict=True):
        wanted = values[out.value].reshape(found.shape)
        errors.append(np.sqrt(np.square(found - wanted).mean()) / wanted.std())
    return float(max(errors))


# -- eq. 6 to 8 ------------------------------------------------------------------------------------


def test_weights_are_normalized_by_groups_of_kernels() -> None:
    weight = np.zeros((20, 2, 1, 1), np.float32)
    weight[3], weight[17] = 4, -0.5
    peak = group_peak(weight, 16)
    np.testing.assert_array_equal(peak, [4] * 16 + [0.5] * 4)
    codes = quantize_weight(weight / peak.reshape(-1, 1, 1, 1), np.full(20, 2.0), 4) * 8
    assert codes[3].tolist() == [[[7]], [[7]]] and codes[17].tolist() == [[[-7]], [[-7]]]
    assert group_peak(np.zeros((3, 2)), 2).tolist() == [1, 1, 1]


def test_bias_is_rounded_half_to_even_within_int32() -> None:
    found = round_bias(np.array([0.5, 1.5, -0.5, 1e20, -1e20]), 0).tolist()
    assert found == [0, 2, 0, 2**31 - 1, -(2**31)]


# -- ranges ----------------------------------------------------------------------------------------


def test_a_range_balances_maps_and_weights() -> None:
    """Of rare outliers some are cut off; with few weight codes more are."""
    values = np.concatenate([RNG.uniform(0, 1, 10_000), np.linspace(1, 3, 10)])
    alone = choose_ranges([RangedMap("x", 4, values)], {})["x"]
    assert 0.9 < alone < 2
    weight = RNG.normal(0, 0.3, (16, 9))
    weight /= np.abs(weight).max()
    kernels = Kernels("in", weight, np.full(16, 0.5), 4, np.ones(16))
    maps = [RangedMap("in", 8, fixed=True), RangedMap("x", 4, values, (kernels,))]
    assert choose_ranges(maps, {"in": 0.3})["x"] < alone


def test_a_ceiling_is_kept_unless_what_is_tied_costs_more() -> None:
    values = np.abs(RNG.normal(0, 3, 10_000))
    capped = RangedMap("x", 8, values, ceiling=2.0)
    assert 1.9 < choose_ranges([capped], {})["x"] <= 2
    high = RangedMap("y", 8, np.full(10_000, 6.0), tied=("x",))
    assert choose_ranges([capped, high], {})["y"] > 5


def test_the_input_range_scales_weights_too() -> None:
    """The same numbers in other units: input and weights scaled against each other."""
    weight = RNG.normal(0, 0.3, (16, 9))
    values = np.abs(RNG.normal(0, 1, 1000))
    found = []
    for unit in (1.0, 10.0):
        source = RangedMap("a", 8, values * unit)
        kernels = Kernels("a", weight, np.full(16, 0.5 / unit), 8)
        maps = [source, RangedMap("b", 8, values, (kernels,))]
        ranges = choose_ranges(maps, {"a": float(np.square(values * unit).mean())})
        found.append((ranges["a"] / unit, ranges["b"]))
    np.testing.assert_allclose(found[0], found[1])


def test_tied_maps_share_a_range_and_grow() -> None:
    maps = [
        RangedMap("a", 8, np.array([0.5])),
        RangedMap("b", 8, np.array([4.0])),
        RangedMap("c", 8, np.array([1.0]), tied=("a",), growth=2.0),
        RangedMap("d", 8, None, tied=("c", "b"), growth=2.0),
    ]
    found = choose_ranges(maps, {})
    assert found["c"] == 2 * found["a"] and found["d"] == 2 * found["c"] == 2 * found["b"]
    assert choose_ranges([RangedMap("x", 8, fixed=True)], {}) == {"x": 1.0}


def test_result_range_is_a_power_of_two() -> None:
    assert [result_range([p], 1.0) for p in (0.3, 0.5, 3)] == [0.5, 0.5, 4]
    assert result_range([]) == result_range([0.0]) == 1


@pytest.mark.parametrize("size", [16, 144, 64 * 49])
def test_samples_cover_every_place(size: int) -> None:
    stride = sample_stride(2_000_000, size)
    assert 2_000_000 / stride > 70_000
    assert len(set(np.arange(0, size * stride, stride) % size)) == size


# -- whole networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.06),
        ({"input_range": (-0.5, 1.5)}, 0.06),
        ({"activation_bits": 4}, 0.4),
        ({"weight_bits": 4, "first_weight_bits": 8, "last_weight_bits": 8}, 0.6),
        ({"activation_bits": 4, "weight_bits": 4, "input_bits": 4, "group": 3}, 0.9),
    ],
)
def test_the_integers_compute_the_network(options: dict[str, Any], limit: float) -> None:
    given = network()
    quantized = quantize_network(given, {"image": images()}, Options(**options))
    assert relative_error(quantized.graph, given, images()) < limit
    names = set(quantized.names.values())
    assert names == {"image", *(layer.name for layer in given.layers)}


def test_the_graph_has_the_networks_layers() -> None:
    graph = quantize_network(network(), {"image": images()}, Options()).graph
    assert [type(layer) for layer in graph.layers] == [Conv] * 5 + [Add] + [Pool] * 3 + [Conv]
    assert all(layer.requant.native for layer in graph.layers if layer.requant is not None)
    assert [len(layer.terms) for layer in graph.layers if isinstance(layer, Conv)] == [
        1, 1, 2, 1, 1, 1,
    ]  # fmt: skip
    assert graph.layers[1].residual is not None and graph.layers[-1].requant is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("low", "high"), [(-2, 2), (0, 40), (-3, 0.5)])
def test_inputs_of_another_range_take_a_scale_and_zero_point(low: float, high: float) -> None:
    given = network()
    x = images(low=low, high=high)
    graph = quantize_network(given, {"image": x}, Options()).graph
    entry = graph.inputs[0]
    assert entry.quantize.factor == 1 and (entry.type.zero_point > 0) == (low < 0)
    assert relative_error(graph, given, x) < 0.08


def test_four_bits_of_gain_are_taken_up() -> None:
    """Eq. 5 and 8 shrink what each 4-bit layer computes by 12 %, its bias not."""
    given = network()
    x = images()
    narrow = {"weight_bits": 4, "activation_bits": 4}
    found = [
        relative_error(
            quantize_network(given, {"image": x}, Options(method=m, **narrow)).graph, given, x
        )
        for m in ("corrected", "paper")
    ]
    assert 2 * found[0] < found[1]


def test_few_images_do() -> None:
    """Statistics come from the network; the images only show what quantization changes."""
    given = network()
    graph = quantize_network(given, {"image": images(2)}, Options()).graph
    assert relative_error(graph, given, images()) < 0.2


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, x = network(), images()
    whole = quantize_network(given, {"image": x}, Options()).graph
    monkeypatch.setattr("tvm_mars.ptq.quantize.CHUNK", 16 * 8 * 8 * 7)
    parts = quantize_network(given, {"image": x}, Options()).graph
    assert str(whole) == str(parts)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        if isinstance(one, Conv) and isinstance(other, Conv):
            for mine, theirs in zip(one.terms, other.terms, strict=True):
                assert np.abs(mine.weight.astype(int) - theirs.weight).max() <= 1


def test_dead_and_constant_channels() -> None:
    """A kernel of zeros, a gamma of zero, a channel that never leaves zero, a black input."""
    given = network()
    stem = given.layers[0]
    assert isinstance(stem, Sum) and stem.terms[0].norm is not None
    term = stem.terms[0]
    weight, gamma, beta = term.weight.copy(), term.norm.gamma.copy(), term.norm.beta.copy()
    weight[0], gamma[1], beta[2] = 0, 0, -100
    fixed = attrs.evolve(term.norm, gamma=gamma, beta=beta)
    stem = attrs.evolve(stem, terms=[attrs.evolve(term, weight=weight, norm=fixed)])
    given = FloatNetwork(given.inputs, [stem, *given.layers[1:]], given.outputs)
    for x in (images(), np.zeros((3, 3, 8, 8), np.float32)):
        quantize_network(given, {"image": x}, Options())
    graph = quantize_network(given, {"image": images()}, Options()).graph
    assert relative_error(graph, given, images()) < 0.08


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "input image: missing"),
        ({"picture": images()}, r"no such input; there are \['image'\] .*\*\*{'image': images}"),
        ({"image": images()[:0]}, "shape"),
        ({"image": images()[:, :2]}, r"expected \(N, 3, 8, 8\)"),
        ({"image": np.full((2, 3, 8, 8), np.nan, np.float32)}, "finite"),
        ({"image": np.full((2, 3, 8, 8), "x")}, "dtype"),
    ],
)
def test_calibration_is_checked(calibration: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_network(network(), calibration, Options())


def test_weights_are_checked() -> None:
    with pytest.raises(InputError, match=r"fc: its weight holds 1 values that are NaN"):
        Term("fc", "x", [[np.nan, 1]], [0])
    with pytest.raises(InputError, match=r"bn: its variance"):
        Norm("bn", [1], [1], [1], [np.inf])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, "weight_bits: 5"),
        ({"method": "best"}, "corrected"),
        ({"input_range": (0.5, 1)}, "padding is zero"),
        ({"input_range": 3}, "no pair"),
        ({"input_range": (0, float("inf"))}, "input_range"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options(**options)
