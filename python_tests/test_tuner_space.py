"""The space of schedules: every point gives the same codes, timed as the machine times it."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, MarsArch, Region, isa, simulate
from mars_runtime.errors import CapacityError
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.random_graphs import random_inputs
from python_tests.small_networks import every_kind_of_layer, overlapping, pooled_convs
from python_tests.test_machine import (
    MACHINES,
    assert_conserved,
    assert_macs,
    execute,
    network_of,
    total,
)
from tvm_mars.codegen import generate
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.graph import (
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Output,
    Pool,
    Requant,
    evaluate_values,
)
from tvm_mars.networks import resnet18, vgg16
from tvm_mars.schedule import DEALINGS, HALOS, Point, ScheduleError, plan, scheduled_steps
from tvm_mars.tuner.bound import least_cycles
from tvm_mars.tuner.space import Space, replaced
from tvm_mars.tuner.staggering import staggered
from tvm_mars.tuner.starts import bordered as bordered_start
from tvm_mars.tuner.starts import starts, uniform

MARS = PRESETS["mars"]
NETWORKS = 200
CHUNK = 20
TRIES = 4


def drawn_point(space: Space, rng: random.Random) -> Point:
    """Draw decisions of every step, the more the less likely the point is to be legal."""
    point = space.default
    for index in range(len(point.choices)):
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


def others(space: Space, point: Point) -> set[str]:
    """Name what is decided otherwise than by default of pools and of dealing kernel blocks."""
    found = set()
    for layer, choice, before in zip(
        space.graph.layers, point.choices, space.default.choices, strict=True
    ):
        if choice.fused != before.fused:
            found.add("pool")
        if isinstance(layer, Conv) and not choice.chained:
            plain = attrs.evolve(choice, dealing="heaviest")
            if space.loads(layer, choice) != space.loads(layer, plain):
                found.add(choice.dealing)
    return found


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
            for index in rng.sample(range(len(point.choices)), min(3, len(point.choices))):
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
        point = Point(
            tuple(
                attrs.evolve(choice, **changes) if "chained" in space.domain(index) else choice
                for index, choice in enumerate(space.default.choices)
            )
        )
        if point == space.default:
            continue
        codes = codes_of(graph, seed)
        ran[run_point(space, point, codes, evaluate_values(graph, codes))] += 1
    assert ran["moved"] >= 6, ran


def cut_kinds(space: Space, point: Point) -> set[str]:
    """Name what the layers with a cut border have, besides."""
    found: set[str] = set()
    schedule = space.realize(point)
    steps = scheduled_steps(space.graph, schedule)
    for step, entry in zip(steps, schedule.layers, strict=True):
        if not (entry.row_cuts or entry.column_cuts):
            continue
        layer, out = step.layer, space.graph.types[step.output]
        assert isinstance(layer, Conv)
        tests = {
            "columns": entry.column_cuts,
            "stride": any(max(term.stride) > 1 for term in layer.terms),
            "dilation": any(max(term.dilation) > 1 for term in layer.terms),
            "fused pool": step.pool,
            "projection": len(layer.terms) > 1,
            "residual": layer.residual,
            "row groups": entry.row_groups > 1,
            "chained": entry.chained,
            "apart": entry.apart,
            "sums in a bank": entry.partial == "bank",
            "sums off-chip": entry.partial == "offchip",
            "tiles": entry.tile != (out.height, out.width),
            "tiles outside": entry.order == "tiles" and len(entry.loads) > 1,
            "staged input": any(entry.staged),
            "staged output": entry.output_staged,
        }
        found |= {name for name, holds in tests.items() if holds}
    return found


BORDER_CHUNKS = 6
IN_EVERY_CHUNK = {
    "columns",
    "stride",
    "row groups",
    "residual",
    "staged input",
    "sums in a bank",
    "chained",
    "tiles",
}


@pytest.mark.parametrize("chunk", range(BORDER_CHUNKS))
def test_borders_that_pass_over_padding_give_the_codes(chunk, first_seed):
    """Borders cut wherever they can be, beside random decisions; all kinds of layers have some."""
    tried, kinds = Counter[str](), Counter[str]()
    skipped = 0
    for seed in range(first_seed + 30 * chunk, first_seed + 30 * (chunk + 1)):
        graph = network_of(seed)
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        names = list(MACHINES)
        for name in (names[seed % len(names)], "mars", "small"):
            try:
                space = Space.of(graph, MACHINES[name])
            except CapacityError:
                continue
            rng = random.Random(f"{name} {seed}")
            for _ in range(2):
                point = bordered(space, drawn_point(space, rng), rng)
                if all(choice.border == "whole" for choice in point.choices):
                    continue
                tried[found := run_point(space, point, codes, values)] += 1
                if found != "refused":
                    kinds.update(cut_kinds(space, point))
                    layers = space.time(point).layers
                    skipped += sum(layer.counters.passed_over for layer in layers)
    assert tried["moved"] >= 20 and skipped, tried
    assert set(kinds) >= IN_EVERY_CHUNK, kinds


def bordered(space: Space, point: Point, rng: random.Random) -> Point:
    for index in range(len(point.choices)):
        domain = space.domain(index)
        border = rng.choice(domain.get("border", ("whole",))[-2:])
        chain = "chained" in domain and rng.random() < 0.3
        changes = {"chained": True, "row_groups": 1, "partial": "bank"} if chain else {}
        point = replaced(point, index, border=border, **changes)
    return point


@pytest.mark.parametrize("name", ["mars", "small", "full", "one"])
def test_a_border_behind_a_fused_pool(name):
    """3x3 with two pixels of padding, 2x2 pool: both rows of the first window miss the first tap.

    By hand: of eight rows six meet the first tap row, eight the second, six the third. So columns.
    """
    rng = np.random.default_rng(3)
    kind = MapType(32, 6, 6, 8)
    weight = rng.integers(-30, 31, (48, 32, 3, 3))
    weight[weight == 0] = 1
    term = ConvTerm("x0", weight, padding=(2, 2, 2, 2))
    layers = [
        Conv("conv0", [term], rng.integers(-4000, 4000, 48), Requant.eq5(8, 17)),
        Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)),
    ]
    output = Output("maxpool1", (48, 4, 4), Dequantize("uint8"))
    graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [output])
    space = Space.of(graph, MACHINES[name])
    codes = codes_of(graph, 1)
    for border, met in (("whole", 24 * 24), ("rows", 20 * 24), ("both", 20 * 20)):
        point = replaced(space.default, 0, border=border)
        assert run_point(space, point, codes, evaluate_values(graph, codes)) != "refused"
        assert space.time(point).layers[0].counters.group_sets == 3 * 2 * met


def test_a_border_is_a_choice_where_it_meets_fewer_taps():
    """3x3 over 6x6 with padding; a pool's window meets all taps; a zero point is no zero."""
    borders = {}
    for zero, pool, kernel in ((0, False, 3), (0, True, 3), (4, False, 3), (0, False, 1)):
        kind = MapType(16, 6, 6, 8, zero)
        pad = (kernel // 2,) * 4
        term = ConvTerm("x0", np.ones((16, 16, kernel, kernel), np.int8), padding=pad)
        layers = [Conv("conv0", [term], np.zeros(16), Requant.eq5(8, 12))]
        if pool:
            layers.append(Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)))
        size = 3 if pool else 6
        output = Output(layers[-1].name, (16, size, size), Dequantize("uint8"))
        graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [output])
        space = Space.of(graph, MARS)
        borders[zero, pool, kernel] = space.decisions(space.default, 0).get("border")
        if pool:  # left on its own, it leaves the convolution's border to be cut
            apart = replaced(space.default, 1, fused=False)
            assert space.decisions(apart, 0)["border"] == ("whole", "rows", "both")
        dense = Space.of(graph, PRESETS["mars-dense"])
        assert dense.domain(0)["border"] == ("whole",)
    assert borders == {
        (0, False, 3): ("whole", "rows", "both"),
        (0, True, 3): None,
        (4, False, 3): None,
        (0, False, 1): None,
    }


# -- fetching for one core while the others compute ------------------------------------------------


def hidden(region: Region, arch: MarsArch) -> int:
    """Give the cycles in which weights are fetched while some core computes."""
    events = simulate(region, arch, trace=True).events
    computes = [one for one in events if one.lane.endswith("compute")]
    found = 0
    for event in events:
        if event.name == "FETCH weight":
            busy = np.zeros(event.end - event.start, bool)
            for one in computes:
                busy[max(0, one.start - event.start) : max(0, one.end - event.start)] = True
            found += int(busy.sum())
    return found


@pytest.mark.parametrize("name", ["mars", "prefetch", "full", "small", "one"])
def test_cores_that_are_fetched_for_in_turn_give_the_codes(name, first_seed):
    """Every layer leaves some group-sets fetched, beside random decisions."""
    ran, behind = Counter[str](), 0
    for seed in range(first_seed, first_seed + 24):
        graph = network_of(seed)
        try:
            space = Space.of(graph, MACHINES[name])
        except CapacityError:
            continue
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        rng = random.Random(f"{name} {seed}")
        for _ in range(2):
            point = drawn_point(space, rng)
            for index, layer in enumerate(graph.layers):
                if isinstance(layer, Conv):
                    point = replaced(point, index, fetch_depth=rng.choice((1, 3, 8, 24, 200)))
            ran[found := run_point(space, point, codes, values)] += 1
            if found != "refused":
                schedule = space.realize(point)
                region = build_region(
                    NamedGraph.of(graph), space.arch, scheduler=lambda *_, s=schedule: s
                )
                behind += hidden(region, space.arch)
    assert ran["moved"] >= 12, ran
    assert (behind > 0) == (name != "one"), behind


def test_a_core_stands_still_for_its_own_weights_alone():
    """Two dense layers that do not fit the arrays together, the first in four tiles.

    By hand: the second's 36 group-sets a core take the port 16 cycles each, as long as they are
    filled, so that the port is never free meanwhile. Fetched for all cores before the first layer
    computes, the last waits for 4 x 576 cycles; in turn, each for its own 576. Tables come on top,
    and the last FILL before leaves the port free.
    """
    rng = np.random.default_rng(0)
    kind = MapType(16, 16, 16, 8)
    shapes = [(64, 16, 1, 1), (64, 64, 3, 3), (64, 64, 3, 3)]
    layers = [
        Conv(
            f"conv{number}",
            [ConvTerm(source, rng.integers(1, 100, shape), padding=(shape[2] // 2,) * 4)],
            np.zeros(64),
            Requant.eq5(8, 17),
        )
        for number, (source, shape) in enumerate(zip(("x0", "conv0", "conv1"), shapes, strict=True))
    ]
    output = Output("conv2", (64, 16, 16), Dequantize("uint8"))
    graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [output])
    arch = attrs.evolve(MARS, macro_write_bits=128, array_fill_cycles=0)
    space = Space.of(graph, arch)
    tiles = replaced(space.default, 1, tile=(4, 16))
    points = [tiles, replaced(tiles, 2, fetch_lead=1), replaced(tiles, 1, fetch_depth=36)]
    codes = codes_of(graph, 0)
    values = evaluate_values(graph, codes)
    assert {run_point(space, point, codes, values) for point in points} == {"moved"}
    alone, together, in_turn = (space.time(point).layers[1].cycles for point in points)
    fetch = 36 * 16
    assert together - alone == pytest.approx(4 * fetch, rel=0.05)
    assert in_turn - alone == pytest.approx(fetch, rel=0.05)


def test_what_the_port_lacks_is_fetched_ahead():
    """At 32 bit the arrays take longer than the port: nothing is to be gained. At 128 bit it is."""
    for bits in (32, 128):
        space = Space.of(vgg16(activation_bits=4), attrs.evolve(MARS, macro_write_bits=bits))
        point = bordered_start(space, uniform(space, {"join": True, "most": 24, "chunk": 4}))
        found = staggered(space, point)
        assert (found == point) == (bits == 32)
        if bits == 128:
            before, after = space.time(point), space.time(found)
            assert after.cycles < 0.95 * before.cycles
            fetched = [total(time.layers).fetched_bits for time in (before, after)]
            assert fetched[0] == fetched[1]


def halo_kinds(space: Space, point: Point) -> set[str]:
    """Name what the layers have whose windows are rings of rows, and which of them turn."""
    found: set[str] = set()
    schedule = space.realize(point)
    region = build_region(NamedGraph.of(space.graph), space.arch, scheduler=lambda *_: schedule)
    steps = scheduled_steps(space.graph, schedule)
    for step, entry, layer in zip(steps, schedule.layers, region.layers, strict=True):
        if entry.halo == "reload":
            continue
        code = region.instructions[layer.start : layer.stop]
        if not any(isinstance(one, isa.Sas) and one.row for one in code):
            continue
        axes, out = step.layer, space.graph.types[step.output]
        conv = axes if isinstance(axes, Conv) else None
        terms = conv.terms if conv else ()
        tests = {
            "pool": isinstance(axes, Pool),
            "blocks of a pool in turn": isinstance(axes, Pool) and entry.block_tile < out.blocks,
            "stride": any(term.stride[0] > 1 for term in terms),
            "dilation": any(term.dilation[0] > 1 for term in terms),
            "fused pool": step.pool,
            "residual": conv and conv.residual,
            "residual over several loads": conv
            and conv.residual
            and entry.order == "tiles"
            and len(entry.loads) > 1,
            "four bits": any(space.graph.types[name].bits == 4 for name in axes.inputs),
            "padding": any(term.padding[0] for term in terms),
            "smaller tile": out.height % entry.tile[0],
            "tiles outside": entry.order == "tiles" and len(entry.loads) > 1,
            "loads outside": entry.order == "loads" and len(entry.loads) > 1,
            "row groups": entry.row_groups > 1,
            "borders": entry.row_cuts,
            "staged output": entry.output_staged,
        }
        found |= {name for name, holds in tests.items() if holds}
    return found


HALO_CHUNKS = 4
HALO_SEEDS = 80


def kept_and_reloaded(
    space: Space,
    keep: Point,
    reload: Point,
    codes: dict[str, np.ndarray],
    values: dict[str, np.ndarray],
) -> set[str]:
    """Execute a point with halos kept and without; name what the layers have that keep some."""
    assert "refused" not in [run_point(space, one, codes, values) for one in (keep, reload)]
    moved, again = (total(space.time(one).layers) for one in (keep, reload))
    assert moved.map_in_bits < again.map_in_bits
    # What is computed and what is read stay as they are.
    assert moved.map_reads == again.map_reads
    assert moved.macro_accesses == again.macro_accesses
    return halo_kinds(space, keep)


@pytest.mark.parametrize("chunk", range(HALO_CHUNKS))
def test_rows_that_windows_share_stay_or_are_moved_in_again(chunk, first_seed):
    """Both on each drawn point, on machines whose banks force strips: same codes, fewer words."""
    tried, kinds = Counter[str](), Counter[str]()
    first = first_seed + HALO_SEEDS * chunk
    for seed in range(first, first + HALO_SEEDS):
        graph = network_of(seed)
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        for name in ("tiny", ("small", "one", "prefetch")[seed % 3]):
            try:
                space = Space.of(graph, MACHINES[name])
            except CapacityError:
                continue
            rng = random.Random(f"{name} {seed}")
            open_ = [i for i in range(len(graph.layers)) if "halo" in space.domain(i)]
            for _ in range(3 if open_ else 0):
                point = drawn_point(space, rng)
                keep, reload = (
                    Point(tuple(attrs.evolve(choice, halo=halo) for choice in point.choices))
                    for halo in HALOS[::-1]
                )
                if space.legal(keep) or space.realize(keep) == space.realize(reload):
                    continue
                tried["both"] += 1
                kinds.update(kept_and_reloaded(space, keep, reload, codes, values))
    assert tried["both"] >= 10, tried
    assert set(kinds) >= {"padding", "staged output", "four bits", "smaller tile"}, kinds


def test_rings_of_every_kind_of_window(first_seed):
    """Every map off-chip, every layer in strips of any height; otherwise random decisions."""
    arch = attrs.evolve(MARS, cores=2, weight_groups_per_partition=40, array_fill_cycles=20)
    ran = 0
    kinds = Counter[str]()
    for seed in range(first_seed, first_seed + 60):
        graph = overlapping(seed)
        space = Space.of(graph, attrs.evolve(arch, overlap=("none", "full")[seed % 2]))
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        rng = random.Random(seed)
        for _ in range(2):
            point = drawn_point(space, rng)
            for index, layer in enumerate(graph.layers):
                out = graph.types[layer.name]
                height = rng.randint(1, max(1, out.height // 2))
                blocks = rng.randint(1, out.blocks)
                groups = min(height, point.choices[index].row_groups)
                point = replaced(
                    point,
                    index,
                    tile=(height, out.width),
                    staged=True,
                    block_tile=blocks,
                    row_groups=groups,
                    halo="keep",
                )
            if space.legal(point):
                continue
            reload = Point(tuple(attrs.evolve(one, halo="reload") for one in point.choices))
            kinds.update(kept_and_reloaded(space, point, reload, codes, values))
            ran += 1
    assert ran >= 50, ran
    every = {"pool", "blocks of a pool in turn", "stride", "dilation", "fused pool", "residual"}
    every |= {"four bits", "padding", "smaller tile", "tiles outside", "loads outside"}
    every |= {"row groups", "borders", "staged output", "residual over several loads"}
    assert all(kinds[name] >= 3 for name in every), kinds


def strips(height: int, kernel: int, stride: int, dilation: int, padding: int, channels: int = 16):
    """Give a network of one layer without a second column of taps, over a map of 5 columns."""
    kind = MapType(16, height, 5, 8)
    rng = np.random.default_rng(height)
    weight = rng.integers(1, 30, (channels, 16, kernel, 1))
    vertical = {"stride": (stride, 1), "padding": (padding, 0, padding, 0)}
    term = ConvTerm("x0", weight, dilation=(dilation, 1), **vertical)
    layer = Conv("conv0", [term], rng.integers(-4000, 4000, channels), Requant.eq5(8, 18))
    rows = (height + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    output = Output("conv0", (channels, rows, 5), Dequantize("uint8"))
    return Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], [layer], [output])


@pytest.mark.parametrize(
    ("shape", "tile", "loads", "kept", "again"),
    [
        # 3 rows of taps, padding 1, 24 rows, 6 a tile: 0-6, 5-12, 11-18, 17-23. Kept: 0-7, then
        # six, six and four.
        ((24, 3, 1, 1, 1), 6, 1, 8 + 6 + 6 + 4, 7 + 8 + 8 + 7),
        # 10 rows, the last tile has two: 0-4, 3-8, 7-9. A ring of six: 0-5, 3-8, 4-9.
        ((10, 3, 1, 1, 1), 4, 1, 6 + 3 + 1, 5 + 6 + 3),
        # 7 rows of taps, two rows apart, padding 3: 0-9, 5-17, 13-23.
        ((24, 7, 2, 1, 3), 4, 1, 13 + 5 + 6, 10 + 13 + 11),
        # No padding, and row 23 meets nothing: 0-8, 8-16, 16-22.
        ((24, 3, 2, 1, 0), 4, 1, 9 + 8 + 6, 9 + 9 + 7),
        # Taps two rows apart: 0-5, 2-9, 6-11.
        ((12, 3, 1, 2, 2), 4, 1, 8 + 2 + 2, 6 + 8 + 6),
        # The second load begins where the first has left 4-9: 0-3, then 6-8 and 9.
        ((10, 3, 1, 1, 1), 4, 2, 6 + 3 + 1 + 4 + 3 + 1, 2 * (5 + 6 + 3)),
        # Windows of two tiles share nothing: nothing to keep.
        ((24, 1, 1, 1, 0), 6, 1, 24, 24),
    ],
)
def test_rows_are_moved_in_as_counted_by_hand(shape, tile, loads, kept, again):
    graph = strips(*shape, channels=16 * loads)
    arch = attrs.evolve(MARS, cores=1, weight_groups_per_partition=shape[1])
    space = Space.of(graph, arch)
    codes = codes_of(graph, 1)
    for halo, rows in (("keep", kept), ("reload", again)):
        point = replaced(space.default, 0, tile=(tile, 5), order="loads", halo=halo)
        assert len(space.realize(point).layers[0].loads) == loads
        assert run_point(space, point, codes, evaluate_values(graph, codes)) != "refused"
        # Two nibble planes of one channel block, five columns of 64 bits.
        assert space.time(point).layers[0].counters.map_in_bits == 64 * 5 * 2 * rows


def test_keeping_rows_is_a_choice_where_windows_of_strips_share_them():
    """On `mars` the map is one tile, with small banks it is strips; columns share no rows."""
    graph = strips(24, 3, 1, 1, 1)
    small = attrs.evolve(MARS, bank_bits=64 * 5 * 2 * 16)
    space = Space.of(graph, small)
    assert space.default.choices[0].tile[0] < 24
    assert space.domain(0)["halo"] == HALOS and space.default.choices[0].halo == "keep"
    assert space.decisions(space.default, 0)["halo"] == HALOS
    assert "halo" not in space.decisions(replaced(space.default, 0, tile=(1, 3)), 0)
    assert "halo" not in Space.of(graph, MARS).domain(0)
    assert "halo" not in Space.of(strips(24, 1, 1, 1, 0), small).domain(0)
    columns = replaced(space.default, 0, tile=(1, 3), row_groups=1)
    same = [replaced(columns, 0, halo=halo) for halo in HALOS]
    assert space.realize(same[0]) == space.realize(same[1])


@pytest.mark.parametrize("name", ["mars", "prefetch", "full", "small"])
def test_pools_fused_or_not_and_every_dealing_give_the_codes(name, first_seed):
    """Each of these decisions alone, on every layer that has it; and any of them among others."""
    ran: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 6):
        graph = pooled_convs(seed)
        space = Space.of(graph, MACHINES[name])
        rng = random.Random(f"{name} {seed}")
        places = [
            (index, decision, value)
            for index in range(len(graph.layers))
            for decision in ("fused", "dealing")
            for value in space.domain(index).get(decision, ())
        ]
        points = [replaced(space.default, index, **{one: value}) for index, one, value in places]
        for _ in range(8):
            point = drawn_point(space, rng)
            for index, decision, value in rng.sample(places, len(places) // 2):
                point = replaced(point, index, **{decision: value})
            points.append(point)
        codes = codes_of(graph, seed)
        values = evaluate_values(graph, codes)
        for number, point in enumerate(points):
            if run_point(space, point, codes, values) == "moved":
                ran.update(others(space, point))
                ran["among others"] += number >= len(places) and len(others(space, point)) > 1
    assert ran["pool"] >= 12 and ran["among others"] >= 3, ran
    assert all(ran[dealing] >= 3 for dealing in DEALINGS[1:]), ran


def test_a_fused_pool_decides_about_the_map_that_both_write():
    """Alone, the convolution writes its own map, where the schedule without fusing has it."""
    graph = every_kind_of_layer()
    space = Space.of(graph, MARS)
    conv, pool = (graph.layers[index].name for index in (0, 1))
    default, apart = space.default, replaced(space.default, 1, fused=False)
    assert space.writer(default, 0) == 1 and space.writer(apart, 0) == 0
    assert {"tile", "staged", "bank"} <= set(space.decisions(apart, 0))
    assert not {"tile", "staged", "bank"} & set(space.decisions(default, 0))
    assert "block_tile" in space.domain(1) and "block_tile" not in space.decisions(default, 1)
    steps = [(entry.layer, entry.output) for entry in space.realize(default).layers]
    assert steps[0] == (conv, pool)
    steps = [(entry.layer, entry.output) for entry in space.realize(apart).layers]
    assert steps[:2] == [(conv, conv), (pool, pool)]


def test_kernel_blocks_are_cut_into_equal_parts():
    """A block of 18 group-sets, at most 8 a load: three of 6, each in a load of its own."""
    space = Space.of(every_kind_of_layer(), MARS)
    layer = space.graph.layers[0]
    loads = space.loads(layer, attrs.evolve(space.default.choices[0], most=8, row_groups=1))
    parts = [piece for load in loads for piece in load.cores[0]]
    assert parts[0].total == 18 and [part.group_sets for part in parts] == [6, 6, 6]


def test_loads_that_are_filled_together_open_the_arrays_once():
    space = Space.of(every_kind_of_layer(), attrs.evolve(MARS, weight_groups_per_partition=64))
    joined = Point(tuple(attrs.evolve(choice, join=True) for choice in space.default.choices))
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


def test_arrays_that_are_not_filled_whole_are_the_first():
    """Another load would not fit beside what any array but the first is filled with."""
    space = Space.of(vgg16(activation_bits=4), MARS)
    point = Point(tuple(attrs.evolve(choice, join=True) for choice in space.default.choices))
    filled: list[list[int]] = []
    for entry in space.realize(point).layers:
        for load, ahead in zip(
            entry.loads, entry.fill_ahead or [0] * len(entry.loads), strict=True
        ):
            size = max(load.group_sets(core) for core in load.active)
            if ahead:
                filled[-1].append(size)
            else:
                filled.append([size])
    assert len(filled) > 4
    for before, after in itertools.pairwise(filled):
        assert sum(after) <= MARS.group_sets_per_core < before[-1] + sum(after)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ("low", [0, 0, 0, 0, 0]),
        ("next", [0, 20, 40, 0, 20]),
        # Where slots are alike, those at an end of the array.
        ("oldest", [0, 44, 20, 0, 44]),
    ],
)
def test_loads_take_the_slots_that_are_asked_for(slots, expected):
    """Five loads of 20 group-sets on each core, in arrays of 64."""
    weight = np.ones((20 * 16, 20 * 16, 1, 1), np.int8)
    kind = MapType(20 * 16, 1, 1, 8)
    graph = Graph(
        [Input("x0", kind, kind.shape, Quantize("uint8"))],
        [Conv("conv0", [ConvTerm("x0", weight)], np.zeros(20 * 16), Requant.eq5(8, 16))],
        [Output("conv0", kind.shape, Dequantize("uint8"))],
    )
    space = Space.of(graph, attrs.evolve(MARS, overlap="full"))
    point = replaced(space.default, 0, most=20, chunk=32, slots=slots)
    region = generate(
        graph,
        space.arch,
        space.packed,
        space.realize(point),
        input_names=["x0"],
        output_names=["y0"],
    )
    fills = [one for one in region.instructions if isinstance(one, isa.Fill) and not one.core]
    assert [fill.count for fill in fills] == [20] * 5
    assert [fill.slot for fill in fills] == expected


@pytest.mark.parametrize(("make", "bits"), [(vgg16, 4), (lambda **k: resnet18(0.05, **k), 8)])
def test_starts_come_within_a_twentieth_of_the_bound(make, bits):
    space = Space.of(make(activation_bits=bits), attrs.evolve(MARS, overlap="full"))
    best = min(space.time(point).cycles for point in starts(space))
    assert least_cycles(space.graph, space.arch, space.packed) >= 0.95 * best


REFUSALS = [
    (1, {"bank": 0, "tile": (99, 1)}, "a tile of 99x1"),
    (0, {"row_groups": 9}, "9 groups of 4 cores"),
    (0, {"block_tile": 9}, "9 channel blocks of 2"),
    (0, {"chained": True}, "a chain of one kernel block, not 2"),
    (0, {"fused": True}, "nothing before it can do it while writing"),
]


@pytest.mark.parametrize(("index", "changes", "message"), REFUSALS)
def test_refusals_name_the_layer_and_the_reason(index, changes, message):
    space = Space.of(every_kind_of_layer(), MARS)
    reason = space.legal(replaced(space.default, index, **changes))
    assert reason is not None and message in reason
    assert reason.startswith("conv0: ")


def test_loads_ahead_of_what_the_macros_hold_are_refused():
    space = Space.of(every_kind_of_layer(), attrs.evolve(MARS, weight_groups_per_partition=20))
    point = Point(tuple(attrs.evolve(choice, fill_lead=3) for choice in space.default.choices))
    assert "macro slots of 20 are wanted beside" in str(space.legal(point))


def test_choices_for_other_layers_are_refused():
    space = Space.of(every_kind_of_layer(), MARS)
    assert "choices for" in str(space.legal(Point(space.default.choices[:-1])))
