"""The timed four-core machine: executes a region's instructions on its units and memories.

With images it moves real bytes: banks, weight, index and parameter SRAMs, macros and off-chip
memory are poisoned at reset; reading a cell that nothing wrote, or touching one that another unit
is still using, is an error. Without images it is the timeline: the same instructions, the same
start times and counts, no data.

Time is in core cycles. Program order is issue order, so that one pass gives every start: the latest
of issue, the unit's own queue, the tokens waited for, and the architecture's overlap rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from . import isa, timing
from .arch import MarsArch
from .datapath import ConvTile, add_tile, pool_tile
from .errors import MachineError, MemoryAccessError
from .maps import WORD_BYTES, pack_map, unpack_map
from .memory import ChipMemory, Core, Sram, whole
from .packing import unpack_group_sets
from .program import Region
from .timeline import Event, LayerTime, Timeline

__all__ = ["Machine", "simulate", "transfer_words"]

Array = npt.NDArray[Any]

# A time with what is to blame for it, see STALLS.
Done = tuple[int, str]
AT_ONCE: Done = (0, "")
# A core, what CONV costs there, and for how many cycles it takes the core.
ConvCost: TypeAlias = tuple[int, timing.Cost, int]
INSTRUCTION_BITS = 8 * isa.INSTRUCTION_BYTES
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
        self.issue_cycles, self.overlap = arch.issue_cycles, arch.overlap
        self.length = len(region.instructions)
        self.trace = trace
        self.events: list[Event] = []
        self.cores = [Core(number, arch) for number in range(arch.cores)]
        self.bank_compute = [0] * arch.banks  # until when cores use the bank
        self.bank_move = [0] * arch.banks  # until when DMA uses it
        self.dma_free = self.issued = self.now = 0
        self.tokens: dict[int, Done] = {}  # by mask of one
        self.layers = [LayerTime(layer.name, layer.kind) for layer in region.layers]
        self.layers = self.layers or [LayerTime("region", "region")]
        self.computed = [0] * len(self.layers)  # until when a layer's cores compute
        self.layer_number = self.index = 0
        self.layer = self.layers[0]  # whose instructions run
        self.counters = self.layer.counters
        self.costs: list[timing.Cost] = []  # of what cores compute in the layer
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
        self._book_costs()
        if self.layer_number + 1 < len(self.layers):
            self.layer_number += 1
            self.layer = self.layers[self.layer_number]
            self.counters = self.layer.counters
            self.layer.start = self.now

    def _step(self, instruction: isa.Instruction, wait: int, signal: int) -> None:
        waited = AT_ONCE
        while wait:
            token = wait & -wait
            wait ^= token
            signalled = self.tokens.get(token)
            if signalled is None:
                number = token.bit_length() - 1
                raise MachineError(f"waits for token {number}, which nothing signals: a deadlock")
            if signalled > waited:
                waited = signalled
        done = self._execute(instruction, waited)
        if signal:
            self.tokens[1 << signal - 1] = done

    def _execute(self, instruction: isa.Instruction, waited: Done) -> Done:
        """Issue and execute an instruction that has waited for others."""
        self.issued += self.issue_cycles
        self.counters.instruction_bits += INSTRUCTION_BITS
        issued = (self.issued, "issue")
        done = _HANDLERS[type(instruction)](
            self, instruction, issued if issued > waited else waited
        )
        if done[0] > self.now:
            self.now = done[0]
        return done

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        self.events.append(Event(lane, name, self.layer_number, self.index, start, end))

    def _core(self, number: int) -> Core:
        if number >= len(self.cores):
            raise MachineError(f"core {number} on a chip of {len(self.cores)} cores")
        return self.cores[number]

    # -- dma -----------------------------------------------------------------------------------

    def _fetch(self, fetch: isa.Fetch, waited: Done) -> Done:
        core, sram, length = self._checked_fetch(fetch)
        if fetch.source + length > self.region.image_bytes:
            raise MemoryAccessError(
                f"off-chip image of {self.region.image_bytes} bytes addressed at "
                f"{fetch.source}..{fetch.source + length - 1}"
            )
        bits = 8 * length
        cycles = timing.offchip_cycles(self.arch, bits)
        end = self._end_of_fetch(core, waited[0], cycles)
        self.counters.fetched_bits += bits
        self.counters.core_sram_bits += bits
        if self.trace:
            name = ("weight", "index", "parameter")[fetch.memory]
            self._record("dma", f"FETCH {name}", end - cycles, end)
        # The timeline needs the index codes too: they decide how long a CONV takes.
        if self.memory is not None or (fetch.memory == isa.MEMORY_INDEX and self.reads_codes):
            sram.cells.write(sram.span(fetch.destination, length), end - cycles, end, whole)
            data = self.region.image[fetch.source : fetch.source + length]
            sram.data[fetch.destination : fetch.destination + length] = np.frombuffer(
                data, np.uint8
            )
        return end, "weights"

    def _checked_fetch(self, fetch: isa.Fetch) -> tuple[Core, Sram, int]:
        """Give the core, its SRAM and the bytes of a FETCH, or refuse it."""
        core, length = self._core(fetch.core), fetch.length
        sram = core.srams[fetch.memory]
        sram.check(fetch.destination, length)
        if not length:
            raise MachineError("transfers nothing")
        return core, sram, length

    def _end_of_fetch(self, core: Core, waited: int, cycles: int) -> int:
        """Give when a FETCH ends, for which the DMA is taken until then."""
        start = waited
        if self.dma_free > start:
            start = self.dma_free
        if self.overlap == "none" and core.compute_free > start:
            start = core.compute_free
        self.dma_free = core.fetch_free = end = start + cycles
        return end

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
        if self.trace:
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

    def _end_of_load(self, core: Core, waited: int, cycles: int) -> int:
        """Give when a PREPARE or FILL ends, for which a core's load unit is taken until then."""
        start = waited
        if core.load_free > start:
            start = core.load_free
        if self.overlap != "full" and core.compute_free > start:
            start = core.compute_free
        core.load_free = end = start + cycles
        return end

    def _prepare(self, prepare: isa.Prepare, waited: Done) -> Done:
        latest = 0
        for number in timing.core_list(prepare.cores, self.arch.cores):
            core = self.cores[number]
            cycles = self.arch.array_fill_cycles
            end = self._end_of_load(core, waited[0], cycles)
            core.open = True
            self.counters.array_fills += 1
            if self.trace:
                self._record(f"core {number} load", "PREPARE", end - cycles, end)
            latest = max(latest, end)
        return latest, "weights"

    def _fill(self, fill: isa.Fill, waited: Done) -> Done:
        core, cost = self._checked_fill(fill)
        if not core.open:
            raise MachineError("writes an array that no PREPARE opened")
        end = self._end_of_load(core, waited[0], cost.cycles)
        self.counters.core_sram_bits += 8 * cost.source_bytes
        self.counters.macro_write_bits += cost.macro_bits
        start = end - cost.cycles
        if self.trace:
            self._record(f"core {fill.core} load", "FILL", start, end)
        if self.memory is not None:
            slots = slice(fill.slot, fill.slot + fill.count)
            span = core.weight.span(fill.source, cost.source_bytes)
            core.weight.cells.read(span, start, end, whole)
            core.slots.write(slots, start, end, whole)
            packed = core.weight.data[fill.source : fill.source + cost.source_bytes]
            core.macros[slots] = unpack_group_sets(packed, 8 if fill.weight_bits else 4)
        return end, "weights"

    def _checked_fill(self, fill: isa.Fill) -> tuple[Core, timing.FillCost]:
        """Give the core and the cost of a FILL, or refuse it."""
        core = self._core(fill.core)
        cost = timing.fill_cost(self.arch, fill.count, 8 if fill.weight_bits else 4)
        core.weight.check(fill.source, cost.source_bytes)
        if not fill.count or fill.slot + fill.count > cost.slots:
            raise MemoryAccessError(
                f"macro slots {fill.slot}..{fill.slot + fill.count - 1} of {cost.slots}"
            )
        return core, cost

    # -- compute -------------------------------------------------------------------------------

    def _configure(self, setting: isa.Sas | isa.Apw | isa.Residual, waited: Done) -> Done:
        return self._end_of_setting(self._configured(setting), waited)

    def _configured(self, setting: isa.Sas | isa.Apw | isa.Residual) -> Sequence[int]:
        """Set registers of cores; give those cores."""
        bare = _without_tokens(setting)  # equal settings share cached costs
        numbers = timing.core_list(setting.cores, self.arch.cores)
        for number in numbers:
            core = self.cores[number]
            core.config = timing.configured(core.config, bare)
        return numbers

    def _end_of_setting(self, numbers: Sequence[int], waited: Done) -> Done:
        """Give when some cores' registers are set, and book the time."""
        latest = 0
        for number in numbers:
            core = self.cores[number]
            end = self._compute_start(core, waited, ()) + self.issue_cycles
            core.compute_free = end
            if end > latest:
                latest = end
        self.layer.stalls["issue"] += len(numbers) * self.issue_cycles
        return latest, "cores"

    def _compute_start(self, core: Core, waited: Done, banks: Sequence[int]) -> int:
        """Find when a core can start, and book its waiting."""
        start, free = waited[0], core.compute_free
        if self.overlap != "full" and core.load_free >= start:
            start, _ = waited = max(waited, (core.load_free, "weights"))
        if self.overlap == "none" and core.fetch_free >= start:
            start, _ = waited = max(waited, (core.fetch_free, "weights"))
        for bank in banks:
            if self.bank_move[bank] >= start:
                start, _ = waited = max(waited, (self.bank_move[bank], "maps"))
        if start <= free:
            return free
        self._book_wait(free, start, waited[1])
        return start

    def _book_wait(self, since: int, until: int, cause: str) -> None:
        """Book a core's waiting, in its own layer under the last cause.

        What lies before the end of the layer before is the time in which other cores computed
        that, and maps left behind them; unless the core runs ahead of them.
        """
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
        self.cores[number].compute_free = end
        if end > self.computed[self.layer_number]:
            self.computed[self.layer_number] = end
        if self.trace:
            self._record(f"core {number} compute", name, start, end)

    def _book_costs(self) -> None:
        """Book what does not depend on time, for all that the layer's cores computed."""
        layer, counters, cost = self.layer, self.counters, timing.total(self.costs)
        layer.macro_cycles += cost.macro_cycles
        layer.stalls["latency"] += cost.latency
        layer.stalls["ports"] += cost.cycles - cost.macro_cycles - cost.latency
        reads = sum(cost.reads)
        counters.group_sets += cost.group_sets
        counters.passed_over += cost.passed_over
        counters.macro_accesses += cost.macro_cycles * self.arch.macros_per_core
        counters.map_reads += reads
        counters.map_writes += sum(cost.writes)
        counters.bank_bits += (reads + cost.written_words) * timing.WORD_BITS
        counters.core_sram_bits += 8 * (cost.index_bytes + cost.parameter_bytes)
        counters.partial_bits += cost.partial_words * timing.WORD_BITS
        self.costs.clear()

    def _conv(self, conv: isa.Conv, waited: Done) -> Done:
        costs = self._conv_costs(conv)
        done = self._end_of_conv(costs, waited)
        if self.memory is not None:
            for number, _, cycles in costs:
                core = self.cores[number]
                end, load = core.compute_free, self._load_of(core, conv)
                ConvTile(self.memory, core, conv, end - cycles, end).execute(load)
        return done

    def _conv_costs(self, conv: isa.Conv) -> Sequence[ConvCost]:
        """Give what CONV takes on each of its cores, whose arrays it closes, or refuse it."""
        if not conv.height * conv.width:
            raise MachineError("writes no pixel")
        place = None if conv.partial == isa.PARTIAL_OFFCHIP else conv.partial_bank
        costs = []
        splits = False
        for number in timing.core_list(conv.cores, self.arch.cores):
            core = self.cores[number]
            core.open = False
            load = self._load_of(core, conv)
            splits = splits or load.splits
            cost = _conv_cost(self.arch, conv.height, conv.width, place, core.config, load)
            costs.append((number, cost))
            self.costs.append(cost)
        if not splits:
            _refuse_unused(conv, "partial", "partial_bank", "partial_base")
        elif conv.partial == isa.PARTIAL_OFFCHIP:
            _refuse_unused(conv, "partial_bank")
        # Partial sums of all cores share the off-chip port and hold it to the end.
        words = sum(cost.partial_words for _, cost in costs)
        transfer = timing.offchip_cycles(self.arch, words * timing.WORD_BITS)
        return [
            (number, cost, max(cost.cycles, transfer if cost.partial_words else 0))
            for number, cost in costs
        ]

    def _end_of_conv(self, costs: Sequence[ConvCost], waited: Done) -> Done:
        """Give when a CONV ends, and book what it takes."""
        latest, dma_free = 0, self.dma_free
        for number, cost, cycles in costs:
            own_waited = waited
            if cost.partial_words:
                own_waited = max(waited, (dma_free, "maps"))
            start = self._compute_start(self.cores[number], own_waited, cost.banks)
            end = start + cost.cycles
            for bank in cost.banks:
                if end > self.bank_compute[bank]:
                    self.bank_compute[bank] = end
            if cost.partial_words:
                end = start + cycles
                self.layer.stalls["ports"] += cycles - cost.cycles
                self.dma_free = max(self.dma_free, end)
            self._book(number, "CONV", start, end, cost)
            if end > latest:
                latest = end
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
                _refuse_unused(core.config.context(context), "shift", "kernel_width", "skip")
            self.costs.append(cost)
            start = self._compute_start(core, waited, cost.banks)
            end = start + cost.cycles
            for bank in cost.banks:
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


@functools.lru_cache(maxsize=32768)
def _conv_cost(
    arch: MarsArch,
    height: int,
    width: int,
    partial_bank: int | None,
    config: timing.CoreConfig,
    load: timing.DecodedLoad,
) -> timing.Cost:
    """Give the cost of CONV on a core, or refuse fields of APW that a CONV does not use."""
    cost = timing.conv_cost(arch, height, width, partial_bank, config, load)
    _refuse_unused(config.output, *_UNUSED_BY_MODE[config.output.mode])
    return cost


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
