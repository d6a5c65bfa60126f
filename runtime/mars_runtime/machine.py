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
from typing import Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from . import isa, timing
from .arch import MarsArch
from .datapath import ConvTile, add_tile, pool_tile
from .errors import MachineError, MemoryAccessError
from .maps import WORD_BYTES, pack_map, unpack_map
from .memory import ChipMemory, Core, whole
from .packing import group_set_bytes, unpack_group_sets
from .program import Region
from .timeline import Event, LayerTime, Timeline

__all__ = ["Machine", "simulate", "transfer_words"]

Array = npt.NDArray[Any]

# A time with what is to blame for it, see STALLS.
Done = tuple[int, str]
Kind = TypeVar("Kind", bound=isa.Instruction)


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

    reads_codes = True  # whether loads are decoded from the index SRAMs

    def __init__(
        self, region: Region, arch: MarsArch, images: int | None = None, trace: bool = False
    ) -> None:
        self.region, self.arch = region, arch
        self.length = len(region.instructions)
        self.trace = trace
        self.events: list[Event] = []
        self.cores = [Core(number, arch) for number in range(arch.cores)]
        self.bank_compute = [0] * arch.banks  # until when cores use the bank
        self.bank_move = [0] * arch.banks  # until when DMA uses it
        self.dma_free = self.issued = self.now = 0
        self.tokens: dict[int, tuple[int, str]] = {}
        self.layers = [LayerTime(layer.name, layer.kind) for layer in region.layers]
        self.layers = self.layers or [LayerTime("region", "region")]
        self.computed = [0] * len(self.layers)  # until when a layer's cores compute
        self.layer_number = self.index = 0
        self.layer = self.layers[0]  # whose instructions run
        self.counters = self.layer.counters
        self.image_words = -(-region.image_bytes // WORD_BYTES)
        self.memory: ChipMemory | None = None
        if images is not None:
            try:
                self.memory = ChipMemory(arch, images, self.image_words, region.offchip_words)
            except MemoryError:
                raise MachineError(
                    f"{images} images take {region.offchip_words * WORD_BYTES * images} bytes "
                    f"off-chip, more than this host has",
                    hint="run fewer images at once",
                ) from None

    # -- input, output, execution --------------------------------------------------------------

    def write_input(self, port: int, codes: Array) -> None:
        """Place stored codes ``[N, C, H, W]`` in off-chip memory."""
        entry = self.region.inputs[port]
        at = entry.address - self.image_words
        memory = self._data()
        memory.maps[:, at : at + entry.type.words] = pack_map(codes, entry.type)
        memory.map_cells.ready[at : at + entry.type.words] = 1

    def read_output(self, port: int) -> Array:
        """Give stored codes or accumulators ``[N, C, H, W]`` from off-chip memory.

        Raises
        ------
        PoisonError
            If the program did not write all of them.
        """
        entry = self.region.outputs[port]
        at = entry.address - self.image_words
        memory = self._data()
        memory.map_cells.check_read(memory.map_cells.ready[at : at + entry.type.words], self.now)
        return unpack_map(memory.maps[:, at : at + entry.type.words], entry.type)

    def _data(self) -> ChipMemory:
        if self.memory is None:
            raise MachineError("holds no data: it was made for a timeline", hint="pass images=")
        return self.memory

    def run(self) -> Timeline:
        """Execute the region.

        Raises
        ------
        MachineError
            If an instruction does what the hardware cannot: the error names the instruction.
        """
        stops = [layer.stop for layer in self.region.layers] or [len(self.region.instructions)]
        for index, instruction in enumerate(self.region.instructions):
            self.index = index
            while self.index >= stops[self.layer_number] and self.layer_number + 1 < len(stops):
                self._end_layer()
            try:
                self._step(instruction, instruction.wait, instruction.signal)
            except MachineError as error:
                name = type(instruction).__name__.upper()
                place = f"instruction {self.index} ({name}, {self.layers[self.layer_number].name})"
                raise type(error)(error.problem, where=place, hint=error.hint) from None
        self._end_layer()
        return Timeline(self.now, tuple(self.layers), tuple(self.events))

    def _end_layer(self) -> None:
        self.layer.cycles = self.now - self.layer.start
        if self.layer_number + 1 < len(self.layers):
            self.layer_number += 1
            self.layer = self.layers[self.layer_number]
            self.counters = self.layer.counters
            self.layer.start = self.now

    def _step(self, instruction: isa.Instruction, wait: int, signal: int) -> None:
        self.issued += self.arch.issue_cycles
        self.counters.instruction_bits += 8 * isa.INSTRUCTION_BYTES
        waited = (self.issued, "issue")
        while wait:
            token = (wait & -wait).bit_length() - 1
            wait &= wait - 1
            if token not in self.tokens:
                raise MachineError(f"waits for token {token}, which nothing signals: a deadlock")
            waited = max(waited, self.tokens[token])
        done = _HANDLERS[type(instruction)](self, instruction, waited)
        if done[0] > self.now:
            self.now = done[0]
        if signal:
            self.tokens[signal - 1] = done

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        if self.trace:
            self.events.append(Event(lane, name, self.layer_number, self.index, start, end))

    def _core(self, number: int) -> Core:
        if number >= len(self.cores):
            raise MachineError(f"core {number} on a chip of {len(self.cores)} cores")
        return self.cores[number]

    # -- dma -----------------------------------------------------------------------------------

    def _fetch(self, fetch: isa.Fetch, waited: Done) -> Done:
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
        start = max(waited[0], self.dma_free)
        if self.arch.overlap == "none":
            start = max(start, core.compute_free)
        bits = 8 * fetch.length
        end = start + timing.offchip_cycles(self.arch, bits)
        self.dma_free = core.fetch_free = end
        self.counters.fetched_bits += bits
        self.counters.core_sram_bits += bits
        self._record("dma", f"FETCH {('weight', 'index', 'parameter')[fetch.memory]}", start, end)
        # The timeline needs the index codes too: they decide how long a CONV takes.
        if self.memory is not None or (fetch.memory == isa.MEMORY_INDEX and self.reads_codes):
            sram.cells.write(span, start, end, whole)
            data = self.region.image[fetch.source : fetch.source + fetch.length]
            sram.data[fetch.destination : fetch.destination + fetch.length] = np.frombuffer(
                data, np.uint8
            )
        return end, "weights"

    def _move(self, move: isa.Move, waited: Done) -> Done:
        words = move.words * move.rows * move.planes
        if not words:
            raise MachineError("transfers nothing")
        inward = move.direction == isa.MOVE_IN
        # [A] the DMA takes the bank's ports as a whole: no core computes on it meanwhile.
        start = max(waited[0], self.dma_free, self.bank_compute[move.bank])
        bits = words * timing.WORD_BITS
        end = start + timing.offchip_cycles(self.arch, bits)
        self.dma_free = self.bank_move[move.bank] = end
        self.counters.bank_bits += bits
        if inward:
            self.counters.map_in_bits += bits
        else:
            self.counters.map_out_bits += bits
        self._record("dma", f"MOVE {'in' if inward else 'out'}", start, end)
        bank_size = self.arch.bank_words
        map_size = self.region.offchip_words - self.image_words
        address = move.address - self.image_words
        _check_span(move, move.base, move.plane, move.pitch, bank_size, "bank")
        _check_span(
            move, address, move.offchip_plane, move.offchip_pitch, map_size, "off-chip map memory"
        )
        if self.memory is not None:
            data, cells = self.memory.banks[move.bank], self.memory.bank_cells[move.bank]
            bank = transfer_words(move, move.base, move.plane, move.pitch)
            offchip = transfer_words(move, address, move.offchip_plane, move.offchip_pitch)
            if inward:
                self.memory.map_cells.read(offchip, start, end, whole)
                cells.write(bank, start, end, whole)
                data[:, bank] = self.memory.maps[:, offchip]
            else:
                cells.read(bank, start, end, whole)
                self.memory.map_cells.write(offchip, start, end, whole)
                self.memory.maps[:, offchip] = data[:, bank]
        return end, "maps"

    # -- load ----------------------------------------------------------------------------------

    def _load_start(self, core: Core, waited: Done) -> int:
        start = max(waited[0], core.load_free)
        return start if self.arch.overlap == "full" else max(start, core.compute_free)

    def _prepare(self, prepare: isa.Prepare, waited: Done) -> Done:
        latest = 0
        for number in timing.core_list(prepare.cores, self.arch.cores):
            core = self.cores[number]
            start = self._load_start(core, waited)
            core.load_free = start + self.arch.array_fill_cycles
            core.open = True
            self.counters.array_fills += 1
            self._record(f"core {number} load", "PREPARE", start, core.load_free)
            latest = max(latest, core.load_free)
        return latest, "weights"

    def _fill(self, fill: isa.Fill, waited: Done) -> Done:
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
        start = self._load_start(core, waited)
        end = start + timing.fill_cycles(self.arch, fill)
        core.load_free = end
        self.counters.core_sram_bits += 8 * length
        self.counters.macro_write_bits += timing.fill_bits(self.arch, fill)
        self._record(f"core {fill.core} load", "FILL", start, end)
        if self.memory is not None:
            core.weight.cells.read(span, start, end, whole)
            core.slots.write(slots, start, end, whole)
            packed = core.weight.data[fill.source : fill.source + length]
            core.macros[slots] = unpack_group_sets(packed, weight_bits)
        return end, "weights"

    # -- compute -------------------------------------------------------------------------------

    def _configure(self, setting: isa.Sas | isa.Apw | isa.Residual, waited: Done) -> Done:
        latest = 0
        bare = _without_tokens(setting)  # equal settings share cached costs
        for number in timing.core_list(setting.cores, self.arch.cores):
            core = self.cores[number]
            core.config = timing.configured(core.config, bare)
            start = self._compute_start(core, waited, ())
            end = start + self.arch.issue_cycles
            self.layer.stalls["issue"] += end - start
            core.compute_free = end
            latest = max(latest, end)
        return latest, "cores"

    def _compute_start(self, core: Core, waited: Done, banks: Sequence[int]) -> int:
        """Find when a core can start, and book its waiting."""
        causes = [waited]
        if self.arch.overlap != "full":
            causes.append((core.load_free, "weights"))
        if self.arch.overlap == "none":
            causes.append((core.fetch_free, "weights"))
        causes += [(self.bank_move[bank], "maps") for bank in banks]
        start, cause = max(causes)
        self._book_wait(core.compute_free, start, cause)
        return max(start, core.compute_free)

    def _book_wait(self, since: int, until: int, cause: str) -> None:
        """Book a core's waiting, in its own layer under the last cause.

        What lies before the end of the layer before is the time in which other cores computed
        that, and maps left behind them; unless the core runs ahead of them.
        """
        if until <= since:
            return
        ahead = until <= self.layer.start
        begin = since if ahead else max(since, self.layer.start)
        self.layer.stalls[cause] += until - begin
        self._book_idle(since, begin, self.layer_number - 1)

    def _book_idle(self, since: int, until: int, number: int) -> None:
        """Book a core's time without work, back from a layer."""
        while since < until:
            layer = self.layers[number]
            first = max(since, layer.start)
            computed = min(max(first, self.computed[number]), until)
            layer.stalls["cores"] += computed - first
            layer.stalls["maps"] += until - computed
            until, number = first, number - 1

    def _book(self, number: int, name: str, start: int, end: int, cost: timing.Cost) -> None:
        core, layer, counters = self.cores[number], self.layer, self.counters
        core.compute_free = end
        self.computed[self.layer_number] = max(self.computed[self.layer_number], end)
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

    def _conv(self, conv: isa.Conv, waited: Done) -> Done:
        numbers = timing.core_list(conv.cores, self.arch.cores)
        if not conv.height * conv.width:
            raise MachineError("writes no pixel")
        loads, costs, starts = [], [], []
        offchip_words = 0
        splits = False
        for number in numbers:
            core = self.cores[number]
            core.open = False
            load = self._load_of(core, conv)
            cost = timing.conv_cost(self.arch, conv, core.config, load)
            _refuse_unused(core.config.output, *_UNUSED_BY_MODE[core.config.output.mode])
            contexts = {segment.context for visit in load.visits for segment in visit.segments}
            banks = self._output_banks(core, sorted(contexts))
            own_waited = waited
            if load.splits:
                splits = True
                if cost.partial_words:
                    own_waited = max(waited, (self.dma_free, "maps"))
                else:
                    banks = sorted({*banks, conv.partial_bank})
            loads.append(load)
            costs.append(cost)
            starts.append(self._compute_start(core, own_waited, banks))
            offchip_words += cost.partial_words
            for bank in banks:
                self.bank_compute[bank] = max(self.bank_compute[bank], starts[-1] + cost.cycles)
        if not splits:
            _refuse_unused(conv, "partial", "partial_bank", "partial_base")
        elif conv.partial == isa.PARTIAL_OFFCHIP:
            _refuse_unused(conv, "partial_bank")
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
            if self.memory is not None:
                ConvTile(self.memory, self.cores[number], conv, start, end).execute(load)
        return latest, "cores"

    def _load_of(self, core: Core, conv: isa.Conv) -> timing.DecodedLoad:
        """Walk the load that a core computes with."""
        return timing.decode_load(core.index.data.tobytes(), conv.descriptor, conv.codes, conv.slot)

    def _pool(self, pool: isa.Pool, waited: Done) -> Done:
        return self._apw_pass("POOL", pool, waited, timing.pool_cost, pool_tile, (0,))

    def _add(self, add: isa.Add, waited: Done) -> Done:
        contexts = (0, 1)[: 1 + add.operands]
        return self._apw_pass("ADD", add, waited, timing.add_cost, add_tile, contexts)

    def _apw_pass(
        self,
        name: str,
        instruction: Any,
        waited: Done,
        cost_of: Callable[..., timing.Cost],
        data: Callable[..., None],
        contexts: Sequence[int],
    ) -> Done:
        numbers = timing.core_list(instruction.cores, self.arch.cores)
        if not instruction.height * instruction.width * instruction.blocks:
            raise MachineError("writes no pixel")
        latest = 0
        for place, number in enumerate(numbers):
            core = self.cores[number]
            blocks = timing.dealt_blocks(instruction.block, instruction.blocks, place, len(numbers))
            if not len(blocks):
                continue
            cost = cost_of(self.arch, instruction, core.config, len(blocks))
            _refuse_unused(core.config.output, "mode", "pool_height", "pool_width")
            if name == "POOL" and instruction.mode == isa.POOL_MAX:
                _refuse_unused(core.config.output, "shift", "zero", "low", "high")
                _refuse_unused(instruction, "multiplier", "count_padding")
            if name == "ADD" and not instruction.operands:
                _refuse_unused(instruction, "multiplier_b")
            for context in contexts:
                _refuse_unused(core.config.context(context), "shift", "kernel_width")
            banks = self._output_banks(core, contexts)
            start = self._compute_start(core, waited, banks)
            end = start + cost.cycles
            for bank in banks:
                self.bank_compute[bank] = max(self.bank_compute[bank], end)
            self._book(number, name, start, end, cost)
            latest = max(latest, end)
            if self.memory is not None:
                data(self.memory, instruction, core, blocks, start, end)
        return latest, "cores"

    # -- controller ----------------------------------------------------------------------------

    def _sync(self, sync: isa.Sync, waited: Done) -> Done:
        return waited

    def _halt(self, halt: isa.Halt, waited: Done) -> Done:
        if self.index != self.length - 1:
            raise MachineError("stands before the end of the program")
        end = max(waited[0], self.now)
        for core in self.cores:
            self._book_idle(core.compute_free, end, self.layer_number)
        return end, "cores"


_DEFAULTS = {
    spec: {one.name: one.default for one in attrs.fields(spec)} for spec in isa.INSTRUCTIONS
}

# Fields of APW that CONV does not use.
_UNUSED_BY_MODE = {
    isa.MODE_SHIFT: (),
    isa.MODE_MULTIPLIER: ("shift",),
    isa.MODE_RAW: ("shift", "wide", "zero", "low", "high", "pool_height", "pool_width"),
}

_HANDLERS: dict[type[isa.Instruction], Callable[[Machine, Any, Done], Done]] = {
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


def _without_tokens(instruction: Kind) -> Kind:
    if not (instruction.signal or instruction.wait):
        return instruction
    return attrs.evolve(instruction, signal=0, wait=0)


def _refuse_unused(setting: isa.Instruction, *names: str) -> None:
    """Refuse fields that have no meaning here, so that no bit of a program is without effect."""
    for name in names:
        value = getattr(setting, name)
        if value != _DEFAULTS[type(setting)][name]:
            kind = type(setting).__name__.upper()
            raise MachineError(f"{kind} has {name}={value}, which means nothing here")


def _check_span(move: isa.Move, base: int, plane: int, pitch: int, size: int, where: str) -> None:
    """Refuse a MOVE that leaves a memory or touches a word twice on one side."""
    last = base + plane * (move.planes - 1) + pitch * (move.rows - 1) + move.words - 1
    if base < 0 or last >= size:
        raise MemoryAccessError(f"{where} of {size} words addressed at {base}..{last}")
    if (move.rows > 1 and pitch < move.words) or (
        move.planes > 1 and plane < pitch * (move.rows - 1) + move.words
    ):
        raise MachineError("rows or planes of a transfer overlap")


def transfer_words(move: isa.Move, base: int, plane: int, pitch: int) -> Array:
    """Give the words of a MOVE on one side, in the order in which they travel."""
    grid = (
        base
        + plane * np.arange(move.planes)[:, None, None]
        + pitch * np.arange(move.rows)[:, None]
        + np.arange(move.words)
    )
    return grid.reshape(-1)


def simulate(region: Region, arch: MarsArch, trace: bool = False) -> Timeline:
    """Give the timeline of a region, without data.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    return Machine(region, arch, trace=trace).run()
