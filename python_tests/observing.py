"""Quantized networks through TVM onto MARS beside ONNX Runtime's codes for the same maps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import tvm_mars
from tvm_mars.frontend.lower import Lowered, lower
from tvm_mars.frontend.relax import partition_for_mars, read_region
from tvm_mars.frontend.relax.api import import_model
from tvm_mars.graph import Graph, evaluate_layer, evaluate_values
from tvm_mars.options import CompileOptions

__all__ = ["end_to_end", "lowered", "observe", "onnx_runtime", "single_layers"]

Values = dict[str, npt.NDArray[Any]]


def onnx_runtime(model: onnx.ModelProto, inputs: Values) -> list[Any]:
    """Run a model on the CPU."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, inputs))


def lowered(model: onnx.ModelProto) -> Lowered:
    """Lower a model that MARS must take whole, as one region."""
    mod = partition_for_mars(import_model(model))
    report = tvm_mars.offload_report(mod)
    assert not report.rejected and not report.host_operators and report.regions == 1, str(report)
    (region,) = [f for _, f in mod.functions_items() if f.attrs and "Codegen" in f.attrs]
    return lower(read_region(region), CompileOptions().arch)


def observe(model: onnx.ModelProto, inputs: Values) -> tuple[Graph, Values]:
    """Lower a network; give ONNX Runtime's codes for each of its maps that is dequantized."""
    constants = {entry.name: entry for entry in model.graph.initializer}
    known = {"", *constants}
    for node in model.graph.node:
        if known.issuperset(node.input):
            known.update(node.output)
    codes = {
        node.input[0]: numpy_helper.to_array(constants[node.input[2]]).dtype
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in known
    }
    codes = {name: kind for name, kind in codes.items() if kind.itemsize == 1}
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    del open_model.graph.output[:]
    open_model.graph.output.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), None)
        for name, kind in codes.items()
    )
    found = onnx_runtime(open_model, inputs)
    graph = lowered(open_model).graph
    values: Values = {}
    for out, result in zip(graph.outputs, found, strict=True):
        stored = result.astype(np.int64) - out.dequantize.low
        values[out.value] = stored.reshape(len(result), *graph.types[out.value].shape)
    return graph, values


def single_layers(graph: Graph, values: Values) -> dict[str, int]:
    """Give, of each layer fed ONNX Runtime's codes, the largest difference from its result."""
    differences = {}
    values = dict(values)
    for layer in graph.layers:
        if not set(layer.inputs) <= set(values):  # a max pool of codes is no output: exact anyway
            continue
        ours = evaluate_layer(layer, graph.types, values)
        if layer.name in values:
            differences[layer.name] = int(np.abs(ours - values[layer.name]).max())
        values.setdefault(layer.name, ours)
    return differences


def end_to_end(graph: Graph, values: Values) -> Counter[int]:
    """Count codes by how far they stray, from the same input codes on."""
    inputs = {entry.name: values[entry.name] for entry in graph.inputs}
    ours = evaluate_values(graph, inputs)
    histogram: Counter[int] = Counter()
    for name in set(values) - set(inputs):
        steps, counts = np.unique(np.abs(ours[name] - values[name]), return_counts=True)
        histogram.update(dict(zip(steps.tolist(), counts.tolist(), strict=True)))
    return histogram
