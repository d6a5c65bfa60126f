"""The bound: below every schedule of random networks, reached where nothing else costs."""

from __future__ import annotations

import itertools
import random

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.test_machine import MACHINES, network_of
from python_tests.test_tuner_space import drawn_point
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Pool, Requant
from tvm_mars.schedule import ScheduleError
from tvm_mars.tuner.bound import least_cycles
from tvm_mars.tuner.space import Space, replaced

MARS = PRESETS["mars"]
FULL = attrs.evolve(MARS, overlap="full")


def convs(channels: list[int], kernel: int, size: int, bits: int = 8) -> Graph:
    """Dense convolutions one behind the other, every group-set of which is stored."""
    layers = []
    pad = (kernel // 2,) * 4
    for number, (before, after) in enumerate(itertools.pairwise(channels)):
        weight = np.ones((after, before, kernel, kernel), np.int8)
        term = ConvTerm(f"conv{number - 1}" if number else "x0", weight, padding=pad)
        layers.append(Conv(f"conv{number}", [term], np.zeros(after), Requant.eq5(bits, 20)))
    kind = MapType(channels[0], size, size, bits)
    out = Output(layers[-1].name, (channels[-1], size, size), Dequantize("uint8"))
    return Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [out])


def optimum(graph: Graph, arch: MarsArch) -> int:
    """Give the cycles of the best of all combinations of what matters to one layer."""
    space = Space.of(graph, arch)
    domain = space.domain(0)
    names = ("row_groups", "most", "chunk", "apart", "border")
    found = []
    for values in itertools.product(*(domain[name] for name in names)):
        point = replaced(space.default, 0, **dict(zip(names, values, strict=True)))
        if space.legal(point) is None:
            found.append(space.time(point).cycles)
    assert len(found) > 20
    return min(found)


@pytest.mark.parametrize("chunk", range(6))
def test_no_schedule_is_below_it(chunk, first_seed):
    """Random networks and points, also on a chip with overlap whose arrays are small."""
    machines = MACHINES | {"few": attrs.evolve(FULL, weight_groups_per_partition=8)}
    timed = 0
    for seed in range(first_seed + 50 * chunk, first_seed + 50 * (chunk + 1)):
        graph = network_of(seed)
        for name in (list(machines)[seed % len(machines)], "few"):
            try:
                space = Space.of(graph, machines[name])
            except CapacityError:
                continue
            least = least_cycles(graph, space.arch, space.packed)
            rng = random.Random(f"{name} {seed}")
            for point in (space.default, drawn_point(space, rng), drawn_point(space, rng)):
                try:
                    cycles = space.time(point).cycles
                except ScheduleError:
                    continue
                assert 0 < least <= cycles, (seed, name)
                timed += 1
    assert timed > 100


@pytest.mark.parametrize("overlap", ["none", "full"])
def test_it_is_reached_where_only_the_macros_cost_time(overlap):
    """Four kernel blocks, four input blocks, two accesses, 46 x 46 pairs of pixel and tap.

    Of 16 rows the first and the last tap row meet 15. 16,928 cycles a core.
    """
    free = {"array_fill_cycles": 0, "macro_write_bits": 2**20, "offchip_bits_per_cycle": 2**20}
    arch = attrs.evolve(MARS, overlap=overlap, **free)
    graph = convs([64, 64], 3, 16)
    least = least_cycles(graph, arch, Space.of(graph, arch).packed)
    assert 4 * 46 * 46 * 2 <= least <= 4 * 46 * 46 * 2 + 36
    assert optimum(graph, arch) <= 1.004 * least


def test_what_a_fused_pool_covers_is_computed_together():
    """By hand, 3x3 over 8x8 with padding: fused, every tap is met by all windows.

    On its own the pool reads 64 pixels of eight bits, 128 cycles. Of two taps, the first and the
    middle one, 7 x 7 and 8 x 8 pixels meet data: less is saved. Of nine taps 22 x 22: more is.
    """
    for taps, least in (([0, 4], 2 * 64 * 2), (range(9), 22 * 22 * 2 + 64 * 2)):
        kind = MapType(16, 8, 8, 8)
        weight = np.zeros((16, 16, 9), np.int8)
        weight[:, :, taps] = 1
        term = ConvTerm("x0", weight.reshape(16, 16, 3, 3), padding=(1, 1, 1, 1))
        layers = [
            Conv("conv0", [term], np.zeros(16), Requant.eq5(8, 20)),
            Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)),
        ]
        out = Output("maxpool1", (16, 4, 4), Dequantize("uint8"))
        graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [out])
        free = {"array_fill_cycles": 0, "macro_write_bits": 2**20, "offchip_bits_per_cycle": 2**20}
        one = attrs.evolve(FULL, cores=1, **free)
        assert (
            least_cycles(graph, one, Space.of(graph, one).packed) == least + 2
        )  # one is fetched and filled


def test_it_is_reached_where_only_filling_costs_time():
    """Sixteen kernel blocks of 16 group-sets on one pixel: 64 a core, filled in 4,096 cycles."""
    graph = convs([256, 256], 1, 1, bits=4)
    space = Space.of(graph, MARS)
    least = least_cycles(graph, MARS, space.packed)
    assert least == 1400 + 64 * 64 + 64
    assert optimum(graph, MARS) <= 1.03 * least


def test_with_full_overlap_a_layer_is_filled_behind_the_one_before():
    """By hand: 9 x 16 group-sets a layer, 36 a core; 64 pixels, one access.

    Of 8 x 8 pixels and 9 taps 22 x 22 pairs meet data: conv0 ends at 1400 + 64 + 4 x 484 = 3,400.
    What begins with conv0 fills 72 group-sets a core in two openings: 2 x 1400 + 72 x 64 = 7,408,
    later than conv1's work, 3,400 + 1,936. What begins with conv1 may be there when conv0 is done.
    """
    graph = convs([64, 64, 64], 3, 8, bits=4)
    assert least_cycles(graph, FULL, Space.of(graph, FULL).packed) == 7408
    wide = attrs.evolve(FULL, macro_write_bits=2048)
    assert least_cycles(graph, wide, Space.of(graph, wide).packed) == 1400 + 1 + 2 * 4 * 484


def test_off_chip_memory_holds_the_port():
    """144 group-sets of 258 bytes and 1,024 words of output at 8 bits per cycle."""
    graph = convs([64, 64], 3, 16, bits=4)
    narrow = attrs.evolve(FULL, offchip_bits_per_cycle=8)
    assert least_cycles(graph, narrow, Space.of(graph, narrow).packed) == 144 * 258 + 1024 * 8


def test_without_overlap_a_core_is_fetched_for_or_computes():
    """By hand, one core: 16 x 46 x 46 cycles of macros, 144 group-sets of 258 bytes at 8 bits.

    Filling takes 144 x 64 cycles and three openings, less than fetching. With prefetch it counts.
    """
    graph = convs([64, 64], 3, 16, bits=4)
    one = attrs.evolve(MARS, cores=1, offchip_bits_per_cycle=8)
    work, fetched, filled = 16 * 46 * 46, 144 * 258, 144 * 64 + 3 * 1400
    for overlap, loading in (("none", fetched), ("prefetch", filled)):
        arch = attrs.evolve(one, overlap=overlap)
        packed = Space.of(graph, arch).packed
        assert least_cycles(graph, arch, packed) == max(work + loading, fetched + 1024 * 8)


def test_what_weight_srams_do_not_hold_is_fetched_after_the_layer_before():
    """By hand: conv0 has 9 group-sets over 32x32, conv1 288 over one pixel; 32 cycles to fetch one.

    conv0 computes 94 x 94 cycles, a quarter on each core, from when a group-set was fetched (with
    its code, 33 cycles) and filled (1). Then the chip holds 16 group-sets of conv1 in its slots, 16
    in its weight SRAMs. The others are fetched, and the last of them is filled.
    """
    layers = [
        Conv(
            f"conv{number}",
            [ConvTerm(source, np.ones((outputs, 16, 3, 3), np.int8), **where)],
            np.zeros(outputs),
            Requant.eq5(4, 20),
        )
        for number, (source, outputs, where) in enumerate(
            (
                ("x0", 16, {"padding": (1, 1, 1, 1)}),
                ("conv0", 512, {"padding": (1, 1, 1, 1), "stride": (32, 32)}),
            )
        )
    ]
    kind = MapType(16, 32, 32, 4)
    out = Output("conv1", (512, 1, 1), Dequantize("uint8"))
    graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [out])
    arch = attrs.evolve(
        FULL,
        weight_groups_per_partition=4,
        weight_sram_bits=4 * 2048,
        array_fill_cycles=0,
        macro_write_bits=2**20,
        offchip_bits_per_cycle=64,
    )
    least = 33 + 1 + 94 * 94 // 4 + (288 - 16 - 16) * 32 + 1
    space = Space.of(graph, arch)
    assert least_cycles(graph, arch, space.packed) == least <= space.time(space.default).cycles


def test_an_empty_kernel_block_needs_no_weights():
    """By hand, one core: an empty kernel block is computed while the array is opened.

    Both blocks take a cycle for each of 64 x 32 pixels, and opening as many as one of them.
    """
    kind = MapType(16, 64, 32, 4)
    weight = np.zeros((32, 16, 1, 1), np.int8)
    weight[:16] = 1
    layers = [Conv("conv0", [ConvTerm("x0", weight)], np.zeros(32), Requant.eq5(4, 20))]
    out = Output("conv0", (32, 64, 32), Dequantize("uint8"))
    graph = Graph([Input("x0", kind, kind.shape, Quantize("uint8"))], layers, [out])
    arch = attrs.evolve(FULL, cores=1, array_fill_cycles=2048, macro_write_bits=2**20)
    assert least_cycles(graph, arch, Space.of(graph, arch).packed) == 2 * 64 * 32
