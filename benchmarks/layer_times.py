"""Where the exact engine's time goes: each step of a plan for one image alone, in processor caches.

A step is repeated many times in one call; the least of many calls is what an idle processor gives.
Dot products are those of 16 outputs with 4 inputs in the stored group-sets, at every pixel: where a
layer does more of them per nanosecond than the processor can, zeros were left out, be it the
border's or those of channels that are absent, as in the stem.

Run: ``python benchmarks/layer_times.py --network resnet18 --density 0.05`` (seconds).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mars_runtime import PRESETS, native
from mars_runtime.engine import _Runner
from mars_runtime.lift import lift
from mars_runtime.plan import Plan, dot_products
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.networks import mobilenet_v1, resnet18, resnet20, vgg16

NETWORKS = {network.__name__: network for network in (vgg16, resnet18, resnet20, mobilenet_v1)}
REPEATS = 20  # of a step in a call
CALLS = 100


def least_seconds(runner: _Runner, steps: np.ndarray, repeats: int) -> float:
    """Time steps that are called one after the other, per ``repeats``."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        runner.plan.library.run(steps.ctypes.data, len(steps), 0, 1, runner.addresses[1])
        found.append((time.perf_counter() - start) / repeats)
    return min(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--density", type=float, default=0.05)
    arguments = parser.parse_args()
    arch = PRESETS["mars"]
    graph = NETWORKS[arguments.network](arguments.density)
    network = lift(build_region(NamedGraph.of(graph), arch), arch)
    runner = _Runner(Plan(network, native.variants()[0], 1, 1))
    images = [np.random.default_rng(0).random((1, *i.shape), np.float32) for i in graph.inputs]
    runner.point_to(images)
    print(f"{arguments.network}, {arguments.density:.0%}, kernels {native.variants()[0]}\n")
    print("| step | map | dot products | us | dot products / ns |")
    print("|---|---|---:|---:|---:|")
    entries = len(runner.steps) - len(network.layers)
    total = 0.0
    for number, step in enumerate(runner.steps):
        seconds = least_seconds(runner, np.repeat(step[None], REPEATS, axis=0), REPEATS)
        total += seconds
        if number < entries:
            print(f"| entry | | | {1e6 * seconds:.2f} | |")
            continue
        layer = network.layers[number - entries]
        out = network.maps[layer.out]
        products = dot_products(layer, out)
        rate = f"{products / seconds / 1e9:.2f}" if products else ""
        print(
            f"| {type(layer).__name__} | {16 * out.blocks}x{out.height}x{out.width} "
            f"| {products:,} | {1e6 * seconds:.2f} | {rate} |"
        )
    whole = least_seconds(runner, runner.steps, 1)
    print(f"\nall steps, each alone: {1e6 * total:.0f} us; in order: {1e6 * whole:.0f} us")


if __name__ == "__main__":
    main()
