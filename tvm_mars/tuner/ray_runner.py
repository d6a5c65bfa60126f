"""Measuring on a Ray cluster, where workers may be lost and may hang.

A worker is an actor of one core that holds the space and measures one point at a time. One that
dies or does not answer in time is replaced, and its point is measured again by whoever is free.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from mars_runtime.errors import OptionError

from ..schedule import Point
from .changes import changes, changes_text
from .runners import AHEAD, Measured, RunnerError, measure
from .space import Space

__all__ = ["RayOptions", "RayPool", "connected"]

_WHERE = "runner ray"
_START_SECONDS = 300  # for the first of the workers
_REACH_SECONDS = 10  # for a connection to the cluster's head; Ray itself tries for minutes
# What a client of HTTP/2 sends first, with SETTINGS of its own; the server answers with SETTINGS
# (RFC 9113, 3.4 and 6.5). A frame's type is the fourth byte of its header.
_FRAME_HEADER_BYTES, _SETTINGS = 9, b"\x04"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)
_GO_ON = "--resume goes on from what was measured"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Measure = Callable[[Space, Point], Measured | None]


@attrs.frozen(kw_only=True)
class RayOptions:
    """How to measure on a cluster.

    Parameters
    ----------
    address : str, optional
        ``HOST:PORT``, or ``auto`` for a cluster of this host; the one of ``RAY_ADDRESS`` if not
        given, and where that is not set one that is started here. A connection that this process
        has already comes before all of these.
    timeout : float
        Seconds that a point may take.
    retries : int
        How often a point is measured again whose worker was lost or too slow.

    Raises
    ------
    OptionError
        If a value has no meaning.
    """

    address: str | None = None
    timeout: float = 60.0
    retries: int = 3

    def __attrs_post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise OptionError(f"{self.timeout:g} s is no time", where="option trial_timeout")
        if self.retries < 0:
            raise OptionError(f"{self.retries} is below 0", where="option retries")


@contextlib.contextmanager
def connected(address: str | None, workers: int) -> Iterator[Any]:
    """Give Ray, connected to a cluster; what is connected already stays so.

    Parameters
    ----------
    workers : int
        Cores of a cluster that is started here.

    Raises
    ------
    RunnerError
        If Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise RunnerError(
            "Ray is not installed",
            where=_WHERE,
            hint="pip install 'tvm-mars[ray]', or use the runner local",
        ) from None
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # It is for this process alone: nobody looks at its dashboard, nothing is to be reported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet |= {"num_cpus": workers, "include_dashboard": False}
    try:
        _check_reachable(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        raise RunnerError(
            f"no connection to the cluster {address}: {error}",
            where=_WHERE,
            hint="is it running (ray status), with this version of Ray and Python? "
            "Without an address one is started on this host",
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens that speaks HTTP/2, as the cluster's gRPC does."""
    place = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if not place:
        return
    with socket.create_connection((place[1], int(place[2])), _REACH_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(_HTTP2_HELLO)
        with connection.makefile("rb") as answer:
            header = answer.read(_FRAME_HEADER_BYTES)
        if header[3:4] != _SETTINGS:
            raise ConnectionError("what listens there is no cluster of Ray")


def _said(error: Exception) -> str:
    """Give what an error of Ray begins and ends with; between them is a traceback."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))


class _Actor:
    """What runs on the cluster."""

    def __init__(self, space: Space, measure: Measure) -> None:
        self.space, self.measured = space, measure

    def pid(self) -> int:
        return os.getpid()

    def measure(self, point: Point) -> Measured | None:
        return self.measured(self.space, point)


@attrs.define
class _Worker:
    """An actor, what it was asked for last and since when, and which point that is about.

    It has no point while it starts, or is busy with what is not wanted any more, and no task when
    it is free.
    """

    actor: Any
    task: Any
    since: float
    number: int | None = None
    pid: int | None = None


class RayPool:
    """Measures on a Ray cluster.

    Parameters
    ----------
    workers : int
        Actors, of one core each; with fewer free cores, fewer of them work.
    measured : callable
        What an actor calls with the space and a point.

    Raises
    ------
    RunnerError
        If Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, space: Space, workers: int, options: RayOptions, measured: Measure = measure
    ) -> None:
        self.options, self.default = options, space.default
        self.failed_starts = 0
        self.workers: list[_Worker] = []
        with contextlib.ExitStack() as stack:
            self.ray = stack.enter_context(connected(options.address, workers))
            stack.callback(self._end_workers)
            self.actor = self.ray.remote(num_cpus=1)(_Actor)
            # Once on the cluster, however many workers there are, and are to come.
            self.given = self.ray.put(space), self.ray.put(measured)
            self.workers += [self._started() for _ in range(workers)]
            self.stack = stack.pop_all()

    def measure(self, points: Sequence[Point]) -> Iterator[Measured | None]:
        """Yield what each point costs.

        Raises
        ------
        RunnerError
            If no worker can be had, or a point was tried as often as allowed.
        """
        waiting = deque(range(len(points)))
        attempts = [0] * len(points)
        found: dict[int, Measured | None] = {}
        given = 0  # points whose cost was yielded
        try:
            while given < len(points):
                for worker in self.workers:
                    ahead = given + AHEAD * len(self.workers)
                    if worker.task is None and waiting and waiting[0] < ahead:
                        number = waiting.popleft()
                        attempts[number] += 1
                        worker.task = worker.actor.measure.remote(points[number])
                        worker.number, worker.since = number, time.monotonic()
                for worker in self._answered():
                    asked, lost = worker.number, self._take(worker, found)
                    if lost and asked is not None:
                        self._check_attempts(attempts[asked], points[asked], lost)
                        waiting.appendleft(asked)
                while given in found:
                    yield found.pop(given)
                    given += 1
        finally:
            for worker in self.workers:
                worker.number = None

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        self.stack.close()

    # -- workers ---------------------------------------------------------------------------------

    def _started(self) -> _Worker:
        actor = self.actor.remote(*self.given)
        return _Worker(actor, actor.pid.remote(), time.monotonic())

    def _end_workers(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker.actor)
        self.workers.clear()

    def _answered(self) -> list[_Worker]:
        """Wait until workers have answered, were lost, or have run out of time; give these."""
        busy = [worker for worker in self.workers if worker.task is not None]
        ends = [end for worker in busy if (end := self._end(worker)) is not None]
        seconds = max(0.0, min(ends) - time.monotonic()) if ends else None
        done, _ = self.ray.wait([worker.task for worker in busy], timeout=seconds)
        now = time.monotonic()
        return [
            worker
            for worker in busy
            if worker.task in done or ((end := self._end(worker)) is not None and end <= now)
        ]

    def _end(self, worker: _Worker) -> float | None:
        """Give when a worker's time is over; one may wait for a core as long as another works."""
        if worker.pid is not None:
            return worker.since + self.options.timeout
        if any(one.pid is not None for one in self.workers):
            return None
        return worker.since + _START_SECONDS

    def _take(self, worker: _Worker, found: dict[int, Measured | None]) -> str:
        """Take a worker's answer; tell why there is none, when another has taken its place."""
        try:
            answer = self.ray.get(worker.task, timeout=0)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.GetTimeoutError:
            if worker.pid is None:
                raise self._no_worker(f"{_START_SECONDS} s have passed") from None
            why = f"it took more than {self.options.timeout:g} s"
        except self.ray.exceptions.RayError as error:
            why = f"its worker was lost: {_said(error)}"
        else:
            if worker.pid is None:
                worker.pid, self.failed_starts = answer, 0
            elif worker.number is not None:
                found[worker.number] = answer
            worker.task = worker.number = None
            return ""
        if worker.pid is None:
            self.failed_starts += 1
            if self.failed_starts > self.options.retries:
                raise self._no_worker(why)
        self.ray.kill(worker.actor)
        self.workers[self.workers.index(worker)] = self._started()
        return why

    def _no_worker(self, why: str) -> RunnerError:
        return RunnerError(
            f"no worker starts: {why}",
            where=_WHERE,
            hint="does the cluster have a free core (ray status), and each of its nodes this "
            f"version of tvm-mars? {_GO_ON}",
        )

    def _check_attempts(self, attempts: int, point: Point, why: str) -> None:
        if attempts > self.options.retries:
            layers = enumerate(map(changes_text, changes(self.default, point)))
            changed = "; ".join(f"layer {number}: {text}" for number, text in layers if text)
            raise RunnerError(
                f"the default schedule{changed and ' but for '}{changed} was tried {attempts} "
                f"times, and at last {why}",
                where=_WHERE,
                hint=f"a longer trial timeout, or nodes with more memory, may help; {_GO_ON}",
            )
