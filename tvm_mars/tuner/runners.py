"""Who measures points: this process, or several worker processes beside it.

Points are measured by the timed machine without data. Results come back one by one, in the order of
the points, so that a search does not depend on how many workers there are.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

import attrs

from mars_runtime.energy import energy_of
from mars_runtime.errors import MarsError
from mars_runtime.timeline import Counters, Timeline

from ..schedule import Point, ScheduleError
from .space import Space

__all__ = ["AHEAD", "InProcess", "Measured", "Runner", "RunnerError", "WorkerPool", "measure"]

#: Points for each worker that are measured while an earlier one is not done: as much as a search
#: that is killed may have measured in vain.
AHEAD = 2


class RunnerError(MarsError, RuntimeError):
    """Points could not be measured."""


@attrs.frozen
class Measured:
    """What a point costs; ``layer_cycles`` are by layer, and ``cycles`` their sum."""

    cycles: int
    energy_pj: float
    layer_cycles: tuple[int, ...]


class Runner(Protocol):
    """Measures points."""

    def measure(self, points: Sequence[Point]) -> Iterator[Measured | None]:
        """Yield what each point costs as soon as it is known; None for what the space refuses.

        Raises
        ------
        RunnerError
            If workers cannot do it.
        """

    def close(self) -> None:
        """End the workers."""


def measure(space: Space, point: Point) -> Measured | None:
    """Measure one point; None if the space refuses it."""
    try:
        timeline = space.time(point)
    except ScheduleError:
        return None
    # A convolution and the pool that is fused into it are one: conv0+maxpool1.
    cycles = {layer.name.partition("+")[0]: layer.cycles for layer in timeline.layers}
    return Measured(
        timeline.cycles,
        energy_of(_total(timeline), space.arch).total,
        tuple(cycles.get(layer.name, 0) for layer in space.graph.layers),
    )


def _total(timeline: Timeline) -> Counters:
    counters = Counters()
    for layer in timeline.layers:
        counters.add(layer.counters)
    return counters


class InProcess:
    """Measures in this process."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def measure(self, points: Sequence[Point]) -> Iterator[Measured | None]:
        """Yield what each point costs."""
        return (measure(self.space, point) for point in points)

    def close(self) -> None:
        """Do nothing."""


class WorkerPool:
    """Measures in worker processes, each of which holds the space."""

    def __init__(self, space: Space, workers: int) -> None:
        self.ahead = AHEAD * workers
        # Forked workers would inherit the threads' locks of TVM and XGBoost.
        context = multiprocessing.get_context("spawn")
        # Not as an argument: to start a process that dies before it has read a large one hangs.
        self.spaces: multiprocessing.Queue[Space] = context.Queue()
        for _ in range(workers):
            self.spaces.put(space)
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(self.spaces,)
        )

    def measure(self, points: Sequence[Point]) -> Iterator[Measured | None]:
        """Yield what each point costs.

        Raises
        ------
        RunnerError
            If a worker process is lost.
        """
        waiting: deque[concurrent.futures.Future[Measured | None]] = deque()
        try:
            for point in points:
                waiting.append(self.pool.submit(_measure_here, point))
                if len(waiting) == self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunnerError(
                "a worker process was lost",
                where="runner local",
                hint="was it killed, or memory short, or does a script that tunes do so outside of "
                "if __name__ == '__main__'? --resume goes on from what was measured",
            ) from None

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)
        self.spaces.cancel_join_thread()
        self.spaces.close()


_spaces: list[Space] = []  # a worker's own


def _begin(spaces: multiprocessing.Queue[Space]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _spaces[:] = [spaces.get()]


def _end_with_parent() -> None:
    """End this process where the one that searches is killed and can tell its workers nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _measure_here(point: Point) -> Measured | None:
    return measure(_spaces[0], point)
