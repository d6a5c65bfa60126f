"""How the next points to measure are chosen.

A strategy proposes points and is told what they cost; it never measures. Everything random comes
from its seed, so that the same trials follow whoever measures them. All start with the same few
points: the default schedule, and what one decision taken for all steps alike makes of it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs

from ..schedule import Point, Schedule, ScheduleError
from .model import CostModel, make_model
from .space import Space, replaced
from .starts import starts, uniform

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

#: Decisions that are tried for all steps alike, at the start and by the grid.
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
    """Draw steps of the default point anew: any number of them, a third of their decisions."""
    while True:
        point = space.default
        count = rng.randint(1, len(point.steps))
        for index in rng.sample(range(len(point.steps)), count):
            point = space.drawn(rng, point, index, 1 / 3)
        yield point


def grid_points(space: Space) -> Iterator[Point]:
    """Yield a graph of one step exhaustively; else all uniform points, then single changes."""
    default = space.default
    if len(default.steps) == 1:
        domain = space.domain(0)
        for values in itertools.product(*domain.values()):
            choice = attrs.evolve(default.steps[0], **dict(zip(domain, values, strict=True)))
            yield replaced(default, 0, choice)
        return
    for values in itertools.product(*UNIFORM.values()):
        yield uniform(space, dict(zip(UNIFORM, values, strict=True)))
    for index in range(len(default.steps)):
        yield from space.neighbours(default, index)


class Annealing:
    """Simulated annealing: one step's decisions change at a time, the temperature falls."""

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


def _moved(space: Space, rng: random.Random, point: Point, steps: int) -> Point:
    """Change a few decisions of so many steps that follow each other."""
    first = rng.randrange(len(point.steps))
    for index in range(first, min(first + steps, len(point.steps))):
        domain = space.domain(index)
        names = rng.sample(list(domain), rng.choice((1, 1, 2)))
        drawn = {name: rng.choice(domain[name]) for name in names}
        point = replaced(point, index, attrs.evolve(point.steps[index], **drawn))
    return point


class Evolution:
    """Evolutionary search: the best points are changed and crossed; a model picks among many.

    Which decision is changed is drawn by how often changing it has made a point better. With the
    cost model ``none`` what was bred is measured as it comes.
    """

    KEPT = 6
    BRED = 8  # candidates for each point that is measured
    TRUSTED = 32  # measured points with which the model chooses half of the next
    CROSSED = 0.2  # share that has two parents

    def __init__(self, space: Space, rng: random.Random, model: CostModel, picks: bool) -> None:
        self.space, self.rng, self.model, self.picks = space, rng, model, picks
        self.fresh = _Fresh(space)
        self.first = list(starts(space))
        self.measured: list[tuple[float, int, Point]] = []
        self.changed: dict[Point, tuple[float, list[str]]] = {}  # parent's cost, what was decided
        self.tries: dict[str, int] = {}  # by decision, how often it was changed
        self.wins: dict[str, int] = {}  # ... for the better

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
        scores = self.model.scores(bred)
        order = sorted(range(len(bred)), key=lambda i: (-scores[i], i))
        trust = len(self.measured) / (len(self.measured) + self.TRUSTED)
        greedy = self.fresh.take((bred[i] for i in order), round(count * trust))
        self.rng.shuffle(bred)
        return [*greedy, *self.fresh.take(iter(bred), count - len(greedy))]

    def _child(self, parents: Sequence[tuple[float, int, Point]]) -> Point:
        # The better half of two that are drawn: pressure without losing the rest.
        place = min(self.rng.randrange(len(parents)), self.rng.randrange(len(parents)))
        cost, _, child = parents[place]
        if self.rng.random() < self.CROSSED:
            _, _, other = self.rng.choice(parents)
            cut = self.rng.randint(0, len(child.steps))
            child = attrs.evolve(child, steps=child.steps[:cut] + other.steps[cut:])
        decided = []
        first = self.rng.randrange(len(child.steps))
        for index in range(first, min(first + self.rng.choice((1, 1, 1, 2)), len(child.steps))):
            step = child.steps[index]
            open_ = {n: v for n, v in self.space.domain(index).items() if len(v) > 1}
            if not open_:
                continue
            (name,) = self.rng.choices(list(open_), [self._promise(one) for one in open_])
            value = self.rng.choice([v for v in open_[name] if v != getattr(step, name)])
            child = replaced(child, index, attrs.evolve(step, **{name: value}))
            decided.append(name)
        self.changed.setdefault(child, (cost, decided))
        return child

    def _promise(self, name: str) -> float:
        """Tell how often changing a decision made a point better, as far as was tried."""
        return (1 + self.wins.get(name, 0)) / (4 + self.tries.get(name, 0))

    def observe(self, points: Sequence[Point], costs: Sequence[float | None]) -> None:
        """Keep what was measured, and let the model learn from all of it."""
        for point, cost in zip(points, costs, strict=True):
            before, decided = self.changed.get(point, (0.0, []))
            for name in decided:
                self.tries[name] = self.tries.get(name, 0) + 1
                self.wins[name] = self.wins.get(name, 0) + (cost is not None and cost < before)
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
