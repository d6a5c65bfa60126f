"""Points with which every search begins: the default, and what a few rules make of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import attrs

from mars_runtime.timing import RAW_WORDS

from ..graph import Conv, Pool
from ..schedule import Border, Point, ScheduleError
from .space import Space, replaced
from .staggering import staggered

__all__ = ["bordered", "layout", "starts", "uniform"]


def starts(space: Space) -> Iterator[Point]:
    """Yield the default point, those that differ from it in all layers alike, and layouts.

    All but the first have borders cut where that pays.
    """
    yield space.default
    yield bordered(space, space.default)
    joined = {"join": True, "chained": True}
    for changes in (
        {"join": True},
        joined | {"most": 1, "chunk": 16, "slots": "next"},
        joined | {"most": 8, "chunk": 4},
        joined | {"most": 24, "chunk": 16},
        joined | {"most": 32, "chunk": 4},
    ):
        yield bordered(space, uniform(space, changes))
    ahead = uniform(space, joined | {"most": 8, "chunk": 4, "fetch_lead": 1})
    yield _first_alone(space, bordered(space, ahead))
    if space.arch.overlap == "none":
        yield from _in_turn(space)
    if space.arch.overlap == "full":
        for most, balanced in itertools.product((8, 12), (None, 1024, 256)):
            yield bordered(space, layout(space, most, balanced))


def _in_turn(space: Space) -> Iterator[Point]:
    """Yield points that fetch for one core while the others compute, where that is of use.

    Their loads are large where maps are, and small where filling takes longest: those leave less of
    the arrays empty.
    """
    types = space.graph.types
    sizes = [types[layer.name].height * types[layer.name].width for layer in space.graph.layers]
    for most, few, pixels in ((40, 40, 0), (40, 24, 64), (24, 8, 16)):
        large, small = (
            uniform(space, {"join": True, "chained": True, "most": limit, "chunk": 4}).choices
            for limit in (most, few)
        )
        chosen = (
            small[index] if size <= pixels else large[index] for index, size in enumerate(sizes)
        )
        point = bordered(space, Point(tuple(chosen)))
        for trial in (point, _first_alone(space, point)):
            found = staggered(space, trial) if _has_room(space, trial) else trial
            if found != trial:
                yield found


def uniform(space: Space, changes: dict[str, Any]) -> Point:
    """Give the default point with the same decisions taken for all convolutions.

    A limit that would cut a kernel block, so that its sums had to travel, is not taken there.
    """
    choices = []
    for layer, choice in zip(space.graph.layers, space.default.choices, strict=True):
        packed = space.packed.get(layer.name)
        if packed is None:
            choices.append(choice)
            continue
        wanted = dict(changes)
        pixels = space.graph.types[layer.name].height * space.graph.types[layer.name].width
        if wanted.pop("chained", False) and len(packed.blocks) == pixels == 1:
            wanted |= {"chained": True, "row_groups": 1}
        if wanted.get("most"):
            wanted["most"] = max(wanted["most"], *(b.group_sets for b in packed.blocks))
            if wanted["most"] >= space.arch.slots(packed.weight_bits):
                wanted["most"] = choice.most
        choices.append(attrs.evolve(choice, **wanted))
    return Point(tuple(choices))


def bordered(space: Space, point: Point, *, pools: bool = True) -> Point:
    """Give a point with borders cut where fewer cycles of cores outweigh the drains of more CONVs.

    With ``pools`` a fused pool is done apart where cutting its convolution's border outweighs
    reading the map again.
    Where the kernel blocks, dealt out anew, have no room, or the map, all stays as it is.
    """
    found = point
    for index, layer in enumerate(space.graph.layers):
        if not isinstance(layer, Conv):
            continue
        cost, cut = _border(space, found, index)
        pool = space.fusible.get(layer.name)
        if pools and pool is not None and found.choices[pool].fused:
            apart = _apart(found, index, pool)
            conv, other = _border(space, apart, index)
            if conv + _pooling(space, pool) < cost and _has_room(space, other):
                cut = other
        found = cut
    return found if _has_room(space, found) else point


def _first_alone(space: Space, point: Point) -> Point:
    """Give a point whose first convolution begins as soon as its own weights are there."""
    convs = [i for i, layer in enumerate(space.graph.layers) if isinstance(layer, Conv)]
    return replaced(point, convs[1], join=False) if len(convs) > 1 else point


def _apart(point: Point, conv: int, pool: int) -> Point:
    """Give a point with a pool done apart from its convolution, which writes where both did.

    The pool, and what follows, changes banks: each reads one and writes the other, whose ports
    serve both at once.
    """
    choices = [
        attrs.evolve(choice, bank=1 - choice.bank) if place >= pool else choice
        for place, choice in enumerate(point.choices)
    ]
    return replaced(
        replaced(Point(tuple(choices)), conv, bank=point.choices[pool].bank), pool, fused=False
    )


def _border(space: Space, point: Point, index: int) -> tuple[float, Point]:
    """Give the least cycles of a convolution over its borders, and the point that has them."""
    arch, layer = space.arch, space.graph.layers[index]
    assert isinstance(layer, Conv)
    settings = 1 if layer.residual is None else 2  # SAS; RESIDUAL besides
    drain = arch.macro_latency_cycles + arch.apw_latency_cycles + settings * arch.issue_cycles
    costs: dict[Border, int] = {}
    for border in space.decisions(point, index).get("border", (point.choices[index].border,)):
        try:
            share = space.share(layer, attrs.evolve(point.choices[index], border=border))
        except ScheduleError:
            continue
        costs[border] = share.busy + share.convs * drain
    if not costs:
        return math.inf, point
    best = min(costs, key=costs.__getitem__)
    return costs[best], replaced(point, index, border=best)


def _pooling(space: Space, index: int) -> int:
    """Give the cycles of a pool of its own on the core that is dealt most blocks."""
    pool = space.graph.layers[index]
    assert isinstance(pool, Pool)
    source = space.graph.types[pool.input]
    blocks = -(-source.blocks // space.arch.cores)
    return blocks * source.height * source.width * source.planes


def layout(space: Space, most: int, balanced: int | None) -> Point:
    """Give a point whose loads are filled in a steady stream, behind compute.

    An opened array is filled whole, by loads with each of which a core computes as soon as it is
    there. They hold at most ``most`` group-sets where cutting kernel blocks costs no time, whole
    blocks elsewhere. Layers of at least ``balanced`` pixels have their rows shared out where that
    leaves the cores more even, and they leave room in the array for what follows.
    """
    point = space.default
    for index in range(len(point.choices)):
        trials = _layouts(space, point, index, most, balanced)
        point = next((trial for trial in trials if _has_room(space, trial)), point)
    return point


def _layouts(
    space: Space, point: Point, index: int, most: int, balanced: int | None
) -> Iterator[Point]:
    """Yield what :func:`layout` tries for a layer, best first."""
    layer = space.graph.layers[index]
    if not isinstance(layer, Conv):
        return
    arch, packed, out = space.arch, space.packed[layer.name], space.graph.types[layer.name]
    point = replaced(point, index, join=True, slots="next")
    pixels, capacity = out.height * out.width, arch.slots(packed.weight_bits)
    heaviest = max(block.group_sets for block in packed.blocks)
    if pixels == len(packed.blocks) == 1:
        yield replaced(point, index, chained=True, row_groups=1)
        return
    whole = replaced(point, index, most=heaviest if heaviest < capacity else 0)
    if balanced is not None and pixels >= balanced:
        choice = whole.choices[index]
        shared = [attrs.evolve(choice, row_groups=n) for n in space.domain(index)["row_groups"]]
        even = min(shared, key=lambda one: (space.share(layer, one).cycles, one.row_groups))
        if even.row_groups > 1 and space.share(layer, even).group_sets <= capacity * 3 // 4:
            yield replaced(whole, index, row_groups=even.row_groups)
    if packed.group_sets > arch.cores * most:
        # A part between two others reads and writes sums while it computes; a first or last one
        # does so only once.
        accesses = arch.accesses(space.graph.types[layer.terms[0].input].bits)
        part = most if most * accesses >= 2 * RAW_WORDS else max(most, -(-heaviest // 2))
        small = replaced(point, index, most=part)
        yield small
        # Where the sums need a bank for themselves, the map goes where the layer's input lies.
        writer = space.writer(point, index)
        yield from (replaced(small, writer, bank=bank) for bank in range(arch.banks))
    yield whole


def _has_room(space: Space, point: Point) -> bool:
    try:
        space.realize(point)
    except ScheduleError:
        return False
    return True
