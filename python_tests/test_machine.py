"""The machine: code for code the reference, its time worked out by hand, its refusals."""

from __future__ import annotations

import math
from collections import Counter

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, Machine, MarsArch, isa, simulate
from mars_runtime.errors import CapacityError, MachineError
from mars_runtime.memory import Cells
from mars_runtime.program import Region
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.timeline import Timeline
from python_tests.random_graphs import FOCI, events, features, random_graph, random_inputs
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import (
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate_values,
)
from tvm_mars.schedule import (
    LayerSchedule,
    Schedule,
    Step,
    fuse_pools,
    plan,
    scheduled_steps,
)
from tvm_mars.schedule.windows import input_windows

MARS = PRESETS["mars"]

#: Every preset, and machines whose memories force tiles, halos, spills and partial sums.
MACHINES: dict[str, MarsArch] = {
    **PRESETS,
    "prefetch": attrs.evolve(MARS, overlap="prefetch", bank_bits=32 * 1024),
    "full": attrs.evolve(MARS, overlap="full", bank_bits=64 * 1024, cores=2),
    "small": attrs.evolve(
        MARS,
        bank_bits=48 * 1024,
        index_sram_bits=256,
        parameter_sram_bits=2048,
        weight_sram_bits=4096,
        dual_4bit_cells=True,
    ),
    "tiny": attrs.evolve(MARS, bank_bits=16 * 1024, overlap="full", weight_groups_per_partition=16),
    "one": attrs.evolve(
        MARS,
        cores=1,
        weight_groups_per_partition=5,
        bank_bits=96 * 1024,
        array_fill_cycles=0,
        macro_latency_cycles=0,
        apw_latency_cycles=0,
        issue_cycles=7,
    ),
}

NETWORKS = 320
CHUNK = 20


# -- code for code ---------------------------------------------------------------------------------


def network_of(seed: int) -> Graph:
    """Every focus in turn, so that no feature hangs on the luck of a seed."""
    return random_graph(seed, focus=list(FOCI)[seed % len(FOCI)])


def execute(region: Region, arch: MarsArch, graph: Graph, codes: dict[str, np.ndarray]):
    machine = AuditedMachine(region, arch, images=len(next(iter(codes.values()))))
    for port, entry in enumerate(graph.inputs):
        machine.write_input(port, codes[entry.name])
    timeline = machine.run()
    outputs = [machine.read_output(port) for port in range(len(graph.outputs))]
    machine.audit()
    return outputs, timeline


class AuditedMachine(Machine):
    """Counts on its own what the memories' cells really see."""

    def audit(self) -> None:
        """Assert what must hold of memories and counters after a run."""
        counters = total(self.layers)
        memory = self.memory
        assert memory is not None
        for cells in memory.bank_cells:
            written = cells.ready > 0
            # A word that is used was written before; nothing is used after the end.
            assert not (cells.busy > 0)[~written].any()
            assert cells.ready.max() <= self.now + 1 and cells.busy.max() <= self.now
        code = self.region.instructions
        fetches = [one for one in code if isinstance(one, isa.Fetch)]
        moves = [one for one in code if isinstance(one, isa.Move)]
        assert counters.fetched_bits == 8 * sum(one.length for one in fetches)
        assert counters.instruction_bits == 8 * len(self.region.code)
        words = Counter[int]()
        for one in moves:
            words[one.direction] += one.words * one.rows * one.planes
        assert counters.map_in_bits == 64 * words[isa.MOVE_IN]
        assert counters.map_out_bits == 64 * words[isa.MOVE_OUT]


def total(layers):
    counters = type(layers[0].counters)()
    for layer in layers:
        counters.add(layer.counters)
    return counters


def assert_conserved(timeline: Timeline, arch: MarsArch) -> None:
    """Every cycle of every core is computing or has a cause."""
    spent = sum(layer.macro_cycles + sum(layer.stalls.values()) for layer in timeline.layers)
    assert spent == arch.cores * timeline.cycles
    assert sum(layer.cycles for layer in timeline.layers) == timeline.cycles
    assert all(count >= 0 for layer in timeline.layers for count in layer.stalls.values())


def assert_macs(
    timeline: Timeline,
    region: Region,
    graph: Graph,
    arch: MarsArch,
    schedule: Schedule | None = None,
) -> None:
    """MACs executed are the packed ones times pixels, however tiles and loads cut them.

    Left out are those whose tap meets padding alone in all pixels of a CONV.
    """
    packed = pack(graph, arch)
    schedule = schedule or plan(graph, arch, packed)
    steps = scheduled_steps(graph, schedule)
    rows = zip(steps, schedule.layers, timeline.layers, region.layers, strict=True)
    for step, entry, layer, info in rows:
        if not isinstance(step.layer, Conv):
            assert layer.counters.macs(arch) == layer.macro_cycles == 0
            continue
        kind = graph.types[step.layer.name]
        height, width = kind.height, kind.width
        if step.pool:  # rows and columns that the fused pool leaves out are not computed
            out = graph.types[step.pool.name]
            height, width = out.height * step.pool.kernel[0], out.width * step.pool.kernel[1]
        one = packed[step.layer.name]
        assert info.group_sets == one.group_sets
        counters = layer.counters
        assert counters.group_sets + counters.passed_over == one.group_sets * height * width
        places = Counter(
            (int(term), int(tap))
            for block in one.blocks
            for term, tap in zip(block.terms, block.taps, strict=True)
        )
        met = met_pixels(step, entry, graph, arch)
        assert counters.group_sets == sum(met[place] * count for place, count in places.items())
        assert counters.macs(arch) == counters.group_sets * 256
        bits = [graph.types[term.input].bits for term in step.layer.terms]
        assert layer.macro_cycles == sum(
            arch.accesses(bits[place[0]]) * met[place] * count for place, count in places.items()
        )
        assert layer.counters.macro_accesses == arch.macros_per_core * layer.macro_cycles


def met_pixels(
    step: Step, entry: LayerSchedule, graph: Graph, arch: MarsArch
) -> Counter[tuple[int, int]]:
    """Pixels that take accesses for each term and tap, by trying every pixel of every CONV."""
    found: Counter[tuple[int, int]] = Counter()
    (ph, pw), out = step.pooling, graph.types[step.output]
    for tile in entry.tiles(out):
        for share in entry.shares(tile, arch.cores):
            for part in entry.parts(tile, share):
                pixels = [
                    ((tile[0] + part.y) * ph + y, (tile[1] + part.x) * pw + x)
                    for y in range(part.height * ph)
                    for x in range(part.width * pw)
                ]
                for number, term in enumerate(step.layer.terms):
                    skips = arch.zero_skipping and not graph.types[term.input].zero_point
                    met = taps_that_meet(term, graph.types[term.input], pixels)
                    taps = range(math.prod(term.kernel))
                    # Sub-kernels share the mask of their 16 taps.
                    walked = {tap % 16 for tap in met} if skips else set(range(16))
                    found.update({(number, tap): len(pixels) for tap in taps if tap % 16 in walked})
    return found


def taps_that_meet(term: ConvTerm, source: MapType, pixels: list[tuple[int, int]]) -> set[int]:
    """Taps of a kernel that meet the map from any of some pixels."""
    return {
        r * term.kernel[1] + c
        for r in range(term.kernel[0])
        for c in range(term.kernel[1])
        if any(
            0 <= y * term.stride[0] + r * term.dilation[0] - term.padding[0] < source.height
            and 0 <= x * term.stride[1] + c * term.dilation[1] - term.padding[1] < source.width
            for y, x in pixels
        )
    }


def assert_weights_fetched(
    region: Region, schedule: Schedule, graph: Graph, arch: MarsArch
) -> None:
    """Weight bits off-chip are the stored ones, for each filling and group of cores once."""
    packed = pack(graph, arch)
    steps = scheduled_steps(graph, schedule)
    for step, entry, info in zip(steps, schedule.layers, region.layers, strict=True):
        if not isinstance(step.layer, Conv):
            continue
        one = packed[step.layer.name]
        tiles = len(list(entry.tiles(graph.types[step.output])))
        passes = tiles if entry.order == "tiles" else 1
        fetched = sum(
            fetch.length
            for fetch in region.instructions[info.start : info.stop]
            if isinstance(fetch, isa.Fetch) and fetch.memory == isa.MEMORY_WEIGHT
        )
        copies = passes * entry.row_groups
        assert fetched * 8 == copies * one.group_sets * 256 * one.weight_bits


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("chunk", range(NETWORKS // CHUNK))
def test_machine_agrees_with_the_reference(name, chunk, first_seed):
    arch = MACHINES[name]
    ran = 0
    for seed in range(first_seed + chunk * CHUNK, first_seed + (chunk + 1) * CHUNK):
        graph = network_of(seed)
        inputs = random_inputs(graph, seed, images=1 + seed % 2)
        codes = {
            entry.name: entry.quantize.apply(inputs[entry.name]).reshape(-1, *entry.type.shape)
            for entry in graph.inputs
        }
        values = evaluate_values(graph, codes)
        try:
            region = build_region(NamedGraph.of(graph), arch)
        except CapacityError:
            assert arch.bank_bits < MARS.bank_bits, f"seed {seed}"
            continue
        ran += 1
        outputs, timeline = execute(region, arch, graph, codes)
        for out, found in zip(graph.outputs, outputs, strict=True):
            np.testing.assert_array_equal(found, values[out.value], f"seed {seed}, {out.value}")
        assert simulate(region, arch) == timeline, f"seed {seed}"
        assert_conserved(timeline, arch)
        assert_macs(timeline, region, graph, arch)
        schedule = plan(graph, arch, pack(graph, arch))
        assert_weights_fetched(region, schedule, graph, arch)
    assert ran > CHUNK // 2


POOLS = [((2, 2), (10, 12)), ((2, 2), (9, 7)), ((3, 2), (11, 8)), ((1, 3), (5, 10))]


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("window", "size"), POOLS, ids=str)
def test_pools_fused_behind_a_convolution(name, window, size):
    """Max pools that the APW does while writing, rows and columns left over included."""
    rng = np.random.default_rng(size)
    for channels, stride, native in ((16, 1, True), (40, 1, False), (24, 2, False)):
        kind = MapType(channels, size[0] * stride, size[1] * stride, 8, 0 if native else 9)
        weight = rng.integers(-30, 31, (48, channels, 3, 3)) * (rng.random((1, 1, 3, 3)) < 0.7)
        term = ConvTerm("x0", weight, stride=(stride, stride), padding=(1, 1, 1, 1))
        scaled = Requant(rng.integers(2**19, 2**20, 48), [28], 8, 3, 3, 240)
        requant = Requant.eq5(8, 17) if native else scaled
        layers = [
            Conv("conv0", [term], rng.integers(-4000, 4000, 48), requant),
            Pool("maxpool1", "max", "conv0", window, window),
        ]
        images = Input("x0", kind, kind.shape, Quantize("uint8"))
        shape = (48, size[0] // window[0], size[1] // window[1])
        graph = Graph([images], layers, [Output("maxpool1", shape, Dequantize("uint8"))])
        assert fuse_pools(graph)[0].pool
        region = build_region(NamedGraph.of(graph), MACHINES[name])
        codes = {"x0": rng.integers(0, 256, (2, *kind.shape))}
        outputs, timeline = execute(region, MACHINES[name], graph, codes)
        np.testing.assert_array_equal(outputs[0], evaluate_values(graph, codes)["maxpool1"])
        assert_conserved(timeline, MACHINES[name])
        assert_macs(timeline, region, graph, MACHINES[name])


# -- coverage --------------------------------------------------------------------------------------


def test_the_networks_meet_what_they_should(first_seed):
    """At least ten hits of each over the networks above, on the machines that they run on."""
    hits = Counter[str]()
    for seed in range(first_seed, first_seed + NETWORKS):
        graph = network_of(seed)
        hits.update(features(graph))
        for name, count in events(graph, random_inputs(graph, seed, images=1 + seed % 2)).items():
            hits[name] += count > 0
        for name in ("prefetch", "tiny", "one"):
            hits.update(schedule_features(graph, MACHINES[name]))
    for name in (
        "over-64", "empty-block", "sub-kernels", "projection", "residual", "mixed-widths",
        "tie", "low", "high", "spill", "halo", "partial bank", "partial offchip", "tiles outside",
        "loads outside", "row groups", "depthwise", "grouped", "dilated", "strided", "zero-point",
        "per-channel", "raw", "overlapping-pool", "count-pad", "count-valid", "global-pool",
        "multi-input", "multi-output", "wide-input", "add", "all-zero",
    ):  # fmt: skip
        assert hits[name] >= 10, f"{name}: {hits[name]} of {dict(hits)}"


def schedule_features(graph: Graph, arch: MarsArch) -> set[str]:
    """Name what a graph's schedule holds."""
    try:
        schedule = plan(graph, arch, pack(graph, arch))
    except CapacityError:
        return set()
    found = {"spill"} if schedule.spills else set()
    for step, entry in zip(scheduled_steps(graph, schedule), schedule.layers, strict=True):
        if step.pool:
            found.add("fused pool")
        if entry.row_groups > 1:
            found.add("row groups")
        if any(load.splits for load in entry.loads):
            found.add(f"partial {entry.partial}")
        tiles = list(entry.tiles(graph.types[step.output]))
        if len(tiles) < 2:
            continue
        if len(entry.loads) > 1:
            found.add(f"{entry.order} outside")
        first, second = (input_windows(step, graph.types, tile)[0] for tile in tiles[:2])
        if entry.staged[0] and first.x == second.x and second.y < first.y + first.height:
            found.add("halo")
    return found


def test_every_word_written_to_a_bank_is_read():
    """A dense network without strides that skip pixels: nothing is computed or moved in vain."""
    graph = vgg_like()
    for bank_bits in (512, 64, 24):
        arch = attrs.evolve(MARS, bank_bits=bank_bits * 1024, weight_groups_per_partition=20)
        region = build_region(NamedGraph.of(graph), arch)
        machine = Machine(region, arch, images=1)
        assert machine.memory is not None
        banks = [UnreadCells(cells.name, len(cells.ready)) for cells in machine.memory.bank_cells]
        machine.memory.bank_cells = banks
        machine.write_input(0, np.ones((1, 16, 16, 16), np.uint8))
        machine.run()
        assert sum(cells.written for cells in banks) > 16 * 16 * 4
        assert [cells.wasted + int(cells.unread.sum()) for cells in banks] == [0, 0]


class UnreadCells(Cells):
    """Cells that know which words nothing has read since they were written."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(name, count)
        self.unread = np.zeros(count, bool)
        self.wasted = self.written = 0

    def read(self, cells, start, end, view):
        super().read(cells, start, end, view)
        view(self.unread)[cells] = False

    def check_read(self, ready, start):
        super().check_read(ready, start)
        base = ready.__array_interface__["data"][0] - self.ready.__array_interface__["data"][0]
        if 0 <= base < self.ready.nbytes:  # a view of the state: partial sums, residuals in place
            place = np.lib.stride_tricks.as_strided(
                self.unread[base // 8 :], ready.shape, [stride // 8 for stride in ready.strides]
            )
            place[...] = False

    def write(self, cells, start, end, view):
        super().write(cells, start, end, view)
        self.wasted += int(view(self.unread)[cells].sum())
        self.written += int(view(self.unread)[cells].size)
        view(self.unread)[cells] = True


def vgg_like() -> Graph:
    """Three dense 3x3 convolutions with a residual and a pool, all group-sets full."""
    rng = np.random.default_rng(3)
    kind = MapType(16, 16, 16, 8)
    same = (1, 1, 1, 1)

    def conv(number: int, source: str, given: int, channels: int, residual=None) -> Conv:
        weight = rng.integers(1, 9, (channels, given, 3, 3))
        term = ConvTerm(source, weight, padding=same)
        return Conv(f"conv{number}", [term], np.zeros(channels), Requant.eq5(8, 19), residual)

    layers = [
        conv(0, "x0", 16, 32),
        conv(1, "conv0", 32, 32, Residual("conv0", 2)),
        Pool("maxpool2", "max", "conv1", (2, 2), (2, 2)),
        conv(3, "maxpool2", 32, 48),
        Pool("avgpool4", "avg", "conv3", (8, 8), (1, 1), requant=Requant.eq5(8, 8)),
    ]
    images = Input("x0", kind, kind.shape, Quantize("uint8"))
    return Graph([images], layers, [Output("avgpool4", (48,), Dequantize("uint8"))])


def test_data_do_not_change_the_timeline():
    graph = vgg_like()
    region = build_region(NamedGraph.of(graph), MARS)
    rng = np.random.default_rng(0)
    timelines = []
    for images in (1, 3):
        machine = Machine(region, MARS, images=images)
        machine.write_input(0, rng.integers(0, 256, (images, 16, 16, 16)))
        timelines.append(machine.run())
    assert timelines[0] == timelines[1] == simulate(region, MARS)


def test_machine_without_data_says_so():
    region = build_region(NamedGraph.of(vgg_like()), MARS)
    with pytest.raises(MachineError, match="timeline"):
        Machine(region, MARS).read_output(0)
