"""The decisions behind a schedule, as data: what a search chooses among.

Which kernel blocks a core holds, and where maps lie in a bank, follow from them by the rules of the
default schedule: blocks heaviest first to the core with the least work, maps in the first gap.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from ..graph import Graph
from .plan import fuse_pools
from .types import Schedule

__all__ = ["BORDERS", "Border", "Choice", "Point", "point_of"]

Border: TypeAlias = Literal["whole", "rows", "both"]
BORDERS: tuple[Border, ...] = ("whole", "rows", "both")


@attrs.frozen(kw_only=True)
class Choice:
    """The decisions of one step; those from ``order`` on concern convolutions.

    Parameters
    ----------
    tile : (int, int)
        Rows and columns written per pass.
    block_tile : int
        Channel blocks per pass of a pool or an addition.
    staged : bool
        Whether the output lives off-chip.
    bank : int
        Where a resident output is written.
    order : "loads" or "tiles"
        The outer loop.
    partial : "bank" or "offchip"
        Where partial sums of a cut kernel block travel.
    row_groups : int
        Into how many groups the cores are divided by rows.
    most : int
        Group-sets that a load may put on a core; 0 for as many as the array holds. A kernel block
        of more is cut into equal parts.
    chunk : int
        Group-sets per FETCH and FILL.
    join : bool
        Whether loads are filled together with the one before, as long as they fit beside each
        other: the arrays are opened once for all.
    fill_lead, fetch_lead : int
        How many loads' compute a filling that does not join precedes; how many more its fetching.
    slots : "low" or "next"
        Which macro slots are tried first: the lowest, or those behind the load before.
    apart : bool
        Whether each core has a CONV of its own.
    chained : bool
        Whether the layer's one kernel block is spread over the cores.
    border : "whole", "rows" or "both"
        Whether rows, or rows and columns, at the border have CONVs of their own, which pass over
        the taps that only meet padding there.
    """

    tile: tuple[int, int]
    block_tile: int
    staged: bool = False
    bank: int = 0
    order: Literal["tiles", "loads"] = "loads"
    partial: Literal["bank", "offchip"] = "bank"
    row_groups: int = 1
    most: int = 0
    chunk: int = 8
    join: bool = False
    fill_lead: int = 0
    fetch_lead: int = 0
    slots: Literal["low", "next"] = "low"
    apart: bool = False
    chained: bool = False
    border: Border = "whole"


@attrs.frozen
class Point:
    """One schedule of a graph: a choice for each step, and the pools that are left unfused."""

    steps: tuple[Choice, ...]
    unfused: tuple[str, ...] = ()


def point_of(graph: Graph, schedule: Schedule) -> Point:
    """Read the point of a default schedule."""
    written = {entry.output for entry in schedule.layers}
    steps = fuse_pools(graph)
    return Point(
        tuple(
            Choice(
                tile=entry.tile,
                block_tile=entry.block_tile,
                staged=entry.output_staged,
                bank=entry.place.bank,
                order=entry.order,
                partial="offchip" if entry.partial == "offchip" else "bank",
                row_groups=entry.row_groups,
                chunk=entry.fetch_chunk,
            )
            for entry in schedule.layers
        ),
        tuple(step.pool.name for step in steps if step.pool and step.layer.name in written),
    )
