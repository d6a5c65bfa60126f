"""Measuring on a Ray cluster: lost workers' points are measured again."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mars_runtime.errors import MarsError

from ..schedule import Point
from .runners import Measured, measure
from .space import Space

__all__ = ["RayPool", "RunnerError"]

_RETRIES = 4  # of a task whose worker was lost
_TIMEOUT = 600.0  # seconds for a batch
_CHUNK = 4  # points of a task


class RunnerError(MarsError, RuntimeError):
    """Points could not be measured."""


class RayPool:
    """Measures in tasks of a Ray cluster: the one of RAY_ADDRESS, else one that it starts here.

    Parameters
    ----------
    workers : int
        Cores of a cluster that is started.
    timeout : float
        Seconds that a batch may take.

    Raises
    ------
    RunnerError
        If Ray is not installed.
    """

    def __init__(self, space: Space, workers: int, timeout: float = _TIMEOUT) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise RunnerError(
                "needs Ray", where="runner ray", hint="pip install 'tvm-mars[ray]', or use local"
            ) from None
        self.ray, self.timeout = ray, timeout
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(
                num_cpus=None if _has_address() else workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        self.space = ray.put(space)
        self.task = ray.remote(max_retries=_RETRIES)(_measure_all)

    def measure(self, points: Sequence[Point]) -> list[Measured | None]:
        """Give what each point costs.

        Raises
        ------
        RunnerError
            If workers are lost again and again, or the batch takes too long.
        """
        chunks = [points[at : at + _CHUNK] for at in range(0, len(points), _CHUNK)]
        tasks = [self.task.remote(self.space, list(chunk)) for chunk in chunks]
        try:
            found = self.ray.get(tasks, timeout=self.timeout)
        except self.ray.exceptions.GetTimeoutError:
            raise RunnerError(
                f"{len(points)} points took more than {self.timeout:g} s",
                where="runner ray",
                hint="give the cluster more cores; --resume goes on from what was measured",
            ) from None
        except (
            self.ray.exceptions.WorkerCrashedError,
            self.ray.exceptions.NodeDiedError,
            self.ray.exceptions.ObjectLostError,
            self.ray.exceptions.RaySystemError,
        ) as error:
            raise RunnerError(
                f"workers were lost more than {_RETRIES} times: {error}",
                where="runner ray",
                hint="see Ray's logs; --resume goes on from what was measured",
            ) from None
        return [measured for chunk in found for measured in chunk]

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        if self.started:
            self.ray.shutdown()


def _has_address() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _measure_all(space: Space, points: list[Point]) -> list[Measured | None]:
    return [measure(space, point) for point in points]
