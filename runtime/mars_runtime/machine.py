"""The timed four-core machine: executes a region's instructions on its units and memories.

With images it moves real bytes: banks, weight, index and parameter SRAMs, macros and off-chip
memory are poisoned at reset; reading a cell that nothing wrote, or touching one that another unit
is still using, is an error. Without images it is the timeline: the same instructions, the same
start times and counts, no data.

Time is in core cycles. Program order is issue order, so that one pass gives every start: the latest
of issue, the unit's own queue, the tokens waited for, and the architecture's overlap rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from . import isa, timing
from .arch import MarsArch
from .errors import HazardError, MachineError, MemoryAccessError, PoisonError
from .kernels import convolve_group_sets, max_windows
from .maps import WORD_BYTES, WORD_CHANNELS, join_nibbles, pack_map, split_nibbles, unpack_map
from .packing import (
    block_parameter_bytes,
    group_set_bytes,
    unpack_group_sets,
    unpack_parameters,
)
from .program import Region
from .rounding import divide_half_even

__all__ = ["STALLS", "Counters", "Event", "LayerTime", "Machine", "Timeline", "simulate"]

Array = npt.NDArray[Any]

# Why a core's compute unit waits, or takes longer than its macros.
STALLS: dict[str, str] = {
    "weights": "waits for weights, index codes or parameters to be loaded",
    "maps": "waits for feature maps to travel to or from off-chip memory",
    "cores": "waits for other cores to finish what it depends on",
    "issue": "waits for the controller to issue, or sets registers",
    "ports": "a bank port is busier than the macros",
    "latency": "pipeline drain of macros and APW",
}
_CAUSE_OF_UNIT = {"dma": "maps", "load": "weights", "compute": "cores", "controller": "cores"}


@attrs.define
class Counters:
    """What happened, summed over cores. Bits are bits; the rest are events."""

    group_sets: int = attrs.field(default=0, metadata={"doc": "group-set times output pixel"})
    macro_accesses: int = attrs.field(default=0, metadata={"doc": "accesses of single macros"})
    map_reads: int = attrs.field(default=0, metadata={"doc": "port reads of the banks by cores"})
    map_writes: int = attrs.field(default=0, metadata={"doc": "port writes of the banks by cores"})
    bank_bits: int = attrs.field(default=0, metadata={"doc": "bits through the banks, with DMA"})
    core_sram_bits: int = attrs.field(
        default=0, metadata={"doc": "bits into and out of weight, index and parameter SRAMs"}
    )
    macro_write_bits: int = attrs.field(default=0, metadata={"doc": "macro cells written, bits"})
    fetched_bits: int = attrs.field(
        default=0, metadata={"doc": "off-chip bits of weights, index codes, parameters"}
    )
    instruction_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of the code"})
    map_in_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of maps, inward"})
    map_out_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of maps, outward"})
    partial_bits: int = attrs.field(
        default=0, metadata={"doc": "off-chip bits of partial sums, both ways"}
    )
    array_fills: int = attrs.field(default=0, metadata={"doc": "arrays opened for writing"})

    def add(self, other: Counters) -> None:
        """Add another's counts."""
        for field in attrs.fields(Counters):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def offchip_bits(self) -> int:
        """All bits through the off-chip port."""
        return (
            self.fetched_bits
            + self.instruction_bits
            + self.map_in_bits
            + self.map_out_bits
            + self.partial_bits
        )

    def macs(self, arch: MarsArch) -> int:
        """Multiply-accumulates that the macros executed."""
        return self.group_sets * arch.group_set_weights


@attrs.define
class LayerTime:
    """Time and counts of one layer.

    ``cycles`` is the time from the end of the layer before to the end of this one;
    ``macro_cycles`` and ``stalls`` (by cause, see :data:`STALLS`) are sums over cores, and together
    they are ``cores * cycles`` over a whole region.
    """

    name: str
    kind: str
    start: int = 0
    cycles: int = 0
    macro_cycles: int = 0
    stalls: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(STALLS, 0))
    counters: Counters = attrs.field(factory=Counters)


@attrs.frozen
class Event:
    """An instruction's time on a lane such as ``core 0 compute`` or ``dma``."""

    lane: str
    name: str
    layer: int
    index: int
    start: int
    end: int


@attrs.frozen
class Timeline:
    """A region's time on the machine, for one image."""

    cycles: int
    layers: tuple[LayerTime, ...]
    events: tuple[Event, ...] = ()


class Cells:
    """When each cell of a memory was written, and until when it is read."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.ready = np.full(count, -1, np.int64)  # -1: poison
        self.busy = np.zeros(count, np.int64)

    def read(self, cells: Any, start: int, end: int, view: Callable[[Array], Array]) -> None:
        """Check a read of ``view(state)[cells]`` and mark it."""
        self.check_read(view(self.ready)[cells], start)
        busy = view(self.busy)
        busy[cells] = np.maximum(busy[cells], end)

    def check_read(self, ready: Array, start: int) -> None:
        """Refuse to read poison, or what is not there yet."""
        if ready.size and ready.min() < 0:
            raise PoisonError(f"reads {self.name} where nothing was written")
        if ready.size and ready.max() > start:
            raise HazardError(
                f"reads {self.name} at cycle {start}, written until {ready.max()}",
                hint="a wait token is missing",
            )

    def write(self, cells: Any, start: int, end: int, view: Callable[[Array], Array]) -> None:
        """Check a write of ``view(state)[cells]`` and mark it."""
        busy, ready = view(self.busy)[cells], view(self.ready)[cells]
        until = max(int(busy.max()), int(ready.max())) if busy.size else 0
        if until > start:
            raise HazardError(
                f"writes {self.name} at cycle {start}, in use until {until}",
                hint="a wait token is missing",
            )
        view(self.ready)[cells] = end


class Sram:
    """Bytes with their cells; ``grain`` bytes are one cell."""

    def __init__(self, name: str, size: int, grain: int) -> None:
        self.name, self.size, self.grain = name, size, grain
        self.data = np.zeros(size, np.uint8)
        self.cells = Cells(name, -(-size // grain))

    def span(self, address: int, length: int) -> slice:
        """Give the cells of some bytes, or refuse them."""
        if address + length > self.size or address % self.grain or length % self.grain:
            raise MemoryAccessError(
                f"{self.name} of {self.size} bytes in cells of {self.grain} addressed at "
                f"{address}..{address + length - 1}"
            )
        return slice(address // self.grain, (address + length) // self.grain)


def _whole(state: Array) -> Array:
    return state


class Core:
    """One core: its SRAMs, macros, registers, and how far its units are busy."""

    def __init__(self, number: int, arch: MarsArch) -> None:
        self.weight = Sram(
            f"core {number} weight SRAM", arch.weight_sram_bits // 8, group_set_bytes(4)
        )
        self.index = Sram(f"core {number} index SRAM", arch.index_sram_bits // 8, isa.CODE_BYTES)
        self.parameter = Sram(
            f"core {number} parameter SRAM", arch.parameter_sram_bits // 8, WORD_CHANNELS
        )
        slots = max(arch.slots(4), arch.slots(8))
        self.macros = np.zeros((slots, WORD_CHANNELS, WORD_CHANNELS), np.int8)
        self.macro_bits = np.zeros(slots, np.int8)
        self.slots = Cells(f"core {number} macros", slots)
        self.config = timing.CoreConfig()
        self.open = False
        self.compute_free = self.load_free = self.fetch_free = 0


class Machine:
    """A MARS chip with one region loaded.

    Parameters
    ----------
    region : Region
        What to execute.
    arch : MarsArch
        The chip.
    images : int, optional
        Size of the batch whose data the machine holds. The timeline is that of one image: images
        run in sequence and their data do not change it. None for a timeline without data.
    trace : bool
        Whether to record an :class:`Event` for every instruction.
    """

    def __init__(
        self, region: Region, arch: MarsArch, images: int | None = None, trace: bool = False
    ) -> None:
        self.region, self.arch, self.images = region, arch, images
        self.trace = trace
        self.events: list[Event] = []
        self.cores = [Core(number, arch) for number in range(arch.cores)]
        self.bank_compute = [0] * arch.banks  # until when cores use the bank
        self.bank_move = [0] * arch.banks  # until when DMA uses it
        self.dma_free = self.issued = self.now = 0
        self.tokens: dict[int, tuple[int, str]] = {}
        self.layers = [LayerTime(layer.name, layer.kind) for layer in region.layers]
        self.layers = self.layers or [LayerTime("region", "region")]
        self.layer_number = self.index = 0
        self.image_words = -(-region.image_bytes // WORD_BYTES)
        if images is not None:
            self._allocate(images)

    def _allocate(self, images: int) -> None:
        words = self.arch.bank_words
        self.banks = [np.zeros((images, words, WORD_BYTES), np.uint8) for _ in self.bank_move]
        self.bank_cells = [Cells(f"bank {b}", words) for b in range(self.arch.banks)]
        count = self.region.offchip_words - self.image_words
        self.maps = np.zeros((images, count, WORD_BYTES), np.uint8)
        self.map_cells = Cells("off-chip maps", count)

    # -- input, output, execution --------------------------------------------------------------

    def write_input(self, port: int, codes: Array) -> None:
        """Place stored codes ``[N, C, H, W]`` in off-chip memory."""
        entry = self.region.inputs[port]
        at = entry.address - self.image_words
        self.maps[:, at : at + entry.type.words] = pack_map(codes, entry.type)
        self.map_cells.ready[at : at + entry.type.words] = 0

    def read_output(self, port: int) -> Array:
        """Give stored codes or accumulators ``[N, C, H, W]`` from off-chip memory.

        Raises
        ------
        PoisonError
            If the program did not write all of them.
        """
        entry = self.region.outputs[port]
        at = entry.address - self.image_words
        self.map_cells.check_read(self.map_cells.ready[at : at + entry.type.words], self.now)
        return unpack_map(self.maps[:, at : at + entry.type.words], entry.type)

    def run(self) -> Timeline:
        """Execute the region.

        Raises
        ------
        MachineError
            If an instruction does what the hardware cannot: the error names the instruction.
        """
        stops = [layer.stop for layer in self.region.layers] or [len(self.region.instructions)]
        for self.index, instruction in enumerate(self.region.instructions):
            while self.index >= stops[self.layer_number] and self.layer_number + 1 < len(stops):
                self._end_layer()
            try:
                self._step(instruction)
            except MachineError as error:
                name = type(instruction).__name__.upper()
                place = f"instruction {self.index} ({name}, {self.layers[self.layer_number].name})"
                raise type(error)(error.problem, where=place, hint=error.hint) from None
        self._end_layer()
        return Timeline(self.now, tuple(self.layers), tuple(self.events))

    def _end_layer(self) -> None:
        layer = self.layers[self.layer_number]
        layer.cycles = self.now - layer.start
        if self.layer_number + 1 < len(self.layers):
            self.layer_number += 1
            self.layers[self.layer_number].start = self.now

    @property
    def layer(self) -> LayerTime:
        """The layer whose instructions run."""
        return self.layers[self.layer_number]

    @property
    def counters(self) -> Counters:
        """The layer's counters."""
        return self.layer.counters

    def _step(self, instruction: isa.Instruction) -> None:
        self.issued += self.arch.issue_cycles
        self.counters.instruction_bits += 8 * isa.INSTRUCTION_BYTES
        waits = [(self.issued, "issue")]
        token_mask = instruction.wait
        while token_mask:
            token = (token_mask & -token_mask).bit_length() - 1
            token_mask &= token_mask - 1
            if token not in self.tokens:
                raise MachineError(f"waits for token {token}, which nothing signals: a deadlock")
            waits.append(self.tokens[token])
        end, cause = _HANDLERS[type(instruction)](self, instruction, waits)
        self.now = max(self.now, end)
        if instruction.signal:
            self.tokens[instruction.signal - 1] = (end, cause)

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        if self.trace:
            self.events.append(Event(lane, name, self.layer_number, self.index, start, end))

    def _core(self, number: int) -> Core:
        if number >= len(self.cores):
            raise MachineError(f"core {number} on a chip of {len(self.cores)} cores")
        return self.cores[number]

    # -- dma -----------------------------------------------------------------------------------

    def _fetch(self, fetch: isa.Fetch, waits: Waits) -> tuple[int, str]:
        core = self._core(fetch.core)
        sram = (core.weight, core.index, core.parameter)[fetch.memory]
        span = sram.span(fetch.destination, fetch.length)
        if not fetch.length:
            raise MachineError("transfers nothing")
        if fetch.source + fetch.length > self.region.image_bytes:
            raise MemoryAccessError(
                f"off-chip image of {self.region.image_bytes} bytes addressed at "
                f"{fetch.source}..{fetch.source + fetch.length - 1}"
            )
        start, _ = max(waits)
        start = max(start, self.dma_free)
        if self.arch.overlap == "none":
            start = max(start, core.compute_free)
        bits = 8 * fetch.length
        end = start + timing.offchip_cycles(self.arch, bits)
        self.dma_free = core.fetch_free = end
        self.counters.fetched_bits += bits
        self.counters.core_sram_bits += bits
        self._record("dma", f"FETCH {('weight', 'index', 'parameter')[fetch.memory]}", start, end)
        # The timeline needs the index codes too: they decide how long a CONV takes.
        if self.images is not None or fetch.memory == isa.MEMORY_INDEX:
            sram.cells.write(span, start, end, _whole)
            data = self.region.image[fetch.source : fetch.source + fetch.length]
            sram.data[fetch.destination : fetch.destination + fetch.length] = np.frombuffer(
                data, np.uint8
            )
        return end, "weights"

    def _move(self, move: isa.Move, waits: Waits) -> tuple[int, str]:
        words = move.words * move.rows * move.planes
        if not words:
            raise MachineError("transfers nothing")
        inward = move.direction == isa.MOVE_IN
        # [A] the DMA takes the bank's ports as a whole: no core computes on it meanwhile.
        start = max(max(waits)[0], self.dma_free, self.bank_compute[move.bank])
        bits = words * timing.WORD_BITS
        end = start + timing.offchip_cycles(self.arch, bits)
        self.dma_free = self.bank_move[move.bank] = end
        self.counters.bank_bits += bits
        if inward:
            self.counters.map_in_bits += bits
        else:
            self.counters.map_out_bits += bits
        self._record("dma", f"MOVE {'in' if inward else 'out'}", start, end)
        bank = _strided(move.base, move.plane, move.pitch, move, self.arch.bank_words, "bank")
        offchip = _strided(
            move.address - self.image_words,
            move.offchip_plane,
            move.offchip_pitch,
            move,
            self.region.offchip_words - self.image_words,
            "off-chip map memory",
        )
        if self.images is not None:
            cells = self.bank_cells[move.bank]
            data = self.banks[move.bank]
            if inward:
                self.map_cells.read(offchip, start, end, _whole)
                cells.write(bank, start, end, _whole)
                data[:, bank] = self.maps[:, offchip]
            else:
                cells.read(bank, start, end, _whole)
                self.map_cells.write(offchip, start, end, _whole)
                self.maps[:, offchip] = data[:, bank]
        return end, "maps"

    # -- load ----------------------------------------------------------------------------------

    def _load_start(self, core: Core, waits: Waits) -> int:
        start = max(max(waits)[0], core.load_free)
        return start if self.arch.overlap == "full" else max(start, core.compute_free)

    def _prepare(self, prepare: isa.Prepare, waits: Waits) -> tuple[int, str]:
        latest = 0
        for number in timing.core_list(prepare.cores, self.arch.cores):
            core = self.cores[number]
            start = self._load_start(core, waits)
            core.load_free = start + self.arch.array_fill_cycles
            core.open = True
            self.counters.array_fills += 1
            self._record(f"core {number} load", "PREPARE", start, core.load_free)
            latest = max(latest, core.load_free)
        return latest, "weights"

    def _fill(self, fill: isa.Fill, waits: Waits) -> tuple[int, str]:
        core = self._core(fill.core)
        weight_bits = 8 if fill.weight_bits else 4
        length = fill.count * group_set_bytes(weight_bits)
        span = core.weight.span(fill.source, length)
        slots = slice(fill.slot, fill.slot + fill.count)
        if not fill.count or slots.stop > self.arch.slots(weight_bits):
            raise MemoryAccessError(
                f"macro slots {slots.start}..{slots.stop - 1} of {self.arch.slots(weight_bits)}"
            )
        if not core.open:
            raise MachineError("writes an array that no PREPARE opened")
        start = self._load_start(core, waits)
        end = start + timing.fill_cycles(self.arch, fill)
        core.load_free = end
        self.counters.core_sram_bits += 8 * length
        self.counters.macro_write_bits += timing.fill_bits(self.arch, fill)
        self._record(f"core {fill.core} load", "FILL", start, end)
        if self.images is not None:
            core.weight.cells.read(span, start, end, _whole)
            core.slots.write(slots, start, end, _whole)
            packed = core.weight.data[fill.source : fill.source + length]
            core.macros[slots] = unpack_group_sets(packed, weight_bits)
        return end, "weights"

    # -- compute -------------------------------------------------------------------------------

    def _configure(self, setting: isa.Sas | isa.Apw | isa.Residual, waits: Waits) -> Done:
        latest = 0
        bare = attrs.evolve(setting, signal=0, wait=0)  # equal settings share cached costs
        for number in timing.core_list(setting.cores, self.arch.cores):
            core = self.cores[number]
            if isinstance(bare, isa.Sas):
                contexts = list(core.config.contexts)
                contexts[bare.context] = bare
                core.config = attrs.evolve(core.config, contexts=tuple(contexts))
            elif isinstance(bare, isa.Apw):
                core.config = attrs.evolve(core.config, apw=bare, residual=None)
            else:
                core.config = attrs.evolve(core.config, residual=bare)
            start = self._compute_start(core, waits, ())
            end = start + self.arch.issue_cycles
            self.layer.stalls["issue"] += end - start
            core.compute_free = end
            latest = max(latest, end)
        return latest, "cores"

    def _compute_start(self, core: Core, waits: Waits, banks: Sequence[int]) -> int:
        """Find when a core can start, and book its waiting under the last cause."""
        causes = [*waits]
        if self.arch.overlap != "full":
            causes.append((core.load_free, "weights"))
        if self.arch.overlap == "none":
            causes.append((core.fetch_free, "weights"))
        causes += [(self.bank_move[bank], "maps") for bank in banks]
        start, cause = max(causes)
        if start > core.compute_free:
            self.layer.stalls[cause] += start - core.compute_free
        return max(start, core.compute_free)

    def _book(self, number: int, name: str, start: int, end: int, cost: timing.Cost) -> None:
        core, layer, counters = self.cores[number], self.layer, self.counters
        core.compute_free = end
        latency = min(
            end - start - cost.macro_cycles,
            self.arch.apw_latency_cycles
            + (self.arch.macro_latency_cycles if cost.group_sets else 0),
        )
        layer.macro_cycles += cost.macro_cycles
        layer.stalls["latency"] += latency
        layer.stalls["ports"] += end - start - cost.macro_cycles - latency
        counters.group_sets += cost.group_sets
        counters.macro_accesses += cost.macro_cycles * self.arch.macros_per_core
        counters.map_reads += sum(cost.reads)
        counters.map_writes += sum(cost.writes)
        counters.bank_bits += timing.WORD_BITS * (sum(cost.reads) + cost.written_words)
        counters.core_sram_bits += 8 * (cost.index_bytes + cost.parameter_bytes)
        self._record(f"core {number} compute", name, start, end)

    def _output_banks(self, core: Core, contexts: Sequence[int]) -> list[int]:
        config = core.config
        banks = {config.output.bank, *(config.context(number).bank for number in contexts)}
        if config.residual:
            banks.add(config.residual.bank)
        return sorted(banks)

    def _conv(self, conv: isa.Conv, waits: Waits) -> tuple[int, str]:
        numbers = timing.core_list(conv.cores, self.arch.cores)
        if not conv.height * conv.width:
            raise MachineError("writes no pixel")
        bare = attrs.evolve(conv, signal=0, wait=0, y=0, x=0)
        loads, costs, starts = [], [], []
        offchip_words = 0
        for number in numbers:
            core = self.cores[number]
            core.open = False
            load = timing.decode_load(
                core.index.data.tobytes(), conv.descriptor, conv.codes, conv.slot
            )
            cost = timing.conv_cost(self.arch, bare, core.config, load)
            contexts = {segment.context for visit in load.visits for segment in visit.segments}
            banks = self._output_banks(core, sorted(contexts))
            if cost.partial_words:
                waits = [*waits, (self.dma_free, "maps")]
            elif any(not (visit.first and visit.last) for visit in load.visits):
                banks = sorted({*banks, conv.partial_bank})
            loads.append(load)
            costs.append(cost)
            starts.append(self._compute_start(core, waits, banks))
            offchip_words += cost.partial_words
            for bank in banks:
                self.bank_compute[bank] = max(self.bank_compute[bank], starts[-1] + cost.cycles)
        transfer = timing.offchip_cycles(self.arch, offchip_words * timing.WORD_BITS)
        latest = 0
        for place, number in enumerate(numbers):
            load, cost, start = loads[place], costs[place], starts[place]
            # Partial sums of all cores share the off-chip port and hold it to the end.
            end = start + max(cost.cycles, transfer if cost.partial_words else 0)
            if cost.partial_words:
                self.dma_free = max(self.dma_free, end)
            self.counters.partial_bits += cost.partial_words * timing.WORD_BITS
            self._book(number, "CONV", start, end, cost)
            latest = max(latest, end)
            if self.images is not None:
                _ConvTile(self, conv, number, start, end).execute(load)
        return latest, "cores"

    def _pool(self, pool: isa.Pool, waits: Waits) -> tuple[int, str]:
        return self._apw_pass("POOL", pool, waits, timing.pool_cost, self._pool_data, (0,))

    def _add(self, add: isa.Add, waits: Waits) -> tuple[int, str]:
        contexts = (0, 1)[: 1 + add.operands]
        return self._apw_pass("ADD", add, waits, timing.add_cost, self._add_data, contexts)

    def _apw_pass(
        self,
        name: str,
        instruction: Any,
        waits: Waits,
        cost_of: Callable[..., timing.Cost],
        data: Callable[..., None],
        contexts: Sequence[int],
    ) -> tuple[int, str]:
        numbers = timing.core_list(instruction.cores, self.arch.cores)
        if not instruction.height * instruction.width * instruction.blocks:
            raise MachineError("writes no pixel")
        latest = 0
        for place, number in enumerate(numbers):
            core = self.cores[number]
            blocks = timing.dealt_blocks(
                instruction.block, instruction.blocks, place, len(numbers)
            )
            if not len(blocks):
                continue
            cost = cost_of(self.arch, instruction, core.config, len(blocks))
            banks = self._output_banks(core, contexts)
            start = self._compute_start(core, waits, banks)
            end = start + cost.cycles
            for bank in banks:
                self.bank_compute[bank] = max(self.bank_compute[bank], end)
            self._book(number, name, start, end, cost)
            latest = max(latest, end)
            if self.images is not None:
                data(instruction, core, blocks, start, end)
        return latest, "cores"

    def _pool_data(
        self, pool: isa.Pool, core: Core, blocks: Array, start: int, end: int
    ) -> None:
        sas, apw = core.config.context(0), core.config.output
        source = _MapView(self, sas)
        average = pool.mode == isa.POOL_AVERAGE
        size = (pool.kernel_height, pool.kernel_width)
        patch, inside = source.window(
            sas, (pool.height, pool.width), size, blocks, 0 if average else -1, start, end
        )
        shape = (self.images, len(blocks), pool.height, pool.width, WORD_CHANNELS)
        best = np.full(shape, 0 if average else -1, np.int64)
        count = np.zeros((pool.height, pool.width, 1), np.int64)
        for r in range(size[0]):
            for c in range(size[1]):
                rows = _steps(r * sas.dilation_y, pool.height, sas.stride_y)
                columns = _steps(c * sas.dilation_x, pool.width, sas.stride_x)
                pixels, hit = patch[:, :, rows, columns], inside[rows, columns, None]
                if average:
                    best += np.where(hit, pixels - sas.zero, 0)
                    count += hit
                else:
                    best = np.maximum(best, pixels)
        if average:
            if pool.count_padding:
                count = np.full_like(count, size[0] * size[1])
            best = _requantize(apw, best * pool.multiplier, count)
        elif best.min(initial=0) < 0:
            raise MachineError("pools a window that lies wholly outside the map")
        _write_tile(self, apw, pool, blocks, best, start, end)

    def _add_data(self, add: isa.Add, core: Core, blocks: Array, start: int, end: int) -> None:
        apw = core.config.output
        total = np.zeros(1, np.int64)
        for number, multiplier in ((0, add.multiplier_a), (1, add.multiplier_b)):
            if number > add.operands:
                continue
            sas = core.config.context(number)
            view = _MapView(self, sas)
            tile = (add.height, add.width)
            patch, _ = view.window(sas, tile, (1, 1), blocks, sas.zero, start, end)
            rows = _steps(0, add.height, sas.stride_y)
            columns = _steps(0, add.width, sas.stride_x)
            total = total + (patch[:, :, rows, columns].astype(np.int64) - sas.zero) * multiplier
        codes = _requantize(apw, total * add.multiplier, np.ones(1, np.int64))
        _write_tile(self, apw, add, blocks, codes, start, end)

    # -- controller ----------------------------------------------------------------------------

    def _sync(self, sync: isa.Sync, waits: Waits) -> tuple[int, str]:
        return max(waits)

    def _halt(self, halt: isa.Halt, waits: Waits) -> tuple[int, str]:
        if self.index != len(self.region.instructions) - 1:
            raise MachineError("stands before the end of the program")
        waiting_for_map = self.dma_free >= self.now
        for core in self.cores:
            tail = max(0, self.now - core.compute_free)
            self.layer.stalls["maps" if waiting_for_map else "cores"] += tail
        return max(max(waits)[0], self.now), "cores"


Waits = list[tuple[int, str]]
Done = tuple[int, str]

_HANDLERS: dict[type[isa.Instruction], Callable[[Machine, Any, Waits], Done]] = {
    isa.Fetch: Machine._fetch,
    isa.Prepare: Machine._prepare,
    isa.Fill: Machine._fill,
    isa.Sas: Machine._configure,
    isa.Apw: Machine._configure,
    isa.Residual: Machine._configure,
    isa.Conv: Machine._conv,
    isa.Pool: Machine._pool,
    isa.Add: Machine._add,
    isa.Move: Machine._move,
    isa.Sync: Machine._sync,
    isa.Halt: Machine._halt,
}


# -- data ------------------------------------------------------------------------------------------


def _strided(base: int, plane: int, pitch: int, move: isa.Move, size: int, where: str) -> Array:
    """Give the words of a MOVE on one side, each once, within the memory."""
    last = base + plane * (move.planes - 1) + pitch * (move.rows - 1) + move.words - 1
    if base < 0 or last >= size:
        raise MemoryAccessError(f"{where} of {size} words addressed at {base}..{last}")
    if (move.rows > 1 and pitch < move.words) or (
        move.planes > 1 and plane < pitch * (move.rows - 1) + move.words
    ):
        raise MachineError("rows or planes of a transfer overlap")
    grid = (
        base
        + plane * np.arange(move.planes)[:, None, None]
        + pitch * np.arange(move.rows)[:, None]
        + np.arange(move.words)
    )
    return grid.reshape(-1)


def _steps(first: int, count: int, stride: int) -> slice:
    return slice(first, first + (count - 1) * stride + 1, stride)


def _requantize(apw: isa.Apw, scaled: Array, count: Array) -> Array:
    code = divide_half_even(scaled, count << np.int64(apw.shift)) + apw.zero
    return np.clip(code, apw.low, apw.high)


def _write_tile(
    machine: Machine, apw: isa.Apw, at: Any, blocks: Array, codes: Array, start: int, end: int
) -> None:
    """Write codes ``[N, block, row, column, 16]`` as POOL and ADD do."""
    view = _MapView(machine, apw)
    for i, block in enumerate(blocks):
        view.write(int(block), at.y, at.x, codes[:, i], start, end)


class _MapView:
    """A map that lies in a bank, as a SAS, APW or RESIDUAL setting describes it."""

    def __init__(
        self,
        machine: Machine,
        setting: isa.Sas | isa.Apw | isa.Residual,
        words: int | None = None,
    ) -> None:
        self.first = getattr(setting, "block", 0)
        self.planes = words or 1 + setting.wide
        self.shape = (setting.blocks, setting.height, setting.width)
        size = self.planes * setting.blocks * setting.height * setting.width
        stop = setting.base + size
        if stop > machine.arch.bank_words:
            raise MemoryAccessError(
                f"bank {setting.bank} of {machine.arch.bank_words} words addressed at "
                f"{setting.base}..{stop - 1}"
            )
        self.span = slice(setting.base, stop)
        self.cells = machine.bank_cells[setting.bank]
        self.data = machine.banks[setting.bank]

    def view(self, state: Array) -> Array:
        """Give a state of the cells as ``[plane, block, row, column]``."""
        return state[self.span].reshape(self.planes, *self.shape)

    def codes(self, blocks: Array | None = None) -> Array:
        """Give the codes of some blocks ``[N, block, row, column, 16]``."""
        grid = self.data[:, self.span].reshape(
            self.data.shape[0], self.planes, *self.shape, WORD_BYTES
        )
        chosen = grid if blocks is None else grid[:, :, blocks]
        return join_nibbles(chosen.swapaxes(0, 1))

    def window(
        self,
        sas: isa.Sas,
        tile: tuple[int, int],
        kernel: tuple[int, int],
        blocks: Array,
        fill: int,
        start: int,
        end: int,
        read: Callable[[Array], None] | None = None,
    ) -> tuple[Array, Array]:
        """Give the padded input of a tile, and which of its pixels lie inside the map.

        Reads are checked for the pixels that the window meets; ``read`` may mark fewer.
        """
        blocks = blocks - self.first
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < self.shape[0]:
            raise MemoryAccessError(
                f"channel blocks {blocks.min()}..{blocks.max()} of {self.shape[0]}"
            )
        y = sas.origin_y + np.arange(
            (tile[0] - 1) * sas.stride_y + (kernel[0] - 1) * sas.dilation_y + 1
        )
        x = sas.origin_x + np.arange(
            (tile[1] - 1) * sas.stride_x + (kernel[1] - 1) * sas.dilation_x + 1
        )
        inside_y = (y >= 0) & (y < self.shape[1])
        inside_x = (x >= 0) & (x < self.shape[2])
        patch = np.full(
            (self.data.shape[0], len(blocks), len(y), len(x), WORD_CHANNELS), fill, np.int16
        )
        if inside_y.any() and inside_x.any():
            rows = slice(y[inside_y][0], y[inside_y][-1] + 1)
            columns = slice(x[inside_x][0], x[inside_x][-1] + 1)
            py = slice(int(inside_y.argmax()), int(inside_y.argmax()) + rows.stop - rows.start)
            px = slice(
                int(inside_x.argmax()), int(inside_x.argmax()) + columns.stop - columns.start
            )
            patch[:, :, py, px] = self.codes(blocks)[:, :, rows, columns]
        met = np.zeros((len(blocks), *self.shape[1:]), bool)
        if read is None:
            for r in range(kernel[0]):
                for c in range(kernel[1]):
                    mark_tap(met, slice(None), sas, tile, r, c)
        else:
            read(met)
        mask = np.zeros(self.shape, bool)
        mask[blocks] = met
        self.cells.read((slice(None), mask), start, end, self.view)
        return patch, inside_y[:, None] & inside_x

    def write(
        self, block: int, y: int, x: int, codes: Array, start: int, end: int
    ) -> None:
        """Write codes ``[N, row, column, 16]`` of one block."""
        rows, columns = slice(y, y + codes.shape[1]), slice(x, x + codes.shape[2])
        block = self.check_tile(block, rows, columns)
        self.cells.write((slice(None), block, rows, columns), start, end, self.view)
        grid = self.data[:, self.span].reshape(
            self.data.shape[0], self.planes, *self.shape, WORD_BYTES
        )
        words = split_nibbles(codes.astype(np.uint8), self.planes)
        grid[:, :, block, rows, columns] = words.swapaxes(0, 1)

    def check_tile(self, block: int, rows: slice, columns: slice) -> int:
        """Refuse a tile outside the map; give the stored block."""
        block -= self.first
        if (
            not 0 <= block < self.shape[0]
            or rows.stop > self.shape[1]
            or columns.stop > self.shape[2]
        ):
            raise MemoryAccessError(
                f"tile of block {block}, rows {rows.start}..{rows.stop - 1}, columns "
                f"{columns.start}..{columns.stop - 1} of a map of {self.shape}"
            )
        return block


def mark_tap(
    met: Array, block: Any, sas: isa.Sas, tile: tuple[int, int], r: int, c: int
) -> None:
    """Mark the pixels ``met[block, row, column]`` that a tap of a tile reads."""
    ranges = []
    for offset, stride, count, size in (
        (r * sas.dilation_y + sas.origin_y, sas.stride_y, tile[0], met.shape[1]),
        (c * sas.dilation_x + sas.origin_x, sas.stride_x, tile[1], met.shape[2]),
    ):
        first = offset if offset >= 0 else offset + -(-(-offset) // stride) * stride
        last = min(offset + (count - 1) * stride, size - 1)
        ranges.append(slice(first, max(first, last + 1), stride))
    met[block, ranges[0], ranges[1]] = True


class _ConvTile:
    """The data of one CONV on one core."""

    def __init__(
        self, machine: Machine, conv: isa.Conv, number: int, start: int, end: int
    ) -> None:
        self.machine, self.conv, self.core = machine, conv, machine.cores[number]
        self.apw = self.core.config.output
        self.start, self.end = start, end
        self.tile = (conv.height * self.apw.pool_height, conv.width * self.apw.pool_width)
        self.images = machine.images or 0
        pixels = self.tile[0] * self.tile[1]
        self.partial_at = conv.partial_base + timing.RAW_WORDS * pixels * number
        self.partial_words = timing.RAW_WORDS * pixels

    def execute(self, load: timing.Load) -> None:
        """Convolve, finish and write every visit."""
        self._mark_srams(load)
        patches = self._patches(load)
        parameters = self.conv.parameters
        size = block_parameter_bytes(self.apw.mode == isa.MODE_MULTIPLIER)
        for visit in load.visits:
            record = self.core.parameter.data[parameters : parameters + size]
            parameters += size
            bias, multiplier, shift = unpack_parameters(record)
            if visit.first:
                acc = np.broadcast_to(bias, (self.images, *self.tile, WORD_CHANNELS))
            else:
                acc = self._read_partial()
            for segment in visit.segments:
                if segment.taps:
                    acc = acc + self._products(segment, *patches[segment.context])
            if np.abs(acc).max() >= 2**31:
                raise MachineError("an accumulator leaves 32 bits")
            if visit.last:
                self._finish(visit.block, acc, multiplier, shift)
            else:
                self._write_partial(acc)

    def _mark_srams(self, load: timing.Load) -> None:
        core, conv, start, end = self.core, self.conv, self.start, self.end
        size = block_parameter_bytes(self.apw.mode == isa.MODE_MULTIPLIER) * len(load.visits)
        for sram, at, length in (
            (core.index, conv.descriptor, load.segments * isa.SEGMENT_BYTES),
            (core.index, conv.codes, load.codes * isa.CODE_BYTES),
            (core.parameter, conv.parameters, size),
        ):
            sram.cells.read(sram.span(at, length), start, end, _whole)
        if conv.slot + load.codes > len(core.macros):
            raise MemoryAccessError(
                f"macro slots {conv.slot}..{conv.slot + load.codes - 1} of {len(core.macros)}"
            )
        core.slots.read(slice(conv.slot, conv.slot + load.codes), start, end, _whole)

    def _patches(self, load: timing.Load) -> dict[int, tuple[Array, dict[int, int]]]:
        """Gather each context's input once for all visits."""
        used: dict[int, set[tuple[int, int]]] = {}
        for visit in load.visits:
            for segment in visit.segments:
                places = zip(segment.taps, segment.blocks, strict=True)
                used.setdefault(segment.context, set()).update(places)
        patches = {}
        for context, places in used.items():
            sas = self.core.config.context(context)
            if not places:
                continue
            blocks = sorted({block for _, block in places})
            where = {block: i for i, block in enumerate(blocks)}
            taps = sorted({tap for tap, _ in places})
            kernel = (max(taps) // sas.kernel_width + 1, sas.kernel_width)

            def mark(met: Array, sas: isa.Sas = sas, places: Any = places, at: Any = where) -> None:
                for tap, block in places:
                    r, c = divmod(tap, sas.kernel_width)
                    mark_tap(met, at[block], sas, self.tile, r, c)

            view = _MapView(self.machine, sas)
            patch, _ = view.window(
                sas, self.tile, kernel, np.array(blocks), sas.zero, self.start, self.end, mark
            )
            patches[context] = (patch.astype(np.float32), where)
        return patches

    def _products(
        self, segment: timing.LoadedSegment, patch: Array, where: dict[int, int]
    ) -> Array:
        sas = self.core.config.context(segment.context)
        places = []
        for tap, block in zip(segment.taps, segment.blocks, strict=True):
            r, c = divmod(tap, sas.kernel_width)
            places.append((where[block], r * sas.dilation_y, c * sas.dilation_x))
        weights = self.core.macros[segment.slot : segment.slot + len(places)]
        products = convolve_group_sets(
            patch, weights, places, self.tile, (sas.stride_y, sas.stride_x)
        )
        return products << sas.shift

    def _partial_store(self) -> tuple[Cells, Array, slice]:
        machine, conv = self.machine, self.conv
        offchip = conv.partial == isa.PARTIAL_OFFCHIP
        at = self.partial_at - (machine.image_words if offchip else 0)
        cells = machine.map_cells if offchip else machine.bank_cells[conv.partial_bank]
        data = machine.maps if offchip else machine.banks[conv.partial_bank]
        if at < 0 or at + self.partial_words > data.shape[1]:
            raise MemoryAccessError(
                f"partial sums at word {at} of {cells.name} with {data.shape[1]} words"
            )
        return cells, data, slice(at, at + self.partial_words)

    def _read_partial(self) -> Array:
        cells, data, span = self._partial_store()
        cells.check_read(cells.ready[span], self.start)
        words = np.ascontiguousarray(data[:, span])
        return words.view("<i4").reshape(-1, *self.tile, WORD_CHANNELS).astype(np.int64)

    def _write_partial(self, acc: Array) -> None:
        cells, data, span = self._partial_store()
        cells.write(span, self.start, self.end, _whole)
        flat = np.ascontiguousarray(acc.astype("<i4")).view(np.uint8)
        data[:, span] = flat.reshape(self.images, -1, WORD_BYTES)

    def _finish(self, block: int, acc: Array, multiplier: Array, shift: Array) -> None:
        conv, apw = self.conv, self.apw
        rows = slice(conv.y, conv.y + conv.height)
        columns = slice(conv.x, conv.x + conv.width)
        words = timing.RAW_WORDS if apw.mode == isa.MODE_RAW else None
        view = _MapView(self.machine, apw, words)
        place = (slice(None), view.check_tile(block, rows, columns), rows, columns)
        residual = self.core.config.residual
        if residual:
            acc = acc + self._residual(residual, block, place, view)
        view.cells.write(place, self.start, self.end, view.view)
        if apw.mode == isa.MODE_RAW:
            self._write_raw(view, place[1], rows, columns, acc)
            return
        codes = max_windows(
            _apw_codes(apw, acc, multiplier, shift), apw.pool_height, apw.pool_width
        )
        grid = view.data[:, view.span].reshape(self.images, view.planes, *view.shape, WORD_BYTES)
        split = split_nibbles(codes.astype(np.uint8), view.planes)
        grid[:, :, place[1], rows, columns] = split.swapaxes(0, 1)

    def _write_raw(
        self, view: _MapView, block: int, rows: slice, columns: slice, acc: Array
    ) -> None:
        # [block][row][column][8 words]: a pixel's sixteen accumulators lie together.
        grid = view.data[:, view.span].reshape(
            self.images, *view.shape, timing.RAW_WORDS * WORD_BYTES
        )
        flat = np.ascontiguousarray(acc.astype("<i4")).view(np.uint8)
        grid[:, block, rows, columns] = flat.reshape(*acc.shape[:3], -1)

    def _residual(self, residual: isa.Residual, block: int, written: Any, out: _MapView) -> Array:
        view = _MapView(self.machine, residual)
        rows = slice(residual.y, residual.y + self.tile[0])
        columns = slice(residual.x, residual.x + self.tile[1])
        place = (slice(None), view.check_tile(block, rows, columns), rows, columns)
        in_place = (view.cells, view.span, view.shape, place) == (
            out.cells,
            out.span,
            out.shape,
            written,
        )
        if in_place:  # each pixel is read just before it is overwritten
            view.cells.check_read(view.view(view.cells.ready)[place], self.start)
        else:
            view.cells.read(place, self.start, self.end, view.view)
        codes = view.codes(np.array([place[1]]))[:, 0, rows, columns]
        return codes.astype(np.int64) << residual.shift


def _apw_codes(apw: isa.Apw, acc: Array, multiplier: Array, shift: Array) -> Array:
    if apw.mode == isa.MODE_MULTIPLIER:
        if shift.size and shift.max() > 62:
            raise MachineError(f"requantization shift {shift.max()} above 62")
        code = divide_half_even(acc * multiplier, np.int64(1) << shift)
        return np.clip(code + apw.zero, apw.low, apw.high)
    top = 255 if apw.wide else 15
    one = np.int64(1) << np.int64(apw.shift)
    clamped = np.clip(acc, 0, one)
    # acc * (2**bits - 1) = (acc << bits) - acc: no multiplier.
    code = divide_half_even(clamped * top, one) + apw.zero
    return np.clip(code, apw.low, apw.high)


def simulate(region: Region, arch: MarsArch, trace: bool = False) -> Timeline:
    """Give the timeline of a region, without data.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    return Machine(region, arch, trace=trace).run()

