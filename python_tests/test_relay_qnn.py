"""Integer networks (``qnn.conv2d`` and its kin) through Relay onto MARS: Relay's own codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest

from python_tests.onnx_models import imported_model, model_inputs

tvm = pytest.importorskip("tvm")
relay = pytest.importorskip("tvm.relay")

from tvm.contrib import graph_executor  # noqa: E402

import tvm_mars  # noqa: E402
from python_tests.tflite_model import Tensor, TfliteWriter  # noqa: E402
from tvm_mars.frontend.relay.codegen import host_target  # noqa: E402
from tvm_mars.frontend.relay.importer import import_model  # noqa: E402
from tvm_mars.frontend.report import OffloadReport  # noqa: E402
from tvm_mars.frontend.rescale import rescale  # noqa: E402
from tvm_mars.frontend.spec import Rescale  # noqa: E402

Q = relay.qnn.op
ROUNDINGS = ("UPWARD", "TONEAREST")


def const(value: Any, dtype: str = "float32") -> Any:
    return relay.const(np.asarray(value, dtype))


def zero(value: int) -> Any:
    return relay.const(int(value))


def run(library: Any, inputs: dict[str, Any]) -> list[Any]:
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    for name, array in inputs.items():
        executor.set_input(name, array)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def compare(mod: Any, inputs: dict[str, Any], **config: str) -> OffloadReport:
    """Run a module by Relay alone and partitioned: no code may differ."""
    with Q.requantize_config(**config):
        partitioned = tvm_mars.partition_for_mars(mod)
        expected = run(relay.build(mod, host_target()), inputs)
        library = relay.build(partitioned, target=tvm.target.Target("mars"))
    found = run(library, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert len(np.unique(theirs)) > 1
    return tvm_mars.offload_report(partitioned)


def module(result: Any, *inputs: Any) -> Any:
    return tvm.IRModule.from_expr(relay.Function(list(inputs), result))


def any_codes(rng: Any, shape: Sequence[int], dtype: str) -> Any:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def whole(report: OffloadReport, *operators: str) -> None:
    """Expect just these operators, all on MARS, in one region with nothing but layouts left."""
    assert [entry.op for entry in report.decisions] == list(operators), str(report)
    assert not report.rejected and report.regions == 1, str(report)
    assert set(report.host_operators) <= {"layout_transform"}, str(report)


# -- one operator ----------------------------------------------------------------------------------


@attrs.frozen
class Conv:
    """A qnn.conv2d as importers give it, and what it is followed by."""

    channels: int = 16
    filters: int = 8
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "uint8"
    weight_zero: int = 0
    in_zero: int = 7
    out_zero: int = 20

    def build(self, rng: Any, scale: Any, out_scale: float, **requantize: Any) -> Any:
        shape = (2, self.channels, 9, 8)
        x = relay.var("x", shape=shape, dtype=self.dtype)
        weight_dtype = "uint8" if self.weight_zero else "int8"
        weight = any_codes(
            rng, (self.filters, self.channels // self.groups, *self.kernel), weight_dtype
        )
        y = Q.conv2d(
            x,
            relay.const(weight),
            zero(self.in_zero),
            zero(self.weight_zero),
            const(0.5),
            const(np.asarray(scale) * 2),
            kernel_size=self.kernel,
            channels=self.filters,
            strides=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        bias = rng.integers(-3000, 3000, self.filters).astype("int32")
        y = relay.nn.bias_add(y, relay.const(bias))
        y = Q.requantize(
            y,
            const(scale),
            zero(0),
            const(out_scale),
            zero(self.out_zero),
            axis=1,
            out_dtype=self.dtype,
            **requantize,
        )
        return x, y


CONVS = {
    "plain": Conv(),
    "stride": Conv(stride=(2, 1), padding=(0, 1, 1, 0)),
    "dilated": Conv(dilation=(2, 2), padding=(2, 2, 2, 2)),
    "pointwise": Conv(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "depthwise": Conv(filters=16, groups=16),
    "grouped": Conv(filters=24, groups=4),
    "int8": Conv(dtype="int8", in_zero=-5, out_zero=-128),
    "weight zero point": Conv(weight_zero=131),
    "wide": Conv(channels=40, filters=33),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", CONVS)
def test_conv2d(name: str, rounding: str) -> None:
    """Random scales per channel, some of which are powers of two and meet halves; saturation."""
    shape = CONVS[name]
    rng = np.random.default_rng(len(name))
    scale = np.exp(rng.uniform(-9, -6, shape.filters)).astype(np.float32)
    scale[::3] = 2.0**-9
    x, y = shape.build(rng, scale, 1.0, rounding=rounding)
    inputs = {"x": any_codes(rng, (2, shape.channels, 9, 8), shape.dtype)}
    whole(compare(module(y, x), inputs), "qnn.conv2d")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_half_goes_where_tvm_sends_it(rounding: str) -> None:
    """A pointwise convolution by one weight, requantized by 1/4: half of the codes meet a half."""
    x = relay.var("x", shape=(1, 1, 16, 16), dtype="int8")
    y = Q.conv2d(
        x,
        relay.const(np.full((1, 1, 1, 1), 1, np.int8)),
        zero(3),
        zero(0),
        const(1.0),
        const(1.0),
        kernel_size=(1, 1),
        channels=1,
    )
    y = Q.requantize(y, const(0.25), zero(0), const(1.0), zero(2), out_dtype="int8")
    codes = np.arange(-128, 128).astype(np.int8).reshape(1, 1, 16, 16)
    whole(compare(module(y, x), {"x": codes}, rounding=rounding), "qnn.conv2d")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_dense(dtype: str, rounding: str) -> None:
    rng = np.random.default_rng(4)
    x = relay.var("x", shape=(5, 48), dtype=dtype)
    weight = any_codes(rng, (10, 48), "int8")
    y = Q.dense(x, relay.const(weight), zero(9), zero(0), const(0.5), const(0.25), units=10)
    y = relay.nn.bias_add(y, relay.const(rng.integers(-500, 500, 10).astype("int32")))
    y = Q.requantize(y, const(2.0**-8), zero(0), const(1.0), zero(11), out_dtype=dtype)
    report = compare(module(y, x), {"x": any_codes(rng, (5, 48), dtype)}, rounding=rounding)
    whole(report, "qnn.dense")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("scales", "zeros"),
    [
        ((0.5, 0.5, 0.5), (3, 200, 17)),
        ((0.5, 0.25, 1.0), (3, 200, 17)),  # each operand meets halves
        ((0.02, 0.03, 0.035), (128, 0, 128)),
        ((0.0913, 0.0517, 0.05), (0, 255, 0)),  # an operand's steps leave eight bits
        ((0.09, 0.09, 0.05), (128, 0, 0)),
    ],
)
def test_add(scales: tuple[float, ...], zeros: tuple[int, ...], rounding: str) -> None:
    """On every pair of codes."""
    shape = (1, 256, 16, 16)
    x, y = (relay.var(name, shape=shape, dtype="uint8") for name in "xy")
    pairs = [part for s, z in zip(scales, zeros, strict=True) for part in (const(s), zero(z))]
    codes = np.arange(256).astype(np.uint8)
    inputs = {
        "x": np.broadcast_to(codes[None, :, None, None], shape).copy(),
        "y": np.broadcast_to(codes.reshape(1, 1, 16, 16), shape).copy(),
    }
    whole(compare(module(Q.add(x, y, *pairs), x, y), inputs, rounding=rounding), "qnn.add")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("scale", [0.5, 0.25, 0.77, 1.0, 1.9])
def test_requantize(scale: float, rounding: str) -> None:
    """Codes to codes of another scale, zero point and type, between what MARS does anyway."""
    x = relay.var("x", shape=(1, 1, 16, 16), dtype="uint8")
    y = Q.requantize(x, const(scale), zero(90), const(1.0), zero(-3), out_dtype="int8")
    y = relay.nn.max_pool2d(y, (1, 1))
    codes = np.arange(256).astype(np.uint8).reshape(1, 1, 16, 16)
    whole(compare(module(y, x), {"x": codes}, rounding=rounding), "max_pool2d")


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (7, 7), (8, 8), (1, 5)])
def test_average_pool(dtype: str, kernel: tuple[int, int]) -> None:
    """TFLite's: a cast, integers cut off towards zero, a cast."""
    rng = np.random.default_rng(6)
    x = relay.var("x", shape=(2, 20, 9, 8), dtype=dtype)
    y = relay.nn.avg_pool2d(relay.cast(x, "int32"), kernel, (2, 1))
    y = relay.cast(y, dtype)
    codes = any_codes(rng, (2, 20, 9, 8), dtype) // rng.choice([1, 16, 64], (2, 20, 1, 1))
    whole(compare(module(y, x), {"x": codes.astype(dtype)}), "avg_pool2d")


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("scale", [0.5, 0.4])
def test_mean(dtype: str, scale: float) -> None:
    """TFLite's: a cast, a mean of integers, a requantization to the same scale or another."""
    rng = np.random.default_rng(7)
    x = relay.var("x", shape=(3, 20, 7, 7), dtype=dtype)
    y = relay.mean(relay.cast(x, "int32"), axis=(2, 3), keepdims=True)
    y = Q.requantize(y, const(0.5), zero(5), const(scale), zero(5), out_dtype=dtype)
    codes = any_codes(rng, (3, 20, 7, 7), dtype) // rng.choice([1, 16, 64], (3, 20, 1, 1))
    whole(compare(module(y, x), {"x": codes.astype(dtype)}), "mean")


def test_accumulators_leave_as_numbers() -> None:
    """A network's logits: qnn.dense, bias, qnn.dequantize with a scale per output."""
    rng = np.random.default_rng(8)
    x = relay.var("x", shape=(5, 48), dtype="uint8")
    scale = rng.uniform(0.001, 0.002, 10)
    weight = relay.const(any_codes(rng, (10, 48), "int8"))
    y = Q.dense(x, weight, zero(9), zero(0), const(0.5), const(scale * 2), units=10)
    y = relay.nn.bias_add(y, relay.const(rng.integers(-500, 500, 10).astype("int32")))
    y = Q.dequantize(y, const(scale), zero(0), axis=1)
    whole(compare(module(y, x), {"x": any_codes(rng, (5, 48), "uint8")}), "qnn.dense")


def test_limits_before_and_after() -> None:
    """A ReLU on accumulators, as FakeQuantizationToInteger leaves it, and clips of codes."""
    rng = np.random.default_rng(9)
    x, y = Conv(out_zero=0).build(rng, 2.0**-8, 1.0)
    requantized = y
    limited = relay.maximum(requantized.args[0], relay.const(np.zeros((8, 1, 1), "int32")))
    y = relay.Call(requantized.op, [limited, *requantized.args[1:]], requantized.attrs)
    y = relay.minimum(relay.clip(y, 3, 200), relay.const(np.uint8(180)))
    whole(compare(module(y, x), {"x": any_codes(rng, (2, 16, 9, 8), "uint8")}), "qnn.conv2d")


# -- how importers write it ------------------------------------------------------------------------


def test_as_the_pytorch_importer_writes_it() -> None:
    """Padding apart, a requantization to int32, a clip, a cast; uint8 maps; qnn.add with a clip."""
    rng = np.random.default_rng(10)
    x = relay.var("x", shape=(2, 3, 10, 10), dtype="float32")

    def conv(data: Any, given: int, out: int, in_zero: int, out_zero: int, relu: bool) -> Any:
        scale = np.exp(rng.uniform(-6, -5, out)).astype(np.float32)
        padded = relay.nn.pad(data, ((0, 0), (0, 0), (1, 1), (1, 1)), float(in_zero))
        weight = relay.const(any_codes(rng, (out, given, 3, 3), "int8"))
        y = Q.conv2d(
            padded,
            weight,
            zero(in_zero),
            zero(0),
            const(0.03),
            const(scale),
            kernel_size=(3, 3),
            channels=out,
            padding=(0, 0),
        )
        y = relay.nn.bias_add(y, relay.const(rng.integers(-3000, 3000, out).astype("int32")))
        y = Q.requantize(
            y,
            const(scale * np.float32(0.03)),
            zero(0),
            const(0.5),
            zero(out_zero),
            axis=1,
            out_dtype="int32",
        )
        return relay.cast(relay.clip(y, out_zero if relu else 0, 255), "uint8")

    start = Q.quantize(x, const(0.03), zero(66), axis=1, out_dtype="uint8")
    stem = conv(start, 3, 16, 66, 0, True)
    deep = conv(stem, 16, 16, 0, 120, False)
    total = Q.add(deep, stem, const(0.5), zero(120), const(0.5), zero(0), const(0.8), zero(10))
    total = relay.clip(total, 10, 255)
    pooled = relay.nn.max_pool2d(total, (2, 2), (2, 2))
    average = relay.cast(relay.nn.global_avg_pool2d(relay.cast(pooled, "int32")), "uint8")
    flat = relay.reshape(average, (0, -1))
    y = Q.dense(
        flat,
        relay.const(any_codes(rng, (10, 16), "int8")),
        zero(10),
        zero(0),
        const(0.8),
        const(0.01),
        units=10,
    )
    y = Q.requantize(y, const(0.008), zero(0), const(0.1), zero(100), out_dtype="int32")
    y = Q.dequantize(relay.cast(relay.clip(y, 0, 255), "uint8"), const(0.1), zero(100))
    report = compare(module(y, x), {"x": rng.normal(0, 1, (2, 3, 10, 10)).astype("float32")})
    operators = ("qnn.conv2d", "qnn.conv2d", "qnn.add", "max_pool2d", "mean", "qnn.dense")
    whole(report, *operators)
    assert not report.host_operators


@pytest.mark.random(6)
def test_fake_quantization_to_integer(seed: int) -> None:
    """Relay's own pass over Q/DQ models; what it leaves in floating point is the last product.

    Of a quantized bias with a scale per channel it makes a requantization that Relay refuses.
    """
    model = imported_model(seed, batch=2, per_channel=False)
    mod = relay.transform.InferType()(import_model(model))
    mod = relay.transform.FakeQuantizationToInteger()(mod)
    mod = relay.transform.FoldConstant()(relay.transform.InferType()(mod))
    inner = mod["main"].body
    while inner.op.name != "nn.batch_flatten":
        inner = inner.args[0]
    mod = tvm.IRModule.from_expr(relay.Function(mod["main"].params, inner.args[0]))
    report = compare(mod, model_inputs(model, seed))
    kinds = ["qnn.conv2d"] * 3 + ["qnn.add", "max_pool2d"] + ["qnn.conv2d"] * 2 + ["mean"]
    whole(report, *kinds)


def test_fake_quantization_to_integer_per_channel() -> None:
    """With a bias in floating point and a ReLU6 on the accumulators of each channel."""
    rng = np.random.default_rng(18)
    x = relay.var("x", shape=(2, 16, 8, 8), dtype="uint8")
    scale = const(np.exp(rng.uniform(-7, -6, 24)))
    weight = relay.const(any_codes(rng, (24, 16, 3, 3), "int8"))
    y = relay.nn.conv2d(
        Q.dequantize(x, const(0.05), zero(9)),
        Q.dequantize(weight, scale, relay.const(np.zeros(24, "int32")), axis=0),
        kernel_size=(3, 3),
        channels=24,
        padding=(1, 1),
    )
    y = relay.nn.bias_add(y, const(rng.normal(0, 1, 24)))
    y = Q.quantize(relay.clip(y, 0.0, 6.0), const(6 / 255), zero(0), out_dtype="uint8")
    mod = relay.transform.FakeQuantizationToInteger()(relay.transform.InferType()(module(y, x)))
    mod = relay.transform.FoldConstant(fold_qnn=True)(relay.transform.InferType()(mod))
    whole(compare(mod, {"x": any_codes(rng, (2, 16, 8, 8), "uint8")}), "qnn.conv2d")


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.random(2)
def test_tflite(seed: int, dtype: str) -> None:
    """A file through TFLite's importer: NHWC maps, which are converted, and its own weights."""
    rng = np.random.default_rng([11, seed])
    writer = TfliteWriter()
    least = np.iinfo(dtype).min
    image = writer.tensor((2, 8, 8, 4), dtype, scale=0.02, zero=least + 130)

    def bias(count: int) -> Tensor:
        return writer.constant(rng.integers(-2000, 2000, count).astype("int32"))

    def result(shape: Sequence[int], scale: float = 0.9, zero: int = 0) -> Tensor:
        return writer.tensor(shape, dtype, scale=scale, zero=least + zero)

    def scales(count: int) -> Any:
        return rng.uniform(0.004, 0.02, count)

    first = writer.conv(
        image,
        writer.constant(any_codes(rng, (16, 3, 3, 4), "int8"), scales(16)),
        bias(16),
        result((2, 8, 8, 16)),
        activation="RELU",
    )
    depth = writer.depthwise(
        first,
        writer.constant(any_codes(rng, (1, 3, 3, 16), "int8"), scales(16)),
        bias(16),
        result((2, 8, 8, 16)),
        activation="RELU6",
    )
    point = writer.conv(
        depth,
        writer.constant(any_codes(rng, (16, 1, 1, 16), "int8"), scales(16)),
        bias(16),
        result((2, 8, 8, 16), zero=128),
    )
    total = writer.add(point, first, result((2, 8, 8, 16), scale=1.1, zero=30), activation="RELU")
    pooled = writer.max_pool(total, (2, 2), result((2, 4, 4, 16), scale=1.1, zero=30))
    average = writer.average_pool(pooled, (4, 4), result((2, 1, 1, 16), scale=1.1, zero=30))
    flat = writer.reshape(average, (2, 16), result((2, 16), scale=1.1, zero=30))
    writer.fully_connected(
        flat,
        writer.constant(any_codes(rng, (10, 16), "int8"), 0.01),
        bias(10),
        result((2, 10), scale=0.9, zero=128),
    )
    mod, params = relay.frontend.from_tflite(
        writer.model(image), shape_dict={"input": (2, 8, 8, 4)}, dtype_dict={"input": dtype}
    )
    mod["main"] = relay.build_module.bind_params_by_name(mod["main"], params)
    report = compare(mod, {"input": any_codes(rng, (2, 8, 8, 4), dtype)})
    whole(
        report,
        *["qnn.conv2d"] * 3,
        "qnn.add",
        "max_pool2d",
        "avg_pool2d",
        "qnn.dense",
    )


# -- what stays on the CPU, and why ----------------------------------------------------------------


def rejected(mod: Any, inputs: dict[str, Any], **config: str) -> str:
    report = compare(mod, inputs, **config)
    (decision,) = report.rejected
    assert report.regions == 0
    return decision.reason


def test_floating_point_requantization_is_refused_where_it_differs() -> None:
    rng = np.random.default_rng(12)
    x, y = Conv(channels=64).build(rng, np.full(8, 3e-6, np.float32), 0.1)
    inputs = {"x": any_codes(rng, (2, 64, 9, 8), "uint8")}
    with tvm.target.Target(host_target()):
        reason = rejected(module(y, x), inputs, compute_dtype="float32")
    assert "requantizes by 3e-05 with rounding UPWARD in float32" in reason


def test_floating_point_requantization_is_taken_where_it_is_equal() -> None:
    rng = np.random.default_rng(13)
    x, y = Conv(channels=4).build(rng, 2.0**-7, 1.0)
    inputs = {"x": any_codes(rng, (2, 4, 9, 8), "uint8")}
    with tvm.target.Target(host_target()):
        whole(compare(module(y, x), inputs, compute_dtype="float32"), "qnn.conv2d")
        whole(compare(module(y, x), inputs, compute_dtype="float64"), "qnn.conv2d")


def test_reasons() -> None:
    rng = np.random.default_rng(14)
    inputs = {"x": any_codes(rng, (2, 16, 9, 8), "uint8")}
    x, y = Conv().build(rng, 2.0**-7, 1.0)
    accumulators = y.args[0]
    assert "nothing requantizes its result" in rejected(module(accumulators, x), inputs)
    moved = Q.requantize(accumulators, const(0.01), zero(5), const(1.0), zero(0), out_dtype="uint8")
    assert "accumulators have zero point 5" in rejected(module(moved, x), inputs)
    wide = Q.requantize(accumulators, const(0.01), zero(0), const(1.0), zero(0), out_dtype="int32")
    assert "its result is int32, not codes" in rejected(module(wide, x), inputs)
    weight = relay.var("w", shape=(8, 16, 3, 3), dtype="int8")
    free = relay.Call(y.op, [_with_weight(accumulators, weight), *y.args[1:]], y.attrs)
    given = {**inputs, "w": any_codes(rng, (8, 16, 3, 3), "int8")}
    assert "its weight is no constant" in rejected(module(free, x, weight), given)


def _with_weight(accumulators: Any, weight: Any) -> Any:
    conv, bias = accumulators.args
    conv = relay.Call(conv.op, [conv.args[0], weight, *conv.args[2:]], conv.attrs)
    return relay.Call(accumulators.op, [conv, bias], accumulators.attrs)


def test_sums_of_many_steps_stay() -> None:
    """An operand takes one map for each 255 steps that it is rounded to, a sum takes four."""
    x, y = (relay.var(name, shape=(1, 16, 8, 8), dtype="uint8") for name in "xy")
    scales = const(0.1), zero(128), const(0.1), zero(0), const(0.04), zero(0)
    rng = np.random.default_rng(17)
    inputs = {name: any_codes(rng, (1, 16, 8, 8), "uint8") for name in "xy"}
    reason = rejected(module(Q.add(x, y, *scales), x, y), inputs)
    assert "At most 4 convolutions are summed" in reason


def test_padded_averages_stay() -> None:
    """TFLite counts the codes inside the map: border windows divide by less."""
    rng = np.random.default_rng(15)
    x = relay.var("x", shape=(1, 16, 8, 8), dtype="uint8")
    inputs = {"x": any_codes(rng, (1, 16, 8, 8), "uint8")}
    for counted, text in ((False, "padding (1, 1, 1, 1) that is not counted"), (True, "")):
        y = relay.nn.avg_pool2d(
            relay.cast(x, "int32"), (3, 3), padding=(1, 1), count_include_pad=counted
        )
        mod = module(relay.cast(y, "uint8"), x)
        if text:
            assert text in rejected(mod, inputs)
        else:
            whole(compare(mod, inputs), "avg_pool2d")


# -- the arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", ["int64", "float32", "float64"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_computed_is_what_tvm_computes(rounding: str, compute_dtype: str) -> None:
    """The model of TVM's requantization, by one scale and by one per channel, against TVM."""
    rng = np.random.default_rng(16)
    scale = np.exp(rng.uniform(-9, 2, 8)).astype(np.float32)
    scale[:3] = 0.5, 2.0, 1.0
    steps = rng.integers(-(2**20), 2**20, (4000, 8)).astype(np.int32)
    steps[:200] = np.arange(-100, 100)[:, None]
    build: Callable[..., Any] = lambda scale: Q.requantize(  # noqa: E731
        relay.var("x", shape=steps.shape, dtype="int32"),
        const(scale),
        zero(0),
        const(1.0),
        zero(0),
        axis=1,
        rounding=rounding,
        compute_dtype=compute_dtype,
        out_dtype="int32",
    )
    for one in (scale, *scale[:4]):
        y = build(one)
        with tvm.target.Target(host_target()):
            library = relay.build(module(y, y.args[0]), host_target())
        (theirs,) = run(library, {"x": steps})
        spec = Rescale(one, 1.0, rounding, compute_dtype)
        np.testing.assert_array_equal(rescale(spec, steps.astype(np.int64)), theirs)
