"""Profiles and traces: numbers against each other, by hand, and against the paper's tables."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import attrs
import numpy as np
import pytest

from mars_runtime import (
    PRESETS,
    Machine,
    MarsArch,
    Program,
    ProgramError,
    energy_of,
    load_arch,
    simulate,
)
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.timeline import STALLS
from mars_runtime.trace import chrome_trace, record
from tvm_mars import networks
from tvm_mars.compiler import NamedGraph, build, dense_baseline
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Requant
from tvm_mars.report import Profile, profile_program, repeated
from tvm_mars.report.text import print_profile


def compiled(graph: Any, arch: MarsArch = PRESETS["mars"], count: int = 1) -> Program:
    return build([NamedGraph.of(graph)] * count, arch)


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled(networks.resnet20())


@pytest.fixture(scope="module")
def profile(program: Program) -> Profile:
    return profile_program(program)


def text_of(profile: Profile) -> str:
    file = io.StringIO()
    print_profile(profile, file)
    return file.getvalue()


# -- profile ---------------------------------------------------------------------------------------


def test_layers_sum_to_the_whole(program: Program, profile: Profile) -> None:
    assert [layer.name for layer in profile.layers] == [x.name for x in program.regions[0].layers]
    assert sum(layer.cycles for layer in profile.layers) == profile.cycles
    assert sum(layer.dense_cycles or 0 for layer in profile.layers) == profile.dense_cycles
    # Every core is computing or stalled at any time.
    assert profile.core_cycles == program.arch.cores * profile.cycles
    busy = sum(layer.macro_cycles for layer in profile.layers)
    assert profile.utilisation == busy / (4 * profile.cycles)
    assert busy + sum(profile.stalls.values()) == 4 * profile.cycles
    assert sum(x.energy.total for x in profile.layers) == pytest.approx(profile.energy.total)


def test_cores_without_a_kernel_block_are_idle_in_that_layer() -> None:
    """One block of 16 outputs, one row: three of four cores are idle, all of the layer's time.

    Three of nine taps meet the row; the others are passed over.
    """
    kind = MapType(16, 1, 64, 8)
    images = Input("x0", kind, kind.shape, Quantize())
    weight = np.ones((16, 16, 3, 3), np.int64)
    terms = [ConvTerm(source, weight, padding=(1, 1, 1, 1)) for source in ("x0", "conv0")]
    requant = Requant.eq5(8, 15)
    layers = [Conv(f"conv{i}", [term], np.zeros(16), requant) for i, term in enumerate(terms)]
    graph = Graph([images], layers, [Output("conv1", kind.shape, Dequantize())])
    for layer in profile_program(compiled(graph), baseline=False).layers:
        assert layer.core_cycles == 4 * layer.cycles
        assert layer.utilisation == 3 * 64 * 2 / (4 * layer.cycles)
        assert (layer.counters.group_sets, layer.counters.passed_over) == (3 * 64, 6 * 64)
        idle = layer.stalls["cores"] + layer.stalls["maps"]
        assert 2.9 * layer.cycles <= idle <= 3.1 * layer.cycles


def test_cycles_are_the_timelines(program: Program, profile: Profile) -> None:
    region = program.regions[0]
    assert profile.cycles == simulate(region, program.arch).cycles
    dense, arch = dense_baseline(region, program.arch)
    assert profile.dense_cycles == simulate(dense, arch).cycles
    assert profile.speedup == profile.dense_cycles / profile.cycles > 1
    for layer in profile.layers:
        assert layer.speedup == (layer.dense_cycles or 0) / layer.cycles


def test_the_baseline_computes_every_group_set(program: Program) -> None:
    # A network without zeros is its own baseline.
    full = profile_program(compiled(networks.resnet20(1.0)))
    assert full.dense_cycles == full.cycles
    assert full.dense_cycles == profile_program(program).dense_cycles


def test_energy_by_hand(profile: Profile) -> None:
    arch, counters = profile.arch, profile.counters
    assert profile.energy.macros == counters.macro_accesses * 22.0
    # Two macros a core, two accesses for an 8-bit input, each group-set and pixel once.
    assert counters.macro_accesses == 2 * 2 * counters.group_sets
    offchip = (
        counters.fetched_bits
        + counters.instruction_bits
        + counters.map_in_bits
        + counters.map_out_bits
        + counters.partial_bits
    )
    assert profile.energy.offchip == pytest.approx(offchip * 20.3)
    parts = attrs.astuple(profile.energy)
    assert profile.energy.total == pytest.approx(sum(parts))
    assert profile.energy.assumed_share == pytest.approx(1 - parts[0] / sum(parts))
    doubled = attrs.evolve(arch, offchip_pj_per_bit=40.6)
    assert energy_of(counters, doubled).offchip == pytest.approx(2 * profile.energy.offchip)


def test_rates_follow_from_cycles(profile: Profile) -> None:
    assert profile.latency_us == profile.cycles / 100
    assert profile.fps == pytest.approx(1e8 / profile.cycles)
    macs = networks.resnet20().macs()
    assert profile.operations == 2 * macs
    assert profile.gops == pytest.approx(2 * macs * 1e8 / profile.cycles / 1e9)
    # Operations per second over joule per second, in 10**12.
    watt = profile.energy.total * 1e-12 * profile.fps
    assert profile.tops_per_watt == pytest.approx(profile.gops * 1e9 / watt / 1e12)
    assert (profile.tops_per_watt_macros or 0) > (profile.tops_per_watt or 0)


def test_the_paper_counts_622_854_and_1094_713_million_operations() -> None:
    # Table I: GOPS over FPS, in every column of VGG16 and of ResNet18.
    vgg16 = profile_program(compiled(networks.vgg16()), baseline=False)
    assert vgg16.paper_operations == 622_854_144
    assert len(vgg16.paper_layers) == 12
    assert vgg16.paper_gops == pytest.approx(vgg16.fps * 0.622854144)
    counted = sum(layer.energy.macros for layer in vgg16.paper_layers)
    assert vgg16.paper_tops_per_watt == pytest.approx(622_854_144 / counted)
    resnet18 = profile_program(compiled(networks.resnet18(0.05)), baseline=False)
    assert resnet18.paper_operations == 1_094_713_344


def test_padding_and_depthwise_fill_little() -> None:
    profile = profile_program(compiled(networks.mobilenet_v1(0.5)), baseline=False)
    filled = [layer.filled(profile.arch) for layer in profile.layers]
    assert filled[0] == pytest.approx(3 / 16)  # three colours of sixteen inputs
    assert filled[1] == pytest.approx(1 / 16)  # depthwise: the diagonal of a group-set
    assert filled[2] == pytest.approx(1)
    assert filled[-2] is None  # the average pool multiplies nothing


def test_without_a_baseline(program: Program, profile: Profile) -> None:
    short = profile_program(program, baseline=False)
    assert short.dense_cycles is short.speedup is short.dense_fps is None
    assert all(layer.speedup is None for layer in short.layers)
    assert short.cycles == profile.cycles
    assert "dense baseline" not in text_of(short)


def test_regions_follow_each_other(program: Program, profile: Profile) -> None:
    twice = profile_program(compiled(networks.resnet20(), count=2))
    assert twice.cycles == 2 * profile.cycles
    assert twice.dense_cycles == 2 * (profile.dense_cycles or 0)
    assert {layer.region for layer in twice.layers} == {0, 1}


def test_a_region_without_layers_is_one_row(program: Program, profile: Profile) -> None:
    region = attrs.evolve(program.regions[0], layers=())
    whole = profile_program(attrs.evolve(program, regions=(region,)))
    assert [layer.cycles for layer in whole.layers] == [profile.cycles]
    assert whole.counters == profile.counters
    text_of(whole)


def test_a_program_without_regions_is_refused(program: Program) -> None:
    with pytest.raises(ProgramError, match="no region"):
        profile_program(attrs.evolve(program, regions=()))


# -- steady state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["none", "prefetch", "full"])
def test_images_back_to_back_are_safe_on_the_machine(overlap: str) -> None:
    # With data the machine checks every read and write against what other units still use.
    arch = load_arch("mars", {"overlap": overlap})
    program = compiled(networks.resnet20(), arch)
    region = program.regions[0]
    twice = repeated(region, 2)
    machine = Machine(twice, arch, images=1)
    codes = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32))
    machine.write_input(0, codes)
    timeline = machine.run()
    single = Machine(region, arch, images=1)
    single.write_input(0, codes)
    once = single.run()
    assert np.array_equal(machine.read_output(0), single.read_output(0))
    steady = profile_program(program, baseline=False).steady_cycles
    assert steady == timeline.cycles - once.cycles
    assert 0 < steady <= once.cycles


# -- JSON and text ---------------------------------------------------------------------------------


def test_json_carries_the_same_numbers(profile: Profile) -> None:
    data = json.loads(json.dumps(profile.to_dict()))
    assert data["total"]["cycles"] == sum(layer["cycles"] for layer in data["layers"])
    assert data["total"]["fps"] == profile.fps
    assert data["total"]["stalls"].keys() == STALLS.keys()
    assert data["total"]["energy_pj"]["macros"] == profile.energy.macros
    assert MarsArch.from_dict(data["arch"]) == profile.arch
    assert "offchip_pj_per_bit" in data["assumed"]
    assert "cores" not in data["assumed"]
    assert data["layers"][3]["counters"]["map_reads"] == profile.layers[3].counters.map_reads


def test_text_says_what_is_assumed_within_80_columns(profile: Profile) -> None:
    text = text_of(profile)
    assert max(map(len, text.splitlines())) <= 80
    assert f"{profile.cycles:,} cycles" in text
    assert f"{profile.fps:,.1f}" in text
    assert f"{profile.energy.assumed_share:.0%} of the energy is assumed [A]" in text
    assert "FPS, steady state" in text
    assert all(layer.name in text for layer in profile.layers)


def test_text_of_a_large_network_stays_within_80_columns() -> None:
    graph = networks.resnet18(0.05, size=224, classes=1000)
    program = attrs.evolve(compiled(graph), host_operators=("softmax",))
    region = program.regions[0]
    long = "a_layer_with_an_uncommonly_long_name"
    layers = (attrs.evolve(region.layers[0], name=long), *region.layers[1:])
    program = attrs.evolve(program, regions=(attrs.evolve(region, layers=layers),))
    text = text_of(profile_program(program, baseline=False))
    assert max(map(len, text.splitlines())) <= 80
    assert "softmax" in text
    # The number of every column is there in full.
    assert f"{profile_program(program, baseline=False).cycles:,}" in text


# -- trace -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(program: Program) -> dict[str, Any]:
    timeline = record(program.regions[0], program.arch)
    found: dict[str, Any] = json.loads(json.dumps(chrome_trace([timeline] * 2, program.arch)))
    return found


def test_trace_follows_the_format(trace: dict[str, Any]) -> None:
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named = set()
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            named |= {event["tid"]} if event["name"] == "thread_name" else set()
        else:
            assert event["ph"] == "X"
            assert isinstance(event["cat"], str)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["tid"] in named


def test_trace_has_a_lane_per_core_unit_and_port(trace: dict[str, Any]) -> None:
    lanes = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    wanted = {"layers", "dma", "bank 0 dma"}
    wanted |= {f"core {core} {unit}" for core in range(4) for unit in ("load", "compute")}
    wanted |= {f"bank {bank} core {core}" for core in range(4) for bank in range(2)}
    assert wanted <= set(lanes)
    assert lanes[:3] == ["layers", "dma", "core 0 load"]


def test_trace_tells_the_timeline(
    program: Program, profile: Profile, trace: dict[str, Any]
) -> None:
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in events)
    assert end == pytest.approx(2 * profile.latency_us)  # two regions, one after the other
    assert {event["args"]["region"] for event in events} == {0, 1}
    lanes: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        lanes.setdefault(event["tid"], []).append(event)
    for lane in lanes.values():  # nothing overlaps: a unit does one thing at a time
        lane.sort(key=lambda event: event["ts"])
        for one, other in itertools.pairwise(lane):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-6
    instructions = {e["args"]["instruction"] for e in events if e["cat"] == "dma"}
    names = [type(program.regions[0].instructions[i]).__name__ for i in instructions]
    assert set(names) <= {"Fetch", "Move"}


def test_recording_ports_changes_no_time(program: Program) -> None:
    region, arch = program.regions[0], program.arch
    plain, recorded = simulate(region, arch, trace=True), record(region, arch)
    assert recorded.layers == plain.layers
    assert [e for e in recorded.events if not e.lane.startswith("bank")] == list(plain.events)
    uses = [event for event in recorded.events if event.lane.startswith("bank")]
    reads = sum(int(e.name.split()[1]) for e in uses if "reads" in e.name)
    assert reads == sum(layer.counters.map_reads for layer in plain.layers)
