"""Float modules through the quantization pass onto MARS, in the IR that the installed TVM has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from mars_runtime.errors import CapacityError, InputError, OptionError, UnsupportedError
from python_tests.float_models import (
    FloatWriter,
    digits_classifier,
    float_network_model,
    run_onnx,
)
from tvm_mars.cli import mars
from tvm_mars.zoo import digits_dataset, digits_split

tvm = pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

import tvm_mars  # noqa: E402
from tvm_mars.frontend import adapter  # noqa: E402

IR = adapter()
RELAY = IR.IR == "Relay"
BATCH = 4


def import_float(model: onnx.ModelProto) -> Any:
    if RELAY:
        from tvm_mars.frontend.relay import import_model
    else:
        from tvm_mars.frontend.relax.api import import_model
    return import_model(model)


def draw(count: int = 64, seed: int = 1, shape: tuple[int, ...] = (3, 12, 12)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape)).astype(np.float32)


def compile_whole(mod: Any, operators: int) -> Any:
    """Compile what MARS must take whole."""
    compiled = tvm_mars.compile(mod)
    report = compiled.report
    assert len(report.offloaded) == operators, str(report)
    assert not report.rejected and not report.host_operators and report.regions == 1, str(report)
    return compiled


def check_codes(mod: Any, compiled: Any, x: np.ndarray) -> np.ndarray:
    """Compare MARS with TVM's CPU build of the same module; give MARS's result."""
    (found,) = compiled.run(dict(zip(compiled.input_names, [x], strict=True))).values()
    alone = IR.build_for_cpu(mod)(x)
    if RELAY:  # whose own code rounds halves away from zero
        assert np.abs(found - alone).max() <= 0.02 * np.abs(alone).max()
    else:
        np.testing.assert_array_equal(found, alone)
    return np.asarray(found)


# -- accuracy --------------------------------------------------------------------------------------


def test_digits_keep_their_accuracy() -> None:
    images, labels = digits_split()
    training = digits_dataset()[0]
    fit, fit_labels = training.images(), training.labels
    model = digits_classifier(fit, fit_labels, len(images))
    mod = tvm_mars.quantize(model, calibration={"image": fit[:100]})
    scores = check_codes(mod, compile_whole(mod, 5), images)
    (float_scores,) = run_onnx(model, {"image": images})
    accuracy = [float((s.argmax(1) == labels).mean()) for s in (float_scores, scores)]
    print(f"float {accuracy[0]:.2%}, w8a8 {accuracy[1]:.2%}")
    assert accuracy[0] > 0.85 and accuracy[1] > accuracy[0] - 0.01


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.1),
        ({"method": "paper"}, None),
        ({"input_range": (-1, 1)}, 0.1),
        ({"activation_bits": 4, "input_bits": 4, "input_range": (-0.2, 1)}, None),
        ({"weight_bits": 4, "activation_bits": 4, "last_weight_bits": 8}, None),
    ],
)
def test_every_operator_is_offloaded(options: dict[str, Any], limit: float | None) -> None:
    model = float_network_model()
    mod = tvm_mars.quantize(model, calibration={"image": draw()}, **options)
    compiled = compile_whole(mod, 14)
    assert compiled.input_names == ("image",) and compiled.output_names == ("scores",)
    x = draw(BATCH, seed=2)
    found = check_codes(mod, compiled, x)
    (wanted,) = run_onnx(model, {"image": x})
    if limit is not None:
        assert np.sqrt(np.square(found - wanted).mean()) < limit * wanted.std()


def test_weights_of_four_bits_stay_four_bits() -> None:
    """What multiplies them, a power of two, stands at the map that they meet."""
    options = {"weight_bits": 4, "last_weight_bits": 4}
    mod = tvm_mars.quantize(float_network_model(), calibration={"image": draw()}, **options)
    partitioned = tvm_mars.partition_for_mars(mod)
    from tvm_mars.frontend.lower import lower
    from tvm_mars.options import CompileOptions

    (region,) = [
        func
        for func in partitioned.functions.values()
        if func.attrs and "mars.interface" in func.attrs
    ]
    graph = lower(IR.read_region(region), CompileOptions().arch).graph
    widths = {term.weight_bits for layer in graph.layers for term in getattr(layer, "terms", ())}
    assert widths == {4}


# -- TVM's own ways --------------------------------------------------------------------------------


def same(one: Any, other: Any) -> None:
    x = draw(BATCH, seed=3)
    np.testing.assert_array_equal(IR.build_for_cpu(one)(x), IR.build_for_cpu(other)(x))


def test_the_pass_stands_in_a_sequence() -> None:
    model = float_network_model()
    step = tvm_mars.QuantizeForMars({"image": draw()}, activation_bits=4)
    assert step.info.name == "mars.QuantizeForMars"
    other = tvm.relay.transform.InferType if RELAY else tvm.relax.transform.CanonicalizeBindings
    first = other()
    mod = tvm.transform.Sequential([first, step])(import_float(model))
    same(mod, tvm_mars.quantize(model, calibration={"image": draw()}, activation_bits=4))
    assert not tvm_mars.offload_report(mod).rejected


def test_parameters_apart_are_bound() -> None:
    model = float_network_model()
    if RELAY:
        mod, params = tvm.relay.frontend.from_onnx(
            model, {"image": [BATCH, 3, 12, 12]}, freeze_params=False
        )
    else:
        from tvm.relax.frontend import detach_params
        from tvm.relax.frontend.onnx import from_onnx

        mod, found = detach_params(from_onnx(model, keep_params_in_input=True))
        names = [var.name for var in mod["main"].params][1:]
        params = dict(zip(names, found["main"], strict=True))
    assert params
    quantized = tvm_mars.quantize(mod, params, calibration={"image": draw()})
    same(quantized, tvm_mars.quantize(model, calibration={"image": draw()}))
    with pytest.raises(UnsupportedError, match="bound"):
        tvm_mars.quantize(mod, calibration={"image": draw()})


def test_a_decomposed_batch_norm_is_folded_too() -> None:
    """As a pass of TVM leaves it: factors and offsets behind the convolution."""
    model = float_network_model()
    mod = import_float(model)
    if RELAY:
        mod = tvm.relay.transform.SimplifyInference()(mod)
    else:
        mod = tvm.relax.transform.DecomposeOpsForInference()(mod)
    quantized = tvm_mars.quantize(mod, calibration={"image": draw()})
    compiled = compile_whole(quantized, 14)
    x = draw(BATCH, seed=2)
    (found,) = compiled.run({"image": x}).values()
    (wanted,) = run_onnx(model, {"image": x})
    assert np.sqrt(np.square(found - wanted).mean()) < 0.1 * wanted.std()


@pytest.mark.skipif(RELAY, reason="Relay compiles for one batch size")
def test_an_open_batch_stays_open() -> None:
    mod = tvm_mars.quantize(float_network_model(batch="N"), calibration={"image": draw()})
    compiled = compile_whole(mod, 14)
    assert compiled.inputs[0].shape == (None, 3, 12, 12)
    assert compiled.run({"image": draw(3)})["scores"].shape == (3, 10)


def test_batches_of_images_are_taken_together() -> None:
    model, x = float_network_model(), draw()
    parts = ({"image": x[at : at + 16]} for at in range(0, 64, 16))
    same(
        tvm_mars.quantize(model, calibration=parts),
        tvm_mars.quantize(model, calibration={"image": x}),
    )


def test_names_that_the_exporter_uses_itself_are_kept() -> None:
    model = float_network_model()
    names = {"image": "conv0", "scores": "x0_codes"}
    for entry in (*model.graph.input, *model.graph.output):
        entry.name = names[entry.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    mod = tvm_mars.quantize(model, calibration={"conv0": draw()})
    compiled = compile_whole(mod, 14)
    assert compiled.input_names == ("conv0",) and compiled.output_names == ("x0_codes",)


def test_the_command_line(tmp_path: Path) -> None:
    model = float_network_model(batch="N")  # of which Relay makes one image
    onnx.save(model, tmp_path / "float.onnx")
    np.savez(tmp_path / "images.npz", image=draw(32))
    written = tmp_path / "net.onnx"
    call = ["quantize", str(tmp_path / "float.onnx"), "--data", str(tmp_path / "images.npz")]
    result = CliRunner().invoke(mars, [*call, "-o", str(written), "--activation-bits", "4"])
    assert result.exit_code == 0, result.output
    wanted = tvm_mars.quantize(
        float_network_model(batch=1 if RELAY else "N"),
        calibration={"image": draw(32)},
        activation_bits=4,
    )
    x = draw(1)
    np.testing.assert_array_equal(
        IR.build_for_cpu(import_float(onnx.load(written)))(x), IR.build_for_cpu(wanted)(x)
    )
    np.savez(tmp_path / "images.npz", picture=draw(32))
    result = CliRunner().invoke(mars, [*call, "-o", str(written)])
    assert result.exit_code == 1 and "picture" in result.output


def test_a_map_leaves_in_its_own_units() -> None:
    writer = FloatWriter(np.random.default_rng(0))
    writer.node("Relu", writer.some_norm(writer.conv("image", 3, 16), 16))
    writer.name_last("map")
    model = writer.model({"image": [BATCH, 3, 12, 12]}, {"map": [BATCH, 16, 12, 12]})
    mod = tvm_mars.quantize(model, calibration={"image": draw()})
    compiled = compile_whole(mod, 1)
    x = draw(BATCH, seed=2)
    (wanted,) = run_onnx(model, {"image": x})
    found = check_codes(mod, compiled, x)
    assert np.abs(found - wanted).max() < 0.1 * wanted.max()


# -- what is refused -------------------------------------------------------------------------------


def small(kind: str, **attributes: Any) -> onnx.ModelProto:
    """A convolution with an operator behind it."""
    writer = FloatWriter(np.random.default_rng(0))
    writer.node(kind, writer.conv("image", 3, 16), **attributes)
    writer.name_last("result")
    return writer.model({"image": [BATCH, 3, 12, 12]}, {"result": [BATCH, 16, 12, 12]})


def two_convs() -> onnx.ModelProto:
    writer = FloatWriter(np.random.default_rng(0))
    writer.conv(writer.conv("image", 3, 16), 16, 16)
    writer.name_last("result")
    return writer.model({"image": [BATCH, 3, 12, 12]}, {"result": [BATCH, 16, 12, 12]})


def shifted_input() -> onnx.ModelProto:
    writer = FloatWriter(np.random.default_rng(0))
    writer.conv(writer.node("Sub", "image", writer.constant(0.5)), 3, 16)
    writer.name_last("result")
    return writer.model({"image": [BATCH, 3, 12, 12]}, {"result": [BATCH, 16, 12, 12]})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small("Sigmoid"), r"sigmoid.*no quantized form.*known: convolutions"),
        (small("LeakyRelu", alpha=0.1), "leaky.*no quantized form"),
        (two_convs(), "which has no ReLU.*put a ReLU between"),
        (shifted_input(), "outside the module"),
        (float_network_model(), None),
    ],
)
def test_operators_without_a_quantized_form(model: onnx.ModelProto, message: str | None) -> None:
    if message is None:  # quantized twice
        model = IR.quantize_to_onnx(model, calibration={"image": draw()})
        message = "quantized already"
    with pytest.raises(UnsupportedError, match=message):
        tvm_mars.quantize(model, calibration={"image": draw()})


def test_mistakes_are_named() -> None:
    model = float_network_model()
    with pytest.raises(InputError, match=r"calibration: missing .*calibration=\{"):
        tvm_mars.quantize(model)
    with pytest.raises(InputError, match="input image: missing"):
        tvm_mars.quantize(model, calibration={})
    with pytest.raises(InputError, match="holds no images"):
        tvm_mars.quantize(model, calibration=[])
    with pytest.raises(InputError, match="holds a ndarray"):
        tvm_mars.quantize(model, calibration=draw())
    with pytest.raises(InputError, match=r"expected \(N, 3, 12, 12\)"):
        tvm_mars.quantize(model, calibration={"image": draw(shape=(3, 8, 8))})
    with pytest.raises(OptionError, match="did you mean weight_bits"):
        tvm_mars.quantize(model, calibration={"image": draw()}, weight_bit=4)
    with pytest.raises(OptionError, match="activation_bits: 6"):
        tvm_mars.QuantizeForMars({"image": draw()}, activation_bits=6)
    for constant in model.graph.initializer:
        if len(constant.dims) == 4:
            values = numpy_helper.to_array(constant).copy()
            values.flat[0] = np.nan
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
            break
    with pytest.raises(InputError, match="weight holds 1 values that are NaN"):
        tvm_mars.quantize(model, calibration={"image": draw()})


def wide_model() -> onnx.ModelProto:
    """Sums of 640 x 9 products of weights without a sign: nothing cancels."""
    weight = np.random.default_rng(0).uniform(0.5, 1, (16, 640, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w"], ["c"], "wide", pads=[1] * 4),
            helper.make_node("Relu", ["c"], ["result"]),
        ],
        "wide",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 640, 5, 5])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 16, 5, 5])],
        [numpy_helper.from_array(weight / 300, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_sums_beyond_float32_are_refused_or_made_coarser() -> None:
    """By the paper's scales they need 2**24 steps and more; a power of two brings them below."""
    images = draw(8, shape=(640, 5, 5))
    images[:, :, 2:] = 0  # so that the range is small beside what the weights could sum to
    images /= 300
    model = wide_model()
    with pytest.raises(CapacityError, match=r"wide: accumulators may leave .* float32"):
        tvm_mars.quantize(model, calibration={"image": images}, method="paper")
    mod = tvm_mars.quantize(model, calibration={"image": images})
    assert len(tvm_mars.compile(mod).report.offloaded) == 1
