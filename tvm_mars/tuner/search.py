"""One search: a strategy proposes, a runner measures, the database remembers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping

import attrs

from mars_runtime.errors import OptionError

from ..schedule import Point
from .database import Database, Record, Workload, arch_key, workload_key
from .ray_runner import RayOptions, RayPool
from .runners import InProcess, Measured, Runner, WorkerPool
from .space import Space
from .strategies import STRATEGIES, make_strategy

__all__ = ["COST_MODELS", "OBJECTIVES", "RUNNERS", "SearchOptions", "search"]

OBJECTIVES = ("cycles", "energy", "edp")
COST_MODELS = ("xgb", "none")
RUNNERS = ("local", "ray")
_CHOICES = {
    "objective": OBJECTIVES,
    "strategy": STRATEGIES,
    "cost_model": COST_MODELS,
    "runner": RUNNERS,
}


@attrs.frozen(kw_only=True)
class SearchOptions:
    """How to search.

    Parameters
    ----------
    trials : int
        Schedules that are measured; those that the space refuses do not count.
    batch : int
        Measured between two fits of the model.
    objective : "cycles", "energy" or "edp"
    strategy : "evolution", "random", "grid" or "annealing"
    cost_model : "xgb" or "none"
        Of the evolutionary search.
    seed : int
    runner : "local" or "ray"
        Where schedules are measured: on this host, or on a Ray cluster, as ``ray`` says. The result
        does not depend on it.
    workers : int
        Processes that measure; the result does not depend on it.
    patience : int, optional
        Trials without a better one after which the search ends.
    first : tuple of Point
        Points to measure early, behind those that every strategy begins with.

    Raises
    ------
    OptionError
        If a value has no meaning.
    """

    trials: int
    batch: int = 32
    objective: str = "cycles"
    strategy: str = "evolution"
    cost_model: str = "xgb"
    seed: int = 0
    runner: str = "local"
    workers: int = 1
    ray: RayOptions = RayOptions()
    patience: int | None = None
    first: tuple[Point, ...] = ()

    def __attrs_post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise OptionError(
                    f"{getattr(self, name)!r} is not one of {', '.join(known)}",
                    where=f"option {name}",
                )
        for name in ("trials", "batch", "workers"):
            if getattr(self, name) < 1:
                raise OptionError(f"{getattr(self, name)} is not above 0", where=f"option {name}")

    @property
    def run(self) -> str:
        """A digest of what decides the trials' order, by which a search finds its own records."""
        names = ("objective", "strategy", "cost_model", "seed", "batch")
        deciding: dict[str, object] = {name: getattr(self, name) for name in names}
        if self.strategy == "annealing":
            deciding["trials"] = self.trials
        if self.first:
            deciding["first"] = [attrs.asdict(point) for point in self.first]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def search(
    space: Space,
    database: Database,
    options: SearchOptions,
    *,
    resume: bool = False,
    name: str = "",
    on_trial: Callable[[Record, Record], None] = lambda record, best: None,
) -> Record:
    """Search a space; give the best record.

    A search that was cut off and is resumed proposes the same points again, takes from the
    database what it had measured of them, and so comes to the result that it would have come to.

    Parameters
    ----------
    resume : bool
        Whether to take up the records of an earlier search with the same options.
    name : str
        What the workload is called in the database.
    on_trial : callable
        Called with every new record and the best so far.
    """
    workload, arch = workload_key(space.graph, space.packed), arch_key(space.arch)
    database.add_workload(workload, _described(space, name))
    known: dict[Point, Record] = {}
    if resume:
        known = {one.point: one for one in database.of(workload, arch) if one.run == options.run}
    strategy = make_strategy(
        options.strategy,
        space,
        seed=options.seed,
        trials=options.trials,
        cost_model=options.cost_model,
    )
    first = [point for point in options.first if point != space.default]  # which is first anyway
    runner = _runner(space, options)
    records: list[Record] = []
    best: Record | None = None
    since = 0
    try:
        while len(records) < options.trials:
            proposed = strategy.propose(min(options.batch, options.trials - len(records)))
            if not proposed:
                break
            points = [point for point in proposed if point not in first]
            if not records:
                points += first
            costs: list[float | None] = []
            for point, measured in zip(points, _measured(runner, points, known), strict=True):
                if measured is None or len(records) == options.trials:
                    costs.append(None)
                    continue
                record = Record(
                    workload=workload,
                    arch=arch,
                    run=options.run,
                    trial=len(records),
                    cycles=measured.cycles,
                    energy_pj=measured.energy_pj,
                    layer_cycles=measured.layer_cycles,
                    point=point,
                )
                records.append(record)
                if point not in known:
                    database.add(record)
                cost = record.cost(options.objective)
                costs.append(cost)
                since += 1
                if best is None or cost < best.cost(options.objective):
                    best, since = record, 0
                on_trial(record, best)
            strategy.observe(points, costs)
            if options.patience is not None and since >= options.patience:
                break
    finally:
        runner.close()
    assert best is not None  # the default schedule is legal
    return best


def _described(space: Space, name: str) -> Workload:
    return Workload(name, tuple(layer.name for layer in space.graph.layers))


def _measured(
    runner: Runner, points: list[Point], known: Mapping[Point, Record]
) -> Iterator[Measured | None]:
    """Yield what each point costs, measuring what is not known."""
    measured = runner.measure([point for point in points if point not in known])
    for point in points:
        earlier = known.get(point)
        if earlier is None:
            yield next(measured)
        else:
            yield Measured(earlier.cycles, earlier.energy_pj, earlier.layer_cycles)


def _runner(space: Space, options: SearchOptions) -> Runner:
    if options.runner == "ray":
        return RayPool(space, options.workers, options.ray)
    workers = min(options.workers, 4 * (os.cpu_count() or 1))
    return InProcess(space) if workers == 1 else WorkerPool(space, workers)
