"""Tuned schedules beside the default and a lower bound; search strategies beside each other.

All cycles are those of the timed machine. Run ``python benchmarks/tuning.py`` for VGG16,
ResNet-18 and the zoo's networks on every overlap; ``--sweep`` for the assumed
``macro_write_bits``; ``--compare`` for the strategies at equal trials and at equal time;
``--exhaustive`` for the search beside all of the schedules of single layers; ``--borders`` for
what taps in the padding cost; ``--places`` for what a better choice of banks and of fused pools
alone would gain.

The bound is that of ``tvm_mars.tuner.bound``, where it is derived.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, MarsArch, simulate
from mars_runtime.quantize import Dequantize, Quantize
from tvm_mars.codegen import generate, time_schedule
from tvm_mars.graph import Conv, Graph, Input, Output
from tvm_mars.networks import resnet18, vgg16
from tvm_mars.paper import TABLE_I
from tvm_mars.schedule import (
    Point,
    Schedule,
    ScheduleError,
    Step,
    fuse_pools,
    least_macro_cycles,
)
from tvm_mars.tuner.bound import least_cycles
from tvm_mars.tuner.database import Database, workload_key
from tvm_mars.tuner.runners import measure
from tvm_mars.tuner.search import SearchOptions, search
from tvm_mars.tuner.space import Space, replaced
from tvm_mars.tuner.starts import bordered, starts, swapped_banks
from tvm_mars.tuner.strategies import grid_points, make_strategy
from tvm_mars.zoo.entries import load, names

PAPER_FPS = {
    (row.workload.network.lower(), row.workload.activation_bits): row.fps
    for row in TABLE_I
    if row.workload.data == "CIFAR-10"
}
# Table II: the share of group-sets left in ResNet-18 on CIFAR-10 at w8a8 and w8a4 is 5 %.
NETWORKS: dict[str, Callable[[int], Graph]] = {
    "vgg16": lambda bits: vgg16(activation_bits=bits),
    "resnet18": lambda bits: resnet18(0.05, activation_bits=bits),
}
OVERLAPS = ("none", "prefetch", "full")


def networks(made: Iterable[str], zoo: Iterable[str]) -> Iterator[tuple[str, Graph, int | None]]:
    """Yield networks made here, at both widths, and of the zoo, with their paper's FPS."""
    for name in made:
        for bits in (8, 4):
            yield f"{name} w8a{bits}", NETWORKS[name](bits), PAPER_FPS[name, bits]
    for name in zoo:
        yield name, load(name), None


def bound(space: Space) -> int:
    """Give cycles that no schedule beats."""
    return least_cycles(space.graph, space.arch, space.packed)


def fps(cycles: float, arch: MarsArch) -> float:
    """Images per second at a latency in core cycles."""
    return arch.core_clock_mhz * 1e6 / cycles


def tuned(space: Space, trials: int, seed: int = 0) -> int:
    """Give the cycles of the best schedule of a search."""
    options = SearchOptions(trials=trials, batch=16, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        return search(space, Database(directory), options).cycles


def table_of(
    console: Console,
    title: str,
    rows: Sequence[tuple[str, Graph, int | None, MarsArch]],
    trials: int,
) -> None:
    """Print untuned, tuned and bound for networks and machines, beside the paper's FPS if any."""
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
        left = name in ("network", "machine")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for name, graph, paper, arch in rows:
        space = Space.of(graph, arch)
        before, after, least = space.time(space.default).cycles, tuned(space, trials), bound(space)
        print(name, arch.name, before, after, least, file=sys.stderr, flush=True)
        table.add_row(
            name,
            arch.name,
            f"{before:,}",
            f"{after:,}",
            f"{before / after:.3f}",
            f"{least:,}",
            f"{least / after:.1%}",
            f"{fps(after, arch):.0f}",
            f"{paper} ({fps(after, arch) / paper:.2f}x)" if paper else "",
        )
    console.print(table)


def borders(console: Console) -> None:
    """Print what is saved by passing over padding: macro cycles, and the default's latency."""
    table = Table(title="the counted layers, macro cycles over the cores", box=None)
    for name in ("layer", "all taps", "what meets the map", "saved", "pools fused", "saved"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    space = Space.of(vgg16(), PRESETS["mars"])
    total = np.zeros(3)
    for step in fuse_pools(space.graph)[1:]:
        layer = step.layer
        if not isinstance(layer, Conv) or layer.terms[0].kernel == (1, 1):
            continue
        held, types = space.packed[layer.name], space.graph.types
        out = types[layer.name]
        accesses = space.arch.accesses(types[layer.terms[0].input].bits)
        found = [held.group_sets * out.height * out.width * accesses] + [
            int(least_macro_cycles(space.arch, one, held, types).sum())
            for one in (Step(layer), step)
        ]
        total += found
        table.add_row(layer.name, *_saved(np.array(found) / space.arch.cores))
    table.add_row("all", *_saved(total / space.arch.cores))
    console.print(table)
    for network, make in NETWORKS.items():
        for bits in (8, 4):
            space = Space.of(make(bits), PRESETS["mars"])
            cut = space.time(bordered(space, space.default, pools=False)).cycles
            whole = space.time(space.default).cycles
            console.print(f"{network} w8a{bits}: {whole:,} by default, {cut:,} with borders cut")


def _saved(cycles: Sequence[float]) -> tuple[str, ...]:
    every, met, fused = cycles
    return (
        f"{every:,.0f}",
        f"{met:,.0f}",
        f"{1 - met / every:.1%}",
        f"{fused:,.0f}",
        f"{1 - fused / every:.1%}",
    )


COMPARED = (
    ("evolution", "xgb"),
    ("evolution", "none"),
    ("annealing", "none"),
    ("random", "none"),
    ("grid", "none"),
)


def course(space: Space, options: SearchOptions) -> list[tuple[float, int]]:
    """Give after each trial of a search the seconds of CPU so far, and the best cycles."""
    start = time.process_time()
    found: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as directory:
        search(
            space,
            Database(directory),
            options,
            on_trial=lambda _, best: found.append((time.process_time() - start, best.cycles)),
        )
    return found


def compare(console: Console, graph: Graph, trials: Sequence[int], seeds: int) -> None:
    """Print the strategies at equal trials, and in the time of plain evolution, fitting included.

    The space keeps what its points share, so that it is made anew for every search.
    """
    arch = attrs.evolve(PRESETS["mars"], name="full", overlap="full")
    table = Table(title=f"full overlap: median (worst) cycles of {seeds} seeds", box=None)
    for name in ("strategy", "trials", "cycles", "seconds", "cycles in plain evolution's time"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for count in trials:
        courses = {
            kind: [
                course(
                    Space.of(graph, arch),
                    SearchOptions(
                        trials=count, batch=16, strategy=kind[0], cost_model=kind[1], seed=seed
                    ),
                )
                for seed in range(seeds if kind[0] != "grid" else 1)
            ]
            for kind in COMPARED
        }
        budget = statistics.median(one[-1][0] for one in courses["evolution", "none"])
        for (strategy, model), runs in courses.items():
            ends = [one[-1][1] for one in runs]
            within = [min(c for at, c in one if at <= max(budget, one[0][0])) for one in runs]
            table.add_row(
                f"{strategy}, {model}" if strategy == "evolution" else strategy,
                str(count),
                f"{statistics.median(ends):,.0f} ({max(ends):,})",
                f"{statistics.median(one[-1][0] for one in runs):.1f}",
                f"{statistics.median(within):,.0f}",
            )
            print(count, strategy, model, ends, file=sys.stderr, flush=True)
    console.print(table)


#: Points of the largest layers of which all schedules are timed.
ENUMERABLE = 2_500_000


def enumerable(arch: MarsArch) -> Iterator[tuple[str, Space]]:
    """Yield the zoo's convolutions that have few enough points, each as a network of its own.

    Those that are alike, and one that adds what another layer gives, are left out.
    """
    seen = set()
    for network in names():
        graph = load(network)
        for layer in graph.layers:
            if not isinstance(layer, Conv) or layer.residual or len(layer.terms) > 1:
                continue
            space = Space.of(layer_alone(graph, layer.name), arch)
            key = workload_key(space.graph, space.packed)
            points = math.prod(len(values) for values in space.domain(0).values())
            if points <= ENUMERABLE and key not in seen:
                seen.add(key)
                yield f"{network} {layer.name}", space


def every_schedule(space: Space) -> list[int]:
    """Give the cycles of all schedules of a network of one layer."""
    found: dict[Schedule, int] = {}
    layer, default = space.graph.layers[0], space.default.choices[0]
    assert isinstance(layer, Conv)
    for point in grid_points(space):
        with contextlib.suppress(ScheduleError):
            choice = point.choices[0]
            loads = space.loads(layer, choice)
            idle = OF_SEVERAL_LOADS if len(loads) == 1 else ()
            if not any(load.cut_cores for load in loads):
                idle += OF_CUT_BLOCKS
            if any(getattr(choice, name) != getattr(default, name) for name in idle):
                continue
            schedule = space.realize(point)
            if schedule not in found:
                found[schedule] = space.time(point).cycles
    return list(found.values())


#: What makes no difference to a network with one load, and to one without cut kernel blocks.
OF_SEVERAL_LOADS: tuple[str, ...] = ("order", "join", "fill_lead", "fetch_lead", "slots")
OF_CUT_BLOCKS = ("partial",)


def exhaustive(console: Console, trials: int, seeds: int) -> None:
    """Print what the search finds of single layers beside the best of all their schedules."""
    title = f"single layers: all schedules, and {trials} trials of {seeds} seeds"
    table = Table(title=title, box=None)
    for name in ("layer", "overlap", "schedules", "default", "optimum", "median", "worst", "x"):
        table.add_column(name, justify="left" if name in ("layer", "overlap") else "right")
    for overlap in ("none", "full"):
        for name, space in enumerable(attrs.evolve(PRESETS["mars"], overlap=overlap)):
            cycles = every_schedule(space)
            least = min(cycles)
            found = sorted(tuned(space, trials, seed) for seed in range(seeds))
            table.add_row(
                name,
                overlap,
                f"{len(cycles):,}",
                f"{space.time(space.default).cycles:,}",
                f"{least:,}",
                f"{statistics.median(found):,.0f}",
                f"{found[-1]:,}",
                f"{found[-1] / least:.4f}",
            )
            print(name, overlap, len(cycles), least, found, file=sys.stderr, flush=True)
    console.print(table)


def placed(space: Space, point: Point) -> tuple[int, int]:
    """Give the least cycles over banks and fused pools, and how many points were timed.

    Layer by layer, as long as it helps: the other bank for its map, or for all maps from there on;
    the pool fused or not, likewise; the map kept on chip or not.
    """
    least, tried, helps = space.time(point).cycles, 0, True
    while helps:
        helps = False
        for index in range(len(point.choices)):
            for other in list(_placed_otherwise(space, point, index)):
                tried += 1
                with contextlib.suppress(ScheduleError):
                    cycles = space.time(other).cycles
                    if cycles < least:
                        least, point, helps = cycles, other, True
    return least, tried


def _placed_otherwise(space: Space, point: Point, index: int) -> Iterator[Point]:
    swapped = swapped_banks(point, index)
    yield swapped
    open_ = space.decisions(point, index)
    for name in ("bank", "fused", "staged"):
        now = getattr(point.choices[index], name)
        for value in open_.get(name, ()):
            if value != now:
                yield replaced(point, index, **{name: value})
                if name != "bank":
                    yield replaced(swapped, index, **{name: value})


def best_start(space: Space) -> tuple[int, Point]:
    """Give the best of the points with which every search begins, behind its cycles."""
    costs = {point: space.time(point).cycles for point in starts(space)}
    best = min(costs, key=costs.__getitem__)
    return costs[best], best


def places(console: Console) -> None:
    """Print what banks and fused pools alone would gain over the best of the starting points."""
    table = Table(title="banks and fused pools, the rest as in the best starting point", box=None)
    for name in ("network", "overlap", "best start", "placed better", "points timed"):
        table.add_column(name, justify="left" if name in ("network", "overlap") else "right")
    for network, graph, _ in networks(NETWORKS, names()):
        for overlap in OVERLAPS:
            space = Space.of(graph, attrs.evolve(PRESETS["mars"], overlap=overlap))
            before, best = best_start(space)
            after, tried = placed(space, best)
            table.add_row(network, overlap, f"{before:,}", f"{after:,}", str(tried))
            print(network, overlap, before, after, tried, file=sys.stderr, flush=True)
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
    """Print how many random schedules of VGG16's layers one process times in a second of CPU."""
    graph = vgg16()
    table = Table(title="schedules timed in a second of CPU", box=None)
    for name in (
        "layer",
        "schedules",
        "instructions",
        "a second",
        "with realizing",
        "x of build and simulate",
    ):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in graph.layers:
        if not isinstance(layer, Conv):
            continue
        space = Space.of(layer_alone(graph, layer.name), PRESETS["mars"])
        points = proposed(space, 100)
        schedules = [space.realize(point) for point in points]
        rate = len(points) / seconds(timed, space, schedules)
        both = len(points) / seconds(realized, space, points)
        start = time.process_time()
        count = 0
        sample = schedules[:: max(1, len(schedules) // 20)]
        for schedule in sample:
            region = generate(
                space.graph,
                space.arch,
                space.packed,
                schedule,
                input_names=["x0"],
                output_names=["y0"],
                with_weights=False,
            )
            count += len(region.instructions)
            simulate(region, space.arch)
        whole = (time.process_time() - start) / len(sample)
        table.add_row(
            layer.name,
            str(len(schedules)),
            f"{count / len(sample):.0f}",
            f"{rate:,.0f}",
            f"{both:,.0f}",
            f"{whole * rate:.1f}",
        )
    console.print(table)
    for bits in (8, 4):
        space = Space.of(vgg16(activation_bits=bits), PRESETS["mars"])
        points = [space.default] * 5
        schedules = [space.realize(point) for point in points]
        alone = 1000 * seconds(timed, space, schedules) / len(points)
        both = 1000 * seconds(realized, space, points) / len(points)
        console.print(
            f"VGG16 w8a{bits}, default schedule: {alone:.1f} ms of CPU, {both:.1f} with realizing"
        )


def proposed(space: Space, count: int) -> list[Point]:
    """Give points that a search measures."""
    strategy = make_strategy("evolution", space, seed=0, trials=count, cost_model="none")
    found: list[Point] = []
    while len(found) < count:
        points = strategy.propose(16)
        if not points:
            break
        costs = [measure(space, point) for point in points]
        found += [point for point, cost in zip(points, costs, strict=True) if cost is not None]
        strategy.observe(points, [None if cost is None else cost.cycles for cost in costs])
    return found


def timed(space: Space, schedules: Sequence[Schedule]) -> None:
    """Time schedules."""
    for schedule in schedules:
        time_schedule(space.graph, space.arch, space.packed, schedule)


def realized(space: Space, points: Sequence[Point]) -> None:
    """Make the schedules of points, and time them: what a search does."""
    for point in points:
        space.time(point)


def seconds(
    run: Callable[[Space, Sequence[Any]], None], space: Space, given: Sequence[Any]
) -> float:
    """Give the CPU time of something: the better of two, warm."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        run(space, given)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="over macro_write_bits")
    parser.add_argument("--compare", action="store_true", help="strategies")
    parser.add_argument("--network", default="digits", help="of the zoo, for --compare")
    parser.add_argument("--borders", action="store_true", help="taps in the padding")
    parser.add_argument("--places", action="store_true", help="banks and fused pools")
    parser.add_argument("--exhaustive", action="store_true", help="the zoo's layers alone")
    parser.add_argument("--speed", action="store_true", help="of the fast timeline")
    options = parser.parse_args()
    console = Console()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    console.print(f"{versions}; simulated cycles, {options.trials} trials\n")
    mars = PRESETS["mars"]
    if options.speed:
        speed(console)
        return
    if options.borders:
        borders(console)
        return
    if options.places:
        places(console)
        return
    if options.exhaustive:
        exhaustive(console, options.trials, options.seeds)
        return
    if options.compare:
        graph = load(options.network)
        counts = [count for count in (64, 256, 1024) if count <= options.trials]
        console.print(f"zoo network {options.network}")
        compare(console, graph, counts, options.seeds)
        return
    machines = [attrs.evolve(mars, name=overlap, overlap=overlap) for overlap in OVERLAPS]
    if options.sweep:
        machines = [
            attrs.evolve(one, name=f"{one.overlap}, {bits} bit", macro_write_bits=bits)
            for bits in (32, 64, 128)
            for one in machines
        ]
    shown = networks(("vgg16",), ()) if options.sweep else networks(NETWORKS, names())
    rows = [(*entry, arch) for entry in shown for arch in machines]
    table_of(console, "tuning", rows, options.trials)


if __name__ == "__main__":
    main()
