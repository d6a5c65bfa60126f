"""The values of a schedule."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import attrs

from mars_runtime.errors import MarsError
from mars_runtime.maps import MapType

from .border import runs

__all__ = [
    "DEALINGS",
    "HALOS",
    "SLOTS",
    "Dealing",
    "Halo",
    "LayerSchedule",
    "Load",
    "Part",
    "Piece",
    "Place",
    "Schedule",
    "ScheduleError",
    "Share",
    "Slots",
]

#: How kernel blocks are dealt to cores.
Dealing: TypeAlias = Literal["heaviest", "snake", "runs"]
DEALINGS: tuple[Dealing, ...] = get_args(Dealing)

#: Which macro slots a load takes.
Slots: TypeAlias = Literal["low", "next", "oldest"]
SLOTS: tuple[Slots, ...] = get_args(Slots)

#: What becomes of rows that the windows of tiles share.
Halo: TypeAlias = Literal["reload", "keep"]
HALOS: tuple[Halo, ...] = get_args(Halo)


class ScheduleError(MarsError, ValueError):
    """A schedule asks for what the machine, or the layer, cannot do."""


@attrs.frozen
class Place:
    """Where a map, a part of it or its partial sums lie: bank and first word."""

    bank: int
    base: int


@attrs.frozen
class Piece:
    """Group-sets ``start .. stop`` of the ``total`` of a kernel block, in one load of one core.

    A piece that does not start at 0 continues the partial sum that the piece before it stored.
    """

    block: int
    start: int
    stop: int
    total: int

    @property
    def group_sets(self) -> int:
        """How many group-sets are loaded."""
        return self.stop - self.start

    @property
    def first(self) -> bool:
        """Whether the sum starts here, from the bias."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether the sum ends here, in the APW."""
        return self.stop == self.total


@attrs.frozen(cache_hash=True)
class Load:
    """One filling of the arrays: for each core the pieces that it holds, in walking order."""

    cores: tuple[tuple[Piece, ...], ...]

    @functools.cached_property
    def active(self) -> tuple[int, ...]:
        """Cores that have a block to write, be it an empty one."""
        return tuple(core for core, pieces in enumerate(self.cores) if pieces)

    def group_sets(self, core: int) -> int:
        """Group-sets that a core holds."""
        return sum(piece.group_sets for piece in self.cores[core])

    @functools.cached_property
    def cut_cores(self) -> frozenset[int]:
        """Cores with a sum that is continued from, or into, another load."""
        return frozenset(
            core
            for core, pieces in enumerate(self.cores)
            if any(not (piece.first and piece.last) for piece in pieces)
        )

    @property
    def splits(self) -> bool:
        """Whether a sum is continued from, or into, another load."""
        return bool(self.cut_cores)


@attrs.frozen
class Share:
    """Rows ``first .. first + height`` of a tile, for some cores."""

    cores: tuple[int, ...]
    first: int
    height: int


@attrs.frozen
class Part:
    """Rows and columns of a tile that one CONV computes, counted within the tile."""

    y: int
    x: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels written."""
        return self.height * self.width


@attrs.frozen
class LayerSchedule:
    """How one layer runs.

    Parameters
    ----------
    layer, output : str
        The layer, and the map that it writes: its own, or that of the max pool fused behind it.
    loads : tuple of Load
        The fillings, in order; empty for a pool or an addition.
    tile : (int, int)
        Rows and columns written per pass; the map is covered row by row of tiles.
    block_tile : int
        Channel blocks per pass of a pool or an addition.
    order : "tiles" or "loads"
        The outer loop: with ``tiles`` each tile meets all loads (weights travel again for every
        tile), with ``loads`` each load meets all tiles (maps travel again for every load).
    inputs : tuple of Place
        For each of the layer's inputs where its words lie while it is read.
    staged : tuple of bool
        For each input whether it lives off-chip, so that tiles of it are moved to that place.
    place : Place
        Where the output is written.
    output_staged : bool
        Whether the output lives off-chip, so that tiles of it are moved out from that place.
    copy_out : bool
        Whether a resident output also leaves, being an output of the region.
    partial : "none", "bank" or "offchip"
        Where partial sums travel.
    partial_place : Place, optional
        Their place in a bank.
    fetch_chunk : int
        Group-sets per FETCH and FILL, so that the two hops overlap.
    row_groups : int
        Into how many groups the cores are divided; each holds the same group-sets and computes its
        share of a tile's rows. More than one where there are fewer kernel blocks than cores.
    slots : "low", "next" or "oldest"
        Which macro slots a load takes: from 0 on; those behind the load before, so that it may be
        filled while the cores still compute with that; or those whose readers lie furthest back.
    fill_ahead : tuple of int
        For each load (none: zero of each), how many loads' compute its filling precedes in program
        order, counted back from its own. Arrays that are open stay open until a core computes:
        loads filled together are opened once.
    fetch_ahead : tuple of int
        The same for fetching, which is never behind filling: weights then wait in the weight SRAM.
    fetch_depth : int
        How many group-sets of later loads the weight SRAM of each core is to hold when the layer is
        done. They are fetched while arrays are filled, as far as the port is free then; the rest
        while the layer is computed, for one core after the other between its tiles.
    apart : bool
        Whether each core has a CONV of its own, which waits for no other core's weights.
    chained : bool
        Whether the layer's one kernel block is spread over the cores: each continues the partial
        sum of the one before.
    row_cuts, column_cuts : tuple of int
        Rows and columns of the output at which a CONV ends within a tile, so that those at the
        border pass over the taps that only meet padding there.
    halo : "reload" or "keep"
        Whether rows of a staged input that the windows of tiles share are moved in for each of
        them, or stay in the bank: the window is then a ring of rows.
    """

    layer: str
    output: str
    loads: tuple[Load, ...]
    tile: tuple[int, int]
    block_tile: int
    order: Literal["tiles", "loads"]
    inputs: tuple[Place, ...]
    staged: tuple[bool, ...]
    place: Place
    output_staged: bool
    copy_out: bool = False
    partial: Literal["none", "bank", "offchip"] = "none"
    partial_place: Place | None = None
    fetch_chunk: int = 8
    row_groups: int = 1
    slots: Slots = "low"
    fill_ahead: tuple[int, ...] = ()
    fetch_ahead: tuple[int, ...] = ()
    fetch_depth: int = 0
    apart: bool = False
    chained: bool = False
    row_cuts: tuple[int, ...] = ()
    column_cuts: tuple[int, ...] = ()
    halo: Halo = "reload"

    @property
    def kept(self) -> int | None:
        """Rows of a whole tile, if rows that windows share stay (see :func:`input_windows`)."""
        return self.tile[0] if self.halo == "keep" else None

    def tiles(self, type: MapType) -> Iterator[tuple[int, int, int, int]]:
        """Yield row, column, height and width of each tile of the output map."""
        for y in range(0, type.height, self.tile[0]):
            for x in range(0, type.width, self.tile[1]):
                yield (
                    y,
                    x,
                    min(self.tile[0], type.height - y),
                    min(self.tile[1], type.width - x),
                )

    def shares(self, tile: tuple[int, int, int, int], cores: int) -> Iterator[Share]:
        """Yield what each group of cores computes of a tile; a group may be left without rows."""
        rows = -(-tile[2] // self.row_groups)
        size = cores // self.row_groups
        for group in range(self.row_groups):
            first = group * rows
            height = min(rows, tile[2] - first)
            if height > 0:
                yield Share(tuple(range(group * size, (group + 1) * size)), first, height)

    def parts(self, tile: tuple[int, int, int, int], share: Share) -> Iterator[Part]:
        """Yield what each CONV computes of a share of a tile."""
        for y, height in runs(tile[0] + share.first, share.height, self.row_cuts):
            for x, width in runs(tile[1], tile[3], self.column_cuts):
                yield Part(y - tile[0], x - tile[1], height, width)

    def __str__(self) -> str:
        places = [
            f"bank{place.bank}+{place.base}{' staged' if staged else ''}"
            for place, staged in zip(self.inputs, self.staged, strict=True)
        ]
        out = f"bank{self.place.bank}+{self.place.base}{' staged' if self.output_staged else ''}"
        partial = f", partial sums {self.partial}" if self.partial != "none" else ""
        groups = f", rows in {self.row_groups} groups" if self.row_groups > 1 else ""
        cut = ""
        if self.row_cuts or self.column_cuts:
            count = (1 + len(self.row_cuts)) * (1 + len(self.column_cuts))
            cut = f", border cut into {count} parts"
        fused = f" with {self.output}" if self.output != self.layer else ""
        halo = ", halo kept" if self.halo == "keep" else ""
        return (
            f"{self.layer}{fused}: {len(self.loads)} loads, tile {self.tile[0]}x{self.tile[1]}, "
            f"{self.order} outside, {' '.join(places)} -> {out}{partial}{groups}{cut}{halo}"
        )


@attrs.frozen
class Schedule:
    """How a graph runs: its layers in order, and the values that were spilled off-chip."""

    layers: tuple[LayerSchedule, ...]
    spills: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        return "\n".join([*lines, f"spilled: {', '.join(self.spills) or 'nothing'}"])
