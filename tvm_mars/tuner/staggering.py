"""Fetching for one core while the others compute: how far ahead of filling each layer should fetch.

Without overlap a core is not fetched for while it computes. Where arrays are filled faster than the
one port fetches for all cores, these stand still until it has. What it fetches for one core after
the other, while those that it does not fetch for compute, costs each core its own part alone.
"""

from __future__ import annotations

import attrs

from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import fill_cost, offchip_cycles

from ..codegen.image import load_parts
from ..graph import Conv
from ..schedule import Point, ScheduleError
from .space import Space, replaced

__all__ = ["staggered"]

PLACES = 3  # tiles at which the cores take turns
SHARE = 0.5  # of the time that a layer computes, in which the port may fetch behind it
SLACK = 1.05  # times the cycles that the port is known to need: what it waits besides


@attrs.define
class _Turn:
    """What is computed with a load: by which layer, and for how long on the busiest core."""

    index: int
    work: float
    filled: bool = False  # whether arrays are filled before it,
    excess: float = 0  # and for how many cycles more the port fetches what is filled


def staggered(space: Space, point: Point) -> Point:
    """Give a point whose layers fetch ahead what the port cannot fetch while arrays are filled.

    From the last filling to the first: what the port lacks there, it fetches behind the compute
    before, or behind that before, where it would take too much of a layer's time. These layers are
    cut into tiles, between which the cores take turns, unless their input is moved by tiles.
    """
    turns = _turns(space, point)
    depths: dict[int, int] = {}  # by layer
    rows: dict[int, int] = {}  # by layer, its turns in a row without filling, where they are fewest
    lacking, row = 0.0, 0  # cycles of the port
    for number, turn in reversed(list(enumerate(turns))):
        row += 1
        if lacking > 0:
            size = 8 * group_set_bytes(
                space.packed[space.graph.layers[turn.index].name].weight_bits
            )
            each = space.arch.cores * offchip_cycles(space.arch, size)
            depths[turn.index] = max(depths.get(turn.index, 0), int(-(-lacking // each)))
            lacking = max(0.0, lacking - SHARE * turn.work)
        if turn.filled or not number or turns[number - 1].index != turn.index:
            rows[turn.index] = min(rows.get(turn.index, row), row)
            row = 0
        if turn.filled:
            lacking = max(0.0, lacking + turn.excess)
    for index, depth in depths.items():
        point = replaced(point, index, fetch_depth=depth)
        point = _cut(space, point, index, -(-PLACES // rows[index]))
    return point


def _turns(space: Space, point: Point) -> list[_Turn]:
    """Give what a point computes with each of its loads, in order, and what is filled before."""
    places = {layer.name: index for index, layer in enumerate(space.graph.layers)}
    turns: list[_Turn] = []
    first = 0  # turn before which the load is filled
    for entry in space.realize(point).layers:
        index = places[entry.layer]
        layer = space.graph.layers[index]
        if not isinstance(layer, Conv):
            continue
        packed, busy = space.packed[layer.name], space.share(layer, point.choices[index]).busy
        for load, ahead in zip(
            entry.loads, entry.fill_ahead or (0,) * len(entry.loads), strict=True
        ):
            turns.append(_Turn(index, busy / len(entry.loads)))
            first = max(first, len(turns) - 1 - ahead)
            filling, parts = turns[first], load_parts(packed, load)
            if not filling.filled:
                filling.filled, filling.excess = True, -space.arch.array_fill_cycles
            port = offchip_cycles(space.arch, 8 * (parts.table_bytes + parts.weight_bytes))
            fill = fill_cost(space.arch, max(1, parts.most_group_sets), packed.weight_bits).cycles
            filling.excess += SLACK * port - fill
    return turns


def _cut(space: Space, point: Point, index: int, parts: int) -> Point:
    """Give a point with a layer's rows cut into tiles, if it can be and no input moves by tiles."""
    writer = space.writer(point, index)
    rows, columns = point.choices[writer].tile
    if not 1 < parts <= rows:
        return point
    cut = replaced(point, writer, tile=(-(-rows // parts), columns))
    try:
        layers = space.realize(cut).layers
    except ScheduleError:
        return point
    name = space.graph.layers[index].name
    staged = next(entry.staged for entry in layers if entry.layer == name)
    return point if any(staged) else cut
