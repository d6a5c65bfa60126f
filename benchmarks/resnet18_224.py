"""ResNet-18 at 224x224 with random weights, 90 % zero group-sets: tiled, spilled, and still exact.

Rows that the windows of tiles share stay in the banks; beside it, by layer, what the same schedule
takes where they are moved in again. Run: ``python benchmarks/resnet18_224.py``, or with
``--network resnet50``.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import attrs
import numpy as np
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, Machine, energy_of
from mars_runtime.timeline import Counters
from tvm_mars.codegen import time_schedule
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import evaluate_values
from tvm_mars.networks import resnet18, resnet50
from tvm_mars.schedule import plan

NETWORKS = {
    "resnet18": ("ResNet-18", lambda: resnet18(0.1, size=224)),
    "resnet50": ("ResNet-50", lambda: resnet50(0.1)),
}


def main() -> None:
    """Compile, run one image, compare with the reference, say what it costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    title, network = NETWORKS[parser.parse_args().network]
    console = Console()
    arch = PRESETS["mars"]
    graph = network()
    start = time.perf_counter()
    packed = pack(graph, arch)
    schedule = plan(graph, arch, packed)
    region = build_region(NamedGraph.of(graph), arch)
    compiled = time.perf_counter() - start
    codes = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
    machine = Machine(region, arch, images=1)
    machine.write_input(0, codes)
    start = time.perf_counter()
    timeline = machine.run()
    ran = time.perf_counter() - start
    expected = evaluate_values(graph, {"x0": codes})[graph.outputs[0].value]
    different = int((machine.read_output(0) != expected).sum())

    reloading = tuple(attrs.evolve(entry, halo="reload") for entry in schedule.layers)
    again = time_schedule(graph, arch, packed, attrs.evolve(schedule, layers=reloading))
    table = Table(title=f"{title}, 224x224, w8a8, 90 % zero group-sets, on mars", box=None)
    for name in ("layer", "tile", "cycles", "wait weights", "wait maps", "off-chip Kbit"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name in ("reloaded: cycles", "Kbit"):
        table.add_column(name, justify="right")
    total, total_again = Counters(), Counters()
    for entry, layer, other in zip(schedule.layers, timeline.layers, again.layers, strict=True):
        total.add(layer.counters)
        total_again.add(other.counters)
        kept = entry.halo == "keep"
        table.add_row(
            layer.name,
            f"{entry.tile[0]}x{entry.tile[1]}",
            f"{layer.cycles:,}",
            f"{layer.stalls['weights'] // arch.cores:,}",
            f"{layer.stalls['maps'] // arch.cores:,}",
            f"{layer.counters.offchip_bits / 1000:,.0f}",
            f"{other.cycles:,}" if kept else "",
            f"{other.counters.offchip_bits / 1000:,.0f}" if kept else "",
        )
    console.print(table)
    energy = energy_of(total, arch)
    lines = (
        f"values that live off-chip: {', '.join(schedule.spills)}",
        f"{timeline.cycles:,} cycles, {arch.core_clock_mhz * 1e6 / timeline.cycles:.1f} FPS; "
        f"{energy.total / 1e9:.2f} mJ per image ({energy.assumed_share:.0%} of it on assumed "
        "figures)",
        f"with shared rows moved in again: {again.cycles:,} cycles; off-chip "
        f"{total.offchip_bits / 1e6:.2f} instead of {total_again.offchip_bits / 1e6:.2f} Mbit",
        f"{len(region.instructions):,} instructions, {region.image_bytes:,} bytes of weights and "
        "tables",
        f"differing accumulators against the reference: {different} of {expected.size}",
        f"compiled (schedule twice) in {compiled:.2f} s, one image simulated in {ran:.2f} s, peak "
        f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB "
        f"(Python {platform.python_version()}, numpy {np.__version__})",
    )
    console.print(*lines, sep="\n")
    raise SystemExit(different != 0)


if __name__ == "__main__":
    main()
