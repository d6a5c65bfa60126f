"""Tuned schedules beside the default and a lower bound; search strategies beside each other.

All cycles are those of the timed machine. Run ``python benchmarks/tuning.py`` for VGG16 and
ResNet-18 on every overlap; ``--sweep`` for the assumed ``macro_write_bits``; ``--compare`` for the
strategies at equal trials and at equal time.

**The bound** holds for every schedule in which a layer starts when the maps that it reads are
complete, which is how programs are made. Let S be the group-sets of the network, each filled at
least once.

*Without overlap, or with prefetch,* a core computes or is filled, never both: four times the
latency is at least all macro cycles, plus all fill cycles, plus the opening of arrays. A core's
array is full after as many group-sets as it holds, and has to be used before it is opened again, so
that ``ceil(S / slots)`` openings are needed in all.

*With full overlap* a core may be filled while it computes, but never hold more than its slots. Let
t(i) be when every layer before i is done. Between t(i) and t(j) the layers i to j-1 compute; and of
their group-sets all but the ``4 x slots`` that the chip can hold at t(i) are filled, in arrays of
which one may have been open already. Both divided by the cores are lower bounds of t(j) - t(i); the
longest path through them is one of the latency. The first layer waits for an opened array.

In both cases every bit fetched, and every map that enters or leaves the chip, holds the off-chip
port for its time; the bound is the larger. It is not always reachable: kernel blocks do not divide
evenly, and drains, tables and the first and last map are left out of the cores' part.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import attrs
import numpy as np
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, MarsArch, isa, simulate
from mars_runtime.packing import group_set_bytes
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.timing import WORD_BITS, fill_cycles, offchip_cycles
from tvm_mars.codegen import generate, time_schedule
from tvm_mars.graph import Conv, Graph, Input, Output
from tvm_mars.networks import resnet18, vgg16
from tvm_mars.tuner.database import Database
from tvm_mars.tuner.search import SearchOptions, search
from tvm_mars.tuner.space import Space
from tvm_mars.tuner.strategies import make_strategy
from tvm_mars.zoo import load_digits

PAPER_FPS = {("vgg16", 8): 540, ("vgg16", 4): 714, ("resnet18", 8): 403, ("resnet18", 4): 711}
# Table II: the share of group-sets left in ResNet-18 on CIFAR-10 at w8a8 and w8a4 is 5 %.
NETWORKS: dict[str, Callable[[int], Graph]] = {
    "vgg16": lambda bits: vgg16(activation_bits=bits),
    "resnet18": lambda bits: resnet18(0.05, activation_bits=bits),
}
OVERLAPS = ("none", "prefetch", "full")


def bound(space: Space) -> int:
    """Give cycles that no schedule beats, as derived above."""
    arch, layers = space.arch, _work(space)
    stored = sum(group_sets for group_sets, _, _ in layers)
    fills = sum(fill for _, fill, _ in layers)
    computes = sum(compute for _, _, compute in layers)
    slots = arch.slots(8)
    if arch.overlap == "full":
        cores = _longest_path(arch, layers, slots)
    else:
        openings = -(-stored // slots) * arch.array_fill_cycles
        cores = -(-(computes + fills + openings) // arch.cores)
    return max(cores, _port(space))


def _work(space: Space) -> list[tuple[int, int, int]]:
    """Give each convolution's group-sets, and their cycles of filling and of the macros."""
    found = []
    for layer in space.graph.layers:
        if not isinstance(layer, Conv):
            continue
        packed, out = space.packed[layer.name], space.graph.types[layer.name]
        accesses = [space.arch.accesses(space.graph.types[term.input].bits) for term in layer.terms]
        macros = sum(int(np.take(accesses, block.terms).sum()) for block in packed.blocks)
        fill = fill_cycles(space.arch, isa.Fill(count=1, weight_bits=packed.weight_bits == 8))
        found.append((packed.group_sets, packed.group_sets * fill, macros * out.height * out.width))
    return found


def _longest_path(arch: MarsArch, layers: Sequence[tuple[int, int, int]], slots: int) -> int:
    done = [0]
    for stop in range(1, len(layers) + 1):
        latest = done[-1] + layers[stop - 1][2] / arch.cores
        if stop == 1:
            latest += arch.array_fill_cycles
        for first in range(stop):
            group_sets = sum(one[0] for one in layers[first:stop])
            fill = sum(one[1] for one in layers[first:stop])
            held = arch.cores * slots if first else 0
            fresh = group_sets - held
            if fresh <= 0:
                continue
            openings = -(-fresh // slots) - (arch.cores if first else 0)
            cycles = fill * fresh / group_sets + max(0, openings) * arch.array_fill_cycles
            latest = max(latest, done[first] + cycles / arch.cores)
        done.append(int(latest))
    return done[-1]


def _port(space: Space) -> int:
    graph = space.graph
    bits = sum(
        8 * packed.group_sets * (group_set_bytes(packed.weight_bits) + isa.CODE_BYTES)
        for packed in space.packed.values()
    )
    ends = [entry.name for entry in graph.inputs] + [out.value for out in graph.outputs]
    words = sum(graph.types[name].words for name in ends)
    return offchip_cycles(space.arch, bits + words * WORD_BITS)


def fps(cycles: float, arch: MarsArch) -> float:
    """Images per second at a latency in core cycles."""
    return arch.core_clock_mhz * 1e6 / cycles


def tuned(space: Space, trials: int, seed: int = 0) -> int:
    """Give the cycles of the best schedule of a search."""
    options = SearchOptions(trials=trials, batch=16, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        return search(space, Database(directory), options).cycles


def table_of(
    console: Console, title: str, rows: Sequence[tuple[str, int, MarsArch]], trials: int
) -> None:
    """Print untuned, tuned and bound for networks and machines."""
    table = Table(title=title, box=None)
    for name in (
        "network",
        "machine",
        "untuned",
        "tuned",
        "x",
        "bound",
        "of bound",
        "FPS",
        "paper",
    ):
        table.add_column(name, justify="left" if name in ("network", "machine") else "right")
    for network, bits, arch in rows:
        space = Space.of(NETWORKS[network](bits), arch)
        before, after, least = space.time(space.default).cycles, tuned(space, trials), bound(space)
        paper = PAPER_FPS[network, bits]
        print(network, bits, arch.name, before, after, least, file=sys.stderr, flush=True)
        table.add_row(
            f"{network} w8a{bits}",
            arch.name,
            f"{before:,}",
            f"{after:,}",
            f"{before / after:.3f}",
            f"{least:,}",
            f"{least / after:.1%}",
            f"{fps(after, arch):.0f}",
            f"{paper} ({fps(after, arch) / paper:.2f}x)",
        )
    console.print(table)


def compare(console: Console, graph: Graph, trials: Sequence[int], seeds: int) -> None:
    """Print the strategies at equal trials, with the time that each took, fitting included."""
    arch = attrs.evolve(PRESETS["mars"], name="full", overlap="full")
    space = Space.of(graph, arch)
    table = Table(title=f"full overlap: median cycles of {seeds} seeds", box=None)
    table.add_column("strategy")
    for count in trials:
        table.add_column(f"{count} trials", justify="right")
    table.add_column("seconds", justify="right")
    for strategy, model in (
        ("evolution", "xgb"),
        ("evolution", "none"),
        ("annealing", "none"),
        ("random", "none"),
        ("grid", "none"),
    ):
        best: dict[int, list[int]] = {count: [] for count in trials}
        start = time.process_time()
        for seed in range(seeds if strategy != "grid" else 1):
            options = SearchOptions(
                trials=max(trials), batch=16, strategy=strategy, cost_model=model, seed=seed
            )
            with tempfile.TemporaryDirectory() as directory:
                database = Database(directory)
                search(space, database, options)
            for count in trials:
                best[count].append(min(one.cycles for one in database.records[:count]))
        seconds = (time.process_time() - start) / len(best[trials[0]])
        table.add_row(
            f"{strategy}, {model}" if strategy == "evolution" else strategy,
            *(f"{statistics.median(best[count]):,.0f}" for count in trials),
            f"{seconds:.1f}",
        )
    console.print(table)


def layer_alone(graph: Graph, name: str) -> Graph:
    """Give a network of one of a graph's convolutions."""
    layer = next(one for one in graph.layers if one.name == name)
    assert isinstance(layer, Conv)
    kind, out = graph.types[layer.terms[0].input], graph.types[name]
    return Graph(
        [Input("x0", kind, kind.shape, Quantize("uint8"))],
        [attrs.evolve(layer, name="conv0", terms=[attrs.evolve(layer.terms[0], input="x0")])],
        [Output("conv0", out.shape, Dequantize("uint8"))],
    )


def speed(console: Console) -> None:
    """Print how many random schedules of a VGG16 layer one process times in a second of CPU."""
    for name in ("conv1", "conv4", "conv7", "conv11"):
        space = Space.of(layer_alone(vgg16(), name), PRESETS["mars"])
        strategy = make_strategy("random", space, seed=0, trials=1)
        points = [point for point in strategy.propose(400) if space.legal(point) is None]
        schedules = [space.realize(point) for point in points]
        start = time.process_time()
        for schedule in schedules:
            time_schedule(space.graph, space.arch, space.packed, schedule)
        seconds = time.process_time() - start
        start = time.process_time()
        for schedule in schedules[:20]:
            region = generate(
                space.graph,
                space.arch,
                space.packed,
                schedule,
                input_names=["x0"],
                output_names=["y0"],
                with_weights=False,
            )
            simulate(region, space.arch)
        whole = (time.process_time() - start) / len(schedules[:20])
        rate = len(schedules) / seconds
        console.print(
            f"{name}: {rate:,.0f} schedules a second of CPU, {whole * rate:.1f}x of building and "
            f"simulating the program ({len(schedules)} distinct schedules)"
        )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="over macro_write_bits")
    parser.add_argument("--compare", action="store_true", help="strategies")
    parser.add_argument("--digits", action="store_true", help="compare on the zoo's digits network")
    parser.add_argument("--speed", action="store_true", help="of the fast timeline")
    options = parser.parse_args()
    console = Console()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    console.print(f"{versions}; simulated cycles, {options.trials} trials\n")
    mars = PRESETS["mars"]
    if options.speed:
        speed(console)
        return
    if options.compare:
        graph = load_digits() if options.digits else NETWORKS["vgg16"](4)
        counts = [count for count in (64, 256, 1024) if count <= options.trials]
        compare(console, graph, counts, options.seeds)
        return
    machines = [
        attrs.evolve(mars, name=f"mars, {overlap}", overlap=overlap) for overlap in OVERLAPS
    ]
    if options.sweep:
        machines = [
            attrs.evolve(one, name=f"{one.overlap}, {bits} bit", macro_write_bits=bits)
            for bits in (32, 64, 128)
            for one in machines
        ]
    networks = ("vgg16",) if options.sweep else tuple(NETWORKS)
    rows = [(name, bits, arch) for name in networks for bits in (8, 4) for arch in machines]
    table_of(console, "tuning", rows, options.trials)


if __name__ == "__main__":
    main()
