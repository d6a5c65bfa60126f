"""Fetching for one core while the others compute: how far ahead of filling each layer should fetch.

Without overlap a core is not fetched for while it computes. Where arrays are filled faster than the
one port fetches for all cores, these stand still until it has. What it fetches for one core after
the other, while those that it does not fetch for compute, costs each core its own part alone.
"""

from __future__ import annotations

import math

import attrs

from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import offchip_cycles

from ..codegen.image import load_parts
from ..graph import Conv
from ..schedule import Point, ScheduleError
from .space import Space, replaced

__all__ = ["staggered"]

PLACES = 3  # tiles behind which the cores take turns


@attrs.define
class _Turn:
    """What is computed with a load: by which layer, and for how long on the busiest core."""

    index: int
    work: float
    filled: bool = False  # whether arrays are filled before it,
    excess: float = 0  # and for how many cycles more the port fetches what is filled


def staggered(space: Space, point: Point) -> Point:
    """Give a point whose layers fetch ahead what the port cannot fetch while arrays are filled.

    What the port lacks for a filling it fetches behind the compute before that, for no longer than
    that takes; and else behind what lies before. Layers that fetch are cut into tiles, between
    which the cores take turns, unless their input is moved by tiles.
    """
    turns = _turns(space, point)
    # Cycles of the port: from the last turn to the first, what is lacking behind each; then, from
    # the first to the last, what of that can be there.
    lacking = [0.0]
    for turn in reversed(turns):
        lacking.append(max(0.0, max(0.0, lacking[-1] - turn.work) + turn.excess))
    ahead = 0.0
    depths: dict[int, int] = {}  # by layer
    rows: dict[int, int] = {}  # by layer, its turns in a row without filling, where they are fewest
    row = 0
    for number, turn in enumerate(turns):
        packed = space.packed[space.graph.layers[turn.index].name]
        size = 8 * group_set_bytes(packed.weight_bits)
        each = space.arch.cores * offchip_cycles(space.arch, size)
        room = space.arch.weight_sram_bits // size * each
        ahead = max(0.0, ahead - turn.excess) + turn.work
        ahead = min(ahead, room, lacking[len(turns) - 1 - number])
        if ahead > 0:
            depths[turn.index] = max(depths.get(turn.index, 0), math.ceil(ahead / each))
        row += 1
        follows = turns[number + 1] if number + 1 < len(turns) else None
        if follows is None or follows.filled or follows.index != turn.index:
            rows[turn.index] = min(rows.get(turn.index, row), row)
            row = 0
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
        aheads = entry.fill_ahead or (0,) * len(entry.loads)
        for load, ahead in zip(entry.loads, aheads, strict=True):
            turns.append(_Turn(index, busy / len(entry.loads)))
            first = max(first, len(turns) - 1 - ahead)
            filling, parts = turns[first], load_parts(packed, load)
            if not filling.filled:
                filling.filled, filling.excess = True, -space.arch.array_fill_cycles
            filling.excess += offchip_cycles(space.arch, parts.bits)
            filling.excess -= parts.fill_cycles(space.arch, packed.weight_bits)
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
