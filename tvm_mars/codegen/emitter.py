"""Dependencies between instructions, found from the memory that they touch, and their tokens."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np

from mars_runtime import isa
from mars_runtime.stopwatch import Computes, Loads, Queue, Run, Transfers

__all__ = [
    "CONTROLLER",
    "DMA",
    "Emitter",
    "Lanes",
    "Span",
    "TransferRun",
    "compute_lanes",
    "load_lanes",
]

#: The queues of an instruction's units, a bit for each: the controller's, that of the DMA, of the
#: cores' load units and of their compute units.
Lanes: TypeAlias = int

#: Memory, first cell, end.
Span: TypeAlias = tuple[object, int, int]

_CORES = isa.field_limit(isa.Conv, "cores").bit_length()
CONTROLLER: Lanes = 1
DMA: Lanes = 2
_FIRST_LOAD = 2
_FIRST_COMPUTE = _FIRST_LOAD + _CORES
_LEAST_COMPUTE = 1 << _FIRST_COMPUTE


def load_lanes(cores: int) -> Lanes:
    """Give the load units of a mask of cores."""
    return cores << _FIRST_LOAD


def compute_lanes(cores: int) -> Lanes:
    """Give the compute units of a mask of cores."""
    return cores << _FIRST_COMPUTE


#: Accesses of one memory: by lanes, then by first cell and end, the last instruction with each.
_Accesses: TypeAlias = dict[Lanes, dict[tuple[int, int], int]]

_NOTHING: Mapping[Lanes, int] = {}


@attrs.frozen
class TransferRun:
    """FETCHes and FILLs in a row, with what they wait for among themselves."""

    transfers: Transfers
    waits: tuple[tuple[int, ...], ...]  # how far back those are that each waits for
    waited: Mapping[Lanes, Mapping[Lanes, int]]  # by lane, then by other lanes, the last waited for


class Emitter:
    """Collects instructions and finds what each must wait for.

    Instructions are numbered in the order in which they are emitted.
    """

    def __init__(self) -> None:
        self.instructions: list[isa.Instruction] = []
        self.starts = [0]  # by layer, its first instruction
        self.waits: list[tuple[int, ...]] = []  # how far back those are that each waits for
        self.loads: dict[int, Loads] = {}  # by CONV
        self.runs: dict[int, Run] = {}  # by their first
        # By instruction of a compute unit and lanes, the last that must be done.
        self._follows: dict[int, Mapping[Lanes, int]] = {}
        # By the first of those that do the same on the same lanes, the last.
        self._last: dict[int, int] = {}
        self._reads: defaultdict[object, _Accesses] = defaultdict(dict)
        self._writes: defaultdict[object, _Accesses] = defaultdict(dict)
        # By lanes, for each of them: lanes of another unit, and the last instruction there that
        # the lane has waited for.
        self._waited: dict[Lanes, list[dict[Lanes, int]]] = {}

    @property
    def layer(self) -> int:
        """The layer that is emitted; they follow each other."""
        return len(self.starts) - 1

    @layer.setter
    def layer(self, number: int) -> None:
        if number >= len(self.starts):
            self.starts.append(len(self.instructions))

    def emit(
        self,
        instruction: isa.Instruction,
        lanes: Lanes,
        after: Mapping[Lanes, int] = _NOTHING,
        reads: Sequence[Span] = (),
        writes: Sequence[Span] = (),
        shared: Sequence[Span] = (),
    ) -> int:
        """Append an instruction that runs on some lanes and touches some memory; give its number.

        The parameters are those of :meth:`follow`.
        """
        index = len(self.instructions)
        self.instructions.append(instruction)
        self.waits.append(())
        self.follow(index, lanes, after, reads, writes, shared)
        return index

    def row(self, computes: Computes, loads: Loads | None) -> int:
        """Append settings and CONVs; give the number of the first.

        What the CONVs touch is still to be told, in their order (:meth:`follow`); ``loads`` are
        what the cores hold, for their time.
        """
        first = len(self.instructions)
        self.instructions += computes.instructions
        self.waits += [()] * len(computes)
        if loads is not None:
            self.loads |= dict.fromkeys(range(first, len(self.instructions)), loads)
            self.runs[first] = computes
        return first

    def follow(
        self,
        index: int,
        lanes: Lanes,
        after: Mapping[Lanes, int] = _NOTHING,
        reads: Sequence[Span] = (),
        writes: Sequence[Span] = (),
        shared: Sequence[Span] = (),
        last: int | None = None,
    ) -> None:
        """Let an instruction wait for what must be done before it, and others for it.

        Within a layer each core writes words of its own and reads none that another writes, so that
        cores do not wait for each other there, but for ``shared`` memory that is written.

        Parameters
        ----------
        after : mapping of lanes to int
            By lanes, the last instruction that must be done, for other reasons than the memory
            that is named here.
        last : int, optional
            The last of a row of instructions that do the same on the same lanes: they touch the
            same and follow the same, as does what computes between them, so that they wait for
            nothing more.
        """
        if reads or writes or shared:
            follows = self._touch(lanes, index, reads, writes, shared)
            if lanes >= _LEAST_COMPUTE:
                self._follows[index] = follows
            if last is not None:
                self._last[index] = last
            after = _latest(follows, after) if after else follows
        if after:
            self.waits[index] = self._waits(after, lanes, index)

    def run(self) -> TransferRun:
        """Give what was emitted, all of it without memory."""
        waited = {lanes: known[0] for lanes, known in self._waited.items() if len(known) == 1}
        return TransferRun(Transfers(tuple(self.instructions)), tuple(self.waits), waited)

    def append(self, run: TransferRun, after: Iterable[tuple[int, Lanes, Lanes, int]] = ()) -> int:
        """Append a run; give the number of its first instruction.

        Parameters
        ----------
        after : iterable of (int, Lanes, Lanes, int)
            Instructions of the run, counted from 0, with their lane and what must be done before
            besides: lanes, and the last instruction there. Those of a lane are in order.
        """
        first = len(self.instructions)
        if run.transfers.instructions:
            self.runs[first] = run.transfers
        self.instructions += run.transfers.instructions
        self.waits += run.waits
        for place, lane, other, earlier in after:
            (waited,) = self._known(lane)
            if waited.get(other, -1) < earlier:
                waited[other] = earlier
                index = first + place
                self.waits[index] += (index - earlier,)
        for lane, last in run.waited.items():
            (waited,) = self._known(lane)
            for other, place in last.items():
                waited[other] = first + place
        return first

    def _touch(
        self,
        lanes: Lanes,
        index: int,
        reads: Sequence[Span],
        writes: Sequence[Span],
        shared: Sequence[Span],
    ) -> dict[Lanes, int]:
        """Note accesses of an instruction; give what must be done before them."""
        follows: dict[Lanes, int] = {}
        # Compute of this layer, from here on, is beside this instruction if that computes, too.
        beside = self.starts[-1] if lanes >= _LEAST_COMPUTE else index
        for memory, first, end in reads:
            if accesses := self._writes[memory]:
                self._before(accesses, first, end, beside, follows, lanes)
        for spans, since in ((writes, beside), (shared, index)):
            for memory, first, end in spans:
                for accesses in (self._writes[memory], self._reads[memory]):
                    if accesses:
                        self._before(accesses, first, end, since, follows, lanes, hides=True)
                # Nothing of its own is hidden: the spans of an instruction do not overlap.
                self._writes[memory].setdefault(lanes, {})[first, end] = index
        for memory, first, end in reads:
            self._reads[memory].setdefault(lanes, {})[first, end] = index
        return follows

    def _before(
        self,
        accesses: _Accesses,
        first: int,
        end: int,
        beside: int,
        follows: dict[Lanes, int],
        lanes: Lanes,
        hides: bool = False,
    ) -> None:
        """Note what must be done before some cells are touched by lanes.

        Accesses that are ``hidden`` as these lanes write the cells anew are forgotten.
        """
        for other, spans in accesses.items():
            computes = other >= _LEAST_COMPUTE
            if other == lanes and not computes:
                continue  # DMA executes its queue in order
            hidden = []
            for (low, high), earlier in spans.items():
                if low >= end or first >= high:
                    continue
                if computes and earlier >= beside:
                    # In its place, what it follows itself: its access may have hidden theirs.
                    for before, last in self._follows[earlier].items():
                        if follows.get(before, -1) < last:
                            follows[before] = last
                    if other != lanes:
                        continue  # nothing waited for that
                else:
                    last = self._last.get(earlier, earlier)
                    if follows.get(other, -1) < last:
                        follows[other] = last
                if hides and first <= low and high <= end:
                    hidden.append((low, high))
            for span in hidden:
                del spans[span]

    def _known(self, lanes: Lanes) -> list[dict[Lanes, int]]:
        """Give for each of some lanes what it has waited for."""
        known = self._waited.get(lanes)
        if known is None:
            each = [1 << n for n in range(lanes.bit_length()) if lanes >> n & 1]
            known = [self._known(lane)[0] for lane in each] if len(each) > 1 else [{}]
            self._waited[lanes] = known
        return known

    def _waits(self, follows: Mapping[Lanes, int], lanes: Lanes, index: int) -> tuple[int, ...]:
        """Give those that a token is needed for: not the own queue, nor what was waited for."""
        known = self._known(lanes)
        waits: tuple[int, ...] = ()
        for other, earlier in follows.items():
            if other == lanes and len(known) == 1:
                continue  # a unit executes its queue in order
            late = False
            for waited in known:
                if waited.get(other, -1) < earlier:
                    waited[other] = earlier
                    late = True
            if late:
                waits += (index - earlier,)
        return waits

    def queue(self) -> Queue:
        """Give the instructions, with SYNCs where tokens run out.

        One that is waited for holds a token until its last waiter. When all are held, a SYNC joins
        the half of them whose next waiters come last.
        """
        stops = [*self.starts[1:], len(self.instructions)]
        last = _last_waiters(self.waits)
        if _most_held(last, len(self.waits)) <= isa.TOKENS:
            return Queue(self.instructions, self.waits, stops, self.loads, self.runs)
        return self._with_syncs(last, stops)

    def _with_syncs(self, last: Mapping[int, int], stops: Sequence[int]) -> Queue:
        """Give the instructions with SYNCs; ``last`` has the last waiter of each."""
        before: list[int] = []  # the instructions before which a SYNC stands
        waits_of: list[tuple[int, ...]] = []
        signals: dict[int, int] = {}  # by what is still waited for, who signals, by place
        members: dict[int, int] = {}  # of a SYNC, by place, for how many
        waiters: dict[int, list[int]] = {}
        for index, waits in enumerate(self.waits):
            for back in waits:
                waiters.setdefault(index - back, []).append(index)
        held = 0
        for index, waits in enumerate(self.waits):
            waited, place = waits, index + len(before)
            if waits:
                if before and index - max(waits) < before[-1]:
                    waited = tuple({place - signals[index - back] for back in waits})
                for back in waits:
                    if last[index - back] == index:
                        sync = signals.pop(index - back)
                        if sync not in members:
                            held -= 1
                        else:
                            members[sync] -= 1
                            held -= not members[sync]
            if index in last:
                if held == isa.TOKENS:
                    chosen = _last_waited(signals, waiters, index)
                    waits_of.append(tuple(place - one for one in chosen))
                    joined = [one for one, who in signals.items() if who in chosen]
                    signals |= dict.fromkeys(joined, place)
                    members[place] = len(joined)
                    before.append(index)
                    held -= len(chosen) - 1
                    waited, place = tuple(back + 1 for back in waited), place + 1
                signals[index] = place
                held += 1
            waits_of.append(waited)
        instructions = list(self.instructions)
        for index in reversed(before):
            instructions.insert(index, isa.Sync())
        return Queue(
            instructions,
            waits_of,
            [stop + bisect_left(before, stop) for stop in stops],
            {index + bisect(before, index): loads for index, loads in self.loads.items()},
            {
                index + bisect(before, index): run
                for index, run in self.runs.items()
                if bisect(before, index) == bisect_left(before, index + len(run))
            },
        )

    def finish(self) -> tuple[tuple[isa.Instruction, ...], Sequence[int]]:
        """Give the instructions with their tokens, and for each layer the end of its own.

        An instruction that is waited for takes the lowest free token.
        """
        queue = self.queue()
        last = _last_waiters(queue.waits)
        token_of: dict[int, int] = {}
        used = 0  # a mask, as tokens are here
        instructions = []
        for place, (instruction, waits) in enumerate(
            zip(queue.instructions, queue.waits, strict=True)
        ):
            wait = signal = 0
            for earlier in (place - back for back in waits):
                wait |= token_of[earlier]
                if last[earlier] == place:
                    used ^= token_of.pop(earlier)
            if place in last:
                token = token_of[place] = ~used & (used + 1)
                used |= token
                signal = token.bit_length()
            instructions.append(attrs.evolve(instruction, wait=wait, signal=signal))
        return tuple(instructions), queue.stops


def _latest(one: Mapping[Lanes, int], other: Mapping[Lanes, int]) -> dict[Lanes, int]:
    """Give for all lanes of either the later instruction."""
    return {lanes: max(one.get(lanes, -1), other.get(lanes, -1)) for lanes in {**one, **other}}


def _last_waiters(waits: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """Give for each instruction that others wait for the last of them."""
    return {place - back: place for place, backs in enumerate(waits) if backs for back in backs}


def _last_waited(
    signals: Mapping[int, int], waiters: Mapping[int, Sequence[int]], index: int
) -> set[int]:
    """Give the half of those that signal, by place, whose next waiters come last.

    ``signals`` has who signals for each instruction that is still waited for.
    """
    soonest: dict[int, int] = {}
    for earlier, place in signals.items():
        of_earlier = waiters[earlier]
        next_waiter = of_earlier[bisect_left(of_earlier, index)]
        soonest[place] = min(soonest.get(place, next_waiter), next_waiter)
    ordered = sorted(soonest, key=lambda place: (-soonest[place], place))
    return set(ordered[: isa.TOKENS // 2])


def _most_held(last: Mapping[int, int], count: int) -> int:
    """Give how many of ``count`` instructions are waited for at once, at most."""
    if len(last) <= isa.TOKENS:
        return len(last)
    signalled = np.bincount(list(last), minlength=count)
    done = np.bincount(list(last.values()), minlength=count)
    return int((signalled - done).cumsum().max())
