"""Orders of channels in which fewer group-sets hold a weight that is not zero.

A group-set is skipped if all its 16 kernels x 16 input channels at one tap are zero. Which channels
share one follows from their order, and the order of a map's channels is free: the kernels that
write it and the inputs of the weights that read it are permuted alike, and every code is the same.
Maps that are added to each other, pooled or convolved channel by channel have one order; maps that
enter or leave the network, and those of other grouped convolutions, keep the model's.

The search clusters channels whose weights are zero at the same places, then exchanges channels of
different blocks while that removes group-sets, class by class. It is deterministic, and the number
of its operations is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.arch import MarsArch
from mars_runtime.maps import WORD_CHANNELS
from mars_runtime.timing import fill_cost

from .graph import Add, Conv, ConvTerm, Graph, Layer, Pool, Requant

__all__ = ["Orders", "found_orders", "permutable", "reordered"]

Array: TypeAlias = npt.NDArray[Any]
#: By value, for maps in another order than the model's: which of its channels is at each place.
Orders: TypeAlias = Mapping[str, Array]

SWEEPS = 2  # over all classes
WORK = 2 * 10**9  # multiply-adds of a class's exchanges


# -- which maps have one order ---------------------------------------------------------------------


def permutable(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Give the maps that may have another order, by classes that must have the same.

    Returns
    -------
    tuple of tuples of str
        Values in the graph's order.
    """
    leader = {name: name for name in graph.types}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    fixed = {entry.name for entry in graph.inputs} | {out.value for out in graph.outputs}
    for layer in graph.layers:
        for name in _tied(layer):
            leader[find(name)] = find(layer.name)
        if isinstance(layer, Conv):
            for term in layer.terms:
                if term.groups > 1 and not _depthwise(term):
                    fixed |= {layer.name, term.input}
    kept = {find(name) for name in fixed}
    classes: dict[str, list[str]] = {}
    for name in graph.types:
        if find(name) not in kept:
            classes.setdefault(find(name), []).append(name)
    return tuple(map(tuple, classes.values()))


def _tied(layer: Layer) -> Iterator[str]:
    """Give the maps that have the order of the layer's own."""
    if isinstance(layer, (Pool, Add)):
        yield from layer.inputs
        return
    yield from (term.input for term in layer.terms if _depthwise(term))
    if layer.residual:
        yield layer.residual.input


def _depthwise(term: ConvTerm) -> bool:
    outputs, per_group = term.weight.shape[:2]
    return bool(term.groups == outputs > 1 == per_group)


# -- a graph in another order ----------------------------------------------------------------------


def reordered(graph: Graph, orders: Orders) -> Graph:
    """Give a graph whose maps have other orders of channels, and the same codes.

    Parameters
    ----------
    orders : mapping of str to int array ``[channels]``
        By value, for every value of the classes of :func:`permutable` that change: which of the
        graph's channels is at each place.
    """
    layers = [
        _reordered_conv(layer, orders) if isinstance(layer, Conv) else layer
        for layer in graph.layers
    ]
    return attrs.evolve(graph, layers=layers)


def _reordered_conv(layer: Conv, orders: Orders) -> Conv:
    terms = []
    for term in layer.terms:
        weight = term.weight
        if layer.name in orders:
            weight = weight[orders[layer.name]]
        if term.input in orders and not _depthwise(term):
            weight = weight[:, orders[term.input]]
        terms.append(attrs.evolve(term, weight=weight))
    if layer.name not in orders:
        return attrs.evolve(layer, terms=terms)
    order = orders[layer.name]
    requant = layer.requant and _reordered_requant(layer.requant, order)
    return attrs.evolve(layer, terms=terms, bias=layer.bias[order], requant=requant)


def _reordered_requant(requant: Requant, order: Array) -> Requant:
    multiplier, shift = (
        values[order] if values.size > 1 else values
        for values in (requant.multiplier, requant.shift)
    )
    return attrs.evolve(requant, multiplier=multiplier, shift=shift)


# -- what a class's channels hold ------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Term:
    """A convolution's weights that are not zero.

    ``by_kernel`` is bool ``[outputs, inputs, taps]``, ``by_input`` ``[inputs, outputs, taps]``; of
    a depthwise one, which has its kernels on a diagonal, ``[outputs, 1, taps]`` and None. ``cost``
    are the core cycles that a stored group-set takes: computing at all pixels, and filling.
    """

    layer: str
    source: str
    by_kernel: Array
    by_input: Array | None
    cost: int

    def stored(self, orders: Orders) -> Array:
        """Count the stored group-sets of each kernel block."""
        if self.by_input is None:
            return np.asarray(_joined(self.by_kernel, orders.get(self.layer)).sum(axis=(1, 2)))
        kernels = _joined(self.by_input, orders.get(self.source)).transpose(1, 0, 2)
        return np.asarray(_joined(kernels, orders.get(self.layer)).sum(axis=(1, 2)))

    def features(self, values: Sequence[str], orders: Orders | None) -> Iterator[Array]:
        """Give what its weights say of a class's channels: bool ``[channels, n]``.

        With orders, for each group-set that a channel can be part of, whether it holds a weight of
        it; without, for each single weight beside those of the other channels.
        """
        if self.by_input is None:
            if self.layer in values:
                yield self.by_kernel[:, 0]
            return
        for name, other, own, across in (
            (self.layer, self.source, self.by_kernel, self.by_input),
            (self.source, self.layer, self.by_input, self.by_kernel),
        ):
            if name not in values:
                continue
            if orders is not None:
                own = _joined(across, orders.get(other)).transpose(1, 0, 2)
            yield own.reshape(len(own), -1)


def _joined(holds: Array, order: Array | None) -> Array:
    """Join the channels of each block, in an order: ``[n, ...]`` to ``[blocks, ...]``."""
    if order is not None:
        holds = holds[order]
    return np.logical_or.reduceat(holds, np.arange(0, len(holds), WORD_CHANNELS), axis=0)


def _terms(graph: Graph, arch: MarsArch) -> Iterator[_Term]:
    for layer in graph.layers:
        if not isinstance(layer, Conv):
            continue
        weight_bits = max(term.weight_bits for term in layer.terms)
        filling = fill_cost(arch, 1, weight_bits).cycles
        out = graph.types[layer.name]
        for term in layer.terms:
            accesses = arch.accesses(graph.types[term.input].bits)
            cost = out.height * out.width * accesses + filling
            holds = (term.weight != 0).reshape(*term.weight.shape[:2], -1)
            across = None if _depthwise(term) else np.ascontiguousarray(holds.transpose(1, 0, 2))
            if term.groups == 1 or across is None:
                yield _Term(layer.name, term.input, holds, across, cost)


# -- the search ------------------------------------------------------------------------------------


def found_orders(graph: Graph, arch: MarsArch) -> tuple[Orders, ...]:
    """Search for orders with fewer stored group-sets.

    Returns
    -------
    tuple of mappings of str to int array
        Orders as :func:`reordered` takes them, the most promising first: none has more stored
        group-sets than the graph, all are estimated to take fewer core cycles. Empty if the machine
        skips no group-sets, nothing may be permuted or nothing is gained.
    """
    classes = permutable(graph)
    if not arch.zero_skipping or not classes:
        return ()
    search = _Search(graph, arch, classes)
    given = search.value({})
    starts: list[Orders] = [search.clustered()]
    if not search.value(starts[0]) < given:
        starts.append({})
    found = []
    for start in starts:
        orders = search.improved(start)
        value = search.value(orders)
        if value < given and value.group_sets <= given.group_sets:
            moved = {name: x for name, x in orders.items() if np.any(x != np.arange(len(x)))}
            found.append((value, moved))
    found.sort(key=lambda one: one[0])
    return tuple(orders for _, orders in found)


@attrs.frozen(order=True)
class _Value:
    """Estimated core cycles of the busiest core, of all cores, and stored group-sets."""

    busiest: float
    cycles: int
    group_sets: int

    def __add__(self, other: _Value) -> _Value:
        return _Value(
            self.busiest + other.busiest,
            self.cycles + other.cycles,
            self.group_sets + other.group_sets,
        )


class _Search:
    def __init__(self, graph: Graph, arch: MarsArch, classes: Sequence[tuple[str, ...]]) -> None:
        self.graph, self.arch, self.classes = graph, arch, classes
        self.terms = tuple(_terms(graph, arch))
        self.layers = tuple(dict.fromkeys(term.layer for term in self.terms))

    def value(self, orders: Orders, layers: Sequence[str] | None = None) -> _Value:
        """Estimate what layers take."""
        total = _Value(0.0, 0, 0)
        for layer in self.layers if layers is None else layers:
            total += self._layer_value(layer, orders)
        return total

    def _layer_value(self, layer: str, orders: Orders) -> _Value:
        cycles, stored = np.zeros(1, np.int64), 0
        for term in self.terms:
            if term.layer == layer:
                counts = term.stored(orders)
                cycles = cycles + counts * term.cost
                stored += int(counts.sum())
        rows = self.graph.types[layer].height
        return _Value(_busiest(cycles, self.arch.cores, rows), int(cycles.sum()), stored)

    def clustered(self) -> Orders:
        """Give orders in which channels with like weights share blocks."""
        orders: dict[str, Array] = {}
        for values in self.classes:
            holds, costs = self._features(values, None)
            orders.update(dict.fromkeys(values, _order(_clustered(holds, costs))))
        return orders

    def improved(self, start: Orders) -> Orders:
        """Improve one class after the other until none gains, or the sweeps are over."""
        orders = dict(start)
        pending = list(self.classes)
        for _ in range(SWEEPS):
            changed: set[str] = set()
            for values in pending:
                order = self._better(values, orders)
                if order is not None:
                    orders.update(dict.fromkeys(values, order))
                    changed |= set(values)
            # What a class gains depends on the other side of its weights.
            beside = {
                name
                for term in self.terms
                if changed & {term.layer, term.source}
                for name in (term.layer, term.source)
            }
            pending = [values for values in self.classes if beside & set(values)]
            if not changed:
                break
        return orders

    def _better(self, values: tuple[str, ...], orders: Orders) -> Array | None:
        holds, costs = self._features(values, orders)
        count = self.graph.types[values[0]].channels
        blocks = np.arange(count) // WORD_CHANNELS
        if values[0] in orders:
            blocks = np.argsort(orders[values[0]]) // WORD_CHANNELS
        order = _order(_exchanged(holds, costs, blocks))
        touched = [
            layer
            for layer in self.layers
            if any(
                term.layer == layer and {layer, term.source} & set(values) for term in self.terms
            )
        ]
        after = {**orders, **dict.fromkeys(values, order)}
        better = self.value(after, touched) < self.value(orders, touched)
        return order if better else None

    def _features(self, values: Sequence[str], orders: Orders | None) -> tuple[Array, Array]:
        """Give what the class's channels hold, bool ``[channels, n]``, and its costs ``[n]``.

        What all hold, or none, is left out: it is the same in every order.
        """
        parts, costs = [], []
        for term in self.terms:
            for holds in term.features(values, orders):
                count = holds.sum(axis=0)
                kept = holds[:, (count > 0) & (count < len(holds))]
                parts.append(kept)
                costs.append(np.full(kept.shape[1], term.cost, np.int64))
        return np.concatenate(parts, axis=1), np.concatenate(costs)


def _busiest(cycles: Array, cores: int, rows: int) -> float:
    """Estimate the busiest core's cycles: blocks heaviest first, or rows shared by groups too."""
    best = float(cycles.sum())
    for groups in range(1, cores + 1):
        if cores % groups or groups > rows:
            continue
        loads = [0] * (cores // groups)
        for block in sorted(cycles.tolist(), reverse=True):
            loads[loads.index(min(loads))] += block
        best = min(best, max(loads) / groups)
    return best


def _order(blocks: Array) -> Array:
    """Give the order in which channels stand, from each one's block; blocks by first channel."""
    members = [np.flatnonzero(blocks == block) for block in range(int(blocks.max()) + 1)]
    whole = [found for found in members if len(found) == WORD_CHANNELS]
    rest = [found for found in members if len(found) < WORD_CHANNELS]
    return np.concatenate([*sorted(whole, key=lambda found: int(found[0])), *rest])


def _numbers(holds: Array, costs: Array) -> tuple[Array, Array]:
    """Give both as floats that hold every sum of costs, so that no order of summation matters."""
    costs = costs // max(1, math.gcd(*costs.tolist()))
    kind = np.float32 if costs.sum() < 2**24 else np.float64
    return holds.astype(kind), costs.astype(kind)


def _clustered(holds: Array, costs: Array) -> Array:
    """Fill block after block: the heaviest channel left, then those that overlap most with it."""
    count = len(holds)
    numbers, weights = _numbers(holds, costs)
    weighted = np.ascontiguousarray((numbers * weights).T)
    totals = numbers @ weights
    blocks = np.full(count, -1)
    for block in range(-(-count // WORD_CHANNELS)):
        covered = np.zeros(holds.shape[1], bool)
        overlap = np.zeros(count, totals.dtype)
        score = totals
        for _ in range(min(WORD_CHANNELS, count - block * WORD_CHANNELS)):
            chosen = int(np.where(blocks < 0, score, -np.inf).argmax())
            blocks[chosen] = block
            fresh = holds[chosen] & ~covered
            covered |= fresh
            overlap += weighted[fresh].sum(axis=0)
            score = 2 * overlap - totals
    return blocks


def _exchanged(holds: Array, costs: Array, blocks: Array) -> Array:
    """Exchange channels of different blocks while that lowers the cost of what blocks hold."""
    blocks = blocks.copy()
    numbers, weights = _numbers(holds, costs)
    count, width = holds.shape
    added = np.zeros((count, count), numbers.dtype)  # by j in the place of i
    saved = np.zeros(count, numbers.dtype)  # without i
    stale, work = np.arange(count), WORK
    while len(stale) and work > 0:
        work -= len(stale) * count * width
        member = blocks[stale] == np.arange(blocks.max() + 1)[:, None]
        alone = (member.astype(numbers.dtype) @ numbers[stale])[blocks[stale]] == numbers[stale]
        lost = alone * weights  # what the block does not hold without i
        added[stale] = lost @ numbers.T
        saved[stale] = (lost * numbers[stale]).sum(axis=1)
        change = added + added.T - saved[:, None] - saved
        stale = np.flatnonzero(np.isin(blocks, _exchange(change, blocks)))
    return blocks


def _exchange(change: Array, blocks: Array) -> Array:
    """Do the best exchanges, at most one for each block, and give the blocks that changed."""
    rows, columns = np.nonzero(np.triu(change < 0) & (blocks[:, None] != blocks))
    changed = np.zeros(int(blocks.max()) + 1, bool)
    for at in np.argsort(change[rows, columns], kind="stable").tolist():
        one, other = rows[at], columns[at]
        if not (changed[blocks[one]] or changed[blocks[other]]):
            changed[blocks[[one, other]]] = True
            blocks[[one, other]] = blocks[[other, one]]
    return np.flatnonzero(changed)
