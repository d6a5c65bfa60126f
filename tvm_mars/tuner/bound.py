"""A number of cycles that no schedule of a network beats on a machine.

It follows from what each layer needs, whatever the schedule: let its *work* be the macro cycles of
all its group-sets at all pixels that it computes, and its *group-sets* those that are stored. A
layer computes when the layers that it depends on are done; each group-set is filled at least once,
before the core that holds it computes with it; a core holds no more group-sets than it has slots,
and fills no more than those between two openings of its array, since it has to compute in between.

**Without overlap, or with prefetch,** a core computes or is filled, never both: cores times the
latency is at least all work, plus all filling, plus one opening for as many group-sets as a core
holds.

**With full overlap** let ``ready(f)`` be a bound of when the layers that ``f`` depends on are done,
0 if there are none. Two things bound the end of a layer ``l``:

- It computes for its work over the cores after ``ready(l)``; a layer that depends on no other waits
  for an opened array and its first group-set.
- Take any ``f`` that is ``l`` or that ``l`` depends on, and the layers between: those that are or
  depend on ``f`` and that are or ``l`` depends on. None of them computes before ``ready(f)``, at
  which the cores hold at most all their slots of their group-sets, or nothing if ``f`` depends on
  no layer. The others are *fresh*: filled after it. One core fills at least its share of them, and
  opens its array for as many as it has slots, though one opening may lie before. And all cores
  together fill all of them.

The latency is at least the latest end. In all cases the off-chip port is held for every group-set
that is fetched with its index code, and for every map that leaves.

What it leaves out makes it too small: kernel blocks do not divide evenly over cores, a core holds
what it computes with while it is filled, drains, tables, maps that enter, pools and additions.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import WORD_BITS, fill_cost, offchip_cycles

from ..graph import Conv, Graph
from ..pack import PackedConv
from ..schedule import fuse_pools

__all__ = ["least_cycles"]


@attrs.frozen
class _Layer:
    """A layer's needs: macro cycles, group-sets, cycles to fill one; and what it depends on."""

    work: int
    group_sets: int
    fill: int
    slots: int
    before: frozenset[str]


def least_cycles(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> int:
    """Give core cycles that no schedule of a graph beats, as derived in the module's text."""
    layers = _layers(graph, arch, packed)
    cores = _filled_behind(layers, arch) if arch.overlap == "full" else _in_turn(layers, arch)
    return max(cores, _port(graph, arch, packed))


def _layers(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> dict[str, _Layer]:
    """Give the convolutions in order; other layers only hand their dependencies on."""
    # A fused pool leaves out the pixels that no window covers.
    steps = {step.layer.name: step for step in fuse_pools(graph)}
    before: dict[str, frozenset[str]] = {}
    found: dict[str, _Layer] = {}
    for layer in graph.layers:
        behind = (before.get(name, frozenset()) for name in layer.inputs)
        before[layer.name] = frozenset[str]().union(*behind)
        if not isinstance(layer, Conv):
            continue
        held, step = packed[layer.name], steps[layer.name]
        out, kept = graph.types[layer.name], graph.types[step.output]
        windows = kept.height * step.pooling[0] * kept.width * step.pooling[1]
        pixels = min(out.height * out.width, windows)
        accesses = [arch.accesses(graph.types[term.input].bits) for term in layer.terms]
        work = sum(accesses[term] for block in held.blocks for term in block.terms)
        found[layer.name] = _Layer(
            work * pixels,
            held.group_sets,
            fill_cost(arch, 1, held.weight_bits).cycles,
            arch.slots(held.weight_bits),
            before[layer.name],
        )
        before[layer.name] |= {layer.name}
    return found


def _in_turn(layers: Mapping[str, _Layer], arch: MarsArch) -> int:
    filling = sum(one.group_sets * one.fill for one in layers.values())
    slots = max((one.slots for one in layers.values()), default=1)
    openings = -(-sum(one.group_sets for one in layers.values()) // slots)
    work = sum(one.work for one in layers.values())
    return -(-(work + filling + openings * arch.array_fill_cycles) // arch.cores)


def _filled_behind(layers: Mapping[str, _Layer], arch: MarsArch) -> int:
    end: dict[str, int] = {}
    for name, layer in layers.items():
        ready = _ready(layer, end)
        if not layer.before and layer.group_sets:
            ready += arch.array_fill_cycles + layer.fill
        latest = ready + -(-layer.work // arch.cores)
        for first in (*layer.before, name):
            between = [
                layers[other]
                for other in (*layer.before, name)
                if other == first or first in layers[other].before
            ]
            latest = max(latest, _ready(layers[first], end) + _refilled(between, arch))
        end[name] = latest
    return max(end.values(), default=0)


def _ready(layer: _Layer, end: Mapping[str, int]) -> int:
    return max((end[name] for name in layer.before), default=0)


def _refilled(layers: list[_Layer], arch: MarsArch) -> int:
    """Give the cycles in which layers are filled that begin together, beyond what may be there."""
    slots = max(layer.slots for layer in layers)
    fill = min(layer.fill for layer in layers)
    is_first = any(not layer.before for layer in layers)
    fresh = sum(layer.group_sets for layer in layers) - (0 if is_first else arch.cores * slots)
    if fresh <= 0:
        return 0
    share = -(-fresh // arch.cores)
    opened = 0 if is_first else 1
    busiest = share * fill + (-(-share // slots) - opened) * arch.array_fill_cycles
    openings = max(0, -(-fresh // slots) - opened * arch.cores)
    together = -(-(fresh * fill + openings * arch.array_fill_cycles) // arch.cores)
    return max(busiest, together)


def _port(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> int:
    bits = sum(
        8 * held.group_sets * (group_set_bytes(held.weight_bits) + isa.CODE_BYTES)
        for held in packed.values()
    )
    words = sum(graph.types[name].words for name in {out.value for out in graph.outputs})
    return offchip_cycles(arch, bits + words * WORD_BITS)
