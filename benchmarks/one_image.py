"""Whether two threads that share the layers of one image are faster than one.

VGG16 and ResNet-18 at several densities; both take turns in one process, from an image to codes.
The least time is what an idle processor gives, the median what this machine gives now.

Run: ``python benchmarks/one_image.py`` (two minutes).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mars_runtime import PRESETS, native
from mars_runtime.engine import SHARED_WORK, Engine
from mars_runtime.lift import lift
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.networks import resnet18, vgg16

NETWORKS = {"vgg16": vgg16, "resnet18": resnet18}
DENSITIES = (0.05, 0.1, 0.5, 1.0)
CALLS = 50  # of one contender before the other's turn


def seconds(call: Callable[[], object], count: int) -> list[float]:
    """Time calls."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def shown(times: list[float]) -> str:
    """Give the least time, median and 90th percentile in microseconds."""
    return " / ".join(f"{1e6 * part:.0f}" for part in np.quantile(times, (0, 0.5, 0.9)))


def measure(name: str, density: float, turns: int) -> str:
    """Give a table row of one network and density."""
    arch = PRESETS["mars"]
    network = lift(build_region(NamedGraph.of(NETWORKS[name](density)), arch), arch)
    engine = Engine(network, native.variants()[0])
    work = engine.work / SHARED_WORK
    engine.work = 2**40  # so that threads share it whatever its work is
    image = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)

    def run(threads: int) -> None:
        engine.run([image], lambda part, codes: None, threads)

    times: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(-1, turns):
        for threads, found in times.items():
            taken = seconds(lambda threads=threads: run(threads), CALLS)
            found += taken if turn >= 0 else []  # the first one compiles
    return f"| {name} | {density:.0%} | {work:.1f} | {shown(times[1])} | {shown(times[2])} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--turns", type=int, default=40)
    arguments = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, load {load:.1f}, "
        f"kernels {native.variants()[0]}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "llvmlite"))
    )
    print("us: least / median / 90th percentile\n")
    with ThreadPoolExecutor(1) as pool:
        print(f"to wake a thread: {shown(seconds(lambda: pool.submit(int).result(), 2000))}\n")
    print("| network | density | work / SHARED_WORK | 1 thread | 2 threads |")
    print("|---|---:|---:|---|---|")
    for name in arguments.networks:
        for density in arguments.densities:
            print(measure(name, density, arguments.turns), flush=True)


if __name__ == "__main__":
    main()
