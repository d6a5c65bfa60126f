"""Networks that others quantized: onnxruntime's static quantization, and the Q/DQ forms of others.

Each is taken whole, or what is not says why; each of its layers, fed ONNX Runtime's codes, gives
its codes to within one; end to end few codes stray, and not far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mars_runtime.errors import UnsupportedError
from python_tests.float_networks import float_network, images, quantize_static
from python_tests.onnx_models import ModelWriter, model_inputs
from tvm_mars.frontend.onnx_form import plain_form

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

import tvm_mars
from python_tests.observing import (
    end_to_end,
    lowered,
    observe,
    onnx_runtime,
    single_layers,
)

pytestmark = pytest.mark.filterwarnings("ignore:Field 'shape'")

# What of each network is for MARS, all of it.
TAKEN = {
    "plain": ["avg_pool2d"] + ["conv2d"] * 2 + ["matmul"] * 2 + ["max_pool2d"],
    "residual": ["add"] * 2 + ["conv2d"] * 6 + ["matmul", "mean"],
    "inverted": ["add"] + ["conv2d"] * 7 + ["matmul", "mean"],
    "dense": ["matmul"] * 2,
}
SCHEMES = {
    "uint8": ("QUInt8", "QInt8", False),
    "uint8, symmetric": ("QUInt8", "QInt8", True),
    "int8": ("QInt8", "QInt8", False),
    "int8, symmetric": ("QInt8", "QInt8", True),
    "uint8 weights": ("QUInt8", "QUInt8", False),
}


def quantized(kind: str, folder: Path, opset: int = 17, **options: Any) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return quantize_static(float_network(kind, opset=opset), folder, **{**kinds, **options})


def report_of(model: onnx.ModelProto) -> Any:
    return tvm_mars.offload_report(tvm_mars.partition_for_mars(import_model(model)))


def import_model(model: onnx.ModelProto) -> Any:
    from tvm_mars.frontend.relax.api import import_model

    return import_model(model)


def assert_whole(model: onnx.ModelProto, taken: list[str]) -> None:
    report = report_of(model)
    assert sorted(decision.op for decision in report.offloaded) == taken, str(report)
    assert not report.rejected and not report.host_operators and report.regions == 1, str(report)


def assert_codes(model: onnx.ModelProto, inputs: dict[str, Any], layers: int) -> None:
    """Single layers within a code; end to end few codes differ, and hardly any by more than one.

    One code of a map may move several of the next, whose steps are finer.
    """
    graph, values = observe(model, inputs)
    differences = single_layers(graph, values)
    assert len(differences) >= layers and max(differences.values()) <= 1, differences
    histogram = end_to_end(graph, values)
    print("codes by end-to-end difference:", dict(sorted(histogram.items())))
    assert histogram[0] >= 0.98 * histogram.total()
    assert histogram[0] + histogram[1] >= 0.998 * histogram.total()


# -- onnxruntime's static quantization -------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TAKEN)
def test_static_quantization(kind: str, scheme: str, tmp_path: Path) -> None:
    """Per tensor and per channel in turn."""
    from onnxruntime.quantization import QuantType

    activations, weights, symmetric = SCHEMES[scheme]
    per_channel = (list(TAKEN).index(kind) + list(SCHEMES).index(scheme)) % 2 == 0
    model = quantized(
        kind,
        tmp_path,
        per_channel=per_channel,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
        extra_options={"ActivationSymmetric": symmetric},
    )
    assert {node.op_type for node in model.graph.node}.isdisjoint({"BatchNormalization"})
    assert_whole(model, TAKEN[kind])
    layers = len(TAKEN[kind]) - ("max_pool2d" in TAKEN[kind])
    assert_codes(model, {"image": images(8, 1)}, layers)


OPTIONS = {
    "a quantizer for each reader": {"extra_options": {"DedicatedQDQPair": True}},
    "weights quantized in the file": {"extra_options": {"AddQDQPairToWeight": True}},
    "float biases": {"extra_options": {"QuantizeBias": False}},
    "weights with zero points": {"extra_options": {"WeightSymmetric": False}},
    "activations kept": {"extra_options": {"QDQKeepRemovableActivations": True}},
    "7-bit weights": {"reduce_range": True},
    "Microsoft's operators": {"extra_options": {"UseQDQContribOps": True}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_static_quantization(option: str, tmp_path: Path) -> None:
    model = quantized("residual", tmp_path, **OPTIONS[option])
    assert_whole(model, TAKEN["residual"])
    result = tvm_mars.compile(model).run({"image": images(8, 1)})["scores"]
    (expected,) = onnx_runtime(model, {"image": images(8, 1)})
    step = np.min(np.diff(np.unique(expected)))
    assert np.abs(result - expected).max() <= 2.5 * step


@pytest.mark.parametrize("opset", [13, 18, 21, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    model = quantized("dense", tmp_path, opset, per_channel=True)
    assert model.opset_import[0].version == opset
    assert_whole(model, TAKEN["dense"])
    assert_codes(model, {"image": images(8, 1)}, 2)


@pytest.mark.parametrize("weights", ["QInt4", "QUInt4"])
def test_weights_of_4_bits(weights: str, tmp_path: Path) -> None:
    """Which opset 21 stores as such; with a zero point their differences need five."""
    from onnxruntime.quantization import QuantType

    model = quantized("residual", tmp_path, 21, weight_type=QuantType[weights])
    assert_whole(model, TAKEN["residual"])
    assert_codes(model, {"image": images(8, 1)}, 9)
    terms = [
        t for layer in lowered(model).graph.layers if layer.kind == "conv" for t in layer.terms
    ]
    assert {term.weight_bits for term in terms} <= ({4} if weights == "QInt4" else {4, 8})


def test_only_products_quantized(tmp_path: Path) -> None:
    """Max pools and ReLUs move behind the quantizer that follows; an average of numbers cannot."""
    model = quantized("plain", tmp_path, op_types_to_quantize=["Conv", "Gemm"])
    report = report_of(model)
    taken = sorted(decision.op for decision in report.offloaded)
    assert taken == ["conv2d", "conv2d", "matmul", "matmul", "max_pool2d"]
    reasons = {d.op: d.reason for d in report.rejected}
    assert reasons == {"avg_pool2d": "its input is not quantized (no dequantize before it)"}
    assert report.host_operators == ("nn.relu", "nn.avg_pool2d")


def test_codes_of_16_bits_stay(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    model = quantized("dense", tmp_path, 21, activation_type=QuantType.QInt16)
    compiled = tvm_mars.compile(model)
    assert compiled.program is None and len(compiled.report.rejected) == len(TAKEN["dense"])
    assert all("uint4 or int4 codes: int16" in d.reason for d in compiled.report.rejected)
    (expected,) = onnx_runtime(model, {"image": images(4, 1)})
    result = compiled.run({"image": images(4, 1)})["scores"]
    np.testing.assert_allclose(result, expected, atol=1e-2 * np.abs(expected).max())


def test_integer_operators_are_refused_with_the_remedy(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat

    model = quantized("plain", tmp_path, quant_format=QuantFormat.QOperator)
    with pytest.raises(UnsupportedError, match=r"QLinearConv.*Q/DQ format"):
        tvm_mars.compile(model)


def test_a_concatenation_splits_regions(tmp_path: Path) -> None:
    model = quantized("branches", tmp_path, per_channel=True)
    compiled = tvm_mars.compile(model)
    assert compiled.report.regions == 2 and not compiled.report.rejected
    assert compiled.report.host_operators == ("concat",)
    (expected,) = onnx_runtime(model, {"image": images(8, 1)})
    step = np.min(np.diff(np.unique(expected)))
    result = compiled.run({"image": images(8, 1)})["scores"]
    assert np.abs(result - expected).max() <= 2.5 * step


# -- the forms of others ---------------------------------------------------------------------------


class Writer(ModelWriter):
    """Quantize, clip codes, dequantize; normalization behind quantized products."""

    def clipped(self, x: str, scale: float, low: int, high: int) -> str:
        dtype = np.int8 if low < 0 else np.uint8
        names = self.constant(scale), self.constant(0, dtype)
        codes = self.node("QuantizeLinear", x, *names)
        codes = self.node("Clip", codes, self.constant(low, dtype), self.constant(high, dtype))
        return self.node("DequantizeLinear", codes, *names)

    def weight4(self, *shape: int, axis: int = 0, power: bool = False) -> str:
        codes = self.constant(self.rng.integers(-7, 8, shape), np.int8)
        codes = self.node("Clip", codes, self.constant(-7, np.int8), self.constant(7, np.int8))
        scale = self.rng.uniform(0.01, 0.05, shape[axis]) if not power else np.float32(2**-5)
        zero = np.zeros_like(scale)
        names = self.constant(scale), self.constant(zero, np.int8)
        return self.node("DequantizeLinear", codes, *names, axis=axis)

    def normalization(self, x: str, channels: int) -> str:
        """With negative and zero gammas."""
        gamma = self.rng.uniform(-1.5, 1.5, channels)
        gamma[1] = 0
        draw = self.rng.uniform
        rest = draw(-1, 1, channels), draw(-1, 1, channels), draw(0.5, 2, channels)
        return self.node("BatchNormalization", x, *map(self.constant, (gamma, *rest)))


def qcdq(power: bool = False) -> onnx.ModelProto:
    """Write what Brevitas's QCDQ export gives: 4-bit codes by Clip, normalization not folded."""
    w = Writer(np.random.default_rng(5))
    act = (2**-4, 2**-3) if power else (0.11, 0.13)
    x = w.clipped("image", act[0], -7, 7)
    x = w.node("Conv", x, w.weight4(16, 3, 3, 3, power=power), pads=[1] * 4)
    x = w.clipped(w.node("Relu", w.normalization(x, 16)), act[1], 0, 15)
    x = w.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    depthwise = w.weight4(16, 1, 3, 3, power=power)
    x = w.node("Conv", x, depthwise, w.bias(w.rng.normal(0, 0.2, 16), 2**-9), group=16)
    x = w.clipped(w.node("Relu", x), act[1], 0, 15)
    x = w.node("Flatten", x, axis=1)
    x = w.node("Gemm", x, w.weight4(64, 12, axis=1, power=power), w.constant(np.ones(12)))
    x = w.clipped(w.node("Relu", w.normalization(x, 12)), act[1], 0, 15)
    w.node("Gemm", x, w.weight4(10, 12, power=power), transB=1)
    w.name_last("scores")
    return w.model({"image": ["N", 3, 8, 8]}, {"scores": ["N", 10]})


@pytest.mark.parametrize("power", [False, True], ids=["any scale", "powers of two"])
def test_quantize_clip_dequantize(power: bool) -> None:
    model = qcdq(power)
    assert_whole(model, ["conv2d", "conv2d", "matmul", "matmul", "max_pool2d"])
    assert_codes(model, model_inputs(model, 3, 16), 3)
    graph = lowered(model).graph
    assert {kind.bits for kind in graph.types.values() if kind.bits != 32} == {4}
    assert all(t.weight_bits == 4 for c in graph.layers if c.kind == "conv" for t in c.terms)


def test_the_plain_form_computes_the_same() -> None:
    """But for the rounding of folded normalizations, which some codes at ties show."""
    model = qcdq()
    before = onnx.ModelProto.FromString(model.SerializeToString())
    plain = plain_form(model)
    assert model == before
    onnx.checker.check_model(plain, full_check=True)
    kinds = {node.op_type for node in plain.graph.node}
    assert "BatchNormalization" not in kinds
    inputs = model_inputs(model, 7, 64)
    (ours,), (theirs,) = onnx_runtime(plain, inputs), onnx_runtime(model, inputs)
    assert np.mean(np.abs(ours - theirs) > 1e-5) < 0.05
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def exactly_same(model: onnx.ModelProto, seed: int = 1) -> onnx.ModelProto:
    plain = plain_form(model)
    onnx.checker.check_model(plain, full_check=True)
    inputs = model_inputs(model, seed, 16)
    for ours, theirs in zip(onnx_runtime(plain, inputs), onnx_runtime(model, inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return plain


def test_a_clip_of_codes_clips_numbers_exactly() -> None:
    """Two quantizers of one tensor; one stays, whose codes another operator reads too."""
    w = Writer(np.random.default_rng(2))
    x = w.node("Relu", "image")
    one = w.clipped(x, 0.03, 0, 15)
    two = w.clipped(x, 0.03, 2, 20)
    scale, zero = w.constant(0.017), w.constant(7, np.uint8)
    codes = w.node("QuantizeLinear", "image", scale, zero)
    few = w.node("Clip", codes, w.constant(3, np.uint8), w.constant(18, np.uint8))
    three = w.node("DequantizeLinear", few, scale, zero)
    four = w.node("DequantizeLinear", codes, scale, zero)
    w.node("Sum", one, two, three, four)
    w.name_last("scores")
    model = w.model({"image": ["N", 3, 8, 8]}, {"scores": ["N", 3, 8, 8]})
    plain = exactly_same(model)
    clips = [n for n in plain.graph.node if n.op_type == "Clip"]
    quantizers = {n.output[0] for n in plain.graph.node if n.op_type == "QuantizeLinear"}
    assert len(clips) == 3 and sum(clip.input[0] in quantizers for clip in clips) == 1


def test_a_pool_of_numbers_becomes_one_of_codes() -> None:
    w = Writer(np.random.default_rng(2))
    x = w.node("Conv", w.requantize("image", -1, 1), w.weight4(8, 3, 3, 3), pads=[1] * 4)
    x = w.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    x = w.requantize(w.node("Relu", x), 0, 1)
    w.node("Conv", x, w.weight4(10, 8, 4, 4))
    w.name_last("scores")
    model = w.model({"image": ["N", 3, 8, 8]}, {"scores": ["N", 10, 1, 1]})
    plain = exactly_same(model)
    order = [node.op_type for node in plain.graph.node]
    assert order.index("Relu") < order.index("MaxPool")
    assert order[order.index("MaxPool") - 1] == "QuantizeLinear"
    assert_whole(model, ["conv2d", "conv2d", "max_pool2d"])


def test_equal_quantizers_become_one() -> None:
    w = Writer(np.random.default_rng(2))
    x = w.node("Relu", "image")
    parts = [w.requantize(x, 0, 1), w.requantize(x, 0, 1), w.requantize(x, 0, 2)]
    w.node("Sum", *parts, w.requantize("image", 0, 1))
    w.name_last("scores")
    model = w.model({"image": ["N", 3, 8, 8]}, {"scores": ["N", 3, 8, 8]})
    plain = exactly_same(model)
    assert [node.op_type for node in plain.graph.node].count("QuantizeLinear") == 3


def test_a_normalization_that_does_not_fit_stays() -> None:
    """Code -128 has no opposite in int8; so its negative gamma stays on the CPU."""
    w = Writer(np.random.default_rng(2))
    codes = w.constant(np.full((8, 3, 1, 1), -128), np.int8)
    weight = w.node("DequantizeLinear", codes, w.constant(0.01), w.constant(0, np.int8))
    x = w.node("Conv", w.requantize("image", -1, 1), weight)
    w.requantize(w.normalization(x, 8), -1, 1)
    w.name_last("scores")
    model = w.model({"image": ["N", 3, 8, 8]}, {"scores": ["N", 8, 8, 8]})
    exactly_same(model)
    report = report_of(model)
    assert [d.op for d in report.offloaded] == ["conv2d"]
    assert report.host_operators[0] == "nn.batch_norm"


def test_quantized_in_blocks_is_refused_or_stays() -> None:
    """Opset 21's blocks of weights with a scale each: no layer of MARS has them."""
    rng = np.random.default_rng(0)
    constants = [
        onnx.numpy_helper.from_array(rng.integers(-7, 8, (10, 32)).astype(np.int8), "w"),
        onnx.numpy_helper.from_array(rng.uniform(0.1, 1, (10, 2)).astype(np.float32), "s"),
        onnx.numpy_helper.from_array(np.zeros((10, 2), np.int8), "z"),
        onnx.numpy_helper.from_array(np.float32(0.02), "xs"),
        onnx.numpy_helper.from_array(np.uint8(128), "xz"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"], axis=1, block_size=16),
        helper.make_node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 10])],
        constants,
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    x = {"x": rng.normal(size=(4, 32)).astype(np.float32)}
    (expected,) = onnx_runtime(model, x)
    try:
        compiled = tvm_mars.compile(model)
    except UnsupportedError:
        return
    assert not compiled.report.offloaded
    np.testing.assert_allclose(compiled.run(x)["y"], expected, atol=1e-4)
