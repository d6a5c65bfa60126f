"""Dependencies between instructions, found from the memory that they touch, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import attrs

from mars_runtime import isa

__all__ = ["Emitter", "Lane", "Span"]

Lane: TypeAlias = tuple[str, int]  # a unit's queue: unit and core
Span: TypeAlias = tuple[object, int, int]  # memory, first cell, end


@attrs.define
class _Emitted:
    instruction: isa.Instruction
    layer: int
    lanes: tuple[Lane, ...]
    waits: tuple[int, ...]
    follows: dict[tuple[Lane, ...], int]  # by lanes, the last instruction that must be done


class Emitter:
    """Collects instructions and finds what each must wait for."""

    def __init__(self) -> None:
        self.emitted: list[_Emitted] = []
        self.layer = 0
        # memory -> (first, end, lanes, is_write) -> the last instruction with this access
        self._accesses: dict[object, dict[tuple[int, int, tuple[Lane, ...], bool], int]] = {}
        # lane -> lanes of another unit -> the last instruction there that the lane has waited for
        self._waited: dict[Lane, dict[tuple[Lane, ...], int]] = {}

    def emit(
        self,
        instruction: isa.Instruction,
        lanes: tuple[Lane, ...],
        reads: Iterable[Span] = (),
        writes: Iterable[Span] = (),
        shared: Iterable[Span] = (),
    ) -> None:
        """Append an instruction that runs on some lanes and touches some memory.

        Within a layer each core writes words of its own and reads none that another writes, so that
        cores do not wait for each other there, but for ``shared`` memory that is written.
        """
        index = len(self.emitted)
        marks = [(span, False, True) for span in reads] + [(span, True, True) for span in writes]
        marks += [(span, True, False) for span in shared]
        follows: dict[tuple[Lane, ...], int] = {}
        for (memory, first, end), is_write, apart in marks:
            table = self._accesses.setdefault(memory, {})
            for (low, high, other, wrote), earlier in table.items():
                if low >= end or first >= high or not (wrote or is_write):
                    continue
                if apart and self._same_layer(earlier, lanes):
                    # In its place, what it follows itself: its access may have hidden theirs.
                    for before, last in self.emitted[earlier].follows.items():
                        follows[before] = max(follows.get(before, -1), last)
                else:
                    follows[other] = max(follows.get(other, -1), earlier)
        for (memory, first, end), is_write, _ in marks:
            table = self._accesses[memory]
            if is_write:
                for key in [key for key in table if first <= key[0] and key[1] <= end]:
                    if table[key] != index:
                        del table[key]
            table[first, end, lanes, is_write] = index
        waits = self._waits(follows, lanes)
        self.emitted.append(_Emitted(instruction, self.layer, lanes, waits, follows))

    def _same_layer(self, earlier: int, lanes: tuple[Lane, ...]) -> bool:
        entry = self.emitted[earlier]
        return entry.layer == self.layer and entry.lanes[0][0] == lanes[0][0] == "compute"

    def _waits(
        self, follows: dict[tuple[Lane, ...], int], lanes: tuple[Lane, ...]
    ) -> tuple[int, ...]:
        """Give those that a token is needed for: not the own queue, nor what was waited for."""
        waits = []
        for other, earlier in follows.items():
            if other == lanes and len(lanes) == 1:
                continue  # a unit executes its queue in order
            if all(self._waited.get(lane, {}).get(other, -1) >= earlier for lane in lanes):
                continue
            waits.append(earlier)
            for lane in lanes:
                self._waited.setdefault(lane, {})[other] = earlier
        return tuple(sorted(waits))

    def finish(self) -> tuple[tuple[isa.Instruction, ...], list[int]]:
        """Allot tokens; give the instructions and each one's layer."""
        last_wait: dict[int, int] = {}
        for index, entry in enumerate(self.emitted):
            for earlier in entry.waits:
                last_wait[earlier] = index
        instructions: list[isa.Instruction] = []
        layers: list[int] = []
        token_of: dict[int, int] = {}
        for index, entry in enumerate(self.emitted):
            mask = 0
            for earlier in entry.waits:
                mask |= 1 << token_of[earlier]
            token_of = {e: token for e, token in token_of.items() if last_wait[e] > index}
            signal = 0
            if index in last_wait:
                free = _free_token(token_of.values())
                if free is None:
                    # All tokens are in use: one SYNC waits for them and stands in for all.
                    joined = sum(1 << token for token in set(token_of.values()))
                    token = next(iter(token_of.values()))
                    instructions.append(isa.Sync(wait=joined, signal=token + 1))
                    layers.append(entry.layer)
                    token_of = dict.fromkeys(token_of, token)
                    free = _free_token(token_of.values())
                    assert free is not None
                token_of[index] = free
                signal = free + 1
            instructions.append(attrs.evolve(entry.instruction, wait=mask, signal=signal))
            layers.append(entry.layer)
        return tuple(instructions), layers


def _free_token(used: Iterable[int]) -> int | None:
    taken = set(used)
    return next((token for token in range(isa.TOKENS) if token not in taken), None)
