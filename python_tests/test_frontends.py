"""Every IR's frontend makes the same integer graph of an ONNX file, and so the same program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnx
import pytest

from mars_runtime import load_arch, simulate
from mars_runtime.program import HostReason
from python_tests.onnx_models import ModelWriter, imported_model
from python_tests.random_graphs import random_graph
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.frontend.lower import lower
from tvm_mars.graph import Graph
from tvm_mars.networks import mobilenet_v1, mobilenet_v2, resnet18, vgg16
from tvm_mars.onnx_export import to_onnx
from tvm_mars.options import CompileOptions
from tvm_mars.tuner.api import tune
from tvm_mars.tuner.database import FILES, Database
from tvm_mars.zoo import load_digits

pytest.importorskip("tvm")

import tvm_mars
from tvm_mars.frontend import adapter

SEEDS = range(8)


def graph_of(model: onnx.ModelProto) -> Graph:
    """Lower a model that MARS must take whole."""
    ir = adapter()
    mod = tvm_mars.partition_for_mars(ir.import_model(model))
    report = tvm_mars.offload_report(mod)
    assert not report.rejected and not report.host_operators and report.regions == 1, str(report)
    (region,) = [
        func for func in mod.functions.values() if func.attrs and "mars.interface" in func.attrs
    ]
    return lower(ir.read_region(region), CompileOptions().arch).graph


def digest(graph: Graph) -> str:
    """Hash everything that a graph holds."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(f"{value.shape}".encode() + value.astype("<i8").tobytes())
        elif attrs.has(type(value)):
            found.update(type(value).__name__.encode())
            add([getattr(value, field.name) for field in attrs.fields(type(value))])
        elif isinstance(value, (list, tuple)):
            found.update(str(len(value)).encode())
            for entry in value:
                add(entry)
        else:
            found.update(repr(value).encode())

    add([graph.inputs, graph.layers, graph.outputs])
    return found.hexdigest()


def test_graphs_of_imported_networks(golden: Callable[[str, str], None]) -> None:
    """The same file's graph is the same through Relax and through Relay: both compare with this."""
    lines = [f"imported {seed} {digest(graph_of(imported_model(seed, batch=2)))}" for seed in SEEDS]
    golden("frontend_graphs.txt", "\n".join(lines) + "\n")


NETWORKS: dict[str, Callable[[], Graph]] = {
    "digits": load_digits,
    "mobilenet v1": mobilenet_v1,
    "mobilenet v2": mobilenet_v2,
    "resnet18": resnet18,
    "vgg16": vgg16,
    **{f"random {seed}": partial(random_graph, seed, native=True) for seed in range(50)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_programs(name: str, golden: Callable[..., None]) -> None:
    """The program that the default machine gets is the same, byte for byte, through either IR.

    Both compare with one file. The graph's digest in it tells whether it was the same network.
    """
    graph = NETWORKS[name]()
    shapes = {entry.name: (1, *entry.shape) for entry in graph.inputs}
    compiled = tvm_mars.compile(to_onnx(graph), shape=shapes)
    report, program = compiled.report, compiled.program
    assert program is not None and report.regions == len(program.regions) == 1
    assert report.offloaded and not report.rejected and not report.host_operators, str(report)
    found = hashlib.sha256(program.to_bytes()).hexdigest()
    golden("frontend_programs.json", f"{digest(graph)[:16]} {found}", entry=name)


def test_records_serve_every_ir(tmp_path: Path) -> None:
    """A model's records are, byte for byte, those of its graph, and serve its compilation.

    That holds through either IR, so that each takes the other's.
    """
    graph, arch = load_digits(), load_arch("mars", {"overlap": "full"})
    shape = {"x0": (1, 1, 16, 16)}
    files = []
    for source, place in ((graph, tmp_path / "graph"), (to_onnx(graph), tmp_path / "model")):
        tune(source, shape=shape, work_dir=place, max_trials_global=16, arch=arch)
        files.append([(place / name).read_bytes() for name in FILES])
    assert files[0] == files[1] and files[0][1].count(b"\n") == 16
    default = build([NamedGraph.of(graph)], arch)
    with Database(tmp_path / "graph"):
        expected = build([NamedGraph.of(graph)], arch)
        program = tvm_mars.compile(to_onnx(graph), shape=shape, arch=arch).program
    assert program is not None and program.to_bytes() == expected.to_bytes()
    assert simulate(program.regions[0], arch).cycles < simulate(default.regions[0], arch).cycles


def test_a_program_carries_the_reasons_for_the_cpu(golden: Callable[..., None]) -> None:
    """An average that nothing quantizes: one reason, and one program, through either IR."""
    writer = ModelWriter(np.random.default_rng(3))
    weight = writer.weight(writer.rng.normal(0, 0.2, (16, 3, 3, 3)), per_channel=False)
    x = writer.requantize("image", -1, 1)
    x = writer.requantize(writer.node("Conv", x, weight), -3, 3)
    writer.node("AveragePool", x, kernel_shape=[2, 2])
    writer.name_last("result")
    model = writer.model({"image": [1, 3, 8, 8]}, {"result": [1, 16, 5, 5]})
    program = tvm_mars.compile(model).program
    assert program is not None
    assert program.host_reasons == (HostReason("avg_pool2d", "nothing quantizes its result"),)
    found = hashlib.sha256(program.to_bytes()).hexdigest()
    golden("frontend_programs.json", found, entry="an average pool on the CPU")


def test_the_digest_sees_a_weight() -> None:
    graph = load_digits()
    layer = graph.layers[0]
    term = layer.terms[0]
    weight = term.weight.copy()
    weight.flat[0] += 1 if weight.flat[0] < 7 else -1
    other = attrs.evolve(layer, terms=[attrs.evolve(term, weight=weight), *layer.terms[1:]])
    changed = attrs.evolve(graph, layers=[other, *graph.layers[1:]])
    assert digest(changed) != digest(graph) == digest(load_digits())


def test_the_demo_returns() -> None:
    """The demo's network comes back from its ONNX file as the graph that was written."""
    graph, model = load_digits(), to_onnx(load_digits())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert digest(graph_of(model)) == digest(graph)
