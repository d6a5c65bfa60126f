"""ResNet-18 at 224x224 with random weights, 90 % zero group-sets: tiled, spilled, and still exact.

Run: ``python benchmarks/resnet18_224.py``.
"""

from __future__ import annotations

import platform
import resource
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, Machine, energy_of
from mars_runtime.timeline import Counters
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import evaluate_values
from tvm_mars.networks import resnet18
from tvm_mars.schedule import plan


def main() -> None:
    """Compile, run one image, compare with the reference, say what it costs."""
    console = Console()
    arch = PRESETS["mars"]
    graph = resnet18(0.1, size=224)
    start = time.perf_counter()
    schedule = plan(graph, arch, pack(graph, arch))
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

    table = Table(title="ResNet-18, 224x224, w8a8, 90 % zero group-sets, on mars", box=None)
    for name in ("layer", "tile", "cycles", "wait weights", "wait maps", "off-chip Kbit"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    total = Counters()
    for entry, layer in zip(schedule.layers, timeline.layers, strict=True):
        total.add(layer.counters)
        table.add_row(
            layer.name,
            f"{entry.tile[0]}x{entry.tile[1]}",
            f"{layer.cycles:,}",
            f"{layer.stalls['weights'] // arch.cores:,}",
            f"{layer.stalls['maps'] // arch.cores:,}",
            f"{layer.counters.offchip_bits / 1000:,.0f}",
        )
    console.print(table)
    energy = energy_of(total, arch)
    lines = (
        f"values that live off-chip: {', '.join(schedule.spills)}",
        f"{timeline.cycles:,} cycles, {arch.core_clock_mhz * 1e6 / timeline.cycles:.1f} FPS; "
        f"{energy.total / 1e9:.2f} mJ per image ({energy.assumed_share:.0%} of it on assumed "
        "figures)",
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
