"""The cost model: which of many points are worth measuring, learned from those that were.

Features of a point are its decisions as numbers, one group for each layer of the graph:

===============  ===========================================================================
rows, columns    of the tile, as shares of the map
block_tile       channel blocks per pass, as a share
staged           whether the output lives off-chip
bank             of the output
fused            whether a pool is done by the layer before it
by_tile          whether tiles are the outer loop
offchip          whether partial sums of a cut kernel block travel off-chip
row_groups       groups of cores by rows
most             group-sets per load, as a share of the array (1 for no limit)
dealing          of kernel blocks to cores, by its position in :data:`DEALINGS`
chunk            logarithm of the group-sets per FETCH
join             whether its loads join the one before
fill_lead        loads' compute that a filling precedes
fetch_lead       how many more its fetching
fetch_depth      group-sets that it leaves fetched, as a share of the array
slots            which macro slots loads take, by its position in :data:`SLOTS`
apart            whether each core has a CONV of its own
chained          whether its one kernel block is spread over the cores
border           0 for the whole map, 1 for rows of their own at the border, 2 for columns too
halo             whether rows that windows share stay in the bank
group_sets       of the layer, as a share of the chip's arrays
pixels           of the layer, as a share of the graph's largest
held             group-sets of the core that has most, in arrays
cycles           macro cycles of the core that has most
loads            of the layer
===============  ===========================================================================

Behind them stand the sums of the last three over all layers.

The model is a small gradient-boosted ensemble, fitted to the logarithm of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..graph import Conv, Layer
from ..schedule import BORDERS, DEALINGS, SLOTS, Choice, Point, ScheduleError
from .boosting import fit, predict, require_xgboost
from .space import Space

__all__ = ["BoostedModel", "CostModel", "NoModel", "features", "make_model"]

Array = npt.NDArray[Any]


class CostModel(Protocol):
    """Orders points by what it has learned."""

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        """Learn from all points measured so far."""

    def scores(self, points: Sequence[Point]) -> Array:
        """Give a number for each point; larger is better."""


def features(space: Space, point: Point) -> list[float]:
    """Give a point's features; those of the same layer stand at the same places."""
    found: list[float] = []
    types = space.graph.types
    largest = max(types[one.name].height * types[one.name].width for one in space.graph.layers)
    sums = np.zeros(3)
    for layer, choice in zip(space.graph.layers, point.choices, strict=True):
        share = _share(space, layer, choice)
        sums += share
        found += [*_layer_features(space, layer, choice, largest), *share]
    return [*found, *sums]


def _share(space: Space, layer: Layer, choice: Choice) -> tuple[float, float, float]:
    """Give what falls to the core that has most of a layer; zeros where no load can be made."""
    if not isinstance(layer, Conv):
        return 0, 0, 0
    try:
        share = space.share(layer, choice)
    except ScheduleError:
        return 0, 0, 0
    slots = space.arch.slots(space.packed[layer.name].weight_bits)
    return share.group_sets / slots, share.cycles, share.loads


def _layer_features(space: Space, layer: Layer, choice: Choice, largest: int) -> list[float]:
    out = space.graph.types[layer.name]
    packed = space.packed.get(layer.name)
    capacity = space.arch.slots(packed.weight_bits) if packed else 1
    return [
        choice.tile[0] / out.height,
        choice.tile[1] / out.width,
        choice.block_tile / out.blocks,
        choice.staged,
        choice.bank,
        choice.fused,
        choice.order == "tiles",
        choice.partial == "offchip",
        choice.row_groups,
        (choice.most or capacity) / capacity,
        DEALINGS.index(choice.dealing),
        math.log2(choice.chunk),
        choice.join,
        choice.fill_lead,
        choice.fetch_lead,
        choice.fetch_depth / capacity,
        SLOTS.index(choice.slots),
        choice.apart,
        choice.chained,
        BORDERS.index(choice.border),
        choice.halo == "keep",
        packed.group_sets / (capacity * space.arch.cores) if packed else 0.0,
        out.height * out.width / largest,
    ]


class NoModel:
    """No model: all points are alike."""

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        """Learn nothing."""

    def scores(self, points: Sequence[Point]) -> Array:
        """Give zeros."""
        return np.zeros(len(points))


class BoostedModel:
    """XGBoost, fitted to the logarithm of the cost.

    Parameters
    ----------
    space : Space
        Whose points are scored.
    seed : int
        Of the ensemble.

    Raises
    ------
    ModelError
        If XGBoost is not installed.
    """

    def __init__(self, space: Space, seed: int) -> None:
        require_xgboost()
        self.space, self.seed = space, seed
        self.ensemble: Array | None = None
        self.rows: dict[Point, list[float]] = {}

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        """Fit to all points."""
        worth = -np.log(np.array(costs, np.float64))
        self.ensemble = fit(self._rows(points), worth, self.seed)

    def scores(self, points: Sequence[Point]) -> Array:
        """Give the ensemble's scores; zeros before anything was learned."""
        if self.ensemble is None or not points:
            return np.zeros(len(points))
        return predict(self.ensemble, self._rows(points))

    def _rows(self, points: Sequence[Point]) -> Array:
        for point in points:
            if point not in self.rows:
                self.rows[point] = features(self.space, point)
        return np.array([self.rows[point] for point in points])


def make_model(name: str, space: Space, seed: int) -> CostModel:
    """Give the cost model of a name: ``xgb`` or ``none``."""
    return BoostedModel(space, seed) if name == "xgb" else NoModel()
