"""Who measures points: this process, or several worker processes beside it.

Points are measured by the timed machine without data. Results come back in the order of the points,
so that a search does not depend on how many workers there are.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Sequence
from typing import Protocol

import attrs

from mars_runtime.energy import energy_of
from mars_runtime.timeline import Counters, Timeline

from ..schedule import Point, ScheduleError
from .space import Space

__all__ = ["InProcess", "Measured", "Runner", "WorkerPool", "measure"]


@attrs.frozen
class Measured:
    """What a point costs."""

    cycles: int
    energy_pj: float


class Runner(Protocol):
    """Measures points."""

    def measure(self, points: Sequence[Point]) -> list[Measured | None]:
        """Give what each point costs; None for what the space refuses."""

    def close(self) -> None:
        """End the workers."""


def measure(space: Space, point: Point) -> Measured | None:
    """Measure one point; None if the space refuses it."""
    try:
        timeline = space.time(point)
    except ScheduleError:
        return None
    return Measured(timeline.cycles, energy_of(_total(timeline), space.arch).total)


def _total(timeline: Timeline) -> Counters:
    counters = Counters()
    for layer in timeline.layers:
        counters.add(layer.counters)
    return counters


class InProcess:
    """Measures in this process."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def measure(self, points: Sequence[Point]) -> list[Measured | None]:
        """Give what each point costs."""
        return [measure(self.space, point) for point in points]

    def close(self) -> None:
        """Do nothing."""


class WorkerPool:
    """Measures in worker processes, each of which holds the space."""

    def __init__(self, space: Space, workers: int) -> None:
        # Forked workers would inherit the threads' locks of TVM and XGBoost.
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_set_space,
            initargs=(space,),
        )

    def measure(self, points: Sequence[Point]) -> list[Measured | None]:
        """Give what each point costs."""
        return list(self.pool.map(_measure_here, points, chunksize=4))

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown()


_spaces: list[Space] = []  # a worker's own


def _set_space(space: Space) -> None:
    _spaces[:] = [space]


def _measure_here(point: Point) -> Measured | None:
    return measure(_spaces[0], point)
