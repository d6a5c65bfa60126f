"""The machine: code for code the reference, its time worked out by hand, its refusals."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, Machine, MarsArch, isa, simulate
from mars_runtime.errors import (
    CapacityError,
    HazardError,
    MachineError,
    MemoryAccessError,
    PoisonError,
)
from mars_runtime.maps import MapType
from mars_runtime.packing import pack_group_sets, pack_parameters
from mars_runtime.program import InputPort, LayerInfo, OutputPort, Region
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.timeline import Timeline
from python_tests.random_graphs import FOCI, events, features, random_graph, random_inputs
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import Conv, Graph, Pool, evaluate_values
from tvm_mars.schedule import Schedule, fuse_pools, plan
from tvm_mars.schedule.plan import input_windows

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

    def __init__(self, region: Region, arch: MarsArch, images: int) -> None:
        super().__init__(region, arch, images)
        self.instruction_ends: list[int] = []

    def audit(self) -> None:
        """Assert what must hold of memories and counters after a run."""
        counters = total(self.layers)
        memory = self.memory
        assert memory is not None
        for cells in memory.bank_cells:
            written = cells.ready >= 0
            # A word that is used was written before; nothing is used after the end.
            assert not (cells.busy > 0)[~written].any()
            assert cells.ready.max() <= self.now and cells.busy.max() <= self.now
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


def assert_macs(timeline: Timeline, region: Region, graph: Graph, arch: MarsArch) -> None:
    """MACs executed are the packed ones times pixels, however tiles and loads cut them."""
    packed = pack(graph, arch)
    for step, layer, info in zip(fuse_pools(graph), timeline.layers, region.layers, strict=True):
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
        assert layer.counters.macs(arch) == one.group_sets * 256 * height * width
        accesses = sum(
            arch.accesses(graph.types[step.layer.terms[term].input].bits)
            for block in one.blocks
            for term in block.terms
        )
        assert layer.macro_cycles == accesses * height * width
        assert layer.counters.macro_accesses == arch.macros_per_core * layer.macro_cycles


def assert_weights_fetched_once(timeline: Timeline, region: Region, schedule: Schedule) -> None:
    """Where the schedule passes the loads once, off-chip bits are the stored ones exactly."""
    once = all(
        entry.order == "loads" or len(entry.loads) <= 1 or len(list(_tiles(entry, region))) == 1
        for entry in schedule.layers
    )
    if once:
        assert total(timeline.layers).fetched_bits == 8 * region.image_bytes


def _tiles(entry, region):
    info = next(one for one in region.layers if one.name.split("+")[0] == entry.layer)
    return [
        one
        for one in region.instructions[info.start : info.stop]
        if isinstance(one, isa.Conv) and one.cores
    ][: 2 if len(entry.loads) == 1 else None][: len(entry.loads)]


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
    assert ran > CHUNK // 2
