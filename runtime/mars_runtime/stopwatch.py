"""The machine's time for instructions that were never encoded: what a search measures with.

A compiler that tries thousands of schedules has the instructions and the loads as values. The
stopwatch hands them to the machine's own handlers, so that start times, durations and counts are
those of the executed program; what it leaves out is the encoding, the image and the walk through
the index SRAMs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import attrs

from . import isa, timing
from .arch import MarsArch
from .errors import MachineError, MemoryAccessError
from .machine import AT_ONCE, INSTRUCTION_BITS, ConvCost, Done, Machine
from .memory import Core
from .program import LayerInfo, Region
from .timeline import Timeline
from .timing import CoreConfig, DecodedLoad

__all__ = ["Computes", "Loads", "Queue", "Run", "Stopwatch", "Transfers"]

#: By core what it holds, None if nothing.
Loads: TypeAlias = tuple[DecodedLoad | None, ...]


@attrs.frozen(eq=False)
class Transfers:
    """FETCHes and FILLs in a row, which many schedules share: checked once for an architecture."""

    instructions: tuple[isa.Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)


@attrs.frozen(eq=False)
class Computes:
    """SASs, APWs, RESIDUALs and CONVs in a row, which many schedules share.

    Their costs are found once for an architecture, loads and registers before.
    """

    instructions: tuple[isa.Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)


Run: TypeAlias = Transfers | Computes


@attrs.frozen
class Queue:
    """Instructions in program order.

    Parameters
    ----------
    instructions : list of Instruction
        They end in HALT; their own ``wait`` and ``signal`` are not looked at.
    waits : list of tuple of int
        For each, how far back those are that it waits for.
    stops : list of int
        For each layer the end of its instructions.
    loads : dict
        By the place of each CONV, and of the settings in a row with it, what each core holds.
    runs : dict
        By the place of the first instruction, those of a layer that are in a row.
    """

    instructions: list[isa.Instruction]
    waits: list[tuple[int, ...]]
    stops: list[int]
    loads: dict[int, Loads]
    runs: dict[int, Run]


class Stopwatch(Machine):
    """A chip without data that times one stream.

    Parameters
    ----------
    arch : MarsArch
        The chip.
    layers : sequence of LayerInfo
        What the stream's layer numbers mean.
    image_bytes, offchip_words : int
        Sizes of the off-chip memory, as :class:`Region` has them.
    """

    reads_codes = False

    def __init__(
        self, arch: MarsArch, layers: Sequence[LayerInfo], image_bytes: int, offchip_words: int
    ) -> None:
        super().__init__(Region((), (), tuple(layers), b"", b"", image_bytes, offchip_words), arch)
        self.loads: Mapping[int, Loads] = {}

    def time(self, queue: Queue) -> Timeline:
        """Give the timeline of instructions.

        Raises
        ------
        MachineError
            If an instruction does what the hardware cannot.
        """
        self.length, self.loads = len(queue.instructions), queue.loads
        instructions, waits = queue.instructions, queue.waits
        done: list[Done] = []
        start = 0
        for number, stop in enumerate(queue.stops):
            if number:
                self._end_layer()
            while start < stop:
                self.index = start
                run = queue.runs.get(start)
                if run is not None:
                    start += len(run)
                    if isinstance(run, Transfers):
                        self._transfer(run, waits[self.index : start], done)
                    else:
                        self._compute(run, waits[self.index : start], done)
                    continue
                waited = AT_ONCE
                for back in waits[start]:
                    if done[-back] > waited:
                        waited = done[-back]
                done.append(self._execute(instructions[start], waited))
                start += 1
        self._end_layer()
        return Timeline(self.now, tuple(self.layers))

    def _transfer(
        self, transfers: Transfers, waits: Sequence[tuple[int, ...]], done: list[Done]
    ) -> None:
        """Do what executing each of some transfers does, in one go."""
        costs = _costs(self.arch, transfers)
        if costs.source_end > self.region.image_bytes:
            raise MemoryAccessError(
                f"off-chip image of {self.region.image_bytes} bytes addressed at "
                f"{costs.source_end - 1}"
            )
        if not all(self.cores[number].open for number in costs.filled):
            raise MachineError("writes an array that no PREPARE opened")
        counters = self.counters
        counters.instruction_bits += INSTRUCTION_BITS * len(transfers)
        counters.fetched_bits += costs.fetched_bits
        counters.core_sram_bits += costs.core_sram_bits
        counters.macro_write_bits += costs.macro_write_bits
        issued, now, issue_cycles, cores = self.issued, self.now, self.issue_cycles, self.cores
        for (end_of, number, cycles), backs in zip(costs.steps, waits, strict=True):
            issued = waited = issued + issue_cycles
            for back in backs:
                if done[-back][0] > waited:
                    waited = done[-back][0]
            end = end_of(self, cores[number], waited, cycles)
            if end > now:
                now = end
            done.append((end, "weights"))
        self.issued, self.now = issued, now

    def _costs_of(self, transfers: Transfers) -> _Costs:
        steps: list[tuple[Callable[[Machine, Core, int, int], int], int, int]] = []
        filled = set()
        source_end = fetched = macro_bits = sram_bits = 0
        for instruction in transfers.instructions:
            if isinstance(instruction, isa.Fetch):
                core, _, length = self._checked_fetch(instruction)
                cycles = timing.offchip_cycles(self.arch, 8 * length)
                steps.append((Machine._end_of_fetch, core.number, cycles))
                source_end = max(source_end, instruction.source + length)
                fetched += 8 * length
                sram_bits += 8 * length
            else:
                assert isinstance(instruction, isa.Fill)
                core, cost = self._checked_fill(instruction)
                steps.append((Machine._end_of_load, core.number, cost.cycles))
                filled.add(core.number)
                sram_bits += 8 * cost.source_bytes
                macro_bits += cost.macro_bits
        return _Costs(steps, filled, source_end, fetched, sram_bits, macro_bits)

    def _compute(
        self, computes: Computes, waits: Sequence[tuple[int, ...]], done: list[Done]
    ) -> None:
        """Do what executing each of some settings and CONVs does."""
        before = tuple([core.config for core in self.cores])
        found = _lookup(self.arch, computes, self.loads[self.index], before)
        self.counters.instruction_bits += INSTRUCTION_BITS * len(computes)
        self.costs.append(found.cost)
        issued, now, issue_cycles = self.issued, self.now, self.issue_cycles
        for (numbers, costs), backs in zip(found.steps, waits, strict=True):
            issued += issue_cycles
            waited = (issued, "issue")
            for back in backs:
                if done[-back] > waited:
                    waited = done[-back]
            if costs:
                end = self._end_of_conv(costs, waited)
            else:
                end = self._end_of_setting(numbers, waited)
            if end[0] > now:
                now = end[0]
            done.append(end)
        self.issued, self.now = issued, now
        for core, config in zip(self.cores, found.configs, strict=True):
            core.config = config
        for number in found.closed:
            self.cores[number].open = False

    def _lookup(self, computes: Computes, loads: Loads, configs: Sequence[CoreConfig]) -> _Lookup:
        for core, config in zip(self.cores, configs, strict=True):
            core.config, core.open = config, True
        self.loads = {self.index: loads}
        steps: list[_Step] = []
        for instruction in computes.instructions:
            if isinstance(instruction, isa.Conv):
                steps.append(((), self._conv_costs(instruction)))
            else:
                assert isinstance(instruction, (isa.Sas, isa.Apw, isa.Residual))
                steps.append((self._configured(instruction), ()))
        closed = [core.number for core in self.cores if not core.open]
        configs_after = [core.config for core in self.cores]
        return _Lookup(steps, timing.total(self.costs), configs_after, closed)

    def _load_of(self, core: Core, conv: isa.Conv) -> DecodedLoad:
        load = self.loads[self.index][core.number]
        assert load is not None
        return load


@attrs.frozen
class _Costs:
    """What transfers take.

    Parameters
    ----------
    steps : list of (callable, int, int)
        For each what books its unit, core and cycles.
    filled : set of int
        Cores whose macros are written.
    source_end : int
        End of the bytes that are fetched off-chip.
    """

    steps: list[tuple[Callable[[Machine, Core, int, int], int], int, int]]
    filled: set[int]
    source_end: int
    fetched_bits: int
    core_sram_bits: int
    macro_write_bits: int


_Step: TypeAlias = tuple[Sequence[int], Sequence[ConvCost]]


@attrs.frozen
class _Lookup:
    """What settings and CONVs in a row take, and leave.

    Parameters
    ----------
    steps : list of (sequence of int, sequence of ConvCost)
        For each a setting's cores, or what a CONV takes on its cores.
    cost : Cost
        The sum of all.
    configs : list of CoreConfig
        The cores' registers in the end.
    closed : list of int
        Cores that have computed.
    """

    steps: list[_Step]
    cost: timing.Cost
    configs: list[CoreConfig]
    closed: list[int]


@functools.lru_cache(maxsize=8192)
def _lookup(
    arch: MarsArch, computes: Computes, loads: Loads, configs: tuple[CoreConfig, ...]
) -> _Lookup:
    """Give what settings and CONVs take on an architecture, or refuse them."""
    return Stopwatch(arch, (), 0, 0)._lookup(computes, loads, configs)


@functools.lru_cache(maxsize=8192)
def _costs(arch: MarsArch, transfers: Transfers) -> _Costs:
    """Give what transfers take on an architecture, or refuse them."""
    return Stopwatch(arch, (), 0, 0)._costs_of(transfers)
