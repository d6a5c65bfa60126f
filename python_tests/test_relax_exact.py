"""Networks through TVM's ONNX importer onto MARS compute what ONNX Runtime and the CPU compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from python_tests.onnx_models import imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from tvm_mars.graph import Graph, evaluate
from tvm_mars.onnx_export import to_onnx

tvm = pytest.importorskip("tvm")
onnxruntime = pytest.importorskip("onnxruntime")

import tvm_mars  # noqa: E402
from python_tests.observing import (  # noqa: E402
    end_to_end,
    lowered,
    observe,
    onnx_runtime,
    single_layers,
)
from tvm_mars.frontend.relax.api import import_model  # noqa: E402


def llvm(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    """TVM's CPU build of the module as it was imported."""
    executable = tvm.compile(import_model(model), target="llvm")
    machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values()))
    return [
        result.numpy()
        for result in ([results] if isinstance(results, tvm.runtime.Tensor) else results)
    ]


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
    model = imported_model(seed)
    return observe(model, model_inputs(model, seed, images=8))


@pytest.mark.filterwarnings("ignore:Field 'shape'")
@pytest.mark.random(6)
def test_imported_layers_differ_by_one_code_at_most(seed: int) -> None:
    """Each layer, fed the codes that ONNX Runtime gives it, is within a code of its result."""
    differences = single_layers(*observed(seed))
    assert len(differences) >= 6 and max(differences.values()) <= 1, differences


@pytest.mark.filterwarnings("ignore:Field 'shape'")
def test_histogram_of_imported_differences() -> None:
    """From the same input codes on, over twenty networks: how far codes stray end to end.

    ONNX Runtime rounds float32 products of the scales where the machine is exact, so that a code
    near a tie may fall to the other side (some 4 in 10,000 a layer), and layers add up.
    """
    histogram: Counter[int] = Counter()
    for seed in range(20):
        histogram.update(end_to_end(*observed(seed)))
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
