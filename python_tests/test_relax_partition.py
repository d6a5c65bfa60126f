"""What the partitioning takes, what it leaves, and what it says about that."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import pytest

from mars_runtime.errors import InputError, OptionError, UnsupportedError
from mars_runtime.program import HostReason, Program
from python_tests.onnx_models import ModelWriter, float_model, imported_model, model_inputs

tvm = pytest.importorskip("tvm")
onnxruntime = pytest.importorskip("onnxruntime")

import tvm_mars  # noqa: E402
from tvm_mars.frontend.matching import Node, Op, match  # noqa: E402
from tvm_mars.frontend.patterns import composites_of, parse  # noqa: E402
from tvm_mars.frontend.relax.api import CompiledModel, import_model  # noqa: E402
from tvm_mars.frontend.relax.nodes import OPERATORS  # noqa: E402
from tvm_mars.graph import evaluate  # noqa: E402
from tvm_mars.networks import resnet20  # noqa: E402
from tvm_mars.onnx_export import to_onnx  # noqa: E402

Array = Any
CODES = ("uint8", "int8")


class Writer(ModelWriter):
    """A writer for small Q/DQ networks."""

    def conv(self, x: str, given: int, out: int, kernel: int = 3, **attributes: Any) -> str:
        values = self.rng.normal(0, 0.3, (out, given, kernel, kernel))
        weight = self.weight(values, per_channel=False)
        return self.node("Conv", x, weight, **attributes)


def writer() -> Writer:
    return Writer(np.random.default_rng(7))


def finish(w: Writer, out: list[int | str], given: tuple[int, ...] = (3, 8, 8)) -> onnx.ModelProto:
    w.name_last("result")
    return w.model({"image": ["N", *given]}, {"result": ["N", *out]})


def check(model: onnx.ModelProto, tolerance: float = 1e-5, images: int = 3) -> CompiledModel:
    """Compile, run and compare with ONNX Runtime."""
    compiled = tvm_mars.compile(model)
    inputs = model_inputs(model, 1, images)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)
    for ours, theirs in zip(compiled.run(inputs).values(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
    return compiled


def offloaded(compiled: CompiledModel) -> list[str]:
    return [decision.op for decision in compiled.report.offloaded]


def reasons(compiled: CompiledModel) -> dict[str, str]:
    return {decision.op: decision.reason for decision in compiled.report.rejected}


# -- chains ----------------------------------------------------------------------------------------


def test_every_chain_is_registered_and_has_a_lowering() -> None:
    from tvm.relax.backend.pattern_registry import get_patterns_with_prefix

    from tvm_mars.constraints import CONSTRAINTS
    from tvm_mars.frontend.lower import _Lowering

    names = [pattern.name for pattern in get_patterns_with_prefix("mars.")]
    chains = composites_of(OPERATORS)
    assert names == [composite.name for composite in chains]  # in order of priority
    kinds = {kind for constraint in CONSTRAINTS for kind in constraint.kinds}
    assert all(hasattr(_Lowering, f"_{kind}") for kind in kinds)


def test_registering_again_does_not_duplicate() -> None:
    from tvm.relax.backend.pattern_registry import get_patterns_with_prefix

    from tvm_mars.frontend.relax import register

    before = len(get_patterns_with_prefix("mars."))
    register()
    assert len(get_patterns_with_prefix("mars.")) == before


def test_matching_tries_other_alternatives() -> None:
    constant = Node("const", value=np.zeros(1), shape=(1,))
    inner = Node("add", (Node("value", index=0), constant))
    from tvm_mars.frontend.matching import Const, Either, Value

    flexible = Either((Value("x"), Op("add", (Value("x"), Const("c")))))
    found = match(Op("relu", (flexible,)), Node("relu", (inner,)))
    assert found is not None and found["x"] is inner
    with pytest.raises(UnsupportedError, match=r"not a chain of mars\.qconv2d"):
        parse("mars.qconv2d", inner)


# -- what is taken ---------------------------------------------------------------------------------


def test_pads_drops_and_reshapes_vanish() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    pads = w.constant([0, 0, 2, 1, 0, 0, 1, 2], np.int64)
    x = w.node("Pad", x, pads, w.constant(0.0))
    x = w.requantize(w.node("Relu", w.conv(x, 3, 8, strides=[2, 2])), 0, 3)
    x = w.node("Identity", w.node("Dropout", x))
    x = w.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    x = w.node("GlobalAveragePool", x)
    x = w.node("Squeeze", x, w.constant([2, 3], np.int64))
    x = w.requantize(x, 0, 3)
    w.node("Gemm", x, w.weight(w.rng.normal(0, 0.3, (5, 8)), True), transB=1)
    compiled = check(finish(w, [5]), tolerance=0.02)
    assert offloaded(compiled) == ["conv2d", "max_pool2d", "mean", "matmul"], str(compiled.report)
    assert not compiled.report.host_operators and compiled.report.regions == 1


@pytest.mark.parametrize("dtype", CODES)
def test_same_padding_and_relu6(dtype: str) -> None:
    w = writer()
    x = w.requantize("image", -1, 1, dtype)
    x = w.conv(x, 3, 16, auto_pad="SAME_UPPER")
    x = w.node("Clip", x, w.constant(0.0), w.constant(1.5))
    w.requantize(x, 0, 3, dtype)
    compiled = check(finish(w, [16, 8, 8]))
    assert offloaded(compiled) == ["conv2d"] and not compiled.report.host_operators
    requant = compiled.report
    assert requant.regions == 1


def test_codes_may_enter_and_leave() -> None:
    """A uint8 input and a uint8 output: no conversion at the border."""
    w = writer()
    scale, zero = w.constant(0.02), w.constant(120, np.uint8)
    x = w.node("DequantizeLinear", "image", scale, zero)
    x = w.node("Relu", w.conv(x, 3, 16))
    w.node("QuantizeLinear", x, w.constant(0.03), w.constant(0, np.uint8))
    w.name_last("result")
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, ["N", *shape])
        for name, shape in (("image", (3, 8, 8)), ("result", (16, 6, 6)))
    ]
    graph = onnx.helper.make_graph(w.nodes, "codes", ports[:1], ports[1:], w.constants)
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    compiled = tvm_mars.compile(model)
    assert offloaded(compiled) == ["conv2d"] and not compiled.report.host_operators
    image = np.random.default_rng(2).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"image": image}
    )
    difference = compiled.run({"image": image})["result"].astype(int) - expected
    assert np.abs(difference).max() <= 1


def test_a_shared_map_and_two_outputs() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    shared = w.requantize(w.node("Relu", w.conv(x, 3, 16, pads=[1] * 4)), 0, 3)
    left = w.requantize(w.conv(shared, 16, 16, pads=[1] * 4), -3, 3)
    w.node("Add", left, shared)
    total = w.requantize(w.nodes[-1].output[0], -3, 5)
    w.name_last("total")
    w.requantize(w.conv(shared, 16, 8, 1), -3, 3)
    w.name_last("side")
    del total
    model = w.model({"image": ["N", 3, 8, 8]}, {"total": ["N", 16, 8, 8], "side": ["N", 8, 8, 8]})
    compiled = check(model, tolerance=0.05)
    assert sorted(offloaded(compiled)) == ["add", "conv2d", "conv2d", "conv2d"]
    assert compiled.report.regions == 1 and not compiled.report.host_operators
    assert compiled.program.outputs == ("total", "side")


def test_weights_whose_zero_point_leaves_int8() -> None:
    """Codes minus zero point need nine bits: they become two terms."""
    w = writer()
    x = w.requantize("image", -1, 1)
    codes = w.rng.integers(0, 256, (16, 3, 3, 3)).astype(np.uint8)
    weight = w.node(
        "DequantizeLinear",
        w.constant(codes, np.uint8),
        w.constant(0.004),
        w.constant(40, np.uint8),
    )
    w.requantize(w.node("Conv", x, weight), -9, 9)
    compiled = check(finish(w, [16, 6, 6]), tolerance=0.08)
    assert offloaded(compiled) == ["conv2d"] and not compiled.report.host_operators


def test_a_constant_is_added_per_channel() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.requantize(w.conv(x, 3, 16), -3, 3)
    offset = w.constant(w.rng.normal(0, 1, (16, 1, 1)))
    w.requantize(w.node("Add", x, offset), -3, 3)
    compiled = check(finish(w, [16, 6, 6]), tolerance=0.03)
    assert not compiled.report.host_operators


# -- what stays on the CPU -------------------------------------------------------------------------


def test_a_float_network_stays() -> None:
    compiled = check(float_model())
    assert not compiled.report.offloaded and compiled.program is None
    assert "not quantized" in reasons(compiled)["conv2d"]


def test_an_operator_in_between_splits_regions() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.requantize(w.conv(x, 3, 16), -3, 3)
    x = w.requantize(w.node("Sigmoid", x), 0, 1)
    w.requantize(w.conv(x, 16, 8), -3, 3)
    compiled = check(finish(w, [8, 4, 4]), tolerance=0.05)
    assert offloaded(compiled) == ["conv2d", "conv2d"]
    assert compiled.report.regions == 2 and compiled.report.host_operators == ("sigmoid",)
    first, second = compiled.program.regions
    assert [port.name for port in first.inputs] == ["image"]
    assert [port.name for port in second.outputs] == ["result"]
    assert compiled.program.host_operators == ("sigmoid",)


def test_an_unquantized_residual_of_another_grid() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.requantize(w.conv(x, 3, 16, pads=[1] * 4), -3, 3)
    total = w.node("Add", w.conv(x, 16, 16, pads=[1] * 4), x)
    w.requantize(total, -4, 4)
    compiled = check(finish(w, [16, 8, 8]), tolerance=0.05)
    assert offloaded(compiled) == ["conv2d", "conv2d"]
    assert "no power of two" in reasons(compiled)["add"]


def test_an_average_that_nothing_quantizes() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.requantize(w.conv(x, 3, 16), -3, 3)
    w.node("AveragePool", x, kernel_shape=[2, 2])
    compiled = check(finish(w, [16, 5, 5]), tolerance=0.03)
    assert offloaded(compiled) == ["conv2d"]
    why = "nothing quantizes its result"
    assert reasons(compiled) == {"avg_pool2d": why}
    assert compiled.program.host_reasons == (HostReason("avg_pool2d", why),)
    loaded = Program.from_bytes(compiled.program.to_bytes())
    assert loaded.host_reasons == compiled.program.host_reasons


def test_a_value_that_is_also_used_unquantized() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.conv(x, 3, 16)
    w.requantize(x, -3, 3)
    w.name_last("codes")
    w.node("Sigmoid", x)
    w.name_last("soft")
    model = w.model({"image": ["N", 3, 8, 8]}, {"codes": ["N", 16, 6, 6], "soft": ["N", 16, 6, 6]})
    compiled = check(model, tolerance=0.03)
    # The accumulators leave as numbers, and both readers take them on the CPU.
    assert offloaded(compiled) == ["conv2d"]
    assert set(compiled.report.host_operators) == {"quantize", "dequantize", "sigmoid"}


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"dilations": [2, 2]}, "Pooling windows are not dilated: (2, 2)"),
        ({"strides": [300, 300]}, "are at most 63"),
    ],
)
def test_a_pool_beyond_the_limits(attributes: dict[str, Any], reason: str) -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.requantize(w.conv(x, 3, 16), -3, 3)
    x = w.node("MaxPool", x, kernel_shape=[2, 2], **attributes)
    w.requantize(x, -3, 3)
    size = 4 if "dilations" in attributes else 1
    compiled = check(finish(w, [16, size, size]), tolerance=0.03)
    assert offloaded(compiled) == ["conv2d"]
    assert reason in reasons(compiled)["max_pool2d"]


def test_nan_in_the_model_is_an_error() -> None:
    w = writer()
    x = w.requantize("image", -1, 1)
    weight = w.weight(w.rng.normal(0, 0.3, (16, 3, 3, 3)), False)
    x = w.node("Conv", x, weight, w.constant(np.full(16, np.nan)))
    w.requantize(x, -3, 3)
    with pytest.raises(InputError, match="its bias holds nan"):
        tvm_mars.partition_for_mars(import_model(finish(w, [16, 6, 6])))


# -- options and reports ---------------------------------------------------------------------------


def test_a_region_given_back_runs_on_the_cpu_at_any_batch() -> None:
    """Its symbolic sizes become the model's: a function's own N means nothing outside of it."""
    graph = resnet20()
    model = tvm_mars.compile(to_onnx(graph), min_macs=10**12)
    assert model.program is None
    assert not model.report.offloaded
    images = np.random.default_rng(3).random((2, 3, 32, 32), np.float32)
    (expected,) = evaluate(graph, {"x0": images})
    assert (model.run({"x0": images})["y0"] == expected).all()
    assert (model.run({"x0": images[:1]})["y0"] == expected[:1]).all()


def test_min_macs_keeps_small_regions() -> None:
    mod = import_model(imported_model(1))
    report = tvm_mars.offload_report(mod, min_macs="1_000_000_000")
    assert not report.offloaded and report.regions == 0
    assert all("min_macs" in decision.reason for decision in report.rejected)


def test_report_is_read_from_a_partitioned_module() -> None:
    mod = import_model(imported_model(1))
    assert tvm_mars.offload_report(tvm_mars.partition_for_mars(mod)) == tvm_mars.offload_report(mod)


def test_decisions_have_the_names_of_the_onnx_nodes(caplog: pytest.LogCaptureFixture) -> None:
    """Also of what stays on the CPU; a node without a name goes by its first output."""
    caplog.set_level(logging.INFO, "tvm_mars")
    w = writer()
    x = w.requantize("image", -1, 1)
    weight = w.weight(w.rng.normal(0, 0.3, (16, 3, 3, 3)), False)
    x = w.node("Conv", x, weight, w.bias(np.ones(16), 1e-4))
    x = w.requantize(w.node("Add", x, w.constant(np.ones((16, 1, 1)))), -3, 3)
    x = w.node("MaxPool", x, kernel_shape=[2, 2], dilations=[2, 2])
    shorter = w.requantize(x, -3, 3)
    x = w.requantize(w.conv(shorter, 16, 16, 1), -3, 3)
    x = w.requantize(w.node("Add", x, shorter), -4, 4)
    x = w.requantize(w.node("GlobalAveragePool", x), -4, 4)
    x = w.node("Flatten", x)
    w.node("MatMul", x, w.weight(w.rng.normal(0, 0.3, (16, 10)), False))
    model = finish(w, [10])
    names = iter(["/stem/Conv", "stem+1", "/pool", "", "lv3", "mean", "classify"])
    wanted = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MaxPool", "Add", "GlobalAveragePool", "MatMul"):
            node.name = next(names)
            wanted.append(node.name or node.output[0])
    del wanted[1]  # which adds a constant
    report = tvm_mars.compile(model).report
    assert [decision.name for decision in report.decisions] == wanted
    assert [decision.name for decision in report.rejected] == ["/pool"]
    assert "max_pool2d /pool stays on the CPU" in caplog.text


def test_where_the_order_does_not_tell_names_decisions_keep_their_variables() -> None:
    """A normalization computes a mean too, so no mean is named."""
    w = writer()
    x = w.requantize("image", -1, 1)
    x = w.conv(x, 3, 16)
    (conv,) = (node.name for node in w.nodes if node.op_type == "Conv")
    x = w.node("InstanceNormalization", x, w.constant(np.ones(16)), w.constant(np.zeros(16)))
    w.node("GlobalAveragePool", x)
    decisions = tvm_mars.compile(finish(w, [16, 1, 1])).report.decisions
    assert [decision.op for decision in decisions] == ["conv2d", "mean", "mean"]
    assert decisions[0].name == conv
    assert all(decision.name.startswith(("lv", "gv")) for decision in decisions[1:])


def test_shapes_of_run_time_leave_a_model_to_the_cpu() -> None:
    """TVM's MergeCompositeFunctions ends on the bindings of such shapes."""
    model = imported_model(1, batch=1)
    graph = model.graph
    graph.input.append(onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [2]))
    graph.node.append(onnx.helper.make_node("Expand", [graph.output[0].name, "sizes"], ["wide"]))
    wide = onnx.helper.make_tensor_value_info("wide", onnx.TensorProto.FLOAT, [None, None])
    graph.output[0].CopyFrom(wide)
    compiled = tvm_mars.compile(model)
    assert not compiled.report.offloaded and compiled.program is None
    assert all("tensor_to_shape" in decision.reason for decision in compiled.report.rejected)
    narrow = imported_model(1, batch=1)
    image = model_inputs(narrow, 1, 1)
    (expected,) = onnxruntime.InferenceSession(narrow.SerializeToString()).run(None, image)
    (result,) = compiled.run({**image, "sizes": np.array([3, expected.shape[1]])}).values()
    np.testing.assert_allclose(result, np.repeat(expected, 3, axis=0), atol=1e-4)


def test_a_module_with_compiled_regions_stays_as_it_is() -> None:
    mod = import_model(imported_model(1))
    done = tvm.relax.transform.RunCodegen()(tvm_mars.partition_for_mars(mod))
    again = tvm_mars.partition_for_mars(done)
    assert [gvar.name_hint for gvar in again.get_global_vars()] == [
        gvar.name_hint for gvar in done.get_global_vars()
    ]


def test_rejections_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tvm_mars")
    tvm_mars.partition_for_mars(import_model(float_model()))
    records = [record for record in caplog.records if record.name == "tvm_mars"]
    assert [record.levelname for record in records] == ["INFO", "WARNING"]
    assert "quantize_static" in records[-1].getMessage()


def test_a_quantized_model_is_not_told_to_be_quantized(caplog: pytest.LogCaptureFixture) -> None:
    tvm_mars.partition_for_mars(import_model(imported_model(1)), min_macs=10**12)
    assert "nothing was offloaded" in caplog.text and "quantize_static" not in caplog.text


def test_unknown_options_name_the_nearest() -> None:
    mod = import_model(float_model())
    with pytest.raises(OptionError, match="did you mean min_macs"):
        tvm_mars.partition_for_mars(mod, min_mac=3)
    with pytest.raises(OptionError, match="did you mean arch"):
        tvm.relax.get_pipeline("mars", ach="mars")


def test_parameters_may_be_bound() -> None:
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend.onnx import from_onnx

    model = imported_model(1)
    mod, params = detach_params(from_onnx(model, keep_params_in_input=True))
    names = [var.name for var in mod["main"].params][1:]
    bound = dict(zip(names, params["main"], strict=True))
    whole = tvm_mars.offload_report(import_model(model))
    assert not tvm_mars.offload_report(mod).offloaded
    report = tvm_mars.offload_report(tvm_mars.partition_for_mars(mod, bound))
    assert len(report.offloaded) == len(whole.offloaded)
