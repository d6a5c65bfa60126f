"""Pictures of a page that need no library: group-set maps and the network's edges, as SVG paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from .observe import GroupSetMap

__all__ = ["Edge", "GroupSetPicture", "picture", "route"]

TAP_GAP, TERM_GAP = 1, 3  # in cells
WIDEST, TALLEST, LARGEST_CELL = 640, 288, 9  # in pixels


@attrs.frozen
class GroupSetPicture:
    """A group-set map as two SVG paths in cells; a cell is ``cell`` pixels.

    Rows are kernel blocks; columns are input-channel blocks, tap by tap, term by term.
    """

    columns: int
    rows: int
    cell: int
    zero: str
    stored: str


def picture(groups: GroupSetMap) -> GroupSetPicture:
    """Draw a group-set map."""
    columns, width = _columns(groups)
    cells = {place: (columns[place[1:]], place[0]) for place in groups.dense}
    stored = [cells[place] for place in groups.stored]
    zero = [cell for place, cell in cells.items() if place not in groups.stored]
    cell = max(1, min(LARGEST_CELL, WIDEST // width, TALLEST // groups.out_blocks))
    return GroupSetPicture(width, groups.out_blocks, cell, _path(zero), _path(stored))


def _columns(groups: GroupSetMap) -> tuple[Mapping[tuple[int, int, int], int], int]:
    """Give the column of each (term, tap, input block), and how many columns there are."""
    columns, at = {}, 0
    for term, (taps, blocks) in enumerate(zip(groups.taps, groups.blocks, strict=True)):
        at += TERM_GAP if term else 0
        for tap in range(taps):
            at += TAP_GAP if tap and blocks > 1 else 0
            for block in range(blocks):
                columns[term, tap, block] = at
                at += 1
    return columns, at


def _path(cells: Iterable[tuple[int, int]]) -> str:
    """Give the path of some cells, neighbours of a row as one rectangle."""
    runs: list[tuple[int, int, int]] = []
    for column, row in sorted(cells, key=lambda cell: (cell[1], cell[0])):
        if runs and runs[-1][1] == row and runs[-1][0] + runs[-1][2] == column:
            runs[-1] = (runs[-1][0], row, runs[-1][2] + 1)
        else:
            runs.append((column, row, 1))
    return "".join(f"M{column} {row}h{length}v1h-{length}z" for column, row, length in runs)


# -- the network -----------------------------------------------------------------------------------


@attrs.frozen
class Edge:
    """A map's way from one row of the network to a later one, ``lane`` lanes aside of them.

    Lane 0 is the column of the rows themselves.
    """

    start: int
    stop: int
    lane: int


def route(edges: Sequence[tuple[int, int]]) -> tuple[Edge, ...]:
    """Give edges lanes so that no two of a lane run beside each other."""
    free: list[int] = []  # by lane, from which row on it is free
    found = []
    for start, stop in sorted(set(edges)):
        if stop == start + 1:
            found.append(Edge(start, stop, 0))
            continue
        lane = next((i for i, row in enumerate(free) if row <= start), len(free))
        free[lane : lane + 1] = [stop]
        found.append(Edge(start, stop, lane + 1))
    return tuple(found)
