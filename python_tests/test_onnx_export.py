"""The export is exact in float32, says where it could not be, and repeats to the byte."""

from __future__ import annotations

import math
import subprocess
import sys

import attrs
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from mars_runtime.errors import CapacityError, UnsupportedError
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.rounding import divide_half_even
from python_tests.random_graphs import random_graph
from tvm_mars.graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Operand,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate,
)
from tvm_mars.onnx_export import check_exact, to_onnx


def native_input(channels, height, width, bits=8):
    kind = MapType(channels, height, width, bits)
    top = 2**bits - 1
    return Input("x0", kind, kind.shape, Quantize(high=top, factor=float(top), clip=(0.0, 1.0)))


def single(layer, entry, dequantize=None):
    """Give a graph of one layer."""
    probe = Graph([entry], [layer], [Output("x0", entry.shape, Dequantize())])
    kind = probe.types[layer.name]
    form = dequantize or Dequantize(scale=(2.0**-kind.bits,))
    return Graph([entry], [layer], [Output(layer.name, kind.shape, form)])


def run(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, feeds)


def wide_conv(residual_shift, bias=0):
    """Give 512 dense products of 255 x 127 on one pixel, and a residual that fills the rest."""
    weight = np.full((512, 512, 1, 1), 127)
    return Conv(
        "conv0",
        (ConvTerm("x0", weight),),
        np.full(512, bias),
        Requant.eq5(8, 15),
        Residual("x0", residual_shift),
    )


def test_bound_of_float32_is_sharp():
    """The last sum that float32 holds is exported and exact, one more is refused by name."""
    entry = native_input(512, 1, 1)
    room = 2**24 - 1 - (512 * 255 * 127 + 255)
    good = single(attrs.evolve(wide_conv(0, room), requant=Requant.eq5(8, 16)), entry)
    x = np.ones((1, 512, 1, 1), np.float32)
    assert np.array_equal(run(to_onnx(good), {"x0": x})[0], evaluate(good, {"x0": x})[0])
    bad = single(attrs.evolve(wide_conv(0, room + 1), requant=Requant.eq5(8, 16)), entry)
    with pytest.raises(
        CapacityError, match=r"conv0: accumulators.*needs 16777216, has 16777215"
    ) as e:
        to_onnx(bad)
    assert (e.value.need, e.value.have) == (2**24, 2**24 - 1)


def test_float_is_wrong_beyond_the_bound():
    """The bound is needed: an odd sum above 2**24 has no float32, whatever the order."""
    total = 4608 * 255 * 127 + 1
    assert total > 2**24
    assert int(np.float32(total)) != total


def test_product_before_rounding_is_bound_as_well():
    """(2**16 - 1) * 255 still has 24 bits, on the next finer grid it may not."""
    entry = native_input(512, 1, 1)
    check_exact(single(attrs.evolve(wide_conv(0), requant=Requant.eq5(8, 16)), entry))
    with pytest.raises(CapacityError, match=r"conv0: clamped accumulators times 2\*\*bits - 1"):
        check_exact(single(attrs.evolve(wide_conv(0), requant=Requant.eq5(8, 17)), entry))


def average(kernel, bits_out, include=False, padding=(0, 0, 0, 0)):
    return Pool("avgpool0", "avg", "x0", kernel, (1, 1), padding, include, Requant.eq5(bits_out, 8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (1, 3), (3, 3), (5, 3), (7, 7), (15, 17)])
def test_average_pools_round_every_sum_exactly(kernel, bits):
    """Every sum of the window that can occur: counts 3, 5, 15 and 17 share factors with 255."""
    count = math.prod(kernel)
    sums = np.arange(0, 255 * count + 1)
    base, extra = sums // count, sums % count
    codes = base[:, None] + (np.arange(count) < extra[:, None])
    graph = single(average(kernel, bits), native_input(1, *kernel), Dequantize("uint8"))
    # The middle of each code's interval: eq. 5 gives back every code.
    x = (codes / 255).astype(np.float32).reshape(-1, 1, *kernel)
    assert np.array_equal(np.rint(x * np.float32(255)).reshape(codes.shape), codes)
    expected = evaluate(graph, {"x0": x})[0]
    np.testing.assert_array_equal(run(to_onnx(graph), {"x0": x})[0], expected)


@pytest.mark.parametrize(("bits_in", "bits"), [(4, 4), (4, 8), (8, 4), (8, 8)])
def test_average_of_few_codes_survives_two_roundings(bits_in, bits):
    """What the export relies on, for every sum of up to 256 codes; 278 would break it."""
    for count in [*range(1, 257), 278]:
        sums = np.arange((2**bits_in - 1) * count + 1)
        average = (sums / 2**bits_in).astype(np.float32) / np.float32(count)
        codes = np.rint(average * np.float32(2**bits - 1))
        exact = divide_half_even(sums * (2**bits - 1), count << bits_in)
        wrong = np.count_nonzero(codes != exact)
        assert wrong == (1 if (count, bits_in, bits) == (278, 8, 8) else 0), count


def test_average_pool_bound():
    check_exact(single(average((16, 16), 8), native_input(1, 16, 16)))
    with pytest.raises(CapacityError, match=r"avgpool0: the sum of the window.*needs 17825792"):
        check_exact(single(average((16, 17), 8), native_input(1, 16, 17)))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            single(average((2, 2), 8), attrs.evolve(native_input(1, 2, 2), quantize=Quantize())),
            "x0: quantizes float32",
        ),
        (
            single(
                Add("add0", (Operand("x0", 1),), Requant([7], [3], 8, 0, 0, 255)),
                native_input(1, 2, 2),
            ),
            "add0: requantizes by multiplier per tensor",
        ),
        (
            single(
                Add("add0", (Operand("x0", 3),), Requant.eq5(8, 10)),
                native_input(1, 2, 2),
            ),
            "add0: scale 3 is no power of two",
        ),
        (
            single(
                Add("add0", (Operand("x0", -2),), Requant.eq5(8, 10)),
                native_input(1, 2, 2),
            ),
            "add0: scale -2 is no power of two",
        ),
        (
            single(
                Conv("conv0", (ConvTerm("x0", [[[[1]]]]),), [0]),
                native_input(1, 2, 2),
                Dequantize(scale=(0.3,)),
            ),
            "conv0: scale 0.3 is no power of two",
        ),
        (
            single(
                Conv("conv0", (ConvTerm("x0", [[[[1]]]]),), [0]),
                native_input(1, 2, 2),
                Dequantize("int32"),
            ),
            "conv0: accumulators leave as int32",
        ),
        (
            single(
                Add("add0", (Operand("x0", 1),), Requant.eq5(8, 8)),
                native_input(1, 2, 2),
                Dequantize("int8", low=-128),
            ),
            "add0: leaves as int8",
        ),
    ],
)
def test_what_is_not_native_is_refused_by_name(graph, message):
    with pytest.raises(UnsupportedError, match=message):
        to_onnx(graph)


@pytest.mark.random(60)
def test_files_are_portable(seed):
    """The checker passes, scales are scalars and powers of two, the batch is symbolic."""
    model = to_onnx(random_graph(seed, native=True))
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constants[node.input[1]]
            assert scale.shape == () == constants[node.input[2]].shape
            assert math.frexp(float(scale))[0] == 0.5
            assert constants[node.input[2]] == 0
    used = {name for node in model.graph.node for name in node.input}
    assert set(constants) <= used
    for value in [*model.graph.input, *model.graph.output]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    assert [value.name for value in model.graph.output] == [
        f"y{i}" for i in range(len(model.graph.output))
    ]


def test_paper_networks_carry_the_papers_scales():
    """In a network of eq. 5 to 8 a weight code is worth 2**-(bits - 1), whatever its alignment."""
    graph = random_graph(5, native=True, paper=True, focus="projection", layers=0)
    model = to_onnx(graph)
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    scales = {
        n.output[0]: float(constants[n.input[1]])
        for n in model.graph.node
        if n.op_type == "DequantizeLinear"
    }
    for layer in graph.layers:
        for i, term in enumerate(layer.terms):
            assert scales[f"{layer.name}_term{i}_weight"] == 2.0 ** -(term.weight_bits - 1)


@pytest.mark.parametrize("shifts", [(0, 4), (4, 0), (4, 4)])
def test_bias_of_aligned_dense_terms(shifts):
    """A bias on a finer grid than its Gemm's: ONNX Runtime must not fuse it at the wrong scale."""
    terms = [
        ConvTerm("x0", [[[[w]]], [[[-w]]]], 4, shift=s) for w, s in zip((3, 5), shifts, strict=True)
    ]
    layer = Conv("conv0", terms, [700, 300], Requant.eq5(8, 11))
    graph = single(layer, native_input(1, 1, 1, bits=4))
    x = np.linspace(0, 1, 16, dtype=np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(run(to_onnx(graph), {"x0": x})[0], evaluate(graph, {"x0": x})[0])


def test_the_same_value_may_leave_twice():
    entry = native_input(1, 2, 2)
    pool = Pool("maxpool0", "max", "x0", (2, 2), (1, 1))
    outs = [
        Output("maxpool0", (1, 1, 1), Dequantize("uint8")),
        Output("maxpool0", (1,), Dequantize("uint8")),
        Output("maxpool0", (1, 1, 1), Dequantize("uint8")),
        Output("maxpool0", (1, 1, 1), Dequantize(scale=(2.0**-8,))),
        Output("x0", (1, 2, 2), Dequantize("uint8")),
    ]
    graph = Graph([entry], [pool], outs)
    x = np.array([[[[0.1, 0.5], [0.2, 0.9]]]], np.float32)
    for expected, got in zip(
        evaluate(graph, {"x0": x}), run(to_onnx(graph), {"x0": x}), strict=True
    ):
        np.testing.assert_array_equal(expected, got)


DIGEST = """
import hashlib
from python_tests.random_graphs import random_graph
from tvm_mars.onnx_export import to_onnx
digest = hashlib.sha256()
for seed in range(20):
    digest.update(to_onnx(random_graph(seed, native=True)).SerializeToString())
print(digest.hexdigest())
"""


def test_bytes_do_not_depend_on_the_hash_seed(monkeypatch):
    digests = set()
    monkeypatch.setenv("PYTHONPATH", ":".join(entry for entry in sys.path if entry))
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        run = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1
