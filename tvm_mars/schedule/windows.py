"""What a tile needs of each of its layer's inputs, and what of that the tile before has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from mars_runtime.maps import MapType

from ..graph import Conv, Pool

if TYPE_CHECKING:
    from .plan import Step

__all__ = ["Window", "extents", "input_windows", "overlaps", "shares_rows"]


@attrs.frozen
class Window:
    """What of an input a tile needs: rows and columns, and where the tile's origin falls in it.

    ``origin`` is the input row and column, counted from the first of the window, that output pixel
    (0, 0) of the tile meets with tap (0, 0); negative in the padding.

    In a ``ring`` of rows each row of the input has one place in all windows of a layer, which are
    alike in height: rows that two of them share stay where they are.
    """

    y: int
    x: int
    height: int
    width: int
    origin: tuple[int, int]
    ring: bool = False

    @property
    def row(self) -> int:
        """The stored row that is the window's first."""
        return self._stored(self.y)

    def missing(self, held: Window | None) -> Iterator[tuple[int, int, int]]:
        """Yield runs of rows that another window of the input has not left in the bank.

        Yields
        ------
        (int, int, int)
            A run's first row, counted in the input and as it is stored, and its rows.
        """
        if held == self:
            return
        end = self.y + self.height
        runs = [(self.y, end)]
        if self.ring and held is not None:
            runs = [(self.y, min(end, held.y)), (max(self.y, held.y + held.height), end)]
        for first, stop in runs:
            while first < stop:
                count = min(stop - first, self.height - self._stored(first))
                yield first, self._stored(first), count
                first += count

    def _stored(self, row: int) -> int:
        return row % self.height if self.ring else row - self.y


@attrs.frozen
class _Axis:
    """How output pixels meet an input along its rows, or columns; ``padding`` lies before it."""

    size: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0

    @property
    def reach(self) -> int:
        """Rows from the first tap to the last."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def overlaps(self) -> bool:
        """Whether what adjacent output pixels meet has rows in common."""
        return self.reach > self.stride

    def extent(self, count: int) -> int:
        """Rows that so many output pixels need at most."""
        return min((count - 1) * self.stride + self.reach, self.size)

    def needed(self, first: int, count: int) -> tuple[int, int, int]:
        """First row and end of what output pixels need, and the row that the first one meets."""
        start = first * self.stride - self.padding
        stop = start + (count - 1) * self.stride + self.reach
        low = min(max(start, 0), self.size - 1)  # a tile that only meets padding still names a row
        return low, max(low + 1, min(stop, self.size)), start


def _axes(step: Step, types: Mapping[str, MapType]) -> Iterator[tuple[_Axis, _Axis]]:
    """Yield for each input of a step how the pixels that its layer computes meet it."""
    layer = step.layer
    if isinstance(layer, Pool):
        yield _pair(types[layer.input], layer.kernel, layer.stride, (1, 1), layer.padding)
        return
    terms = layer.terms if isinstance(layer, Conv) else ()
    for term in terms:
        yield _pair(types[term.input], term.kernel, term.stride, term.dilation, term.padding)
    for name in layer.inputs[len(terms) :]:  # a residual, or what is added
        yield _Axis(types[name].height), _Axis(types[name].width)


def _pair(
    source: MapType,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Sequence[int],
) -> tuple[_Axis, _Axis]:
    return (
        _Axis(source.height, kernel[0], stride[0], dilation[0], padding[0]),
        _Axis(source.width, kernel[1], stride[1], dilation[1], padding[1]),
    )


def extents(
    step: Step, types: Mapping[str, MapType], tile: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Give for each input the rows and columns that any tile of this size needs at most."""
    height, width = tile[0] * step.pooling[0], tile[1] * step.pooling[1]
    return tuple([(rows.extent(height), cols.extent(width)) for rows, cols in _axes(step, types)])


def input_windows(
    step: Step,
    types: Mapping[str, MapType],
    tile: tuple[int, int, int, int],
    kept: int | None = None,
) -> tuple[Window, ...]:
    """For a tile (row, column, height, width) of a step's output, what it needs of each input.

    Parameters
    ----------
    kept : int, optional
        Rows of a whole tile where the rows that windows share stay in the bank: such windows are
        rings of as many rows as a whole tile needs. Without, each is as large as it has to be.
    """
    ph, pw = step.pooling
    found = []
    for vertical, horizontal in _axes(step, types):
        ring = False
        low, high, y = vertical.needed(tile[0] * ph, tile[2] * ph)
        if kept is not None and vertical.overlaps:
            ring, rows = True, vertical.extent(kept * ph)
            low = max(0, high - rows)
            high = low + rows
        left, right, x = horizontal.needed(tile[1] * pw, tile[3] * pw)
        found.append(Window(low, left, high - low, right - left, (y - low, x - left), ring))
    return tuple(found)


def overlaps(step: Step, types: Mapping[str, MapType]) -> tuple[bool, ...]:
    """Tell for each input whether windows of tiles that lie below each other share rows."""
    return tuple([vertical.overlaps for vertical, _ in _axes(step, types)])


def shares_rows(
    step: Step, types: Mapping[str, MapType], tile: tuple[int, int], staged: Sequence[bool]
) -> bool:
    """Tell whether tiles that follow each other share rows of an input that is moved in for them.

    Those that do not have the width of the map share columns instead, or lie too far apart.
    """
    out = types[step.output]
    strips = tile[1] == out.width and tile[0] < out.height
    shared = zip(overlaps(step, types), staged, strict=True)
    return strips and any(overlap and moved for overlap, moved in shared)
