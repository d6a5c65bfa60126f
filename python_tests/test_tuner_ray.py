"""Measuring on a real Ray of this host, a worker of which is killed on purpose."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from python_tests.test_tuner import found, small_space
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.ray_runner import RayPool, RunnerError
from tvm_mars.tuner.runners import InProcess
from tvm_mars.tuner.search import SearchOptions, search
from tvm_mars.tuner.strategies import make_strategy

pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def patient_cluster(monkeypatch):
    """Let a busy host answer late: its raylet is not dead."""
    for name in ("period_ms", "timeout_ms", "initial_delay_ms"):
        monkeypatch.setenv(f"RAY_health_check_{name}", "60000")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")


def workers_of_ray() -> list[int]:
    """Give the task workers that this test's Ray has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and descends_from_us(int(entry.name)):
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if title.startswith(b"ray::"):
                found.append(int(entry.name))
    return found


def descends_from_us(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False
        pid = int(status.split("PPid:")[1].split()[0])
    return False


def test_lost_workers_points_are_measured_again_and_nothing_differs(tmp_path):
    space = small_space()
    points = make_strategy("random", space, seed=0, trials=1).propose(400)
    expected = InProcess(space).measure(points)
    pool = RayPool(space, 2)
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 240
        while not killed and time.monotonic() < until:
            for pid in workers_of_ray()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert pool.measure(points) == expected
        killer.join()
        assert killed
        with pytest.raises(RunnerError, match="took more than"):
            RayPool(space, 2, timeout=1e-4).measure(points)
    finally:
        pool.close()


def test_a_search_on_ray_comes_to_the_same(tmp_path):
    space = small_space()
    for runner in ("local", "ray"):
        options = SearchOptions(trials=24, batch=8, runner=runner, workers=2)
        search(space, Database(tmp_path / runner), options)
    assert found(tmp_path / "local") == found(tmp_path / "ray")
