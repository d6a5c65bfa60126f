"""The space of schedules: every point gives the same codes, timed as the machine times it."""

from __future__ import annotations

import random
from collections import Counter

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, isa, simulate
from mars_runtime.errors import CapacityError
from python_tests.random_graphs import random_inputs
from python_tests.small_networks import every_kind_of_layer
from python_tests.test_machine import (
    MACHINES,
    assert_conserved,
    assert_macs,
    execute,
    network_of,
)
from tvm_mars.codegen import generate
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.graph import Graph, evaluate_values
from tvm_mars.networks import resnet18, vgg16
from tvm_mars.schedule import Point, ScheduleError, plan
from tvm_mars.tuner.bound import least_cycles
from tvm_mars.tuner.space import Space

MARS = PRESETS["mars"]
NETWORKS = 200
CHUNK = 20
TRIES = 4


def drawn_point(space: Space, rng: random.Random) -> Point:
    """Draw decisions of every step, the more the less likely the point is to be legal."""
    point = space.default
    for index in range(len(point.steps)):
        point = space.drawn(rng, point, index, rng.choice([0.0, 0.1, 0.3]))
    return point


def codes_of(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    inputs = random_inputs(graph, seed, images=1)
    return {
        entry.name: entry.quantize.apply(inputs[entry.name]).reshape(-1, *entry.type.shape)
        for entry in graph.inputs
    }


def run_point(
    space: Space, point: Point, codes: dict[str, np.ndarray], values: dict[str, np.ndarray]
) -> str:
    """Execute a point and compare it with the reference and its timeline; tell what it was."""
    try:
        expected = space.time(point)
    except ScheduleError as refusal:
        assert str(refusal) == space.legal(point) and refusal.problem
        return "refused"
    graph, arch, schedule = space.graph, space.arch, space.realize(point)
    region = build_region(NamedGraph.of(graph), arch, scheduler=lambda *_: schedule)
    assert least_cycles(graph, arch, space.packed) <= expected.cycles
    outputs, timeline = execute(region, arch, graph, codes)
    assert timeline == expected == simulate(region, arch)
    for out, found in zip(graph.outputs, outputs, strict=True):
        np.testing.assert_array_equal(found, values[out.value], out.value)
    assert_conserved(timeline, arch)
    assert_macs(timeline, region, graph, arch, schedule)
    return "default" if point == space.default else "moved"


@pytest.mark.parametrize("chunk", range(NETWORKS // CHUNK))
def test_every_legal_point_gives_the_codes_and_the_time_of_the_machine(chunk, first_seed):
    """Random networks, random points of their space: executed, against reference and timeline."""
    tried: Counter[str] = Counter()
    for seed in range(first_seed + chunk * CHUNK, first_seed + (chunk + 1) * CHUNK):
        graph = network_of(seed)
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        names = list(MACHINES)
        for name in (names[seed % len(names)], names[(seed // 3 + 1) % len(names)]):
            try:
                space = Space.of(graph, MACHINES[name])
            except CapacityError:
                continue
            rng = random.Random(f"{name} {seed}")
            for _ in range(TRIES):
                tried[run_point(space, drawn_point(space, rng), codes, values)] += 1
    assert tried["moved"] >= CHUNK // 2, tried


@pytest.mark.parametrize("overlap", ["none", "full"])
def test_what_points_share_does_not_change_their_time(overlap):
    """Points of several spaces in turn, so that each meets what the others have left cached."""
    arch = attrs.evolve(MARS, name=overlap, overlap=overlap)
    spaces = [
        Space.of(graph, arch)
        for graph in (
            resnet18(0.05),
            vgg16(activation_bits=4),
            every_kind_of_layer(),
            network_of(7),
        )
    ]
    rng = random.Random(overlap)
    met: Counter[str] = Counter()
    for _ in range(6):
        for number, space in enumerate(spaces):
            point = space.default
            for index in rng.sample(range(len(point.steps)), min(3, len(point.steps))):
                point = space.drawn(rng, point, index, 0.3)
            try:
                found = space.time(point)
            except ScheduleError:
                continue
            region = generate(
                space.graph,
                arch,
                space.packed,
                space.realize(point),
                input_names=[entry.name for entry in space.graph.inputs],
                output_names=[out.value for out in space.graph.outputs],
                with_weights=False,
            )
            assert found == simulate(region, arch) == space.time(point)
            met[f"space {number}"] += 1
            met["with SYNC"] += any(isinstance(one, isa.Sync) for one in region.instructions)
    assert min(met[f"space {number}"] for number in range(len(spaces))) >= 2, met
    assert met["with SYNC"] >= 2, met


@pytest.mark.parametrize("name", MACHINES)
def test_the_default_schedule_is_a_point(name):
    for seed in range(60):
        graph = network_of(seed)
        try:
            space = Space.of(graph, MACHINES[name])
        except CapacityError:
            continue
        schedule = plan(graph, space.arch, space.packed)
        assert space.realize(space.default) == schedule
        assert space.legal(space.default) is None
        region = build_region(NamedGraph.of(graph), space.arch, with_weights=False)
        assert space.time(space.default) == simulate(region, space.arch)


@pytest.mark.parametrize("name", ["mars", "small", "full"])
def test_a_block_that_is_spread_over_the_cores_gives_the_codes(name):
    ran: Counter[str] = Counter()
    for seed in range(40):
        graph = network_of(seed)
        try:
            space = Space.of(graph, MACHINES[name])
        except CapacityError:
            continue
        changes = {"chained": True, "row_groups": 1}
        steps = tuple(
            attrs.evolve(choice, **changes) if "chained" in space.domain(index) else choice
            for index, choice in enumerate(space.default.steps)
        )
        if steps == space.default.steps:
            continue
        codes = codes_of(graph, seed)
        ran[
            run_point(
                space, Point(steps, space.default.unfused), codes, evaluate_values(graph, codes)
            )
        ] += 1
    assert ran["moved"] >= 6, ran


def test_kernel_blocks_are_cut_into_equal_parts():
    """A block of 18 group-sets, at most 8 a load: three of 6, each in a load of its own."""
    space = Space.of(every_kind_of_layer(), MARS)
    layer = space.graph.layers[0]
    loads = space.loads(layer, attrs.evolve(space.default.steps[0], most=8, row_groups=1))
    parts = [piece for load in loads for piece in load.cores[0]]
    assert parts[0].total == 18 and [part.group_sets for part in parts] == [6, 6, 6]


def test_loads_that_are_filled_together_open_the_arrays_once():
    space = Space.of(every_kind_of_layer(), attrs.evolve(MARS, weight_groups_per_partition=64))
    joined = Point(tuple(attrs.evolve(choice, join=True) for choice in space.default.steps))
    apart, together = (
        generate(
            space.graph,
            space.arch,
            space.packed,
            space.realize(point),
            input_names=["x0"],
            output_names=["y0"],
        )
        for point in (space.default, joined)
    )
    assert sum(type(one).__name__ == "Prepare" for one in apart.instructions) == 4
    assert sum(type(one).__name__ == "Prepare" for one in together.instructions) == 1
    saved = simulate(apart, space.arch).cycles - simulate(together, space.arch).cycles
    assert 0 < saved <= 3 * MARS.array_fill_cycles


REFUSALS = [
    ({"bank": 0, "tile": (99, 1)}, "a tile of 99x1"),
    ({"row_groups": 9}, "9 groups of 4 cores"),
    ({"block_tile": 9}, "9 channel blocks of 2"),
    ({"chained": True}, "a chain of one kernel block, not 2"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals_name_the_layer_and_the_reason(changes, message):
    space = Space.of(every_kind_of_layer(), MARS)
    point = attrs.evolve(
        space.default,
        steps=(attrs.evolve(space.default.steps[0], **changes), *space.default.steps[1:]),
    )
    reason = space.legal(point)
    assert reason is not None and message in reason
    assert reason.startswith("conv0: ")


def test_loads_ahead_of_what_the_macros_hold_are_refused():
    space = Space.of(every_kind_of_layer(), attrs.evolve(MARS, weight_groups_per_partition=20))
    point = Point(tuple(attrs.evolve(choice, fill_lead=3) for choice in space.default.steps))
    assert "macro slots of 20 are wanted beside" in str(space.legal(point))


def test_choices_for_other_steps_are_refused():
    space = Space.of(every_kind_of_layer(), MARS)
    assert "choices for" in str(space.legal(Point(space.default.steps[:-1])))
