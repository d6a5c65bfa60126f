"""Dependencies between instructions, found from the memory that they touch, and their tokens."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import attrs

from mars_runtime import isa
from mars_runtime.stopwatch import Issued
from mars_runtime.timing import DecodedLoad

__all__ = ["CONTROLLER", "DMA", "Emitter", "Lanes", "Span", "compute_lanes", "load_lanes"]

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


@attrs.define
class _Emitted:
    """An instruction with what it waits for: earlier ones, by number."""

    instruction: isa.Instruction
    layer: int
    waits: list[int]
    follows: dict[Lanes, int]  # by lanes, the last instruction that must be done
    loads: Mapping[int, DecodedLoad] | None
    waiters: list[int] = attrs.field(factory=list)  # that wait for this one


#: Accesses of one memory: by first cell, end and lanes, the last instruction with each.
_Accesses: TypeAlias = dict[tuple[int, int, Lanes], int]


class Emitter:
    """Collects instructions and finds what each must wait for."""

    def __init__(self) -> None:
        self.emitted: list[_Emitted] = []
        self._layer = 0
        self._first_of_layer = 0
        self._reads: defaultdict[object, _Accesses] = defaultdict(dict)
        self._writes: defaultdict[object, _Accesses] = defaultdict(dict)
        # lane -> lanes of another unit -> the last instruction there that the lane has waited for
        self._waited: defaultdict[Lanes, dict[Lanes, int]] = defaultdict(dict)

    @property
    def layer(self) -> int:
        """The layer that is emitted; they follow each other."""
        return self._layer

    @layer.setter
    def layer(self, number: int) -> None:
        if number != self._layer:
            self._layer, self._first_of_layer = number, len(self.emitted)

    def emit(
        self,
        instruction: isa.Instruction,
        lanes: Lanes,
        reads: Iterable[Span] = (),
        writes: Iterable[Span] = (),
        shared: Iterable[Span] = (),
        loads: Mapping[int, DecodedLoad] | None = None,
    ) -> None:
        """Append an instruction that runs on some lanes and touches some memory.

        Within a layer each core writes words of its own and reads none that another writes, so that
        cores do not wait for each other there, but for ``shared`` memory that is written.
        ``loads`` is what each core holds, for the time of CONV.
        """
        index = len(self.emitted)
        # Compute of this layer, from here on, is beside this instruction if that computes, too.
        beside = self._first_of_layer if lanes >= _LEAST_COMPUTE else index
        follows: dict[Lanes, int] = {}
        for memory, first, end in reads:
            if accesses := self._writes[memory]:
                self._before(accesses, first, end, beside, follows)
        for spans, since in ((writes, beside), (shared, index)):
            for memory, first, end in spans:
                for accesses in (self._writes[memory], self._reads[memory]):
                    if not accesses:
                        continue
                    for key in self._before(accesses, first, end, since, follows, lanes):
                        del accesses[key]
                # Nothing of its own is hidden: the spans of an instruction do not overlap.
                self._writes[memory][first, end, lanes] = index
        for memory, first, end in reads:
            self._reads[memory][first, end, lanes] = index
        waits = self._waits(follows, lanes, index) if follows else []
        self.emitted.append(_Emitted(instruction, self._layer, waits, follows, loads))

    def _before(
        self,
        accesses: _Accesses,
        first: int,
        end: int,
        beside: int,
        follows: dict[Lanes, int],
        lanes: Lanes = 0,
    ) -> list[tuple[int, int, Lanes]]:
        """Note what must be done before some cells are touched.

        Give the accesses that are hidden if these lanes write the cells anew.
        """
        hidden = []
        for key, earlier in accesses.items():
            low, high, other = key
            if low >= end or first >= high:
                continue
            if earlier >= beside and other >= _LEAST_COMPUTE:
                # In its place, what it follows itself: its access may have hidden theirs.
                for before, last in self.emitted[earlier].follows.items():
                    if follows.get(before, -1) < last:
                        follows[before] = last
                if other != lanes:
                    continue  # nothing waited for that
            elif follows.get(other, -1) < earlier:
                follows[other] = earlier
            if first <= low and high <= end:
                hidden.append(key)
        return hidden

    def _waits(self, follows: dict[Lanes, int], lanes: Lanes, index: int) -> list[int]:
        """Give those that a token is needed for: not the own queue, nor what was waited for."""
        alone = not lanes & (lanes - 1)
        if alone:
            known = [self._waited[lanes]]
        else:
            known = [self._waited[1 << n] for n in range(lanes.bit_length()) if lanes >> n & 1]
        waits = []
        for other, earlier in follows.items():
            if other == lanes and alone:
                continue  # a unit executes its queue in order
            late = [waited for waited in known if waited.get(other, -1) < earlier]
            if late:
                waits.append(earlier)
                self.emitted[earlier].waiters.append(index)
                for waited in late:
                    waited[other] = earlier
        return waits

    def issues(self) -> Iterator[Issued]:
        """Allot tokens: yield the instructions in program order, with SYNCs where tokens run out.

        An instruction that is waited for takes the lowest free token, until its last waiter. When
        all are in use, a SYNC joins those that are waited for last.
        """
        token_of: dict[int, int] = {}
        holders = [0] * isa.TOKENS
        used = 0
        for index, entry in enumerate(self.emitted):
            mask = 0
            for earlier in entry.waits:
                token = token_of[earlier]
                mask |= 1 << token
                if self.emitted[earlier].waiters[-1] == index:
                    del token_of[earlier]
                    holders[token] -= 1
                    if not holders[token]:
                        used ^= 1 << token
            signal = 0
            if entry.waiters:
                if used == _ALL_TOKENS:
                    joined = self._last_waited(token_of, index)
                    token, joined_mask = joined[0], sum(1 << one for one in joined)
                    yield Issued(isa.Sync(), joined_mask, token + 1, entry.layer)
                    for earlier, held in token_of.items():
                        if held in joined:
                            token_of[earlier] = token
                    holders[token] = sum(holders[one] for one in joined)
                    used ^= joined_mask ^ 1 << token
                token = (~used & (used + 1)).bit_length() - 1
                token_of[index] = token
                holders[token] += 1
                used |= 1 << token
                signal = token + 1
            yield Issued(entry.instruction, mask, signal, entry.layer, entry.loads)

    def _last_waited(self, token_of: Mapping[int, int], index: int) -> list[int]:
        """Give the half of the tokens whose next waiters come last."""
        soonest = [len(self.emitted)] * isa.TOKENS
        for earlier, token in token_of.items():
            waiters = self.emitted[earlier].waiters
            soonest[token] = min(soonest[token], waiters[bisect(waiters, index - 1)])
        return sorted(range(isa.TOKENS), key=lambda token: -soonest[token])[: isa.TOKENS // 2]

    def finish(self) -> tuple[tuple[isa.Instruction, ...], list[int]]:
        """Give the instructions with their tokens, and each one's layer."""
        issues = list(self.issues())
        instructions = tuple(
            attrs.evolve(one.instruction, wait=one.wait, signal=one.signal) for one in issues
        )
        return instructions, [one.layer for one in issues]


_ALL_TOKENS = (1 << isa.TOKENS) - 1
