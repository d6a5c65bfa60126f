"""``mars train``."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator

import click

from .base import MarsCommand, assignments, write_text

__all__ = ["train_command"]

INTERRUPTED = 130


@click.command("train", cls=MarsCommand)
@click.argument("recipe", metavar="[RECIPE|FILE.toml]", required=False)
@click.option(
    "--data", metavar="PATH", help="Images: .npz, a binary CIFAR archive, a folder of idx files."
)
@click.option(
    "--runs",
    metavar="DIR",
    default="runs",
    show_default=True,
    help="Folder of runs; this one is DIR/<its name>.",
)
@click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    callback=assignments,
    help="Change the recipe, as in training.epochs=2; may be repeated.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads that compute.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("--tensorboard", metavar="DIR", help="Write a log for TensorBoard.")
@click.option("--list", "wanted", is_flag=True, help="Print the recipes that come with tvm-mars.")
@click.option("--json", "as_json", is_flag=True, help="Print the last epoch's figures as JSON.")
def train_command(
    recipe: str | None,
    data: str | None,
    runs: str,
    changes: dict[str, str],
    threads: int | None,
    device: str,
    tensorboard: str | None,
    wanted: bool,
    as_json: bool,
) -> None:
    """Train a network by a recipe: in float32, or quantization-aware and pruned.

    A run that was interrupted continues where it stood, and ends as if it had not been. Its folder
    holds last.pt (the checkpoint), history.json (loss and accuracy by epoch) and at its end
    final.pt and, of a quantized network, net.onnx. Started by torchrun, the processes share every
    batch evenly, and compute what one would.

    \b
    Example, a dense network and the quantized, pruned one that starts from it:
      mars train resnet20-dense --data cifar-10-binary.tar.gz
      mars train resnet20-w8a8 --data cifar-10-binary.tar.gz
      mars compile runs/resnet20-w8a8/net.onnx --program net.mars
      torchrun --nproc-per-node 4 --no-python mars train resnet20-w8a8 --data ...
    """
    try:
        from ..qat import Trainer, load_data, load_recipe, recipe_names
        from ..qat.ranks import Ranks, joined
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"training needs {error.name}: pip install 'tvm-mars[train]'"
        ) from None

    if wanted:
        click.echo("\n".join(recipe_names()))
        return
    if not (recipe and data):
        raise click.UsageError("give a recipe (--list names those that there are) and --data")
    logging.basicConfig(format="%(message)s")
    chosen = load_recipe(recipe, changes)
    train, test = load_data(data)
    with joined(device) as device, _progress(Ranks.current().first) as progress:
        if Ranks.current().first:
            logging.getLogger("tvm_mars.qat").setLevel(logging.INFO)
        trainer = Trainer(
            chosen,
            train,
            test,
            runs,
            device=device,
            threads=threads,
            progress=progress,
            tensorboard=tensorboard,
        )
        trainer.run()
    if not trainer.finished:
        click.echo(f"stopped at step {trainer.step} of {trainer.steps}: run it again", err=True)
        sys.exit(INTERRUPTED)
    if not trainer.ranks.first:
        return
    last = trainer.history[-1]
    if as_json:
        write_text(json.dumps({"folder": str(trainer.folder), **last}, indent=2), None)
        return
    click.echo(f"{trainer.folder}: {last['test accuracy']:.2%} of the test images")
    if "zero group-sets" in last:
        click.echo(f"{last['zero group-sets']:.2%} of the group-sets of pruned layers are zero")


@contextlib.contextmanager
def _progress(first: bool) -> Iterator[Callable[[int, int, float, float], None] | None]:
    """Show a bar by batch if somebody watches, of the first of several processes."""
    if not first or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    logging.getLogger().handlers = [RichHandler(console=console, show_path=False)]
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[seconds]:.2f} s/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=None, loss=float("nan"), seconds=0.0)

        def show(step: int, steps: int, loss: float, seconds: float) -> None:
            bar.update(task, completed=step, total=steps, loss=loss, seconds=seconds)

        yield show
