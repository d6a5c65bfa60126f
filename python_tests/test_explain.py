"""Explanations: each figure against one that is derived another way."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from mars_runtime import PRESETS, InputError, MarsArch, simulate
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.trace import occupancy
from tvm_mars import networks
from tvm_mars.cli import mars
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.frontend.interface import Interface
from tvm_mars.frontend.partition import Partition, Piece
from tvm_mars.frontend.report import Decision, OffloadReport
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Requant
from tvm_mars.onnx_export import to_onnx
from tvm_mars.pack import pack_conv
from tvm_mars.report.explain import BOUNDS, Explanation, explain, pruned
from tvm_mars.report.explain_text import print_explanation
from tvm_mars.tuner.space import Space
from tvm_mars.tuner.strategies import make_strategy

MARS = PRESETS["mars"]


def of(*graphs: Graph) -> Partition:
    """A partition whose operators are called as the layers are."""
    pieces, decisions = [], []
    for number, graph in enumerate(graphs):
        operators = {layer.name: (f"op{number}_{layer.name}",) for layer in graph.layers}
        decisions += [Decision(name, "conv2d", True) for (name,) in operators.values()]
        pieces.append(Piece(NamedGraph.of(graph), Interface(number), operators))
    decisions.append(Decision("softmax", "avg_pool2d", False, "it is too soft"))
    return Partition(OffloadReport(tuple(decisions), ("softmax",), len(pieces)), tuple(pieces))


def one_conv(weight: Any, size: int = 8, bits: int = 8, **more: Any) -> Graph:
    kind = MapType(weight.shape[1] * more.get("groups", 1), size, size, bits)
    pad = weight.shape[2] // 2
    term = ConvTerm("x0", weight, padding=(pad, pad, pad, pad), **more)
    layer = Conv("conv0", [term], np.zeros(len(weight)), Requant.eq5(bits, bits + 7))
    shape = (len(weight), size, size)
    return Graph(
        [Input("x0", kind, kind.shape, Quantize(high=2**bits - 1))],
        [layer],
        [Output("conv0", shape, Dequantize())],
    )


def cycles(graph: Graph, arch: MarsArch = MARS) -> int:
    return simulate(build_region(NamedGraph.of(graph), arch), arch).cycles


# -- busy ------------------------------------------------------------------------------------------


def test_what_is_busy_by_hand() -> None:
    """64 kernels on 16 inputs, 3x3: nine group-sets for each of four cores, one load."""
    graph = one_conv(np.ones((64, 16, 3, 3), np.int64))
    (layer,) = explain(of(graph), MARS).layers
    pixels = 8 * 8
    assert layer.busy["compute"] == 9 * pixels * 2  # 8-bit inputs take two accesses
    assert layer.busy["load"] == MARS.array_fill_cycles + 9 * 256 * 8 // MARS.macro_write_bits
    # Each tap meets the map but for its border rows and columns: 3x3 taps on 8x8 pixels.
    inside = sum((8 - abs(r)) * (8 - abs(c)) for r in (-1, 0, 1) for c in (-1, 0, 1))
    assert layer.busy["ports"] == 2 * inside
    assert layer.bound == "load"
    assert layer.floor == 2 * inside + 9 * 256 * 8 // MARS.macro_write_bits
    assert layer.schedule_gap == layer.cycles - layer.floor
    region = build_region(NamedGraph.of(graph), MARS)
    counters = simulate(region, MARS).layers[0].counters
    moved = counters.offchip_bits - counters.instruction_bits
    assert moved / MARS.offchip_bits_per_cycle <= layer.busy["off-chip"]
    assert layer.busy["off-chip"] < moved / MARS.offchip_bits_per_cycle + 40  # parts of a cycle


def test_occupancy_agrees_with_the_timeline() -> None:
    graph = networks.resnet20(0.3)
    region = build_region(NamedGraph.of(graph), MARS)
    for lanes, time in zip(occupancy(region, MARS), simulate(region, MARS).layers, strict=True):
        macros = [lanes.get(f"core {core} macros", 0) for core in range(4)]
        assert sum(macros) == time.macro_cycles
        assert max(macros) <= time.cycles
        ports = sum(count for lane, count in lanes.items() if lane.startswith("bank"))
        assert ports == time.counters.map_reads + time.counters.map_writes


@pytest.mark.parametrize("overlap", ["none", "prefetch", "full"])
def test_no_schedule_beats_the_floors(overlap: str) -> None:
    arch = attrs.evolve(MARS, overlap=overlap)
    graph = networks.resnet20(0.2)
    explained = explain(of(graph), arch)
    floor = sum(layer.floor for layer in explained.layers)
    assert floor <= explained.least
    space = Space.of(graph, arch)
    points = make_strategy("random", space, seed=1, trials=1).propose(12)
    seen = [space.time(point).cycles for point in points if space.legal(point) is None]
    assert len(seen) > 3
    assert 0.2 * min(seen) < floor <= explained.least <= min(seen)


def test_narrow_inputs_compute_as_the_narrow_network() -> None:
    weight = np.ones((64, 32, 3, 3), np.int64)
    (wide,) = explain(of(one_conv(weight)), MARS).layers
    (narrow,) = explain(of(one_conv(weight, bits=4)), MARS).layers
    assert wide.narrow_compute == narrow.busy["compute"]
    assert narrow.narrow_compute is None


# -- group-sets ------------------------------------------------------------------------------------


def test_group_sets_by_their_weights() -> None:
    weight = np.zeros((16, 48, 1, 1), np.int64)
    weight[:, :16] = 1  # full
    weight[0, 16:20] = 1  # four weights; the third group-set is zero
    (layer,) = explain(of(one_conv(weight)), MARS).layers
    found = layer.group_sets
    assert found is not None
    assert (found.dense, found.stored, found.filled) == (3, 2, (1, 0, 0, 1))
    assert found.zero_share == pytest.approx(1 / 3)
    assert found.zero_weights == pytest.approx(1 - 260 / 768)
    assert (found.usable, found.gathered) == (256, 2)


def test_padding_and_groups_leave_a_group_set_empty() -> None:
    (stem,) = explain(of(one_conv(np.ones((16, 3, 3, 3), np.int64))), MARS).layers
    assert stem.group_sets is not None
    assert stem.group_sets.usable == 48
    weight = np.ones((32, 1, 3, 3), np.int64)
    (depthwise,) = explain(of(one_conv(weight, groups=32)), MARS).layers
    assert depthwise.group_sets is not None
    assert depthwise.group_sets.usable == 16
    assert depthwise.group_sets.filled[0] == depthwise.group_sets.stored == 18


def test_pruning_takes_the_smallest() -> None:
    weight = np.zeros((16, 64, 1, 1), np.int64)
    for block, value in enumerate([3, 1, 4, 2]):
        weight[:, 16 * block : 16 * block + 16] = value
    layer = one_conv(weight).layers[0]
    assert isinstance(layer, Conv)
    smaller, removed = pruned(layer, 0.5)
    kept = smaller.terms[0].weight.reshape(16, 4, 16).any(axis=(0, 2))
    assert kept.tolist() == [True, False, True, False]
    assert removed == pytest.approx((1 + 4) / (9 + 1 + 16 + 4))
    assert np.array_equal(pruned(layer, 0)[0].terms[0].weight, layer.terms[0].weight)
    assert not pruned(layer, 1)[0].terms[0].weight.any()


# -- what would help -------------------------------------------------------------------------------


def test_what_if_is_what_the_smaller_network_takes() -> None:
    graph = networks.resnet20(0.6)
    (layer,) = explain(of(graph), MARS, op="op0_conv10").layers
    assert [one.share for one in layer.what_if] == [0.5, 0.75, 0.9, 0.95]
    for one in layer.what_if:
        layers = [
            pruned(layer, one.share)[0] if layer.name == "conv10" else layer
            for layer in graph.layers
        ]
        smaller = attrs.evolve(graph, layers=layers)
        packed = pack_conv(layers[10], graph.types, MARS)
        zero = packed.dense_group_sets - packed.group_sets
        assert zero == int(one.share * packed.dense_group_sets)
        assert cycles(smaller) == cycles(graph) - one.saved
    assert layer.what_if[-1].removed > layer.what_if[0].removed > 0


def test_the_whole_network_at_a_share() -> None:
    graph = networks.vgg16(0.5)
    found = explain(of(graph), MARS, share=0.9)
    assert sum(found.saved.values()) == cycles(graph) - cycles(
        attrs.evolve(
            graph,
            layers=[
                pruned(layer, 0.9)[0] if isinstance(layer, Conv) else layer
                for layer in graph.layers
            ],
        )
    )
    assert found.cycles == cycles(graph)


def test_without_zero_skipping_nothing_helps() -> None:
    dense = PRESETS["mars-dense"]
    found = explain(of(networks.resnet20(0.3)), dense)
    assert not any(found.saved.values())
    assert all(layer.group_sets.zero_share == 0 for layer in found.layers if layer.group_sets)


# -- text and command ------------------------------------------------------------------------------


def text_of(found: Explanation, in_full: bool) -> str:
    file = io.StringIO()
    print_explanation(found, file, in_full=in_full)
    return file.getvalue()


@pytest.mark.parametrize("preset", ["mars", "mars-dense"])
def test_text_has_it_all_within_80_columns(preset: str) -> None:
    partition = of(networks.resnet20(0.3), networks.mobilenet_v1(0.3))
    found = explain(partition, PRESETS[preset])
    text = text_of(found, False)
    assert "it is too soft" in text
    assert "1:conv5" in text
    for name in BOUNDS:
        assert f"  {name}: " in text
    for layer in found.layers:
        assert f"{layer.cycles:,}" in text
    full = text_of(explain(partition, PRESETS[preset], op="conv5"), True)
    assert "bounded by " in full
    # A table's rule and a long line of words would both break at 80.
    for line in (*text.splitlines(), *full.splitlines()):
        assert len(line) <= 80


def test_words_do_not_wrap() -> None:
    """No line of prose is so long that the printer breaks it, which would lose its indent."""
    partition = of(networks.resnet20(0.3))
    full = text_of(explain(partition, MARS, op="conv1"), True)
    prose = [line for line in full.splitlines() if line and not line.startswith(("  ", "─"))]
    starts = ("conv2d ", "layer ", "bounded ", "of all cores' ", "what could ")
    assert all(line.startswith(starts) or line[0].isdigit() for line in prose), prose


def test_unknown_operators_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean op0_conv3"):
        explain(of(networks.resnet20(0.3)), MARS, op="op0_konv3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose logits go through a softmax, which MARS does not take, and an average."""
    pytest.importorskip("tvm")
    made = to_onnx(networks.resnet20(0.2))
    name = made.graph.output[0].name
    made.graph.node.append(onnx.helper.make_node("Softmax", [name], ["p"], name="soft"))
    made.graph.output[0].name = "p"
    path = tmp_path_factory.mktemp("explain") / "net.onnx"
    onnx.save(made, path)
    return path


def call(*args: object) -> Any:
    return CliRunner().invoke(mars, [str(arg) for arg in args])


def test_command_names_the_models_operators(model: Path) -> None:
    result = call("explain", model, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    operators = {one["name"]: one for one in data["operators"]}
    assert operators["conv2_term0"]["offloaded"]
    by_layer = {layer["name"]: layer for layer in data["layers"]}
    assert by_layer["conv2"]["operators"] == ["conv2_term0", "conv2_sum1"]
    assert "softmax" in ",".join(data["host_operators"])
    assert data["cycles"] == cycles(networks.resnet20(0.2))
    text = call("explain", model, "--op", "conv2_sum1")
    assert text.exit_code == 0
    assert "add conv2_sum1 is on MARS" in text.stdout
    assert "layer conv2 (conv)" in text.stdout


def test_command_explains_the_tuned_program(model: Path, tmp_path: Path) -> None:
    records = tmp_path / "tuned"
    arguments = ("--trials", 12, "--seed", 0, "--cost-model", "none", "--workers", 1)
    tuned = call("tune", model, "-D", records, *arguments)
    assert tuned.exit_code == 0, tuned.stderr
    plain, found = (
        json.loads(call("explain", model, "--json", *options).stdout)
        for options in ((), ("--tuned", records))
    )
    program = tmp_path / "net.mars"
    assert call("compile", model, "--program", program, "--tuned", records).exit_code == 0
    profile = json.loads(call("profile", program, "--json", "--no-baseline").stdout)
    assert (plain["tuned"], found["tuned"]) == (False, True)
    assert found["cycles"] == sum(layer["cycles"] for layer in profile["layers"])
    assert found["least_cycles"] <= found["cycles"] < plain["cycles"]
    # What is tried with more zero group-sets has no records: both sides have the default schedule.
    assert found["least_cycles"] == plain["least_cycles"]
    for one, other in zip(plain["layers"], found["layers"], strict=True):
        assert one["saved_at_share"] == other["saved_at_share"], one["name"]
    text = call("explain", model, "--tuned", records).stdout
    assert "tuned schedules" in text and max(map(len, text.splitlines())) <= 80
    missing = call("explain", model, "--tuned", tmp_path / "none")
    assert missing.exit_code == 1 and "no such directory" in missing.stderr


def test_command_says_why_an_operator_is_on_the_cpu(model: Path, tmp_path: Path) -> None:
    """A convolution of float weights, which nothing quantizes, in front."""
    made = onnx.load(model)
    weight = onnx.numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    made.graph.initializer.append(weight)
    for node in made.graph.node:
        node.input[:] = ["scaled" if name == "x0" else name for name in node.input]
    first = onnx.helper.make_node("Conv", ["x0", "w"], ["scaled"], name="plain")
    made.graph.node.insert(0, first)
    path = tmp_path / "float.onnx"
    onnx.save(made, path)
    result = call("explain", path, "--op", "plain")
    assert result.exit_code == 0, result.stderr
    assert "conv2d plain is on the CPU: " in result.stdout
    assert "quantize" in result.stdout
    missing = call("explain", path, "--op", "plane")
    assert missing.exit_code == 1
    assert "did you mean plain?" in missing.stderr
