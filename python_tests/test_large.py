"""Networks whose maps exceed the feature-map SRAMs: tiled with halos, spilled, and still exact."""

from __future__ import annotations

import numpy as np

from mars_runtime import PRESETS, Machine
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import evaluate_values
from tvm_mars.networks import mobilenet_v1, resnet18
from tvm_mars.schedule import plan

ARCH = PRESETS["mars"]


def test_resnet18_at_224_pixels_is_exact() -> None:
    graph = resnet18(0.1, size=224)
    schedule = plan(graph, ARCH, pack(graph, ARCH))
    assert {"conv0", "maxpool1", "conv2", "conv3"} <= set(schedule.spills)
    region = build_region(NamedGraph.of(graph), ARCH)
    codes = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
    machine = Machine(region, ARCH, images=1)
    machine.write_input(0, codes)
    timeline = machine.run()
    expected = evaluate_values(graph, {"x0": codes})[graph.outputs[0].value]
    np.testing.assert_array_equal(machine.read_output(0), expected)
    # What is spilled travels out once, and in once: halos stay.
    moved = {layer.name: layer.counters for layer in timeline.layers}
    map_bits = 64 * graph.types["conv2"].words
    assert moved["conv2"].map_out_bits == map_bits
    assert moved["conv3"].map_in_bits == 2 * map_bits  # its input and the residual


def test_mobilenet_at_224_pixels_is_exact() -> None:
    graph = mobilenet_v1(0.3, size=224, activation_bits=4)
    region = build_region(NamedGraph.of(graph), ARCH)
    codes = np.random.default_rng(1).integers(0, 16, (1, 3, 224, 224), np.uint8)
    machine = Machine(region, ARCH, images=1)
    machine.write_input(0, codes)
    machine.run()
    expected = evaluate_values(graph, {"x0": codes})[graph.outputs[0].value]
    np.testing.assert_array_equal(machine.read_output(0), expected)
