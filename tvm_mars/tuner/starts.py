"""Points with which every search begins: the default, and what a few rules make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs

from mars_runtime.timing import RAW_WORDS, fill_cost

from ..graph import Conv, Pool
from ..schedule import Border, Choice, Point, ScheduleError
from ..schedule.types import Slots
from .space import Space, replaced
from .staggering import staggered

__all__ = ["Layout", "bordered", "layout", "starts", "swapped_banks", "uniform"]


@attrs.frozen(kw_only=True)
class Layout:
    """How :func:`layout` divides layers into loads.

    Parameters
    ----------
    most : int
        Group-sets of a load of a layer that is filled for longer than it computes.
    roomy : int
        Those of others; a heavier kernel block is a load of its own.
    balanced : int, optional
        Layers of at least so many pixels have their rows shared out where that leaves the cores
        more even, and they leave room in the array for what follows.
    halved : bool
        Whether others that compute for longer have their rows shared out to two groups of cores,
        with whom loads take turns twice as often.
    apart : bool
        Whether those that compute for longer have a CONV for each core.
    slots : "low", "next" or "oldest"
        Which macro slots loads take.
    """

    most: int
    roomy: int = 0
    balanced: int | None = None
    halved: bool = False
    apart: bool = False
    slots: Slots = "oldest"


#: What is tried: the size of a load decides how well arrays are filled whole.
LAYOUTS = (
    Layout(most=10, roomy=12, balanced=1024),
    Layout(most=12, roomy=12, balanced=256),
    Layout(most=6, roomy=12, balanced=256, slots="next"),
    Layout(most=10, balanced=1024, halved=True, slots="next"),
    Layout(most=12, balanced=1024, halved=True),
    Layout(most=20, apart=True),
)


def starts(space: Space) -> Iterator[Point]:
    """Yield the default point, those that differ from it in all layers alike, and layouts.

    All but the first have borders cut where that pays.
    """
    yield space.default
    yield bordered(space, space.default)
    joined = {"join": True, "chained": True}
    yield bordered(space, _full_at_first(space, uniform(space, {"join": True})))
    for changes in (
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
        for wanted in LAYOUTS:
            yield bordered(space, layout(space, wanted))


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


def _full_at_first(space: Space, point: Point) -> Point:
    """Give a point whose first arrays hold as many whole layers as fit, the last what is left.

    That pays where too little is computed before the second filling to hide it.
    """
    held = 0
    for index, layer in enumerate(space.graph.layers):
        if isinstance(layer, Conv):
            size = space.share(layer, point.choices[index]).group_sets
            held += size
            if held > space.arch.slots(space.packed[layer.name].weight_bits):
                point, held = replaced(point, index, join=False), size
    return point


def _first_alone(space: Space, point: Point) -> Point:
    """Give a point whose first convolution begins as soon as its own weights are there."""
    convs = [i for i, layer in enumerate(space.graph.layers) if isinstance(layer, Conv)]
    return replaced(point, convs[1], join=False) if len(convs) > 1 else point


def _apart(point: Point, conv: int, pool: int) -> Point:
    """Give a point with a pool done apart from its convolution, which writes where both did.

    The pool, and what follows, changes banks: each reads one and writes the other, whose ports
    serve both at once.
    """
    other = swapped_banks(point, pool)
    return replaced(replaced(other, conv, bank=point.choices[pool].bank), pool, fused=False)


def swapped_banks(point: Point, first: int) -> Point:
    """Give a point in which each layer from one on writes the other bank."""
    choices = [
        attrs.evolve(choice, bank=1 - choice.bank) if place >= first else choice
        for place, choice in enumerate(point.choices)
    ]
    return Point(tuple(choices))


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


def layout(space: Space, wanted: Layout) -> Point:
    """Give a point whose loads are filled in a steady stream, behind compute.

    An opened array is filled whole, by loads with each of which a core computes as soon as it is
    there. Kernel blocks are cut for them where that costs no time.
    """
    point = space.default
    for index in range(len(point.choices)):
        trials = _layouts(space, point, index, wanted)
        point = next((trial for trial in trials if _has_room(space, trial)), point)
    return point


def _layouts(space: Space, point: Point, index: int, wanted: Layout) -> Iterator[Point]:
    """Yield what :func:`layout` tries for a layer, best first."""
    layer = space.graph.layers[index]
    if not isinstance(layer, Conv):
        return
    arch, packed, out = space.arch, space.packed[layer.name], space.graph.types[layer.name]
    point = replaced(point, index, join=True, slots=wanted.slots)
    pixels, capacity = out.height * out.width, arch.slots(packed.weight_bits)
    heaviest = max(block.group_sets for block in packed.blocks)
    if pixels == len(packed.blocks) == 1:
        yield replaced(point, index, chained=True, row_groups=1)
        return
    most = max(heaviest, wanted.roomy)
    whole = replaced(point, index, most=most if most < capacity else 0)
    fills_longer = _fills_longer(space, layer, whole.choices[index])
    if not fills_longer:
        point, whole = (replaced(one, index, apart=wanted.apart) for one in (point, whole))
    # Two loads that do not fit beside each other are not filled behind compute.
    streams = fills_longer or 2 * heaviest > capacity
    if wanted.balanced is not None and pixels >= wanted.balanced:
        choice = whole.choices[index]
        shared = [attrs.evolve(choice, row_groups=n) for n in space.domain(index)["row_groups"]]
        even = min(shared, key=lambda one: (space.share(layer, one).cycles, one.row_groups))
        if even.row_groups > 1 and space.share(layer, even).group_sets <= capacity * 3 // 4:
            yield replaced(whole, index, row_groups=even.row_groups)
    behind = all(layer.inputs[0] != entry.name for entry in space.graph.inputs)
    if wanted.halved and not streams and behind:
        halves = replaced(whole, index, row_groups=2)
        if not _fills_longer(space, layer, halves.choices[index]):
            yield halves
    if packed.group_sets > arch.cores * wanted.most and streams:
        # A part between two others reads and writes sums while it computes; a first or last one
        # does so only once.
        accesses = arch.accesses(space.graph.types[layer.terms[0].input].bits)
        enough = wanted.most * accesses >= 2 * RAW_WORDS
        part = wanted.most if enough else max(wanted.most, -(-heaviest // 2))
        small = replaced(point, index, most=part)
        yield small
        # Where the sums need a bank for themselves, the map goes where the layer's input lies.
        writer = space.writer(point, index)
        yield from (replaced(small, writer, bank=bank) for bank in range(arch.banks))
    yield whole


def _fills_longer(space: Space, layer: Conv, choice: Choice) -> bool:
    """Tell whether the core that has most of a layer is filled for longer than it computes."""
    arch, width = space.arch, space.packed[layer.name].weight_bits
    share = space.share(layer, choice)
    opened = arch.array_fill_cycles * share.group_sets / arch.slots(width)
    return fill_cost(arch, share.group_sets, width).cycles + opened > share.busy


def _has_room(space: Space, point: Point) -> bool:
    try:
        space.realize(point)
    except ScheduleError:
        return False
    return True
