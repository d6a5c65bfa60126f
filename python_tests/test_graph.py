"""The integer reference against implementations that share nothing with it."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import attrs
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mars_runtime.errors import InputError
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.random_graphs import FOCI, events, features, random_graph, random_inputs
from tvm_mars.graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    GraphError,
    Input,
    MapType,
    Operand,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate,
    evaluate_values,
)
from tvm_mars.onnx_export import to_onnx


def codes_input(channels, height, width, bits=8, zero_point=0):
    """Give an input that takes stored codes as they are."""
    kind = MapType(channels, height, width, bits, zero_point)
    quantize = Quantize("uint8", high=2**bits - 1, zero_point=zero_point)
    return Input("x0", kind, kind.shape, quantize)


def run_layer(layer, entry, codes):
    """Evaluate one layer on the codes of one image."""
    out = Output(layer.name, (), Dequantize("int32"))
    probe = Graph([entry], [layer], [Output("x0", entry.shape, Dequantize("uint8"))])
    graph = attrs.evolve(probe, outputs=[attrs.evolve(out, shape=probe.types[layer.name].shape)])
    return evaluate(graph, {"x0": np.asarray(codes, np.uint8)[None]})[0][0]


# -- requantization and rounding -------------------------------------------------------------------


@pytest.mark.random(40)
def test_requant_is_exact_rational_arithmetic(seed):
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(1, 5))
    width = int(rng.integers(1, 32))
    shift = rng.integers(0, 63, channels)
    multiplier = rng.integers(2 ** (width - 1), 2**width, channels)
    low, zero, high = np.sort(rng.integers(0, 256, 3))
    requant = Requant(multiplier, shift, 8, int(zero), int(low), int(high))
    count = int(rng.choice([1, 1, 3, 49])) if shift.max() < 50 else 1
    # Accumulators whose quotient is near the codes, and their exact halves.
    halves = (2 * rng.integers(-5, 300, (2, channels, 3, 4)) + 1) << shift[:, None, None] >> 1
    near = halves // multiplier[:, None, None] + rng.integers(-1, 2, halves.shape)
    acc = np.clip(near, -(2**31), 2**31 - 1)
    got = requant.apply(acc, count)
    for place, value in np.ndenumerate(acc):
        channel = place[1]
        real = Fraction(int(value) * int(multiplier[channel]), count << int(shift[channel]))
        assert got[place] == min(max(round(real) + zero, low), high)


@pytest.mark.parametrize(("bits", "half", "changed"), [(8, 128, 127), (4, 8, 7)])
def test_eq5_ties_and_idempotence(bits, half, changed):
    """0.5 is a tie that goes to the even code; quantizing twice changes codes."""
    requant = Requant.eq5(bits, 12)
    top = 2**bits - 1
    acc = np.array([2**11 - 1, 2**11, 2**11 + 1, -5, 0, 2**12 - 1, 2**12, 2**20])
    expected = [top // 2, half, half, 0, 0, top, top, top]
    assert requant.apply(acc[None, None, None]).ravel().tolist() == expected
    codes = np.arange(2**bits).reshape(1, 1, -1)
    again = Add("add0", (Operand("x0", 1),), Requant.eq5(bits, bits))
    twice = run_layer(again, codes_input(*codes.shape, bits), codes)
    assert np.count_nonzero(twice != codes) == changed
    assert twice.max() == (254 if bits == 8 else 14)
    passed = Pool("maxpool0", "max", "x0", (1, 1), (1, 1))
    assert np.array_equal(run_layer(passed, codes_input(*codes.shape, bits), codes), codes)


def test_ties_go_to_even_on_both_sides():
    requant = Requant([1], [1], 8, 10, 0, 255)
    acc = np.array([-5, -3, -1, 1, 3, 5, 7])  # -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5
    got = requant.apply(acc[None, None, None]).ravel() - 10
    assert got.tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_requant_saturates_at_its_clamp():
    requant = Requant([2**31 - 1], [0], 8, 7, 3, 250)
    acc = np.array([-(2**31), -1, 0, 1, 2**31 - 1])
    assert requant.apply(acc[None, None, None]).ravel().tolist() == [3, 3, 7, 250, 250]


# -- layers by hand --------------------------------------------------------------------------------

IMAGE = [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]


def raw_conv(weight, bias=(0,), residual=None, **term):
    return Conv("conv0", (ConvTerm("x0", weight, **term),), bias, residual=residual)


@pytest.mark.parametrize(
    ("layer", "zero_point", "expected"),
    [
        (raw_conv([[[[1, -1], [2, 0]]]]), 0, [[7, 9], [13, 15]]),
        (raw_conv([[[[1, -1], [2, 0]]]], [10]), 1, [[15, 17], [21, 23]]),
        # the border is the zero point, so only pixels count
        (raw_conv([[[[1, 1]]]], padding=(0, 1, 0, 0)), 1, [[0, 1, 3], [3, 7, 9], [6, 13, 15]]),
        (raw_conv([[[[1, 1]]]], padding=(1, 0, 0, 0), dilation=(1, 2)), 0, [[0], [4], [10], [16]]),
        (raw_conv([[[[3]]]], stride=(2, 2), shift=2), 0, [[12, 36], [84, 108]]),
        (
            raw_conv([[[[1]]]], residual=Residual("x0", 3)),
            2,
            [[-9, 0, 9], [18, 27, 36], [45, 54, 63]],
        ),
    ],
)
def test_convolution_by_hand(layer, zero_point, expected):
    entry = codes_input(1, 3, 3, zero_point=zero_point)
    assert run_layer(layer, entry, IMAGE)[0].tolist() == expected


def test_grouped_and_depthwise_convolution_by_hand():
    codes = np.arange(1, 5).reshape(4, 1, 1)
    grouped = raw_conv(np.array([[1, 10], [2, 20]]).reshape(2, 2, 1, 1), [0, 0], groups=2)
    assert run_layer(grouped, codes_input(4, 1, 1), codes).ravel().tolist() == [21, 86]
    depthwise = raw_conv(np.array([1, -1, 2, 3]).reshape(4, 1, 1, 1), [0] * 4, groups=4)
    assert run_layer(depthwise, codes_input(4, 1, 1), codes).ravel().tolist() == [1, -2, 6, 12]


@pytest.mark.parametrize(
    ("include", "expected"), [(False, [[1, 2], [6, 7]]), (True, [[0, 1], [3, 7]])]
)
def test_average_pool_counts_its_padding_or_not(include, expected):
    """Sums 1, 5, 11, 28 over 1, 2, 2, 4 pixels, or over 4 each: half to even."""
    same = Requant([1], [0], 8, 0, 0, 255)
    layer = Pool("avgpool0", "avg", "x0", (2, 2), (2, 2), (1, 1, 0, 0), include, same)
    assert run_layer(layer, codes_input(1, 3, 3), IMAGE)[0].tolist() == expected


def test_max_pool_padding_never_wins():
    layer = Pool("maxpool0", "max", "x0", (2, 2), (2, 2), (1, 1, 0, 0))
    assert run_layer(layer, codes_input(1, 3, 3), IMAGE)[0].tolist() == [[1, 3], [7, 9]]
    zeros = np.zeros((1, 3, 3))
    assert run_layer(layer, codes_input(1, 3, 3), zeros).max() == 0


def test_projection_shares_the_accumulator():
    """Two terms on grids 2**-7 and 2**-11: the first is aligned by 4, one rounding for both."""
    main = ConvTerm("x0", [[[[5]]]], 4, shift=4)
    shortcut = ConvTerm("x0", [[[[-3]]]], 8)
    layer = Conv("conv0", (main, shortcut), [16], Requant.eq5(4, 11))
    code = run_layer(layer, codes_input(1, 1, 1, bits=4), [[[9]]])
    assert code.item() == round(Fraction(9 * 5 * 16 - 9 * 3 + 16, 2**11) * 15) == 5


def test_addition_by_hand():
    requant = Requant([3], [2], 8, 20, 0, 255)
    layer = Add("add0", (Operand("x0", 2), Operand("x0", -1)), requant)
    got = run_layer(layer, codes_input(1, 1, 4, zero_point=3), [[[0, 3, 5, 13]]])
    # (c - 3) * (2 - 1) * 3 / 4 + 20: -2.25, 0, 1.5, 7.5
    assert got.ravel().tolist() == [18, 20, 22, 28]


# -- random networks against loops over exact rationals --------------------------------------------


def naive_pixel(graph, layer, values, place):
    """Give one code of a layer, in Python integers and fractions."""
    image, channel, y, x = place

    def step(name, c, row, column):
        kind = graph.types[name]
        inside = 0 <= row < kind.height and 0 <= column < kind.width
        return int(values[name][image, c, row, column]) - kind.zero_point if inside else None

    if isinstance(layer, Add):
        parts = [(step(o.input, channel, y, x), o.multiplier) for o in layer.operands]
        return naive_requant(layer.requant, channel, Fraction(sum(a * b for a, b in parts)))
    if isinstance(layer, Pool):
        window = [
            step(layer.input, channel, row, column)
            for row in range(y * layer.stride[0] - layer.padding[0], 10**6)[: layer.kernel[0]]
            for column in range(x * layer.stride[1] - layer.padding[1], 10**6)[: layer.kernel[1]]
        ]
        pixels = [pixel for pixel in window if pixel is not None]
        if layer.mode == "max":
            return max(pixels) + graph.types[layer.input].zero_point
        count = len(window) if layer.count_include_pad else len(pixels)
        return naive_requant(layer.requant, channel, Fraction(sum(pixels), count))
    total = int(layer.bias[channel])
    for term in layer.terms:
        per_group = term.weight.shape[0] // term.groups
        first = channel // per_group * term.weight.shape[1]
        for (c, r, k), weight in np.ndenumerate(term.weight[channel]):
            row = y * term.stride[0] - term.padding[0] + r * term.dilation[0]
            column = x * term.stride[1] - term.padding[1] + k * term.dilation[1]
            total += (step(term.input, first + c, row, column) or 0) * int(weight) * 2**term.shift
    if layer.residual:
        total += step(layer.residual.input, channel, y, x) * 2**layer.residual.shift
    return total if layer.requant is None else naive_requant(layer.requant, channel, total)


def naive_requant(requant, channel, value):
    multiplier = int(requant.multiplier[channel % requant.multiplier.size])
    shift = int(requant.shift[channel % requant.shift.size])
    code = round(Fraction(value) * multiplier / 2**shift) + requant.zero_point
    return min(max(code, requant.low), requant.high)


@pytest.mark.random(80)
def test_random_networks_against_exact_rationals(seed):
    graph = random_graph(seed)
    inputs = random_inputs(graph, seed)
    codes = {
        entry.name: entry.quantize.apply(inputs[entry.name]).reshape(-1, *entry.type.shape)
        for entry in graph.inputs
    }
    values = evaluate_values(graph, codes)
    rng = np.random.default_rng(seed)
    for layer in graph.layers:
        result = values[layer.name]
        for _ in range(6):
            place = tuple(int(rng.integers(size)) for size in result.shape)
            assert result[place] == naive_pixel(graph, layer, values, place), (layer.name, place)


@pytest.mark.random(150)
def test_native_networks_against_onnx_runtime(seed):
    graph = random_graph(seed, native=True)
    inputs = random_inputs(graph, seed, images=3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options)
    results = session.run(None, inputs)
    for expected, got in zip(evaluate(graph, inputs), results, strict=True):
        assert expected.dtype == got.dtype
        np.testing.assert_array_equal(expected, got)


# -- borders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.random(4)
def test_borders_against_onnx_runtime(seed, dtype):
    """Quantize and dequantize are ONNX's, halves of a step and saturation included."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    scale = np.float32(rng.uniform(0.01, 0.3))
    zero = np.array(rng.integers(info.min, info.max + 1), dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(v), n) for v, n in [(scale, "scale"), (zero, "zero")]
    ]
    code_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "border",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, 2048])],
            [
                helper.make_tensor_value_info("codes", code_type, [1, 1, 1, 2048]),
                helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 2048]),
            ],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    x = (rng.integers(-600, 600, (1, 1, 1, 2048)) * (scale / 2)).astype(np.float32)
    codes, y = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    quantize = Quantize("float32", int(info.min), int(info.max), float(scale), int(zero))
    stored = quantize.apply(x)
    np.testing.assert_array_equal(stored.astype(np.int64) + info.min, codes)
    real = Dequantize("float32", (float(scale),), int(zero) - int(info.min))
    np.testing.assert_array_equal(real.apply(stored), y)
    np.testing.assert_array_equal(Dequantize(dtype, low=int(info.min)).apply(stored), codes)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "input x0: missing"),
        (np.zeros((1, 1, 3, 4), np.uint8), r"shape \(1, 1, 3, 4\), expected \(N, 1, 3, 3\)"),
        (np.zeros((1, 1, 3, 3), np.float32), "x0: dtype float32, expected uint8"),
        (np.full((1, 1, 3, 3), 16, np.uint8), r"codes 16..16, expected 0..15"),
    ],
)
def test_bad_arrays_are_named(array, message):
    pool = Pool("maxpool0", "max", "x0", (3, 3), (1, 1))
    out = Output("maxpool0", (1, 1, 1), Dequantize("uint8"))
    graph = Graph([codes_input(1, 3, 3, bits=4)], [pool], [out])
    with pytest.raises(InputError, match=message):
        evaluate(graph, {} if array is None else {"x0": array})


def test_nan_is_refused():
    quantize = Quantize(high=255, factor=255.0, clip=(0.0, 1.0))
    with pytest.raises(InputError, match="NaN"):
        quantize.apply(np.array([0.5, np.nan], np.float32))


# -- bad graphs ------------------------------------------------------------------------------------

SAME = Requant.eq5(8, 15)


def conv(weight=None, bias=(0,), requant=SAME, residual=None, name="conv0", **term):
    weight = np.ones((1, 1, 1, 1)) if weight is None else np.asarray(weight)
    source = term.pop("input", "x0")
    return Conv(name, (ConvTerm(source, weight, **term),), bias, requant, residual)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (conv(name="conv7"), "conv7: layer 0 must be named conv0"),
        (conv(input="x9"), "conv0: reads 'x9', which is not defined before"),
        (conv(np.ones((1, 2, 1, 1))), r"conv0: weight \(1, 2, 1, 1\) in 1 groups on 1 channels"),
        (conv(np.full((1, 1, 1, 1), 8), weight_bits=4), "weight codes do not fit 4 bits"),
        (conv(weight_bits=5), "weight codes do not fit 5 bits"),
        (conv(np.ones((1, 1, 4, 1))), r"kernel \(4, 1\) is larger than its input 1x3x3 u8"),
        (conv(stride=(0, 1)), r"stride \(0, 1\)"),
        (conv(bias=(0, 0)), r"conv0: bias of shape \(2,\)"),
        (conv(shift=40), "alignment shift 40"),
        (conv(shift=31), "accumulators may reach 547608330240, above"),
        (conv(residual=Residual("x0", 0), stride=(2, 2)), "conv0: residual 1x3x3 u8 on 1x2x2"),
        (conv(requant=Requant([1, 1], [0], 8, 0, 0, 255)), "requantizes"),
        (conv(requant=Requant([1], [63], 8, 0, 0, 255)), "shift is not within 0..62"),
        (conv(requant=Requant([1], [0], 8, 0, 9, 5)), "clamp 9..5"),
        (conv(requant=Requant([1], [0], 7, 0, 0, 127)), "codes of 7 bits"),
        (Pool("maxpool0", "max", "x0", (2, 2), (1, 1), requant=SAME), "has no requant"),
        (Pool("avgpool0", "avg", "x0", (2, 2), (1, 1)), "needs a requantization"),
        (Pool("maxpool0", "max", "x0", (2, 2), (1, 1), (2, 0, 0, 0)), r"padding \(2, 0, 0, 0\)"),
        (Pool("maxpool0", "max", "x0", (5, 5), (1, 1)), r"window \(5, 5\) larger than 1x3x3"),
    ],
)
def test_bad_graphs_are_named(layer, message):
    with pytest.raises(GraphError, match=message):
        Graph([codes_input(1, 3, 3)], [layer], [Output("x0", (1, 3, 3), Dequantize("uint8"))])


def test_weights_must_be_integers():
    with pytest.raises(GraphError, match="values do not fit int8"):
        ConvTerm("x0", [[[[0.5]]]])
    with pytest.raises(GraphError, match="values do not fit int8"):
        ConvTerm("x0", [[[[200]]]])


def test_accumulators_cannot_be_read():
    layers = [conv(requant=None), Pool("maxpool1", "max", "conv0", (1, 1), (1, 1))]
    with pytest.raises(GraphError, match="maxpool1: reads accumulators 'conv0'"):
        Graph([codes_input(1, 3, 3)], layers, [Output("x0", (1, 3, 3), Dequantize())])


# -- the generator ---------------------------------------------------------------------------------

COVERED = """
    conv maxpool avgpool add residual projection grouped depthwise dilated strided padded
    asymmetric-padding large-kernel wide-input sub-kernels over-64 empty-block all-zero full sparse
    dense flattened raw w4a4 w4a8 w8a4 w8a8 mixed-widths zero-point per-channel native multiplier
    multi-input multi-output overlapping-pool padded-pool global-pool aligned-term odd-channels
    input-float32 input-uint8 input-int8 tie low high
"""


def test_random_graphs_cover_everything(first_seed):
    """300 networks hold each feature at least ten times."""
    found = Counter()
    for seed in range(first_seed, first_seed + 300):
        graph = random_graph(seed)
        found.update(features(graph))
        found.update(events(graph, random_inputs(graph, seed)).keys())
    rare = {name: found[name] for name in COVERED.split() if found[name] < 10}
    assert not rare, f"fewer than ten: {rare}"


@pytest.mark.parametrize("focus", FOCI)
def test_random_graphs_repeat(focus):
    assert random_graph(3, focus=focus) == random_graph(3, focus=focus)
    assert random_graph(3, focus=focus) != random_graph(4, focus=focus)
