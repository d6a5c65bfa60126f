"""VGG16 on 32x32 at the paper's Table IV densities: cycles by layer, and FPS beside the paper's.

The compute bounds are derived here from the packed group-sets; the other figures come from
executing the compiled program on the timed machine. Run: ``python benchmarks/vgg16.py``.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import attrs
import numpy as np
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, MarsArch, Timeline, simulate
from tvm_mars.compiler import NamedGraph, build_region, pack
from tvm_mars.graph import Conv, Graph
from tvm_mars.networks import TABLE_IV, vgg16
from tvm_mars.paper import TABLE_I

PAPER_FPS = {
    row.workload.activation_bits: row.fps
    for row in TABLE_I
    if (row.workload.network, row.workload.data) == ("VGG16", "CIFAR-10")
}


@attrs.frozen
class Bound:
    """Cycles of a counted layer that no schedule without overlap can beat.

    ``fractional`` and ``whole`` are compute: at fractional counts of group-sets and perfect
    balance, and with whole group-sets on the busiest core. ``load`` is the slower hop of the
    fractional weights plus the fixed cost of each filling of the chip's arrays.
    """

    fractional: float
    whole: int
    load: float


def counted(graph: Graph) -> Iterator[Conv]:
    """The layers that Table I counts: 3x3 convolutions with 64 or more inputs."""
    for layer in graph.layers:
        if not isinstance(layer, Conv):
            continue
        term = layer.terms[0]
        if term.kernel == (3, 3) and term.weight.shape[1] >= 64:
            yield layer


def bounds(graph: Graph, arch: MarsArch) -> dict[str, Bound]:
    """Compute-only bounds of the counted layers, from their group-sets."""
    packed = pack(graph, arch)
    found = {}
    for layer in counted(graph):
        out, term = graph.types[layer.name], layer.terms[0]
        pixels = out.height * out.width
        accesses = arch.accesses(graph.types[term.input].bits)
        dense = packed[layer.name].dense_group_sets
        fractional = dense * TABLE_IV[term.weight.shape[1], term.weight.shape[0]]
        whole = -(-packed[layer.name].group_sets // arch.cores)
        fills = -(-packed[layer.name].group_sets // (arch.cores * arch.group_sets_per_core))
        bits = fractional * arch.group_set_weights * 8
        hops = max(bits / arch.offchip_bits_per_cycle, bits / arch.cores / arch.macro_write_bits)
        found[layer.name] = Bound(
            fractional * pixels * accesses / arch.cores,
            whole * pixels * accesses,
            hops + fills * arch.array_fill_cycles,
        )
    return found


def fps(cycles: float, arch: MarsArch) -> float:
    """Images per second at a latency in core cycles."""
    return arch.core_clock_mhz * 1e6 / cycles


def report(console: Console, bits: int, arch: MarsArch, dense: MarsArch) -> None:
    """Print one network on one machine."""
    graph = vgg16(activation_bits=bits)
    region = build_region(NamedGraph.of(graph), arch)
    time = simulate(region, arch)
    base = dense_time(graph, dense)
    limits = bounds(graph, arch)
    table = Table(title=f"VGG16 32x32 w8a{bits} on {arch.name}: cycles", box=None)
    for name in ("layer", "group-sets", "compute", "whole", "machine", "weights", "dense", "x"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for info, layer, reference in zip(region.layers, time.layers, base.layers, strict=True):
        bound = limits.get(info.name.split("+")[0])
        table.add_row(
            info.name,
            f"{info.group_sets}/{info.dense_group_sets}",
            f"{bound.fractional:,.0f}" if bound else "",
            f"{bound.whole:,}" if bound else "",
            f"{layer.cycles:,}",
            f"{layer.stalls['weights'] // arch.cores:,}",
            f"{reference.cycles:,}",
            f"{reference.cycles / layer.cycles:.1f}",
        )
    console.print(table)
    inner = [
        layer.cycles
        for info, layer in zip(region.layers, time.layers, strict=True)
        if info.name.split("+")[0] in limits
    ]
    with_stem, without_stem = fps(time.cycles, arch), fps(sum(inner), arch)
    limit = fps(sum(bound.fractional + bound.load for bound in limits.values()), arch)
    lines = (
        f"twelve layers, compute only: {sum(b.fractional for b in limits.values()):,.0f} in closed "
        f"form, {sum(b.whole for b in limits.values()):,} with whole group-sets",
        f"twelve layers on the machine: {sum(inner):,}; whole network: {time.cycles:,}",
        f"FPS: {with_stem:.0f} whole network, {without_stem:.0f} the twelve layers alone "
        f"(closed form with loads: {limit:.0f}), paper {PAPER_FPS[bits]}",
        f"dense baseline: {base.cycles:,} cycles, {base.cycles / time.cycles:.1f}x "
        "(paper: up to 13x)",
    )
    console.print(*lines, "", sep="\n")


def dense_time(graph: Graph, dense: MarsArch) -> Timeline:
    """Timeline of the network on the machine without zero skipping."""
    return simulate(build_region(NamedGraph.of(graph), dense, with_weights=False), dense)


def main() -> None:
    """Print every width and preset."""
    console = Console()
    console.print(f"Python {platform.python_version()}, numpy {np.__version__}; simulated cycles\n")
    for bits in (8, 4):
        for name in ("mars", "mars-80b"):
            arch = PRESETS[name]
            report(console, bits, arch, attrs.evolve(arch, zero_skipping=False))
    console.print(
        "compute: group-sets at Table IV's fractional counts, perfect balance; whole: whole",
        "group-sets on the busiest of four cores; machine: measured on the timed machine;",
        "weights: of that, cycles in which the average core waits for weights (assumed hops and",
        "fixed array fill, fitted to Table I). The rest is uneven kernel blocks, pipeline drain,",
        "and the image and logits travelling in and out.",
        sep="\n",
    )


if __name__ == "__main__":
    main()
