"""What one instruction takes: cycles, port accesses, macro accesses, bits moved.

These functions are the machine's only source of time and counts; the executing machine and its
timeline without data both call them. Each bank port serves a core once per core cycle, so that a
visit of an output block lasts as long as the busiest of its macros and its two ports.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from . import isa
from .arch import MarsArch
from .errors import MachineError
from .maps import RAW_BITS, WORD_BYTES, WORD_CHANNELS
from .packing import block_parameter_bytes, group_set_bytes

__all__ = [
    "CoreConfig",
    "Cost",
    "FillCost",
    "LoadedSegment",
    "Visit",
    "add_cost",
    "configured",
    "conv_cost",
    "decode_load",
    "fill_cost",
    "inside",
    "met",
    "offchip_cycles",
    "pool_cost",
    "taps_inside",
    "total",
]

WORD_BITS = 8 * WORD_BYTES
RAW_WORDS = RAW_BITS * WORD_CHANNELS // WORD_BITS  # words of a pixel's accumulators, per block


@attrs.frozen(cache_hash=True)
class CoreConfig:
    """What SAS, APW and RESIDUAL have set on a core."""

    contexts: tuple[isa.Sas | None, ...] = (None,) * (isa.field_limit(isa.Sas, "context") + 1)
    apw: isa.Apw | None = None
    residual: isa.Residual | None = None

    def context(self, number: int) -> isa.Sas:
        """Give an input context.

        Raises
        ------
        MachineError
            If no SAS has set it.
        """
        found = self.contexts[number]
        if found is None:
            raise MachineError(f"input context {number} was not set by a SAS")
        return found

    @property
    def output(self) -> isa.Apw:
        """The APW's setting.

        Raises
        ------
        MachineError
            If no APW has set it.
        """
        if self.apw is None:
            raise MachineError("the output was not set by an APW")
        return self.apw


@functools.lru_cache(maxsize=8192)
def configured(config: CoreConfig, setting: isa.Sas | isa.Apw | isa.Residual) -> CoreConfig:
    """Give a core's registers after a setting; an APW setting clears the residual.

    Raises
    ------
    MachineError
        If a SAS begins a map at a row that the map has not.
    """
    if isinstance(setting, isa.Sas):
        if setting.row and setting.row >= setting.height:
            raise MachineError(f"SAS has row={setting.row} of a map of {setting.height} rows")
        contexts = list(config.contexts)
        contexts[setting.context] = setting
        return attrs.evolve(config, contexts=tuple(contexts))
    if isinstance(setting, isa.Apw):
        return CoreConfig(config.contexts, setting)
    return attrs.evolve(config, residual=setting)


@attrs.frozen
class LoadedSegment:
    """Group-sets of a segment: input context, absolute taps and input blocks, first macro slot."""

    context: int
    taps: tuple[int, ...]
    blocks: tuple[int, ...]
    slot: int


@attrs.frozen
class Visit:
    """One output block's turn in a load."""

    block: int
    first: bool
    last: bool
    segments: tuple[LoadedSegment, ...]

    @property
    def group_sets(self) -> int:
        """Group-sets multiplied for each pixel."""
        return sum(len(segment.taps) for segment in self.segments)


@attrs.frozen(cache_hash=True)
class DecodedLoad:
    """A decoded load descriptor with its index codes."""

    visits: tuple[Visit, ...]
    segments: int
    codes: int

    @functools.cached_property
    def splits(self) -> bool:
        """Whether a sum is continued from, or into, another load."""
        return any(not (visit.first and visit.last) for visit in self.visits)


@functools.lru_cache(maxsize=256)
def decode_load(index: bytes, descriptor: int, codes: int, slot: int) -> DecodedLoad:
    """Walk the load descriptor and index codes of an index SRAM's content.

    Raises
    ------
    MachineError
        If the descriptor does not end, or an index code contradicts it.
    """
    visits: list[Visit] = []
    open_segments: list[LoadedSegment] = []
    start, count, first_code = descriptor, 0, codes
    first = True
    while True:
        bits = _word(index, descriptor, isa.SEGMENT_BYTES, "segment")
        segment = isa.unpack_word(isa.Segment, bits)
        descriptor += isa.SEGMENT_BYTES
        if not open_segments:
            first = bool(segment.first)
        taps, blocks = _codes(index, codes, segment)
        open_segments.append(LoadedSegment(segment.context, taps, blocks, slot + count))
        count += len(taps)
        codes += isa.CODE_BYTES * len(taps)
        following = _following(index, descriptor, segment)
        if following is None or following.out_block != segment.out_block or segment.last:
            visits.append(Visit(segment.out_block, first, bool(segment.last), tuple(open_segments)))
            open_segments = []
        elif following.first:
            raise MachineError(f"block {segment.out_block} starts again within its visit")
        if following is None:
            segments = (descriptor - start) // isa.SEGMENT_BYTES
            return DecodedLoad(tuple(visits), segments, (codes - first_code) // isa.CODE_BYTES)


def _following(index: bytes, at: int, segment: isa.Segment) -> isa.Segment | None:
    if segment.end:
        return None
    return isa.unpack_word(isa.Segment, _word(index, at, isa.SEGMENT_BYTES, "segment"))


def _word(index: bytes, at: int, size: int, what: str) -> int:
    if at + size > len(index):
        raise MachineError(f"{what} at byte {at} lies outside the index SRAM of {len(index)} bytes")
    return int.from_bytes(index[at : at + size], "little")


def _codes(index: bytes, at: int, segment: isa.Segment) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if segment.empty:
        return (), ()
    head = isa.unpack_word(isa.IndexCode, _word(index, at, isa.CODE_BYTES, "index code"))
    count = head.count or isa.GROUP_SETS_PER_SEGMENT
    _word(index, at + isa.CODE_BYTES * (count - 1), isa.CODE_BYTES, "index code")
    taps, blocks = [], []
    for i in range(count):
        word = int.from_bytes(index[at + 2 * i : at + 2 * i + isa.CODE_BYTES], "little")
        code = isa.unpack_word(isa.IndexCode, word)
        if code.first != (i == 0) or code.count != head.count:
            raise MachineError(
                f"index code {word:#06x} at byte {at + isa.CODE_BYTES * i} does not continue "
                f"a kernel of {count} group-sets at place {i}"
            )
        taps.append(segment.tap_base * isa.TAPS_PER_SEGMENT + code.tap)
        blocks.append(segment.block_base * isa.BLOCKS_PER_SEGMENT + code.block)
    return tuple(taps), tuple(blocks)


# -- costs -----------------------------------------------------------------------------------------


@attrs.frozen
class Cost:
    """What one core spends on one instruction.

    ``cycles`` end in ``latency``, the drain of the pipeline; for ``macro_cycles`` of them the
    macros are busy, for the rest the ports alone;
    ``reads``, ``writes`` are port accesses per bank, ``written_words`` what the latter carried;
    ``partial_words`` travel off-chip; ``banks`` are those that are in use, with or without access.
    """

    cycles: int
    latency: int
    macro_cycles: int = 0
    group_sets: int = 0  # group-set times pixel, so that one is 256 MACs
    passed_over: int = 0  # the same of those that SAS passes over
    reads: tuple[int, int] = (0, 0)
    writes: tuple[int, int] = (0, 0)
    written_words: int = 0
    partial_words: int = 0
    index_bytes: int = 0
    parameter_bytes: int = 0
    banks: tuple[int, ...] = ()


def total(costs: Sequence[Cost]) -> Cost:
    """Give the sums of costs, without banks in use."""
    return Cost(
        sum([cost.cycles for cost in costs]),
        sum([cost.latency for cost in costs]),
        sum([cost.macro_cycles for cost in costs]),
        sum([cost.group_sets for cost in costs]),
        sum([cost.passed_over for cost in costs]),
        (sum([cost.reads[0] for cost in costs]), sum([cost.reads[1] for cost in costs])),
        (sum([cost.writes[0] for cost in costs]), sum([cost.writes[1] for cost in costs])),
        sum([cost.written_words for cost in costs]),
        sum([cost.partial_words for cost in costs]),
        sum([cost.index_bytes for cost in costs]),
        sum([cost.parameter_bytes for cost in costs]),
    )


@functools.lru_cache(maxsize=65536)
def inside(out: int, stride: int, offset: int, size: int) -> int:
    """How many of ``out`` positions, ``stride`` apart from ``offset`` on, lie in ``0..size-1``."""
    low = max(0, -(-(-offset) // stride))
    high = min(out - 1, (size - 1 - offset) // stride)
    return max(0, high - low + 1)


@functools.lru_cache(maxsize=8192)
def taps_inside(sas: isa.Sas, height: int, width: int, taps: tuple[int, ...]) -> int:
    """Pixels of a tile that read the map, not its padding, summed over taps."""
    return sum(
        inside(
            height,
            sas.stride_y,
            tap // sas.kernel_width * sas.dilation_y + sas.origin_y,
            sas.height,
        )
        * inside(
            width, sas.stride_x, tap % sas.kernel_width * sas.dilation_x + sas.origin_x, sas.width
        )
        for tap in taps
    )


def met(sas: isa.Sas, segment: LoadedSegment) -> Sequence[int]:
    """Give by place in a segment the group-sets that SAS does not pass over."""
    if not sas.skip:
        return range(len(segment.taps))
    return [
        place
        for place, tap in enumerate(segment.taps)
        if not sas.skip >> tap % isa.TAPS_PER_SEGMENT & 1
    ]


def conv_cost(
    arch: MarsArch,
    tile_height: int,
    tile_width: int,
    partial_bank: int | None,
    config: CoreConfig,
    load: DecodedLoad,
) -> Cost:
    """Give the cost of CONV on one core, without other cores' share of the off-chip port.

    Partial sums travel off-chip where they have no bank.
    """
    apw = config.output
    windows = tile_height * tile_width
    height, width = tile_height * apw.pool_height, tile_width * apw.pool_width
    pixels = height * width
    cycles = macro_cycles = walked = passed_over = written = partial_words = 0
    reads, writes = [0, 0], [0, 0]
    for visit in load.visits:
        visit_reads, visit_writes = [0, 0], [0, 0]
        compute = 0
        for segment in visit.segments:
            sas = config.context(segment.context)
            accesses = arch.accesses(8 if sas.wide else 4)
            taps = segment.taps
            if sas.skip:
                taps = tuple(taps[place] for place in met(sas, segment))
            walked += len(taps)
            passed_over += len(segment.taps) - len(taps)
            compute += len(taps) * accesses * pixels
            visit_reads[sas.bank] += accesses * taps_inside(sas, height, width, taps)
        partial = RAW_WORDS * pixels * ((not visit.first) + (not visit.last))
        if partial_bank is None:
            partial_words += partial
        else:
            visit_reads[partial_bank] += RAW_WORDS * pixels * (not visit.first)
            visit_writes[partial_bank] += RAW_WORDS * pixels * (not visit.last)
            written += RAW_WORDS * pixels * (not visit.last)
        if visit.last:
            words = RAW_WORDS if apw.mode == isa.MODE_RAW else 1 + apw.wide
            # Codes of a pixel are written in one access, 64 or 128 bits; accumulators in eight.
            visit_writes[apw.bank] += windows * (words if apw.mode == isa.MODE_RAW else 1)
            written += windows * words
            if config.residual:
                visit_reads[config.residual.bank] += pixels * (1 + config.residual.wide)
        ports = max(r + w for r, w in zip(visit_reads, visit_writes, strict=True))
        cycles += max(compute, ports)
        macro_cycles += compute
        for bank in range(2):
            reads[bank] += visit_reads[bank]
            writes[bank] += visit_writes[bank]
    with_multiplier = apw.mode == isa.MODE_MULTIPLIER
    contexts = {segment.context for visit in load.visits for segment in visit.segments}
    banks = _banks(config, contexts)
    if load.splits and partial_bank is not None:
        banks.add(partial_bank)
    return Cost(
        cycles + arch.macro_latency_cycles + arch.apw_latency_cycles,
        arch.apw_latency_cycles + (arch.macro_latency_cycles if walked else 0),
        macro_cycles,
        walked * pixels,
        passed_over * pixels,
        (reads[0], reads[1]),
        (writes[0], writes[1]),
        written,
        partial_words,
        # Sixteen accumulators hold one pixel of a block: the codes are walked for every pixel, but
        # for those that are passed over.
        load.segments * isa.SEGMENT_BYTES + (pixels * walked + passed_over) * isa.CODE_BYTES,
        len(load.visits) * block_parameter_bytes(with_multiplier),
        tuple(banks),
    )


def _banks(config: CoreConfig, contexts: Iterable[int]) -> set[int]:
    """Give the banks of an output, its residual and some inputs."""
    banks = {config.output.bank, *(config.context(number).bank for number in contexts)}
    if config.residual:
        banks.add(config.residual.bank)
    return banks


def _apw_cost(
    arch: MarsArch, config: CoreConfig, contexts: int, reads: Sequence[int], writes: Sequence[int]
) -> Cost:
    cycles = max(r + w for r, w in zip(reads, writes, strict=True)) + arch.apw_latency_cycles
    apw = config.output
    return Cost(
        cycles,
        arch.apw_latency_cycles,
        reads=(reads[0], reads[1]),
        writes=(writes[0], writes[1]),
        written_words=writes[apw.bank] * (1 + apw.wide),
        banks=tuple(_banks(config, range(contexts))),
    )


def pool_cost(arch: MarsArch, pool: isa.Pool, config: CoreConfig, blocks: int) -> Cost:
    """Give the cost of POOL on a core that is dealt some blocks."""
    sas, apw = config.context(0), config.output
    taps = _window_inside(sas, pool)
    reads, writes = [0, 0], [0, 0]
    reads[sas.bank] = blocks * taps * (1 + sas.wide)
    writes[apw.bank] += blocks * pool.height * pool.width
    return _apw_cost(arch, config, 1, reads, writes)


def _window_inside(sas: isa.Sas, pool: isa.Pool) -> int:
    # The window is rectangular, so that rows and columns factor.
    rows = sum(
        inside(pool.height, sas.stride_y, r * sas.dilation_y + sas.origin_y, sas.height)
        for r in range(pool.kernel_height)
    )
    columns = sum(
        inside(pool.width, sas.stride_x, c * sas.dilation_x + sas.origin_x, sas.width)
        for c in range(pool.kernel_width)
    )
    return rows * columns


def add_cost(arch: MarsArch, add: isa.Add, config: CoreConfig, blocks: int) -> Cost:
    """Give the cost of ADD on a core that is dealt some blocks."""
    apw = config.output
    reads, writes = [0, 0], [0, 0]
    for number in range(1 + add.operands):
        sas = config.context(number)
        pixels = inside(add.height, sas.stride_y, sas.origin_y, sas.height) * inside(
            add.width, sas.stride_x, sas.origin_x, sas.width
        )
        reads[sas.bank] += blocks * pixels * (1 + sas.wide)
    writes[apw.bank] += blocks * add.height * add.width
    return _apw_cost(arch, config, 1 + add.operands, reads, writes)


def offchip_cycles(arch: MarsArch, bits: int) -> int:
    """Core cycles that a transfer holds the off-chip port."""
    return -(-bits // arch.offchip_bits_per_cycle)


@attrs.frozen
class FillCost:
    """What FILL takes: core cycles, bytes of the weight SRAM, bits written to macro cells.

    ``slots`` is how many group-sets of that width the macros hold.
    """

    cycles: int
    source_bytes: int
    macro_bits: int
    slots: int


@functools.lru_cache(maxsize=1024)
def fill_cost(arch: MarsArch, count: int, weight_bits: int) -> FillCost:
    """Give the cost of FILL for a number of group-sets and the width of their weights.

    A 4-bit weight takes a whole cell unless cells hold pairs.
    """
    cell = 4 if weight_bits == 4 and arch.dual_4bit_cells else 8
    bits = count * arch.group_set_weights * cell
    return FillCost(
        -(-bits // arch.macro_write_bits),
        count * group_set_bytes(weight_bits),
        bits,
        arch.slots(weight_bits),
    )


@functools.lru_cache(maxsize=1024)
def core_list(mask: int, cores: int) -> tuple[int, ...]:
    """Give the cores of a mask.

    Raises
    ------
    MachineError
        If the mask is empty or names a core that the chip has not.
    """
    found = tuple(core for core in range(mask.bit_length()) if mask >> core & 1)
    if not found or found[-1] >= cores:
        raise MachineError(f"core mask {mask:#b} on a chip of {cores} cores")
    return found


def dealt_blocks(first: int, count: int, place: int, cores: int) -> npt.NDArray[Any]:
    """Give the channel blocks that POOL and ADD deal to the ``place``-th of ``cores`` cores."""
    return np.arange(first + place, first + count, cores)
