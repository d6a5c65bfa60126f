"""The machine's time for instructions that were never encoded: what a search measures with.

A compiler that tries thousands of schedules has the instructions and the loads as values. The
stopwatch hands them to the machine's own handlers, so that start times, durations and counts are
those of the executed program; what it leaves out is the encoding, the image and the walk through
the index SRAMs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import attrs

from . import isa, timing
from .arch import MarsArch
from .errors import MachineError, MemoryAccessError
from .machine import AT_ONCE, INSTRUCTION_BITS, Done, Machine
from .memory import Core
from .program import LayerInfo, Region
from .timeline import Timeline
from .timing import DecodedLoad

__all__ = ["Queue", "Stopwatch", "Transfers"]


@attrs.frozen(eq=False)
class Transfers:
    """FETCHes and FILLs in a row, which many schedules share: checked once for an architecture."""

    instructions: tuple[isa.Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)


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
        For each CONV, by its place, what each core holds.
    transfers : dict
        By the place of the first instruction, those of a layer that are in a row.
    """

    instructions: list[isa.Instruction]
    waits: list[tuple[int, ...]]
    stops: list[int]
    loads: dict[int, Mapping[int, DecodedLoad]]
    transfers: dict[int, Transfers]


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
        self.loads: Mapping[int, Mapping[int, DecodedLoad]] = {}

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
                transfers = queue.transfers.get(start)
                if transfers is not None:
                    self._transfer(transfers, waits[start : start + len(transfers)], done)
                    start += len(transfers)
                    continue
                self.index = start
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
        issued = self.issued
        for (end_of, number, cycles), backs in zip(costs.steps, waits, strict=True):
            issued = waited = issued + self.issue_cycles
            for back in backs:
                if done[-back][0] > waited:
                    waited = done[-back][0]
            end = end_of(self, self.cores[number], waited, cycles)
            if end > self.now:
                self.now = end
            done.append((end, "weights"))
        self.issued = issued

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

    def _load_of(self, core: Core, conv: isa.Conv) -> DecodedLoad:
        return self.loads[self.index][core.number]


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


@functools.lru_cache(maxsize=8192)
def _costs(arch: MarsArch, transfers: Transfers) -> _Costs:
    """Give what transfers take on an architecture, or refuse them."""
    return Stopwatch(arch, (), 0, 0)._costs_of(transfers)
