"""What pruning costs: group width (the paper's Fig. 12), and cost-aware against plain group lasso.

Trains the small network ``plain`` for CIFAR-10, once dense and then quantized (w8a8) and pruned
with each of the variants; everything else is the recipe ``plain-w8a8``. Runs that are finished are
read, those that were interrupted continue. Run (an hour or two on two cores):
``python benchmarks/pruning.py --data cifar-10-binary.tar.gz --runs runs``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import attrs
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from mars_runtime import PRESETS, simulate
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.qat import Recipe, Trainer, load_data, load_recipe, to_graph
from tvm_mars.qat.data import Images
from tvm_mars.report import compression

DENSE, BASE = "plain-dense", "plain-w8a8"
CHANNELS = (1, 4, 8, 16, 32)  # N of eq. 4
SHARES = (0.5, 0.75)
MARS = PRESETS["mars"]


@attrs.frozen
class Result:
    """A trained network: accuracy, shares of what was pruned and of zero group-sets, cycles."""

    accuracy: float
    pruned: float
    zero: float
    cycles: int

    @property
    def fps(self) -> float:
        """Images per second, one at a time."""
        return MARS.core_clock_mhz * 1e6 / self.cycles


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


def measure(trainer: Trainer) -> Result:
    """Say what a trained network reached, and what it costs on MARS."""
    graph = to_graph(trainer.evaluated().eval(), trainer.images.shape)
    last = trainer.history[-1]
    pruned = compression(graph).layers[1:-1]
    zero = 1 - sum(x.group_sets for x in pruned) / sum(x.dense_group_sets for x in pruned)
    cycles = simulate(build_region(NamedGraph.of(graph), MARS), MARS).cycles
    return Result(last["test accuracy"], last["zero group-sets"], zero, cycles)


def main() -> None:
    """Train what is missing, and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10: binary archive, or .npz")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    data = load_data(options.data)
    dense = trained(load_recipe(DENSE), data, options.runs, options.threads).history[-1]

    def result(**changes: str) -> Result:
        recipe = variant({f"pruning.{key}": text for key, text in changes.items()})
        return measure(trained(recipe, data, options.runs, options.threads))

    packages = ("torch", "numpy")
    print(
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    )
    base = load_recipe(BASE)
    print(
        f"plain, dense float32, {load_recipe(DENSE).training.epochs} epochs: "
        f"{dense['test accuracy']:.2%}; each network below: {base.training.epochs} epochs from it, "
        f"one seed; FPS on mars [A]"
    )
    print("\nWhat is pruned together: 16 kernels x N channels (Fig. 12)")
    print(f"{'N':>4} {'pruned':>8} {'accuracy':>9} {'zero group-sets':>16} {'FPS':>7}")
    share = str(base.pruning.sparsity) if base.pruning else ""
    for channels in CHANNELS:
        found = result(channels=str(channels), sparsity=share)
        print(
            f"{channels:>4} {found.pruned:>8.2%} {found.accuracy:>9.2%} {found.zero:>16.2%} "
            f"{found.fps:>7.0f}"
        )
    print("\nWhich group-sets go: the paper's norm, or the norm over the cycles of a group-set")
    print(f"{'pruned':>8} {'accuracy':>20} {'FPS':>17}")
    print(f"{'':>8} {'paper':>10} {'cycles':>9} {'paper':>8} {'cycles':>8}")
    pairs = [(result(channels="16", sparsity=str(s)), _aware(result, s)) for s in SHARES]
    for (plain, aware), wanted in zip(pairs, SHARES, strict=True):
        print(
            f"{wanted:>8.1%} {plain.accuracy:>10.2%} {aware.accuracy:>9.2%} "
            f"{plain.fps:>8.0f} {aware.fps:>8.0f}"
        )
    _equal_accuracy(*zip(*pairs, strict=True))


def _aware(result, share: float) -> Result:  # type: ignore[no-untyped-def]
    return result(channels="16", sparsity=str(share), cost="cycles")


def _equal_accuracy(plain: tuple[Result, ...], aware: tuple[Result, ...]) -> None:
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
