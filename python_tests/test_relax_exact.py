"""Networks through TVM's ONNX importer onto MARS compute what ONNX Runtime and the CPU compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from python_tests.onnx_models import imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from tvm_mars.graph import Graph, evaluate, evaluate_layer, evaluate_values
from tvm_mars.onnx_export import to_onnx
from tvm_mars.options import CompileOptions

tvm = pytest.importorskip("tvm")
onnxruntime = pytest.importorskip("onnxruntime")

import tvm_mars  # noqa: E402
from tvm_mars.frontend.lower import Lowered, lower  # noqa: E402
from tvm_mars.frontend.relax import partition_for_mars, read_region  # noqa: E402
from tvm_mars.frontend.relax.api import import_model  # noqa: E402


def onnx_runtime(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def llvm(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    """TVM's CPU build of the module as it was imported."""
    executable = tvm.compile(import_model(model), target="llvm")
    machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values()))
    return [
        result.numpy()
        for result in ([results] if isinstance(results, tvm.runtime.Tensor) else results)
    ]


def lowered(model: onnx.ModelProto) -> Lowered:
    """Lower a model that MARS must take whole, as one region."""
    mod = partition_for_mars(import_model(model))
    report = tvm_mars.offload_report(mod)
    assert not report.rejected and not report.host_operators and report.regions == 1, str(report)
    (region,) = [f for _, f in mod.functions_items() if f.attrs and "Codegen" in f.attrs]
    return lower(read_region(region), CompileOptions().arch)


@pytest.mark.random(25)
def test_native_graph_returns(seed: int) -> None:
    """Graph to ONNX to Relax to Graph: the same value, and so the same program from any route."""
    graph = random_graph(seed, native=True, paper=True)
    again = lowered(to_onnx(graph)).graph
    if again != graph:  # the same weights may be written as 4 or as 8 bits
        assert _without_weight_bits(again) == _without_weight_bits(graph)


def _without_weight_bits(graph: Graph) -> str:
    return str(graph).replace(" w4 ", " w8 ")


@pytest.mark.random(8)
def test_native_network_is_exact(seed: int) -> None:
    """Zero differences: reference, ONNX Runtime, TVM on the CPU, MARS."""
    graph = random_graph(seed, native=True)
    model = to_onnx(graph)
    inputs = random_inputs(graph, seed)
    expected = evaluate(graph, inputs)
    compiled = tvm_mars.compile(model)
    assert not compiled.report.rejected and not compiled.report.host_operators
    engines = {
        "ONNX Runtime": onnx_runtime(model, inputs),
        "LLVM": llvm(model, inputs),
        "MARS": compiled.run(inputs).values(),
    }
    for name, results in engines.items():
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, wanted, err_msg=name)


def observed(seed: int) -> tuple[Graph, dict[str, Any]]:
    """Lower an imported network; give ONNX Runtime's codes for each of its quantized maps."""
    model = imported_model(seed)
    codes = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    elements = {
        node.output[0]: onnx.numpy_helper.to_array(zero).dtype
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        for zero in model.graph.initializer
        if zero.name == node.input[2]
    }
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(elements[name]), None)
        for name in codes
    ]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    found = onnx_runtime(model, model_inputs(model, seed, images=8))
    graph = lowered(model).graph
    values: dict[str, Any] = {}
    for out, result in zip(graph.outputs, found, strict=True):
        stored = result.astype(np.int64) - out.dequantize.low
        values[out.value] = stored.reshape(len(result), *graph.types[out.value].shape)
    return graph, values


@pytest.mark.filterwarnings("ignore:Field 'shape'")
@pytest.mark.random(6)
def test_imported_layers_differ_by_one_code_at_most(seed: int) -> None:
    """Each layer, fed the codes that ONNX Runtime gives it, is within a code of its result."""
    graph, values = observed(seed)
    checked = 0
    for layer in graph.layers:
        if not set(layer.inputs) <= set(values):  # a max pool of codes is no output: exact anyway
            continue
        ours = evaluate_layer(layer, graph.types, values)
        if layer.name not in values:
            values[layer.name] = ours
            continue
        assert np.abs(ours - values[layer.name]).max() <= 1, layer.name
        checked += 1
    assert checked >= 6


@pytest.mark.filterwarnings("ignore:Field 'shape'")
def test_histogram_of_imported_differences() -> None:
    """From the same input codes on, over twenty networks: how far codes stray end to end.

    ONNX Runtime rounds float32 products of the scales where the machine is exact, so that a code
    near a tie may fall to the other side (some 4 in 10,000 a layer), and layers add up.
    """
    histogram: Counter[int] = Counter()
    for seed in range(20):
        graph, theirs = observed(seed)
        inputs = {entry.name: theirs[entry.name] for entry in graph.inputs}
        ours = evaluate_values(graph, inputs)
        for name in set(theirs) - set(inputs):
            steps, counts = np.unique(np.abs(ours[name] - theirs[name]), return_counts=True)
            histogram.update(dict(zip(steps.tolist(), counts.tolist(), strict=True)))
    print("codes by end-to-end difference:", dict(sorted(histogram.items())))
    assert histogram[0] >= 0.99 * histogram.total()
    assert histogram[0] + histogram[1] >= 0.999 * histogram.total()
    assert max(histogram) <= 4


@pytest.mark.random(4)
def test_imported_network_on_mars(seed: int) -> None:
    """End to end the few rounded multipliers may show, but stay small."""
    model = imported_model(seed)
    inputs = model_inputs(model, seed, images=8)
    compiled = tvm_mars.compile(model)
    assert not compiled.report.rejected and not compiled.report.host_operators
    (ours,) = compiled.run(inputs).values()
    (theirs,) = onnx_runtime(model, inputs)
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("activations", "weights", "per_channel"),
    [
        ("QUInt8", "QInt8", False),
        ("QUInt8", "QInt8", True),
        ("QInt8", "QInt8", False),
        ("QInt8", "QInt8", True),
        ("QUInt8", "QUInt8", False),  # weights with a zero point
    ],
)
def test_onnx_runtime_static_quantization(
    tmp_path: Any, activations: str, weights: str, per_channel: bool
) -> None:
    """What onnxruntime.quantization writes is taken whole."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    rng = np.random.default_rng(3)

    class Reader(quantization.CalibrationDataReader):
        left = 3

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            batch = rng.normal(size=(4, 3, 8, 8)).astype(np.float32)
            return {"image": batch} if self.left >= 0 else None

    onnx.save(_float_network(rng), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "quantized.onnx",
        Reader(),
        per_channel=per_channel,
        activation_type=quantization.QuantType[activations],
        weight_type=quantization.QuantType[weights],
    )
    model = onnx.load(tmp_path / "quantized.onnx")
    compiled = tvm_mars.compile(tmp_path / "quantized.onnx")
    assert len(compiled.report.offloaded) == 9, str(compiled.report)
    assert not compiled.report.rejected and not compiled.report.host_operators
    inputs = {"image": rng.normal(size=(5, 3, 8, 8)).astype(np.float32)}
    (expected,) = onnx_runtime(model, inputs)
    step = np.min(np.diff(np.unique(expected)))
    assert np.abs(compiled.run(inputs)["scores"] - expected).max() <= 2.5 * step


def _float_network(rng: np.random.Generator) -> onnx.ModelProto:
    nodes, constants = [], []

    def weights(name: str, *shape: int) -> str:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(values, name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    x = node("Conv", ["image", weights("w0", 8, 3, 3, 3), weights("b0", 8)], "c0", pads=[1] * 4)
    x = node("Relu", [x], "r0")
    y = node("Conv", [x, weights("w1", 8, 8, 3, 3), weights("b1", 8)], "c1", pads=[1] * 4)
    y = node("Relu", [node("Add", [y, x], "sum")], "r1")
    y = node("MaxPool", [y], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = node("Relu", [node("Conv", [y, weights("w2", 16, 8, 3, 3)], "c2", pads=[1] * 4)], "r2")
    y = node("AveragePool", [y], "average", kernel_shape=[2, 2], strides=[1, 1])
    y = node("GlobalAveragePool", [y], "mean")
    y = node("Flatten", [y], "flat")
    y = node("Relu", [node("Gemm", [y, weights("w3", 16, 12), weights("b3", 12)], "g")], "r3")
    y = node("MatMul", [y, weights("w4", 12, 10)], "product")
    node("Add", [y, weights("b4", 10)], "scores")
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 10])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
