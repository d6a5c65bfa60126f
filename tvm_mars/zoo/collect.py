"""From a finished training run to an entry of the zoo.

Run as ``python -m tvm_mars.zoo.collect runs/vgg16-w8a4 --data cifar-10-binary.tar.gz``; needs
torch. An entry is written if PyTorch's network in training form and in integers, ONNX Runtime and
the simulated MARS give the same codes at every layer boundary for every test image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mars_runtime.errors import MarsError

from ..datasets import Dataset, load_dataset
from ..graph import Graph
from ..verification import Verification, compare, mars_engine, onnxruntime_engine, reference_engine
from .entries import FOLDER, Record, write

__all__ = ["collect", "summary", "verified"]

LIMIT = 3_000_000  # bytes of a network's file


def summary(checked: Verification) -> dict[str, Any]:
    """Give what was compared, for a record.

    Raises
    ------
    RuntimeError
        If an engine gave another code.
    """
    if not checked.agree:
        raise RuntimeError(f"engines differ, no entry is made:\n{checked}")
    return {
        "images": checked.images,
        "codes": checked.codes,
        "differing codes": {name: sum(found.values()) for name, found in checked.differing.items()},
        "accuracy": {name: checked.accuracy(name) for name in checked.differing},
    }


def verified(graph: Graph, images: Dataset) -> dict[str, Any]:
    """Compare the engines that need no PyTorch, the reference among them."""
    engines = {
        "reference": reference_engine(graph),
        "ONNX Runtime": onnxruntime_engine(graph),
        "MARS": mars_engine(graph),
    }
    return summary(compare(engines, images, graph.outputs[0].value))


def collect(run: Path, data: Path, note: str, folder: Path) -> Record:
    """Verify what a run has trained, and write the entry of its name.

    Parameters
    ----------
    note : str
        What the data is.
    folder : Path
        Where to write the two files.
    """
    from ..qat.data import load_data
    from ..qat.integer import to_graph
    from ..qat.training import load_run
    from ..qat.verify import verify

    network = load_run(run)
    images = load_data(data)[1]
    with click.progressbar(length=len(images), label="verifying", file=sys.stderr) as bar:
        checked = verify(network, images, progress=lambda done: bar.update(done - bar.pos))
    stages = _stages(run)
    dense_recipe, dense_history = stages.pop(0)
    recipes, histories = zip(*stages, strict=True)
    recipe = recipes[-1]
    graph = to_graph(network, images.shape)
    record = Record(
        title=_TITLES[recipe["model"]],
        data=note,
        dense_title="dense, float32",
        accuracy=checked.accuracy("MARS"),
        dense_accuracy=dense_history[-1]["test accuracy"],
        recipes=recipes,
        dense_recipe=dense_recipe,
        history=[entry for history in histories for entry in history],
        dense_history=dense_history,
        images={"train": len(load_dataset(data)[0]), "test": len(images)},
        verified=summary(checked),
        versions={name: version(name) for name in ("torch", "numpy", "onnxruntime")},
    )
    write(recipe["name"], graph, record, folder)
    return record


_TITLES = {
    "plain": "Six convolutions for 32x32 images",
    "resnet18": "ResNet-18 for 32x32 images",
    "resnet20": "ResNet-20 for 32x32 images",
    "vgg16": "VGG16 for 32x32 images",
}


def _stages(run: Path) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Give recipe and history of a run and of those that it started from, the first one first."""
    recipe, history = _history(run)
    before = _stages(run.parent / recipe["init"]) if recipe["init"] else []
    return [*before, (recipe, history)]


def _history(run: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    found = json.loads((run / "history.json").read_text(encoding="utf-8"))
    return found["recipe"], found["epochs"]


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--note", default="CIFAR-10", show_default=True, help="What the data is.")
@click.option(
    "--folder",
    default=FOLDER,
    type=click.Path(exists=True, path_type=Path),
    help="Where to write the entry.  [default: the zoo]",
)
def _main(run: Path, data: Path, note: str, folder: Path) -> None:
    """Make the finished RUN an entry of the zoo."""
    try:
        record = collect(run, data, note, folder)
    except (MarsError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{record.accuracy:.2%}, dense twin {record.dense_accuracy:.2%}")


if __name__ == "__main__":
    _main()
