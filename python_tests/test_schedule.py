"""Loads and the default schedule: everything once, within every memory."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, isa
from mars_runtime.errors import CapacityError
from mars_runtime.packing import block_parameter_bytes
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.random_graphs import random_graph
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Requant
from tvm_mars.schedule import DEALINGS, Step, make_loads, plan, smallest_tile

MARS = PRESETS["mars"]
MACHINES = {
    "mars": MARS,
    "mars-dense": PRESETS["mars-dense"],
    "small": attrs.evolve(
        MARS, index_sram_bits=256, parameter_sram_bits=2048, weight_groups_per_partition=7
    ),
    "two": attrs.evolve(MARS, cores=2, dual_4bit_cells=True, index_sram_bits=512),
}


@pytest.mark.parametrize("name", MACHINES)
def test_loads_hold_every_group_set_once_within_every_memory(name, first_seed):
    arch = MACHINES[name]
    for seed in range(first_seed, first_seed + 150):
        for number, packed in enumerate(pack(random_graph(seed), arch).values()):
            most = (0, 1, 3, 7, 16)[(seed + number) % 5]
            dealing = DEALINGS[seed % len(DEALINGS)]
            loads = make_loads(packed, arch, [2] * 8, most=most, dealing=dealing)
            held: dict[int, list[tuple[int, int]]] = {}
            core_of: dict[int, set[int]] = {}
            for load in loads:
                descriptors, codes = [0], [0]
                for core, pieces in enumerate(load.cores):
                    segments = 0
                    for piece in pieces:
                        held.setdefault(piece.block, []).append((piece.start, piece.stop))
                        core_of.setdefault(piece.block, set()).add(core)
                        assert piece.total == packed.blocks[piece.block].group_sets
                        block = packed.blocks[piece.block]
                        segments += len(block.segments(piece.start, piece.stop))
                    assert load.group_sets(core) <= (most or arch.slots(packed.weight_bits))
                    record = block_parameter_bytes(packed.multiplier is not None)
                    assert len(pieces) * record * 8 <= arch.parameter_sram_bits
                    descriptors.append(segments * isa.SEGMENT_BYTES)
                    codes.append(load.group_sets(core) * isa.CODE_BYTES)
                # Every core's codes begin behind the longest descriptor.
                assert (max(descriptors) + max(codes)) * 8 <= arch.index_sram_bits
            for number, block in enumerate(packed.blocks):
                pieces = held.pop(number)
                assert pieces[0][0] == 0 and pieces[-1][1] == block.group_sets
                assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
                assert len(core_of[number]) == 1  # a partial sum stays on its core
            assert not held


def test_segments_hold_64_group_sets_of_one_term_and_base():
    for seed in range(100):
        for packed in pack(random_graph(seed), MARS).values():
            for block in packed.blocks:
                keys = block.segment_keys()
                bounds = block.segments(0, block.group_sets)
                assert bounds[0][0] == 0 and bounds[-1][1] == block.group_sets
                for start, stop in bounds if block.group_sets else []:
                    assert 0 < stop - start <= 64 and len(np.unique(keys[start:stop], axis=0)) == 1


def test_cores_are_balanced_to_one_block(first_seed):
    for seed in range(first_seed, first_seed + 60):
        for packed in pack(random_graph(seed), MARS).values():
            work = [0] * MARS.cores
            for load in make_loads(packed, MARS, [2] * 8):
                for core in range(MARS.cores):
                    work[core] += load.group_sets(core)
            heaviest = max(block.group_sets for block in packed.blocks)
            assert max(work) - min(work) <= max(heaviest, len(packed.blocks))


DEALT = {
    "heaviest": [{0}, {2}, {6, 1, 5}, {7, 3, 4}],
    "snake": [{0, 5}, {2, 4}, {6, 1}, {7, 3}],
    "runs": [{0}, {1, 2}, {3, 4, 5}, {6, 7}],
}


@pytest.mark.parametrize("dealing", DEALINGS)
def test_kernel_blocks_are_dealt_as_asked(dealing):
    """Blocks of 9, 1, 8, 2, 1, 1, 6 and 4 group-sets; by hand."""
    sizes = (9, 1, 8, 2, 1, 1, 6, 4)
    weight = np.zeros((16 * len(sizes), 144, 1, 1), np.int8)
    for block, size in enumerate(sizes):
        weight[16 * block : 16 * block + 16, : 16 * size] = 1
    kind = MapType(144, 1, 1, 8)
    graph = Graph(
        [Input("x0", kind, kind.shape, Quantize("uint8"))],
        [Conv("conv0", [ConvTerm("x0", weight)], np.zeros(len(weight)), Requant.eq5(8, 16))],
        [Output("conv0", (len(weight), 1, 1), Dequantize("uint8"))],
    )
    (load,) = make_loads(pack(graph, MARS)["conv0"], MARS, [2], dealing=dealing)
    assert [{piece.block for piece in pieces} for pieces in load.cores] == DEALT[dealing]


def test_what_fits_no_bank_is_refused_naming_layer_and_words():
    """A dense layer over 1040 channels needs its whole input at once: 65 blocks, 2 planes."""
    graph = next(
        graph
        for graph in (random_graph(seed, focus="wide-input") for seed in range(50))
        if graph.types["x0"].channels == 1040 and graph.types["x0"].bits == 8
    )
    tiny = attrs.evolve(MARS, bank_bits=1024)
    with pytest.raises(CapacityError, match=r"conv0.*words.*enlarge bank_bits") as caught:
        build_region(NamedGraph.of(graph), tiny)
    assert (caught.value.need, caught.value.have) == smallest_tile(
        Step(graph.layers[0]), graph.types, tiny
    )
    assert smallest_tile(Step(graph.layers[0]), graph.types, MARS) is None


def test_schedule_prints_a_line_per_layer():
    graph = random_graph(4)
    schedule = plan(graph, MARS, pack(graph, MARS))
    lines = str(schedule).splitlines()
    assert len(lines) == len(schedule.layers) + 1 and lines[-1].startswith("spilled: ")
