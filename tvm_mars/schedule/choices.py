"""The decisions behind a schedule, as data: what a search chooses among.

Where maps lie in a bank follows from them by the rule of the default schedule: in the first gap.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from ..graph import Graph
from .types import Dealing, Halo, LayerSchedule, Schedule, Slots

__all__ = ["BORDERS", "Border", "Choice", "Point", "point_of"]

Border: TypeAlias = Literal["whole", "rows", "both"]
BORDERS: tuple[Border, ...] = ("whole", "rows", "both")


@attrs.frozen(kw_only=True)
class Choice:
    """The decisions of one layer; those from ``order`` to ``border`` concern convolutions.

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
    fused : bool
        Whether a max pool is done by the convolution before it while that writes. The map that
        both write is then the pool's: so are the decisions about its tile and its place.
    order : "loads" or "tiles"
        The outer loop.
    partial : "bank" or "offchip"
        Where partial sums of a cut kernel block travel.
    row_groups : int
        Into how many groups the cores are divided by rows.
    most : int
        Group-sets that a load may put on a core; 0 for as many as the array holds. A kernel block
        of more is cut into equal parts.
    dealing : "heaviest", "snake" or "runs"
        Which kernel blocks a core holds (see :func:`make_loads`).
    chunk : int
        Group-sets per FETCH and FILL.
    join : bool
        Whether loads are filled together with the one before, as long as they fit beside each
        other: the arrays are opened once for all.
    fill_lead, fetch_lead : int
        How many loads' compute a filling that does not join precedes; how many more its fetching.
    fetch_depth : int
        Group-sets of later loads that each core's weight SRAM is to hold when the layer is done,
        fetched for while the other cores compute.
    slots : "low", "next" or "oldest"
        Which macro slots are tried first: the lowest, those behind the load before, or those that
        were read longest ago.
    apart : bool
        Whether each core has a CONV of its own.
    chained : bool
        Whether the layer's one kernel block is spread over the cores.
    border : "whole", "rows" or "both"
        Whether rows, or rows and columns, at the border have CONVs of their own, which pass over
        the taps that only meet padding there.
    halo : "reload" or "keep"
        Whether rows of a staged input that the windows of tiles share stay in the bank, where tiles
        have the width of the map.
    """

    tile: tuple[int, int]
    block_tile: int
    staged: bool = False
    bank: int = 0
    fused: bool = False
    order: Literal["tiles", "loads"] = "loads"
    partial: Literal["bank", "offchip"] = "bank"
    row_groups: int = 1
    most: int = 0
    dealing: Dealing = "heaviest"
    chunk: int = 8
    join: bool = False
    fill_lead: int = 0
    fetch_lead: int = 0
    fetch_depth: int = 0
    slots: Slots = "low"
    apart: bool = False
    chained: bool = False
    border: Border = "whole"
    halo: Halo = "reload"  # as records have it that know of no other


@attrs.frozen
class Point:
    """One schedule of a graph: a choice for each of its layers."""

    choices: tuple[Choice, ...]


def point_of(graph: Graph, schedule: Schedule, apart: Schedule | None = None) -> Point:
    """Read the point of a default schedule.

    Parameters
    ----------
    apart : Schedule, optional
        One in which no pool is fused. What it does where the other fuses a pool is what a change
        of that decision alone leads to; without it, tiles of one pixel.
    """
    layers = (*(apart.layers if apart else ()), *schedule.layers)
    written = {entry.output: entry for entry in layers}
    run = {entry.layer: entry for entry in layers}
    unfused = {entry.layer for entry in schedule.layers}
    return Point(
        tuple(
            _choice(run.get(name), written.get(name), name not in unfused)
            for name in (layer.name for layer in graph.layers)
        )
    )


def _choice(run: LayerSchedule | None, written: LayerSchedule | None, fused: bool) -> Choice:
    """Give the choice of a layer that one entry runs, and whose map one entry writes."""
    choice = Choice(tile=(1, 1), block_tile=1, staged=True, fused=fused, halo="keep")
    if written is not None:
        choice = attrs.evolve(
            choice, tile=written.tile, staged=written.output_staged, bank=written.place.bank
        )
    if run is not None:
        choice = attrs.evolve(
            choice,
            block_tile=run.block_tile,
            order=run.order,
            partial="offchip" if run.partial == "offchip" else "bank",
            row_groups=run.row_groups,
            chunk=run.fetch_chunk,
        )
    return choice
