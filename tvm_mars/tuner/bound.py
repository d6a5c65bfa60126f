"""A number of cycles that no schedule of a network beats on a machine.

It follows from what each layer needs, whatever the schedule. Let its *group-sets* be those that are
stored, and its *work* the cycles of cores: for each kernel block those of the macros, or of the
busier bank's port if that takes longer, with every map in the bank where it costs least. A
group-set takes accesses at the pixels at which its tap meets the map, not at others: their padding
may be passed over. What the window of a fused pool covers is computed by one CONV, so that a tap
that meets the map from one of its pixels takes accesses at all of them; a pool of its own reads the
map again; the less of both counts. A pool or an addition works as long as its port. A layer
computes when the layers that it depends on are done; each group-set is filled at least once,
before the core that holds it computes with it; a core holds no more group-sets than it has slots,
and fills no more than those between two openings of its array, since it has to compute in between.

Three things bound the latency on every machine:

**What lies behind each other.** Let ``ready(f)`` be a bound of when the layers that ``f`` depends
on are done, 0 if there are none. The end of a layer ``l`` is bounded by this:

- It computes for its work over the cores after ``ready(l)``, and, unless a kernel block of it is
  empty, after a group-set was fetched, an array opened, and it filled.
- Take any ``f`` that is ``l`` or that ``l`` depends on, and the layers between: those that are or
  depend on ``f`` and that are or ``l`` depends on. None of them computes before ``ready(f)``, at
  which the cores hold at most all their slots of their group-sets, or nothing if ``f`` depends on
  no layer. The others are *fresh*: filled after it. One core fills at least its share of them, and
  opens its array for as many as it has slots, though one opening may lie before. And all cores
  together fill all of them.
- Beside the slots, weight SRAMs may hold group-sets at ``ready(f)``. What fits neither is fetched
  after it, and the last of that is filled.

The latency is at least the latest end.

**What takes turns on a core,** unless it is filled behind compute: computing and filling. Cores
times the latency is at least all work, plus all filling, plus one opening for as many group-sets
as a core holds. Without overlap computing and fetching take turns, too: it is at least all work,
plus all fetching.

**The off-chip port** is held for every group-set that is fetched with its index code, and for every
map that leaves.

What it leaves out makes it too small: kernel blocks do not divide evenly over cores, a core holds
what it computes with while it is filled, drains, tables, maps that enter; and, without overlap,
that cores which are filled together stand still while the port fetches for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import RAW_WORDS, WORD_BITS, fill_cost, inside, offchip_cycles

from ..graph import Add, Conv, Graph, Pool
from ..pack import PackedConv
from ..schedule import Step, fuse_pools, least_macro_cycles

__all__ = ["least_cycles"]

CODE_BITS = 8 * isa.CODE_BYTES


@attrs.frozen
class _Layer:
    """A layer's needs: cores' cycles, group-sets, cycles to fill one and its weights' bits."""

    work: int
    group_sets: int
    fill: int
    slots: int
    bits: int
    dense: bool  # whether no kernel block is empty, so that all of it needs weights
    before: frozenset[str]  # what it depends on


def least_cycles(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> int:
    """Give core cycles that no schedule of a graph beats, as derived in the module's text."""
    layers = _layers(graph, arch, packed)
    behind, port = _behind_each_other(layers, arch), _port(graph, arch, packed)
    return max(behind, port, 0 if arch.overlap == "full" else _in_turn(layers, arch))


def _layers(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> dict[str, _Layer]:
    """Give the layers in order; a pool that may be fused belongs to its convolution."""
    steps = {step.layer.name: step for step in fuse_pools(graph)}
    before: dict[str, frozenset[str]] = {}
    found: dict[str, _Layer] = {}
    for layer in graph.layers:
        behind = (before.get(name, frozenset()) for name in layer.inputs)
        before[layer.name] = frozenset[str]().union(*behind)
        if layer.name not in steps:
            continue
        if not isinstance(layer, Conv):
            work = _pass_work(graph, layer)
            found[layer.name] = _Layer(work, 0, 0, 0, 0, False, before[layer.name])
            before[layer.name] |= {layer.name}
            continue
        held, step = packed[layer.name], steps[layer.name]
        work = _conv_work(graph, arch, held, Step(layer))
        if step.pool:
            fused = _conv_work(graph, arch, held, step)
            work = min(work + _pass_work(graph, step.pool), fused)
        found[layer.name] = _Layer(
            work,
            held.group_sets,
            fill_cost(arch, 1, held.weight_bits).cycles,
            arch.slots(held.weight_bits),
            8 * group_set_bytes(held.weight_bits),
            all(block.group_sets for block in held.blocks),
            before[layer.name],
        )
        before[layer.name] |= {layer.name}
    return found


def _conv_work(graph: Graph, arch: MarsArch, held: PackedConv, step: Step) -> int:
    """Give the cores' cycles of a convolution if every written pixel has a CONV of its own."""
    layer, types = step.layer, graph.types
    assert isinstance(layer, Conv)
    out = types[step.output]
    written = out.height * out.width
    pixels = written * math.prod(step.pooling)
    rows, columns = out.height * step.pooling[0], out.width * step.pooling[1]
    macros = least_macro_cycles(arch, step, held, types)
    ports = [np.full_like(macros, written * (RAW_WORDS if layer.requant is None else 1))]
    if layer.residual:
        ports.append(np.full_like(macros, pixels * types[layer.residual.input].planes))
    for number, term in enumerate(layer.terms):
        source, kernel, pad = types[term.input], term.kernel, term.padding
        met = np.outer(
            _inside(rows, kernel[0], term.stride[0], term.dilation[0], pad[0], source.height),
            _inside(columns, kernel[1], term.stride[1], term.dilation[1], pad[1], source.width),
        ).reshape(-1)
        accesses = arch.accesses(source.bits)
        taps = (block.taps[block.terms == number] for block in held.blocks)
        ports.append(np.array([accesses * int(met[one].sum()) for one in taps]))
    return _busiest(macros, ports)


def _pass_work(graph: Graph, layer: Pool | Add) -> int:
    """Give the cores' cycles of a pool or an addition."""
    out, types = graph.types[layer.name], graph.types
    ports = [np.array([out.height * out.width])]
    if isinstance(layer, Pool):
        source = types[layer.input]
        rows = _inside(
            out.height, layer.kernel[0], layer.stride[0], 1, layer.padding[0], source.height
        )
        columns = _inside(
            out.width, layer.kernel[1], layer.stride[1], 1, layer.padding[1], source.width
        )
        ports.append(np.array([rows.sum() * columns.sum() * source.planes]))
    else:
        ports += [ports[0] * types[operand.input].planes for operand in layer.operands]
    return out.blocks * _busiest(np.zeros(1, np.int64), ports)


def _inside(
    count: int, kernel: int, stride: int, dilation: int, padding: int, size: int
) -> npt.NDArray[Any]:
    """Give for each tap of an axis how many of its positions lie inside the map."""
    return np.array(
        [inside(count, stride, tap * dilation - padding, size) for tap in range(kernel)]
    )


def _busiest(macros: npt.NDArray[Any], ports: Sequence[npt.NDArray[Any]]) -> int:
    """Give the cycles of kernel blocks, each map in the bank where that is least.

    Parameters
    ----------
    macros : int array ``[blocks]``
        Cycles of the macros.
    ports : sequence of int array ``[blocks]``
        Port accesses for each map that is read or written.
    """
    found = []
    for banks in itertools.product((0, 1), repeat=len(ports) - 1):
        load = [macros, np.zeros_like(macros), np.zeros_like(macros)]
        for bank, accesses in zip((0, *banks), ports, strict=True):
            load[1 + bank] = load[1 + bank] + accesses
        found.append(int(np.max(load, axis=0).sum()))
    return min(found)


def _in_turn(layers: Mapping[str, _Layer], arch: MarsArch) -> int:
    group_sets = sum(one.group_sets for one in layers.values())
    slots = max((one.slots for one in layers.values()), default=1)
    loading = sum(one.group_sets * one.fill for one in layers.values())
    loading += -(-group_sets // slots) * arch.array_fill_cycles
    if arch.overlap == "none":
        bits = sum(one.group_sets * (one.bits + CODE_BITS) for one in layers.values())
        loading = max(loading, offchip_cycles(arch, bits))
    return -(-(sum(one.work for one in layers.values()) + loading) // arch.cores)


def _behind_each_other(layers: Mapping[str, _Layer], arch: MarsArch) -> int:
    end: dict[str, int] = {}
    for name, layer in layers.items():
        ready = _ready(layer, end)
        if layer.dense:
            fetched = offchip_cycles(arch, layer.bits + CODE_BITS)
            ready = max(ready, max(fetched, arch.array_fill_cycles) + layer.fill)
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
    is_first = any(not layer.before for layer in layers)
    layers = [layer for layer in layers if layer.group_sets]
    slots = max((layer.slots for layer in layers), default=1)
    fill = min((layer.fill for layer in layers), default=0)
    bits = sum(layer.group_sets * layer.bits for layer in layers)
    if not is_first:
        wide = max((layer.bits for layer in layers), default=0)
        bits -= arch.cores * (slots * wide + arch.weight_sram_bits)
    fetched = offchip_cycles(arch, bits) + fill if bits > 0 else 0
    fresh = sum(layer.group_sets for layer in layers) - (0 if is_first else arch.cores * slots)
    if fresh <= 0:
        return fetched
    share = -(-fresh // arch.cores)
    opened = 0 if is_first else 1
    busiest = share * fill + (-(-share // slots) - opened) * arch.array_fill_cycles
    openings = max(0, -(-fresh // slots) - opened * arch.cores)
    together = -(-(fresh * fill + openings * arch.array_fill_cycles) // arch.cores)
    return max(busiest, together, fetched)


def _port(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> int:
    bits = sum(
        8 * held.group_sets * (group_set_bytes(held.weight_bits) + isa.CODE_BYTES)
        for held in packed.values()
    )
    words = sum(graph.types[name].words for name in {out.value for out in graph.outputs})
    return offchip_cycles(arch, bits + words * WORD_BITS)
