"""How the next points to measure are chosen.

A strategy proposes points and is told what they cost; it never measures. Everything random comes
from its seed, so that the same trials follow whoever measures them. All start with the same few
points: the default schedule, and what one decision taken for all layers alike makes of it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs

from ..schedule import Point, Schedule, ScheduleError
from .model import CostModel, make_model
from .space import Space, replaced
from .starts import starts, uniform

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

#: Decisions that are tried for all layers alike, at the start and by the grid.
UNIFORM: dict[str, tuple[Any, ...]] = {
    "join": (False, True),
    "slots": ("low", "next"),
    "most": (0, 1, 32, 40),
    "chunk": (16, 8, 32),
    "fetch_lead": (0, 1),
    "apart": (False, True),
    "fill_lead": (0, 1),
}
_ATTEMPTS = 50  # drawn for a new point before a strategy gives up


class Strategy(Protocol):
    """Chooses what to measure next."""

    def propose(self, count: int) -> list[Point]:
        """Give up to so many points that were not proposed before; none if there are no more."""

    def observe(self, points: Sequence[Point], costs: Sequence[float | None]) -> None:
        """Learn the cost of what was proposed last; None for what the space refused."""


@attrs.define
class _Fresh:
    """Points whose schedule was not seen before: many decisions make no difference to some."""

    space: Space
    seen: set[Point] = attrs.field(factory=set)
    schedules: set[Schedule] = attrs.field(factory=set)

    def take(self, points: Iterator[Point], count: int) -> list[Point]:
        """Take up to so many new ones; those that the space refuses are left out."""
        found: list[Point] = []
        for point in itertools.islice(points, _ATTEMPTS * count):
            if len(found) == count:
                break
            if self._is_new(point):
                found.append(point)
        return found

    def _is_new(self, point: Point) -> bool:
        if point in self.seen:
            return False
        self.seen.add(point)
        try:
            schedule = self.space.realize(point)
        except ScheduleError:
            return False
        before = len(self.schedules)
        self.schedules.add(schedule)
        return len(self.schedules) > before


class Sweep:
    """Goes through a fixed sequence of points: the starts first."""

    def __init__(self, space: Space, points: Iterator[Point]) -> None:
        self.fresh = _Fresh(space)
        self.points = itertools.chain(starts(space), points)

    def propose(self, count: int) -> list[Point]:
        """Give the next of the sequence."""
        return self.fresh.take(self.points, count)

    def observe(self, points: Sequence[Point], costs: Sequence[float | None]) -> None:
        """Learn nothing."""


def _random_points(space: Space, rng: random.Random) -> Iterator[Point]:
    """Draw layers of the default point anew: any number of them, a third of their decisions."""
    while True:
        point = space.default
        count = rng.randint(1, len(point.choices))
        for index in rng.sample(range(len(point.choices)), count):
            point = space.drawn(rng, point, index, 1 / 3)
        yield point


def grid_points(space: Space) -> Iterator[Point]:
    """Yield a graph of one layer exhaustively; else all uniform points, then single changes."""
    default = space.default
    if len(default.choices) == 1:
        domain = space.domain(0)
        for values in itertools.product(*domain.values()):
            yield replaced(default, 0, **dict(zip(domain, values, strict=True)))
        return
    for values in itertools.product(*UNIFORM.values()):
        yield uniform(space, dict(zip(UNIFORM, values, strict=True)))
    for index in range(len(default.choices)):
        yield from space.neighbours(default, index)


class Annealing:
    """Simulated annealing: one layer's decisions change at a time, the temperature falls."""

    def __init__(self, space: Space, rng: random.Random, trials: int) -> None:
        self.space, self.rng, self.trials = space, rng, trials
        self.fresh = _Fresh(space)
        self.first = list(starts(space))
        self.current = space.default
        self.cost = math.inf
        self.done = 0

    def propose(self, count: int) -> list[Point]:
        """Give neighbours of the current point."""
        if self.first:
            given, self.first = self.first, []
            return self.fresh.take(iter(given), len(given))
        moves = (_moved(self.space, self.rng, self.current, 1) for _ in itertools.count())
        return self.fresh.take(moves, min(count, 4))

    def observe(self, points: Sequence[Point], costs: Sequence[float | None]) -> None:
        """Move to what is better, and to what is worse with a probability that falls."""
        for point, cost in zip(points, costs, strict=True):
            if cost is None:
                continue
            self.done += 1
            heat = 0.02 * max(0.0, 1 - self.done / self.trials)
            worse = math.inf if math.isinf(self.cost) else cost / self.cost - 1
            better = cost <= self.cost
            if better or (heat and self.rng.random() < math.exp(-worse / heat)):
                self.current, self.cost = point, cost


def _moved(space: Space, rng: random.Random, point: Point, layers: int) -> Point:
    """Change a few decisions of so many layers that follow each other."""
    first = rng.randrange(len(point.choices))
    for index in range(first, min(first + layers, len(point.choices))):
        open_ = space.decisions(point, index)
        names = rng.sample(list(open_), min(len(open_), rng.choice((1, 1, 2))))
        point = replaced(point, index, **{name: rng.choice(open_[name]) for name in names})
    return point


class Evolution:
    """Evolutionary search: the best points are changed and crossed; a model picks among many.

    Which decision of a layer is changed is drawn by how often changing it has made a point better,
    there and in all layers. Half of the new values lie beside the old one in the domain, which is
    in order. With the cost model ``none`` what was bred is measured as it comes.
    """

    KEPT = 6
    BRED = 4  # candidates for each point that is measured
    TRUSTED = 128  # measured points with which the model chooses among half of them
    CROSSED = 0.4  # share that has two parents
    NEAR = 0.5  # share of values beside the old one

    def __init__(self, space: Space, rng: random.Random, model: CostModel, picks: bool) -> None:
        self.space, self.rng, self.model, self.picks = space, rng, model, picks
        self.fresh = _Fresh(space)
        self.first = list(starts(space))
        self.measured: list[tuple[float, int, Point]] = []
        # Of each child: its parent's cost, and the decisions that were changed, by layer.
        self.changed: dict[Point, tuple[float, list[tuple[int, str]]]] = {}
        # How often a decision of a layer, or of any, was changed; and for the better.
        self.tries: Counter[tuple[int, str] | str] = Counter()
        self.wins: Counter[tuple[int, str] | str] = Counter()

    def propose(self, count: int) -> list[Point]:
        """Breed points, and give those that the model holds best."""
        if self.first:
            given, self.first = self.first, []
            return self.fresh.take(iter(given), len(given))
        count = min(count, max(4, len(self.measured) // 8))
        best = sorted(self.measured)[: self.KEPT]
        children = (self._child(best) for _ in itertools.count())
        if not self.picks:
            return self.fresh.take(children, count)
        bred = list(dict.fromkeys(itertools.islice(children, self.BRED * count)))
        bred = [point for point in bred if point not in self.fresh.seen]
        scores = dict(zip(bred, self.model.scores(bred), strict=True))
        trust = len(self.measured) / (len(self.measured) + self.TRUSTED)
        # The best of each few: the best of all would be much alike.
        groups = (bred[at : at + self.BRED] for at in range(0, len(bred), self.BRED))
        picked = (
            max(group, key=scores.__getitem__) if self.rng.random() < trust else group[0]
            for group in groups
        )
        return self.fresh.take(picked, count) or self.fresh.take(children, count)

    def _child(self, parents: Sequence[tuple[float, int, Point]]) -> Point:
        # The better half of two that are drawn: pressure without losing the rest.
        place = min(self.rng.randrange(len(parents)), self.rng.randrange(len(parents)))
        cost, _, child = parents[place]
        if self.rng.random() < self.CROSSED:
            _, _, other = self.rng.choice(parents)
            first, last = sorted(self.rng.randint(0, len(child.choices)) for _ in range(2))
            middle = other.choices[first:last]
            child = Point(child.choices[:first] + middle + child.choices[last:])
        decided = []
        first = self.rng.randrange(len(child.choices))
        for index in range(first, min(first + self.rng.choice((1, 1, 1, 2)), len(child.choices))):
            open_ = self.space.decisions(child, index)
            if not open_:
                continue
            (name,) = self.rng.choices(list(open_), [self._promise(index, one) for one in open_])
            value = self._value(open_[name], getattr(child.choices[index], name))
            child = replaced(child, index, **{name: value})
            decided.append((index, name))
        self.changed.setdefault(child, (cost, decided))
        return child

    def _value(self, values: Sequence[Any], now: Any) -> Any:
        """Draw another value of a decision."""
        others = [value for value in values if value != now]
        if now in values and self.rng.random() < self.NEAR:
            place = values.index(now)
            others = [values[at] for at in (place - 1, place + 1) if 0 <= at < len(values)]
        return self.rng.choice(others)

    def _promise(self, index: int, name: str) -> float:
        """Tell how often changing a decision made a point better, as far as was tried.

        What is known of a layer counts beside as much as four tries of what is known of all.
        """
        everywhere = (1 + self.wins[name]) / (4 + self.tries[name])
        return (4 * everywhere + self.wins[index, name]) / (4 + self.tries[index, name])

    def observe(self, points: Sequence[Point], costs: Sequence[float | None]) -> None:
        """Keep what was measured, and let the model learn from all of it."""
        for point, cost in zip(points, costs, strict=True):
            before, decided = self.changed.get(point, (0.0, []))
            better = cost is not None and cost < before
            for index, name in decided:
                self.tries.update(((index, name), name))
                self.wins.update(((index, name), name) if better else ())
            if cost is not None:
                self.measured.append((cost, len(self.measured), point))
        self.changed.clear()
        if self.picks and self.measured:
            self.model.learn([p for _, _, p in self.measured], [c for c, _, _ in self.measured])


STRATEGIES = ("evolution", "random", "grid", "annealing")


def make_strategy(
    name: str, space: Space, *, seed: int, trials: int, cost_model: str = "xgb"
) -> Strategy:
    """Give a strategy of :data:`STRATEGIES`; ``trials`` sets the pace of annealing."""
    rng = random.Random(seed)
    if name == "random":
        return Sweep(space, _random_points(space, rng))
    if name == "grid":
        return Sweep(space, grid_points(space))
    if name == "annealing":
        return Annealing(space, rng, trials)
    return Evolution(space, rng, make_model(cost_model, space, seed), cost_model != "none")
