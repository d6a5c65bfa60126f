"""The cost model: which of many points are worth measuring, learned from those that were.

Features of a point are its decisions as numbers, one group for each step of the graph:

===============  ===========================================================================
rows, columns    of the tile, as shares of the map
block_tile       channel blocks per pass, as a share
staged           whether the output lives off-chip
bank             of the output
by_tile          whether tiles are the outer loop
offchip          whether partial sums of a cut kernel block travel off-chip
row_groups       groups of cores by rows
most             group-sets per load, as a share of the array (1 for no limit)
chunk            logarithm of the group-sets per FETCH
join             whether its loads join the one before
fill_lead        loads' compute that a filling precedes
fetch_lead       how many more its fetching
next             whether macro slots rotate
apart            whether each core has a CONV of its own
chained          whether its one kernel block is spread over the cores
border           0 for the whole map, 1 for rows of their own at the border, 2 for columns too
group_sets       of the layer, as a share of the chip's arrays
pixels           of the layer, as a share of the graph's largest
held             group-sets of the core that has most, in arrays
cycles           macro cycles of the core that has most
loads            of the layer
===============  ===========================================================================

Behind them stand the sums of the last three over all steps.

The model is a small gradient-boosted ensemble with XGBoost's pairwise rank objective: only the
order of points matters to a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..graph import Conv
from ..schedule import BORDERS, Choice, Point, ScheduleError, Step
from .boosting import fit, predict, require_xgboost
from .space import Space

__all__ = ["CostModel", "NoModel", "RankModel", "features", "make_model"]

Array = npt.NDArray[Any]


class CostModel(Protocol):
    """Orders points by what it has learned."""

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        """Learn from all points measured so far."""

    def scores(self, points: Sequence[Point]) -> Array:
        """Give a number for each point; larger is better."""


def features(space: Space, point: Point) -> list[float]:
    """Give a point's features; those of the same step stand at the same places."""
    found: list[float] = []
    steps = space.steps(point)
    largest = max(
        space.graph.types[s.output].height * space.graph.types[s.output].width for s in steps
    )
    sums = np.zeros(3)
    for step, choice in zip(steps, point.steps, strict=True):
        share = _share(space, step, choice)
        sums += share
        found += [*_step_features(space, step, choice, largest), *share]
    return [*found, *sums]


def _share(space: Space, step: Step, choice: Choice) -> tuple[float, float, float]:
    """Give what falls to the core that has most of a step; zeros where no load can be made."""
    if not isinstance(step.layer, Conv):
        return 0, 0, 0
    try:
        share = space.share(step.layer, choice)
    except ScheduleError:
        return 0, 0, 0
    slots = space.arch.slots(space.packed[step.layer.name].weight_bits)
    return share.group_sets / slots, share.cycles, share.loads


def _step_features(space: Space, step: Step, choice: Choice, largest: int) -> list[float]:
    out = space.graph.types[step.output]
    packed = space.packed.get(step.layer.name)
    capacity = space.arch.slots(packed.weight_bits) if packed else 1
    return [
        choice.tile[0] / out.height,
        choice.tile[1] / out.width,
        choice.block_tile / out.blocks,
        choice.staged,
        choice.bank,
        choice.order == "tiles",
        choice.partial == "offchip",
        choice.row_groups,
        (choice.most or capacity) / capacity,
        math.log2(choice.chunk),
        choice.join,
        choice.fill_lead,
        choice.fetch_lead,
        choice.slots == "next",
        choice.apart,
        choice.chained,
        BORDERS.index(choice.border),
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


class RankModel:
    """XGBoost with a pairwise rank objective.

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
        """Fit to all points: the relevance of each is the best cost over its own."""
        best = min(costs)
        relevance = np.array([best / cost for cost in costs])
        self.ensemble = fit(self._rows(points), relevance, self.seed)

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
    return RankModel(space, seed) if name == "xgb" else NoModel()
