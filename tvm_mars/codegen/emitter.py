"""Dependencies between instructions, found from the memory that they touch, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import attrs

from mars_runtime import isa
from mars_runtime.stopwatch import Issued
from mars_runtime.timing import DecodedLoad

__all__ = ["Emitter", "Lane", "Span"]

Lane: TypeAlias = tuple[str, int]  # a unit's queue: unit and core
Span: TypeAlias = tuple[object, int, int]  # memory, first cell, end


@attrs.define
class _Emitted:
    """An instruction with what it waits for: earlier ones, by number."""

    instruction: isa.Instruction
    layer: int
    lanes: tuple[Lane, ...]
    waits: tuple[int, ...]
    follows: dict[tuple[Lane, ...], int]  # by lanes, the last instruction that must be done
    loads: Mapping[int, DecodedLoad] | None


@attrs.define
class _Accesses:
    """Accesses of one memory: by first cell, end and lanes, the last instruction with each."""

    reads: dict[tuple[int, int, tuple[Lane, ...]], int] = attrs.field(factory=dict)
    writes: dict[tuple[int, int, tuple[Lane, ...]], int] = attrs.field(factory=dict)


class Emitter:
    """Collects instructions and finds what each must wait for."""

    def __init__(self) -> None:
        self.emitted: list[_Emitted] = []
        self.layer = 0
        self._accesses: dict[object, _Accesses] = {}
        # lane -> lanes of another unit -> the last instruction there that the lane has waited for
        self._waited: dict[Lane, dict[tuple[Lane, ...], int]] = {}

    def emit(
        self,
        instruction: isa.Instruction,
        lanes: tuple[Lane, ...],
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
        computes = lanes[0][0] == "compute"
        marks = [(span, False, computes) for span in reads]
        marks += [(span, True, computes) for span in writes]
        marks += [(span, True, False) for span in shared]
        follows: dict[tuple[Lane, ...], int] = {}
        for (memory, first, end), is_write, apart in marks:
            accesses = self._accesses.get(memory)
            if accesses is None:
                accesses = self._accesses[memory] = _Accesses()
            for table in (accesses.writes, accesses.reads) if is_write else (accesses.writes,):
                for (low, high, other), earlier in table.items():
                    if low >= end or first >= high:
                        continue
                    if apart and self._computes_same_layer(earlier):
                        # In its place, what it follows itself: its access may have hidden theirs.
                        for before, last in self.emitted[earlier].follows.items():
                            follows[before] = max(follows.get(before, -1), last)
                    elif follows.get(other, -1) < earlier:
                        follows[other] = earlier
        for (memory, first, end), is_write, apart in marks:
            accesses = self._accesses[memory]
            if is_write:
                for table in (accesses.writes, accesses.reads):
                    for key in [key for key in table if first <= key[0] and key[1] <= end]:
                        # What is written anew hides what was there, unless nothing waited for that.
                        beside = apart and key[2] != lanes and self._computes_same_layer(table[key])
                        if table[key] != index and not beside:
                            del table[key]
                accesses.writes[first, end, lanes] = index
            else:
                accesses.reads[first, end, lanes] = index
        waits = self._waits(follows, lanes)
        self.emitted.append(_Emitted(instruction, self.layer, lanes, waits, follows, loads))

    def _computes_same_layer(self, earlier: int) -> bool:
        entry = self.emitted[earlier]
        return entry.layer == self.layer and entry.lanes[0][0] == "compute"

    def _waits(
        self, follows: dict[tuple[Lane, ...], int], lanes: tuple[Lane, ...]
    ) -> tuple[int, ...]:
        """Give those that a token is needed for: not the own queue, nor what was waited for."""
        waits = []
        for other, earlier in follows.items():
            if other == lanes and len(lanes) == 1:
                continue  # a unit executes its queue in order
            known = [self._waited.setdefault(lane, {}) for lane in lanes]
            if all(waited.get(other, -1) >= earlier for waited in known):
                continue
            waits.append(earlier)
            for waited in known:
                waited[other] = earlier
        return tuple(sorted(waits))

    def issues(self) -> Iterator[Issued]:
        """Allot tokens: yield the instructions in program order, with SYNCs where tokens run out.

        An instruction that is waited for takes the lowest free token, until its last waiter.
        """
        last_wait = {
            earlier: index for index, one in enumerate(self.emitted) for earlier in one.waits
        }
        released: dict[int, list[int]] = {}
        for earlier, index in last_wait.items():
            released.setdefault(index, []).append(earlier)
        token_of: dict[int, int] = {}
        holders = [0] * isa.TOKENS
        used = 0
        for index, entry in enumerate(self.emitted):
            mask = 0
            for earlier in entry.waits:
                mask |= 1 << token_of[earlier]
            for earlier in released.get(index, ()):
                token = token_of.pop(earlier)
                holders[token] -= 1
                if not holders[token]:
                    used ^= 1 << token
            signal = 0
            if index in last_wait:
                if used == _ALL_TOKENS:
                    # All tokens are in use: one SYNC waits for them and stands in for all.
                    token = next(iter(token_of.values()))
                    yield Issued(isa.Sync(), used, token + 1, entry.layer)
                    holders = [0] * isa.TOKENS
                    holders[token] = len(token_of)
                    token_of = dict.fromkeys(token_of, token)
                    used = 1 << token
                token = (~used & (used + 1)).bit_length() - 1
                token_of[index] = token
                holders[token] += 1
                used |= 1 << token
                signal = token + 1
            yield Issued(entry.instruction, mask, signal, entry.layer, entry.loads)

    def finish(self) -> tuple[tuple[isa.Instruction, ...], list[int]]:
        """Give the instructions with their tokens, and each one's layer."""
        issues = list(self.issues())
        instructions = tuple(
            attrs.evolve(one.instruction, wait=one.wait, signal=one.signal) for one in issues
        )
        return instructions, [one.layer for one in issues]


_ALL_TOKENS = (1 << isa.TOKENS) - 1
