"""Measuring on a real cluster of Ray, on this host: the same trials, whatever befalls workers."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from mars_runtime.errors import OptionError
from python_tests.test_tuner import found, small_space
from tvm_mars.schedule import Point
from tvm_mars.tuner import ray_runner
from tvm_mars.tuner import search as searching
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.ray_runner import RayOptions, RayPool
from tvm_mars.tuner.runners import InProcess, Measured, RunnerError, measure
from tvm_mars.tuner.search import SearchOptions, search
from tvm_mars.tuner.space import Space
from tvm_mars.tuner.strategies import make_strategy

ray = pytest.importorskip("ray")

LOCAL = SearchOptions(trials=40, batch=12, seed=3)
ON_RAY = attrs.evolve(LOCAL, runner="ray", workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Connect to a cluster of two cores."""
    path = os.pathsep.join(filter(None, sys.path))  # what workers import
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, object]]:
    """Give the trials of the search in this process."""
    directory = tmp_path_factory.mktemp("local")
    search(small_space(), Database(directory), LOCAL)
    return found(directory)


def some_points(space: Space) -> list[Point]:
    return make_strategy("random", space, seed=1, trials=1).propose(24)


def is_alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pid: int) -> None:
    while is_alive(pid):  # the test that hangs here has failed
        time.sleep(0.05)


# -- the same trials -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_are_those_of_this_process(workers, cluster, local, tmp_path):
    search(small_space(), Database(tmp_path), attrs.evolve(ON_RAY, workers=workers))
    assert found(tmp_path) == local
    assert ray.is_initialized()


def test_killed_workers_are_replaced_and_the_trials_stay(cluster, local, tmp_path, monkeypatch):
    pools, puts = [], []

    def pool(*given: Any) -> RayPool:
        pools.append(RayPool(*given))
        return pools[-1]

    def put(value: Any, original: Any = ray.put) -> Any:
        puts.append(value)
        return original(value)

    monkeypatch.setattr(searching, "RayPool", pool)
    monkeypatch.setattr(ray, "put", put)
    killed = []

    def kill(record: Any, best: Any) -> None:
        if record.trial in (5, 6, 20):
            pids = (worker.pid for worker in pools[0].workers)
            victim = next(pid for pid in pids if pid is not None and pid not in killed)
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)

    search(small_space(), Database(tmp_path), ON_RAY, on_trial=kill)
    assert found(tmp_path) == local
    assert len(set(killed)) == 3 and not any(map(is_alive, killed))
    assert sum(isinstance(value, Space) for value in puts) == 1


ELSEWHERE = """
import sys
from python_tests.test_tuner import small_space
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.ray_runner import RayOptions
from tvm_mars.tuner.search import SearchOptions, search
options = SearchOptions(trials=40, batch=12, seed=3, runner="ray", workers=2,
                        ray=RayOptions(address=sys.argv[2] or None))
search(small_space(), Database(sys.argv[1]), options)
"""


@pytest.mark.parametrize("by", ["address", "RAY_ADDRESS"])
def test_a_cluster_that_runs_is_used_and_left_running(by, cluster, local, tmp_path):
    address = ray.get_runtime_context().gcs_address
    given = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if by == "RAY_ADDRESS":
        given["RAY_ADDRESS"] = address
    asked = address if by == "address" else ""
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), asked],
        env={**os.environ, **given},
        check=True,
    )
    assert found(tmp_path) == local
    assert ray.get(ray.remote(lambda: 3).remote()) == 3


def hang(marker: Path, forever: bool, space: Space, point: Point) -> Measured | None:
    """Measure, but hang at first, or always."""
    if forever or not marker.exists():
        marker.touch()
        time.sleep(10_000)
    return measure(space, point)


def die(marker: Path, forever: bool, space: Space, point: Point) -> Measured | None:
    if forever or not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(space, point)


@pytest.mark.parametrize("mishap", [hang, die])
def test_what_hangs_or_dies_is_measured_again(mishap, cluster, tmp_path):
    space = small_space()
    points = some_points(space)
    options = RayOptions(timeout=5)
    pool = RayPool(space, 1, options, functools.partial(mishap, tmp_path / "begun", False))
    costs = list(pool.measure(points))
    pool.close()
    assert (tmp_path / "begun").exists()
    assert costs == list(InProcess(space).measure(points))


@pytest.mark.parametrize(
    ("mishap", "said"), [(hang, "it took more than 2 s"), (die, "its worker was lost")]
)
def test_retries_end(mishap, said, cluster, tmp_path):
    space = small_space()
    options = RayOptions(timeout=2, retries=1)
    pool = RayPool(space, 1, options, functools.partial(mishap, tmp_path / "begun", True))
    message = f"but for layer .* 2 times, and at last {said}.*--resume"
    with pytest.raises(RunnerError, match=message):
        list(pool.measure(some_points(space)[1:]))
    pool.close()


def test_what_a_search_leaves_is_not_taken_for_the_next_points(cluster):
    """As much as is given to workers and not taken is dropped, without harm to what follows."""
    space = small_space()
    points = some_points(space)
    costs = list(InProcess(space).measure(points))
    pool = RayPool(space, 2, RayOptions())
    for _ in range(3):
        begun = pool.measure(points)
        assert [next(begun), next(begun)] == costs[:2]
        begun.close()
        assert list(pool.measure(points[::-1])) == costs[::-1]
    pool.close()


def broken(space: Space, point: Point) -> Measured | None:
    raise OptionError("a mistake in what is measured", where="here")


def test_a_mistake_is_no_lost_worker(cluster):
    space = small_space()
    pool = RayPool(space, 1, RayOptions(), broken)
    with pytest.raises(OptionError, match="here: a mistake in what is measured"):
        list(pool.measure(some_points(space)))
    pool.close()


# -- workers are released --------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [False, True])
def test_workers_are_released(interrupted, cluster, tmp_path, monkeypatch):
    pids = set()

    def pool(*given: Any) -> RayPool:
        made = RayPool(*given)
        pids.update(ray.get([worker.actor.pid.remote() for worker in made.workers]))
        return made

    def interrupt(record: Any, best: Any) -> None:
        if interrupted and record.trial == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(searching, "RayPool", pool)
    try:
        search(small_space(), Database(tmp_path), ON_RAY, on_trial=interrupt)
    except KeyboardInterrupt:
        assert interrupted
    assert len(pids) == 2
    for pid in pids:
        wait_for_end(pid)
    assert len(Database(tmp_path).records) == (11 if interrupted else 40)


SEARCH = """
import os, signal, sys, time
# What runs in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from python_tests.small_networks import every_kind_of_layer
from tvm_mars.tuner import ray_runner
from tvm_mars.tuner.api import tune

def told(trial):
    if trial.record.trial == 10:
        import ray
        pid = ray.get(ray.remote(lambda: os.getppid()).options(num_cpus=0).remote())
        print(pid, flush=True)  # of the node, which ends when nobody needs it
        time.sleep(10_000)

tune(every_kind_of_layer(), work_dir=sys.argv[1], max_trials_global=40, runner="ray",
     on_trial=told)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_that_was_started_ends_with_the_search(sent, tmp_path):
    path = os.pathsep.join(filter(None, sys.path))
    given = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", SEARCH, str(tmp_path / "tuned")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**given, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        node = int(process.stdout.readline())
        assert is_alive(node)
        process.send_signal(sent)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    wait_for_end(node)
    assert len(Database(tmp_path / "tuned").records) == 11


# -- no cluster ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_what_is_no_cluster_is_said(answer, tmp_path, monkeypatch):
    ray.shutdown()
    monkeypatch.setattr(ray_runner, "_REACH_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ended = threading.Event()

        def serve():
            with server.accept()[0] as connection:
                if answer is None:  # listens, and says nothing
                    ended.wait()
                else:
                    connection.recv(1)
                    connection.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            with pytest.raises(RunnerError, match=f"no connection to the cluster {address}"):
                options = attrs.evolve(ON_RAY, ray=RayOptions(address=address))
                search(small_space(), Database(tmp_path), options)
        finally:
            ended.set()
            serving.join()


def test_a_cluster_that_cannot_be_reached_is_said(tmp_path, monkeypatch):
    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "nonsense"):
        options = attrs.evolve(ON_RAY, ray=RayOptions(address=address))
        with pytest.raises(
            RunnerError, match=f"no connection to the cluster {address}.*ray status"
        ):
            search(small_space(), Database(tmp_path), options)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(RunnerError, match=f"no connection to the cluster 127.0.0.1:{port}"):
        search(small_space(), Database(tmp_path), ON_RAY)
    assert not ray.is_initialized()
