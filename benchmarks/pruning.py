"""What pruning costs: group width (the paper's Fig. 12), and cost-aware against plain group lasso.

Trains the small network ``plain`` for CIFAR-10, once dense and then quantized (w8a8) and pruned
with each of the variants; everything else is the recipe ``plain-w8a8``. Runs that are finished are
read, those that were interrupted continue. Writes the figures that ``mars reproduce fig12`` shows.
Run (an hour or two on two cores):
``python benchmarks/pruning.py --data cifar-10-binary.tar.gz --runs runs``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from mars_runtime import PRESETS, simulate
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.qat import Recipe, Trainer, load_data, load_recipe, to_graph
from tvm_mars.qat.data import Images
from tvm_mars.report import compression
from tvm_mars.report.pruning_study import FILE, PruningStudy, Trial, write_study

DENSE, BASE = "plain-dense", "plain-w8a8"
CHANNELS = (1, 4, 8, 16, 32)  # N of eq. 4
FIG_12 = 0.75  # share of blocks that are pruned, whatever N
SHARES = (0.5, 0.75)
COSTS = ("none", "cycles")
MARS = PRESETS["mars"]


def variant(changes: Mapping[str, str]) -> Recipe:
    """Give the base recipe with changes, under a name that tells them."""
    name = "-".join([BASE, *(f"{key.rpartition('.')[2]}{text}" for key, text in changes.items())])
    return load_recipe(BASE, {"name": name, **changes})


def trained(recipe: Recipe, data: tuple[Images, Images], runs: Path, threads: int) -> Trainer:
    """Train a recipe to its end, or read the finished run."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(recipe.name, total=None)
        trainer = Trainer(
            recipe,
            *data,
            runs,
            threads=threads,
            progress=lambda step, steps, *_: bar.update(task, completed=step, total=steps),
        )
        trainer.run()
    if not trainer.finished:
        raise SystemExit("interrupted; run it again to continue")
    return trainer


def measure(trainer: Trainer) -> Trial:
    """Say what a trained network reached, and what it costs on MARS."""
    plan = trainer.recipe.pruning
    assert plan is not None
    graph = to_graph(trainer.evaluated().eval(), trainer.images.shape)
    last = trainer.history[-1]
    pruned = compression(graph).layers[1:-1]
    zero = 1 - sum(x.group_sets for x in pruned) / sum(x.dense_group_sets for x in pruned)
    cycles = simulate(build_region(NamedGraph.of(graph), MARS), MARS).cycles
    return Trial(
        channels=plan.channels,
        cost=plan.cost,
        asked=plan.sparsity,
        pruned=last["zero group-sets"],
        accuracy=last["test accuracy"],
        zero=zero,
        cycles=cycles,
    )


def main() -> None:
    """Train what is missing, print the two tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10: binary archive, or .npz")
    parser.add_argument("--data-name", default="CIFAR-10", help="what to call it in the figures")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="figures to write")
    options = parser.parse_args()
    data = load_data(options.data)
    dense = trained(load_recipe(DENSE), data, options.runs, options.threads)

    def trial(channels: int, share: float, cost: str = "none") -> Trial:
        given = {"channels": channels, "sparsity": share}
        if cost != "none":
            given["cost"] = cost
        recipe = variant({f"pruning.{key}": str(value) for key, value in given.items()})
        return measure(trained(recipe, data, options.runs, options.threads))

    base = load_recipe(BASE)
    assert base.quantization is not None
    wanted = dict.fromkeys(
        [*((channels, FIG_12, "none") for channels in CHANNELS)]
        + [(16, share, cost) for share in SHARES for cost in COSTS]
    )
    study = PruningStudy(
        benchmark="benchmarks/pruning.py",
        network=base.model,
        data=options.data_name,
        weight_bits=base.quantization.weight_bits,
        activation_bits=base.quantization.activation_bits,
        seed=base.seed,
        dense_epochs=dense.recipe.training.epochs,
        epochs=base.training.epochs,
        dense_accuracy=dense.history[-1]["test accuracy"],
        versions={
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "tvm-mars")},
        },
        trials=tuple(trial(*one) for one in wanted),
    )
    write_study(study, options.output)
    _print(study)


def _print(study: PruningStudy) -> None:
    print(", ".join(f"{name} {version}" for name, version in study.versions.items()))
    print(
        f"{study.network} on {study.data}, dense float32, {study.dense_epochs} epochs: "
        f"{study.dense_accuracy:.2%}; each network below: {study.epochs} epochs from it, one seed; "
        "FPS on mars [A]"
    )
    print("\nWhat is pruned together: 16 kernels x N channels (Fig. 12)")
    print(f"{'N':>4} {'pruned':>8} {'accuracy':>9} {'zero group-sets':>16} {'FPS':>7}")
    for found in study.by_channels(FIG_12):
        print(
            f"{found.channels:>4} {found.pruned:>8.2%} {found.accuracy:>9.2%} {found.zero:>16.2%} "
            f"{found.fps:>7.0f}"
        )
    print("\nWhich group-sets go: the paper's norm, or the norm over the cycles of a group-set")
    print(f"{'pruned':>8} {'accuracy':>20} {'FPS':>17}")
    print(f"{'':>8} {'paper':>10} {'cycles':>9} {'paper':>8} {'cycles':>8}")
    curves = [[study.trial(16, share, cost) for share in SHARES] for cost in COSTS]
    for plain, aware in zip(*curves, strict=True):
        print(
            f"{plain.asked:>8.1%} {plain.accuracy:>10.2%} {aware.accuracy:>9.2%} "
            f"{plain.fps:>8.0f} {aware.fps:>8.0f}"
        )
    _equal_accuracy(*curves)


def _equal_accuracy(plain: Sequence[Trial], aware: Sequence[Trial]) -> None:
    """Interpolate both curves of FPS over accuracy, where they overlap."""
    curves = [sorted((x.accuracy, x.fps) for x in results) for results in (plain, aware)]
    low = max(curve[0][0] for curve in curves)
    high = min(curve[-1][0] for curve in curves)
    if low >= high:
        print("the accuracies do not overlap: no comparison at equal accuracy")
        return
    print("at equal accuracy, interpolated:")
    for accuracy in np.linspace(low, high, 4):
        one, other = (float(np.interp(accuracy, *zip(*c, strict=True))) for c in curves)
        print(f"{accuracy:>8.2%} FPS {one:>6.0f} and {other:>6.0f}, {other / one:.2f} times")


if __name__ == "__main__":
    main()
