"""Which kernel blocks go to which core, and into which filling of its array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch

from ..pack import PackedBlock, PackedConv
from .types import Dealing, Load, Piece, ScheduleError

__all__ = ["chained_loads", "make_loads"]


class _Room:
    """What is left of one load on one core: macro slots, index SRAM, parameter SRAM.

    The index SRAM is divided once between index codes and the load descriptor: one CONV serves all
    cores, so that every core has its codes at the same address, behind the longest descriptor.
    """

    def __init__(self, packed: PackedConv, arch: MarsArch, most: int) -> None:
        self.packed = packed
        index_bytes = arch.index_sram_bits // 8
        self.slots = min(most, index_bytes // 2 // isa.CODE_BYTES)
        self.segments = (index_bytes - self.slots * isa.CODE_BYTES) // isa.SEGMENT_BYTES
        self.parameters = arch.parameter_sram_bits // 8
        self.record = packed.parameter_bytes
        self.pieces: list[Piece] = []

    def largest(self, block: int, start: int) -> int | None:
        """Give how far (exclusive) a block's group-sets from ``start`` on fit; None for nothing.

        An empty block needs a segment and its parameters, too.
        """
        if self.parameters < self.record:
            return None
        total = self.packed.blocks[block].group_sets
        stop = min(total, start + self.slots)
        while stop > start or total == 0:
            excess = self._segments(block, start, stop) - self.segments
            if excess <= 0:
                return stop
            if total == 0:
                return None
            stop -= excess  # a group-set less is a segment less at most
        return None

    def _segments(self, block: int, start: int, stop: int) -> int:
        return len(self.packed.blocks[block].segments(start, stop))

    def put(self, block: int, start: int, stop: int) -> None:
        """Take the room of a piece."""
        total = self.packed.blocks[block].group_sets
        self.slots -= stop - start
        self.segments -= self._segments(block, start, stop)
        self.parameters -= self.record
        self.pieces.append(Piece(block, start, stop, total))


def make_loads(
    packed: PackedConv,
    arch: MarsArch,
    cycles: Sequence[npt.ArrayLike],
    row_groups: int = 1,
    most: int = 0,
    dealing: Dealing = "heaviest",
) -> tuple[Load, ...]:
    """Share out kernel blocks and cut them into loads.

    On a core, blocks that do not fit one load come first, over as many loads as they need (each
    continues the partial sum of the one before): back to back where the array is the limit, else in
    equal parts, since a small part takes as long as the transport of its sums. The others each go
    whole into the first load that has room, heaviest first.

    Parameters
    ----------
    cycles : sequence of int or array
        What a group-set of each term of the layer costs: a number, or one for each tap.
    row_groups : int
        Into how many groups the cores are divided, each of which holds all blocks.
    most : int
        Group-sets that a load may put on a core, where the array holds more; 0 for all of it.
    dealing : "heaviest", "snake" or "runs"
        Who takes which block. ``heaviest``: one after the other, heaviest first, goes to the core
        with the least work. ``snake``: heaviest first, back and forth over the cores, which get
        equally many. ``runs``: each core takes blocks that follow each other, divided where the
        work comes close to equal shares.
    """
    costs = [max(1, _cost(block, cycles)) for block in packed.blocks]
    dealt = _deal(costs, arch.cores // row_groups, dealing)
    capacity = arch.slots(packed.weight_bits)
    most = min(most or capacity, capacity)
    filled = [_fill_core(packed, arch, blocks, most) for blocks in dealt]
    count = max(len(loads) for loads in filled)
    return tuple(
        Load(
            row_groups * tuple(tuple(loads[i].pieces) if i < len(loads) else () for loads in filled)
        )
        for i in range(count)
    )


def _cost(block: PackedBlock, cycles: Sequence[npt.ArrayLike]) -> int:
    found = 0
    for term, cost in enumerate(cycles):
        taps = block.taps[block.terms == term]
        by_tap = np.asarray(cost)
        found += int(by_tap[taps].sum() if by_tap.ndim else by_tap * len(taps))
    return found


def _deal(costs: Sequence[int], cores: int, dealing: Dealing) -> list[list[int]]:
    """Give each core's blocks, heaviest first."""
    order = sorted(range(len(costs)), key=lambda block: (-costs[block], block))
    work = [0] * cores
    dealt: list[list[int]] = [[] for _ in work]
    for turn, block in enumerate(order):
        if dealing == "snake":
            core = min(turn % (2 * cores), -(turn + 1) % (2 * cores))
        elif dealing == "runs":
            middle = 2 * sum(costs[:block]) + costs[block]
            core = middle * cores // (2 * sum(costs))
        else:
            core = work.index(min(work))
        work[core] += costs[block]
        dealt[core].append(block)
    return dealt


def chained_loads(packed: PackedConv, arch: MarsArch) -> tuple[Load, ...]:
    """Spread a layer's one kernel block over the cores, piece after piece.

    Raises
    ------
    ScheduleError
        If it has more blocks: a core holds one partial sum at a time.
    """
    if len(packed.blocks) != 1:
        raise ScheduleError(
            f"a chain of one kernel block, not {len(packed.blocks)}", where=packed.name
        )
    total, at = packed.blocks[0].group_sets, 0
    capacity = arch.slots(packed.weight_bits)
    loads: list[Load] = []
    while at < total or not loads:
        rooms = [_Room(packed, arch, capacity) for _ in range(arch.cores)]
        for place, room in enumerate(rooms):
            share = -(-(total - at) // (arch.cores - place))
            stop = room.largest(0, at)
            if stop is not None and (share or (not loads and not place)):
                stop = min(stop, at + share)
                room.put(0, at, stop)
                at = stop
        if not any(room.pieces for room in rooms):
            raise ScheduleError("no group-set fits a core's tables", where=packed.name)
        loads.append(Load(tuple(tuple(room.pieces) for room in rooms)))
    return tuple(loads)


def _fill_core(packed: PackedConv, arch: MarsArch, blocks: Sequence[int], most: int) -> list[_Room]:
    rooms = [_Room(packed, arch, most)]
    for block in blocks:
        total = packed.blocks[block].group_sets
        if total <= most:
            room = next((room for room in rooms if room.largest(block, 0) == total), None)
            if room is None and _Room(packed, arch, most).largest(block, 0) == total:
                room = _Room(packed, arch, most)
                rooms.append(room)
            if room is not None:
                room.put(block, 0, total)
                continue
        back_to_back = most == arch.slots(packed.weight_bits)
        part = total if back_to_back else -(-total // -(-total // most))
        start = 0
        while start < total:
            stop = rooms[-1].largest(block, start)
            wanted = min(total, start + part)
            if stop is None or (stop < wanted and rooms[-1].pieces and not back_to_back):
                rooms.append(_Room(packed, arch, most))
                continue
            stop = min(stop, wanted)
            rooms[-1].put(block, start, stop)
            start = stop
    return [room for room in rooms if room.pieces]
