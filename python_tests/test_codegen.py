"""Instruction streams: golden text, time worked out by hand, hazards, refusals of the machine."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, Machine, MarsArch, isa, simulate
from mars_runtime.errors import HazardError, MachineError, MemoryAccessError, PoisonError
from mars_runtime.program import Region
from mars_runtime.timing import CoreConfig, DecodedLoad, LoadedSegment, Visit, conv_cost
from python_tests.small_networks import every_kind_of_layer, tiny_conv
from tvm_mars.codegen.emitter import DMA, Emitter, compute_lanes
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.graph import Graph
from tvm_mars.pack import PackedConv
from tvm_mars.schedule import Load, Schedule, plan

MARS = PRESETS["mars"]


def on_one_core(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> Schedule:
    """Schedule a one-block layer on core 0 alone, where the default shares out its rows."""
    schedule = plan(graph, arch, packed)
    (layer,) = schedule.layers
    loads = [Load((load.cores[0], *[()] * (arch.cores - 1))) for load in layer.loads]
    return attrs.evolve(schedule, layers=(attrs.evolve(layer, loads=tuple(loads), row_groups=1),))


def tiny() -> Region:
    return build_region(NamedGraph.of(tiny_conv()), MARS, scheduler=on_one_core)


def with_code(region: Region, text: str) -> Region:
    return attrs.evolve(region, code=isa.encode_all(isa.assemble(text)), layers=())


def run_text(text: str, arch=MARS, region: Region | None = None):
    """Run assembly over the tiny layer's image, one image of codes 0..63."""
    machine = Machine(with_code(region or tiny(), text), arch, images=1, trace=True)
    machine.write_input(0, np.arange(64, dtype=np.uint8).reshape(1, 16, 2, 2))
    return machine, machine.run()


def test_tiny_layer_as_text(golden):
    """Reviewed by hand: one group-set, its table at 0 (4 B segment, 2 B code), 64 B of biases at
    6, 256 B of weights at 70; the image ends at 326 B = word 40.75, so that maps start at 41.
    """
    lines = isa.disassemble(tiny().instructions)
    golden("tiny_conv.asm", "\n".join(lines) + "\n")


def test_every_kind_of_layer_as_text(golden):
    region = build_region(NamedGraph.of(every_kind_of_layer()), MARS)
    golden("every_kind_of_layer.asm", "\n".join(isa.disassemble(region.instructions)) + "\n")


def test_tiny_layer_takes_the_cycles_worked_out_on_paper():
    """One group-set on a 2x2 map of 8 bits, preset mars, no overlap; issue one per cycle.

    PREPARE  issued at 1, 1400 for the array                         1 .. 1401
    FETCH    6 B of index = 48 bits over 128 per cycle               2 .. 3
    FETCH    64 B of biases = 512 bits                               3 .. 7
    FETCH    256 B of weights = 2048 bits                            7 .. 23
    FILL     2048 bits over 32, when the array is open            1401 .. 1465
    MOVE     2x2 pixels x 2 planes = 8 words = 512 bits             23 .. 27
    SAS, APW one cycle each, when the core's array is full        1465 .. 1467
    CONV     4 pixels x 2 accesses, 1 macro + 1 APW latency       1467 .. 1477
    MOVE     8 words out                                          1477 .. 1481
    """
    timeline = simulate(tiny(), MARS, trace=True)
    found = {(e.lane, e.name, e.start, e.end) for e in timeline.events}
    assert found >= {
        ("core 0 load", "PREPARE", 1, 1401),
        ("dma", "FETCH index", 2, 3),
        ("dma", "FETCH parameter", 3, 7),
        ("dma", "FETCH weight", 7, 23),
        ("core 0 load", "FILL", 1401, 1465),
        ("dma", "MOVE in", 23, 27),
        ("core 0 compute", "CONV", 1467, 1477),
        ("dma", "MOVE out", 1477, 1481),
    }
    assert timeline.cycles == 1481
    (layer,) = timeline.layers
    assert layer.macro_cycles == 8
    # The other three cores have nothing to do until core 0 has finished; all wait for the MOVE.
    assert layer.stalls == {
        "weights": 1465, "maps": 4 * 4, "cores": 3 * 1477, "issue": 2, "ports": 0, "latency": 2,
    }  # fmt: skip
    counters = layer.counters
    assert counters.group_sets == 4 and counters.macs(MARS) == 4 * 256
    assert counters.macro_accesses == 16  # 2 macros x 2 nibbles x 4 pixels
    assert (counters.map_reads, counters.map_writes) == (8, 4)
    # Core: 8 words read, 8 written (two in one access); DMA: 8 in, 8 out.
    assert counters.bank_bits == 64 * (8 + 8 + 8 + 8)
    assert counters.fetched_bits == 8 * (6 + 64 + 256)
    # Into the SRAMs 326 B; out of them 256 B by FILL and, by CONV, the segment's 4 B, the
    # parameters' 64 B and the index code's 2 B for each of the four pixels.
    assert counters.core_sram_bits == 8 * (326 + 256 + 4 + 64 + 4 * 2)
    assert counters.macro_write_bits == 2048 and counters.array_fills == 1
    assert counters.instruction_bits == 11 * 40 * 8


def test_tiny_layer_gives_the_codes_worked_out_on_paper():
    """Kernel k meets input 15 - k with weight k + 1, bias 8 k; pixel 0 has code 4 c at channel c.

    acc = (k + 1) * 4 * (15 - k) + 8 k; code = round_half_even(acc * 255 / 4096).
    """
    region = tiny()
    machine = Machine(region, MARS, images=1)
    machine.write_input(0, np.arange(64, dtype=np.uint8).reshape(1, 16, 2, 2))
    machine.run()
    acc = [(k + 1) * 4 * (15 - k) + 8 * k for k in range(16)]
    assert acc[:3] == [60, 120, 172]
    assert machine.read_output(0)[0, :, 0, 0].tolist() == [round(a * 255 / 4096) for a in acc]


# -- durations -------------------------------------------------------------------------------------

SAS = isa.Sas(cores=1, blocks=1, height=4, width=4, wide=1)
APW = isa.Apw(cores=1, shift=12, wide=1, high=255, bank=1, blocks=1, height=4, width=4)


def cost(visits, *, sas=SAS, apw=APW, conv=None, residual=None):
    conv = conv or isa.Conv(cores=1, height=4, width=4)
    config = CoreConfig((sas, None, None, None), apw, residual)
    bank = None if conv.partial else conv.partial_bank
    load = DecodedLoad(tuple(visits), 1, 1)
    return conv_cost(MARS, conv.height, conv.width, bank, config, load)


def visit(taps=(0,), first=True, last=True):
    return Visit(0, first, last, (LoadedSegment(0, taps, (0,) * len(taps), 0),))


@pytest.mark.parametrize(
    ("visits", "changes", "cycles", "reads", "writes"),
    [
        # 16 pixels x 2 accesses; 32 reads of bank 0; 16 writes of 128 bits to bank 1; latency 2.
        ([visit()], {}, 34, (32, 0), (0, 16)),
        # Both maps in one bank: its port has 32 + 16 accesses, more than the macros' 32.
        ([visit()], {"apw": attrs.evolve(APW, bank=0)}, 50, (32, 0), (16, 0)),
        # 4 bits: 16 accesses, 16 reads.
        ([visit()], {"sas": attrs.evolve(SAS, wide=0)}, 18, (16, 0), (0, 16)),
        # An empty block has no access, and still writes its bias.
        ([visit(())], {}, 18, (0, 0), (0, 16)),
        # Accumulators: eight words a pixel.
        ([visit()], {"apw": isa.Apw(mode=2, bank=1, blocks=1, height=4, width=4)},
         130, (32, 0), (0, 128)),
        # A residual of 8 bits in the output's bank: 32 reads beside 16 writes.
        ([visit()], {"residual": isa.Residual(cores=1, bank=1, wide=1)}, 50, (32, 32), (0, 16)),
        # A partial sum is stored, 8 words a pixel; then it is read back, beside 16 writes.
        ([visit(last=False)], {"conv": isa.Conv(cores=1, height=4, width=4, partial_bank=1)},
         130, (32, 0), (0, 128)),
        ([visit(first=False)], {"conv": isa.Conv(cores=1, height=4, width=4, partial_bank=1)},
         146, (32, 128), (0, 16)),
        # Off-chip they use no port here; the transfer is the machine's affair.
        ([visit(first=False)], {"conv": isa.Conv(cores=1, height=4, width=4, partial=1)},
         34, (32, 0), (0, 16)),
        # Tap (0, 0) with padding 1 meets 3x3 of 4x4 pixels inside; outside costs no port access.
        ([visit((0,))], {"sas": attrs.evolve(SAS, origin_y=-1, origin_x=-1, kernel_width=3)},
         34, (18, 0), (0, 16)),
        # Tap 0 is passed over, tap 1 meets 3 x 4 pixels inside.
        ([visit((0, 1))], {"sas": attrs.evolve(SAS, origin_y=-1, origin_x=-1, kernel_width=3,
                                               skip=0b1)}, 34, (24, 0), (0, 16)),
        # Index codes have tap 0 for taps 0 and 16: as with an empty block, the bias is left.
        ([visit((0, 16))], {"sas": attrs.evolve(SAS, kernel_width=5, skip=0b1)},
         18, (0, 0), (0, 16)),
        # Two visits follow each other; latency comes once.
        ([visit(), visit((0, 1))], {}, 32 + 64 + 2, (32 + 32 + 2 * 12, 0), (0, 32)),
    ],
)  # fmt: skip
def test_visits_last_as_long_as_the_busiest_of_macros_and_ports(
    visits, changes, cycles, reads, writes
):
    if len(visits) == 2:
        changes = {"sas": attrs.evolve(SAS, kernel_width=2)}
    found = cost(visits, **changes)
    assert (found.cycles, found.reads, found.writes) == (cycles, reads, writes)


def test_partial_sums_off_chip_hold_the_port_for_all_cores():
    found = cost([visit(last=False)], conv=isa.Conv(cores=1, height=4, width=4, partial=1))
    assert found.partial_words == 16 * 8  # 64 cycles of 128 bits, beside 34 of compute


POOLED = """
MOVE pitch=2 plane=4 address=41 offchip_pitch=2 offchip_plane=4 words=2 rows=2 planes=2 signal=0
SAS cores=1 blocks=1 height=2 width=2 wide=a8 {sas}
{second}
APW cores=1 wide=a8 bank={bank} base=64 blocks=1 height=1 width=1 {apw}
{op} cores=1 blocks=1 height=1 width=1 wait=0
HALT
"""


@pytest.mark.parametrize(
    ("op", "bank", "apw", "second", "cycles"),
    [
        # 4 pixels x 2 words read, one written, APW latency 1.
        ("POOL kernel_height=2 kernel_width=2", 1, "", "", 9),
        ("POOL kernel_height=2 kernel_width=2", 0, "", "", 10),
        ("POOL mode=average multiplier=1 kernel_height=2 kernel_width=2", 1, "high=255", "", 9),
        ("ADD multiplier_a=1 multiplier=1", 1, "high=255", "", 3),
        ("ADD operands=two multiplier_a=1 multiplier_b=1 multiplier=1", 0, "high=255",
         "SAS cores=1 context=1 blocks=1 height=2 width=2 wide=a8", 6),
    ],
)  # fmt: skip
def test_pools_and_additions_take_their_port_accesses(op, bank, apw, second, cycles):
    text = POOLED.format(op=op, bank=bank, apw=apw, second=second, sas="")
    _, timeline = run_text(text)
    (event,) = [e for e in timeline.events if e.name in ("POOL", "ADD")]
    assert event.end - event.start == cycles


RING = """
MOVE pitch=2 plane=4 address=41 offchip_pitch=2 offchip_plane=4 words=2 rows={rows} planes=2 \
 signal=0
SAS cores=1 blocks=1 height=2 width=2 wide=a8 row={row} origin_y={origin}
APW cores=1 wide=a8 bank=1 blocks=1 height=2 width=2
POOL cores=1 blocks=1 height={height} width=2 wait=0 signal=1
MOVE direction=out bank=1 pitch=2 plane=4 address=49 offchip_pitch=2 offchip_plane=4 words=2 \
rows={height} planes=2 wait=1
HALT
"""


@pytest.mark.parametrize("row", [0, 1])
def test_a_map_may_begin_at_any_of_its_rows(row):
    """A window of one pixel copies: stored row 0 is read as the row that ``row`` makes of it."""
    text = RING.format(rows=2, row=row, origin=0, height=2)
    machine, _ = run_text(text)
    rows = np.arange(64, dtype=np.uint8).reshape(16, 2, 2)
    assert np.array_equal(machine.read_output(0)[0], np.roll(rows, -row, 1))


@pytest.mark.parametrize(("row", "origin"), [(0, 0), (1, 1)])
def test_only_the_stored_rows_that_are_read_must_be_there(row, origin):
    """Of two rows the first stored one is moved in: row 0 from there on, row 1 from behind it."""
    text = RING.format(rows=1, row=row, origin=origin, height=1)
    run_text(text)
    with pytest.raises(PoisonError, match="bank 0 where nothing was written"):
        run_text(text.replace(f"origin_y={origin}", f"origin_y={1 - origin}"))


# -- hazards and refusals --------------------------------------------------------------------------


def without(token_of: str) -> str:
    """The tiny layer's text without the waits of one instruction."""
    lines = list(isa.disassemble(tiny().instructions))
    at = next(i for i, line in enumerate(lines) if line.startswith(token_of) and "wait" in line)
    lines[at] = lines[at].split(" wait=")[0]
    return "\n".join(lines)


def test_missing_wait_of_fill_is_a_hazard():
    fast = attrs.evolve(MARS, array_fill_cycles=0)
    with pytest.raises(HazardError, match=r"FILL.*core 0 weight SRAM.*wait token"):
        run_text(without("FILL"), fast)


def test_missing_wait_of_conv_is_a_hazard_where_nothing_else_orders_it():
    with pytest.raises(HazardError, match=r"CONV.*(macros|SRAM)"):
        run_text(without("CONV"), attrs.evolve(MARS, overlap="full"))


EDITS = [
    ("FILL", None, PoisonError, "macros where nothing was written"),
    ("MOVE pitch", None, PoisonError, "bank 0 where nothing was written"),
    ("FETCH memory=index", None, MachineError, "index code 0x0000"),
    ("FETCH memory=parameter", None, PoisonError, "parameter SRAM where"),
    ("PREPARE", None, MachineError, "no PREPARE opened"),
    ("SAS", None, MachineError, "context 0 was not set"),
    ("APW", None, MachineError, "output was not set"),
    ("CONV", None, PoisonError, "bank 1 where nothing was written"),
    ("HALT", "HALT\nHALT", MachineError, "before the end"),
]


@pytest.mark.parametrize(("name", "text", "error", "message"), EDITS, ids=lambda x: str(x))
def test_what_the_hardware_cannot_do_is_refused(name, text, error, message):
    lines = list(isa.disassemble(tiny().instructions))
    at = next(i for i, line in enumerate(lines) if line.startswith(name))
    # SYNC keeps the tokens of what is left out.
    tokens = " ".join(w for w in lines[at].split() if w.startswith(("signal=", "wait=")))
    lines[at] = text if text is not None else f"SYNC {tokens}"
    with pytest.raises(error, match=message):
        run_text("\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("FETCH memory=index length=6", "FETCH memory=index length=0", MachineError),
        ("FETCH memory=index length=6", "FETCH memory=index length=6 source=322", MachineError),
        ("FETCH memory=index length=6", "FETCH memory=index length=514", MemoryAccessError),
        ("count=1", "count=65", MemoryAccessError),
        ("count=1", "count=1 slot=64", MemoryAccessError),
        ("count=1", "count=1 core=4", MachineError),
        ("cores=0b1 codes=4", "cores=0b10000 codes=4", MachineError),
        ("cores=0b1 codes=4", "cores=0 codes=4", MachineError),
        ("codes=4", "codes=510", MachineError),
        ("codes=4 height=2", "codes=4 height=3", MemoryAccessError),
        ("bank=1 blocks=1", "bank=1 base=8185 blocks=1", MemoryAccessError),
        ("address=41", "address=40", MemoryAccessError),
        ("address=49", "address=50", MemoryAccessError),
        ("wait=0,1", "wait=0,1,5", MachineError),
        ("SAS cores=0b1 blocks=1", "SAS cores=0b1 row=2 blocks=1", MachineError),
    ],
)
def test_addresses_and_masks_beyond_the_machine_are_refused(old, new, error):
    text = "\n".join(isa.disassemble(tiny().instructions))
    assert text.count(old) == 1
    with pytest.raises(error):
        run_text(text.replace(old, new))


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_are_joined_by_sync_when_they_run_out():
    """70 moves into one bank, all waited for only by the last instructions, on other lanes."""
    emitter = Emitter()
    for number in range(70):
        emitter.emit(
            isa.Fetch(core=0, destination=number, length=1),
            DMA,
            writes=[(("sram", number), 0, 1)],
        )
    for number in range(70):
        emitter.emit(isa.Conv(cores=1), compute_lanes(1), reads=[(("sram", number), 0, 1)])
    instructions, stops = emitter.finish()
    assert any(isinstance(one, isa.Sync) for one in instructions)
    assert list(stops) == [len(instructions)]
    # Every CONV waits, directly or through a SYNC, for the FETCH that it depends on.
    behind: dict[int, set[int]] = {}
    fetched = convs = 0
    for one in instructions:
        waited = set().union(*(behind[t] for t in range(64) if one.wait >> t & 1), set())
        if isinstance(one, isa.Fetch):
            waited = {fetched}
            fetched += 1
        elif isinstance(one, isa.Conv):
            assert convs in waited
            convs += 1
        if one.signal:
            behind[one.signal - 1] = waited
    assert fetched == convs == 70
