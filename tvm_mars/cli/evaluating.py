"""``mars eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from .base import MarsCommand, engine_option, progress_bar, write_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mars_runtime import Program

    from ..datasets import Dataset

    Classifier = Callable[[Dataset], npt.NDArray[np.int64]]

__all__ = ["eval_command"]


@attrs.frozen
class Evaluation:
    """What a network made of some images; ``seconds`` without reading them."""

    images: int
    right: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly."""
        return self.right / self.images

    @property
    def images_per_second(self) -> float:
        """Speed, converting inputs and outputs included."""
        return self.images / self.seconds


@click.command("eval", cls=MarsCommand)
@click.argument("network", metavar="NET.mars|ZOO-NAME")
@click.option(
    "--data",
    required=True,
    metavar="PATH",
    help="Test images: .npz, a binary CIFAR archive, a folder of idx files.",
)
@click.option("--images", type=click.IntRange(1), help="Take only the first ones.")
@click.option(
    "--batch", type=click.IntRange(1), default=256, show_default=True, help="Images at a time."
)
@engine_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def eval_command(
    network: str, data: str, images: int | None, batch: int, engine: str | None, as_json: bool
) -> None:
    """Run a network's test images on the simulated MARS: accuracy and images per second.

    NET is a program that `mars compile --program` wrote, or the name of a network of the zoo. It
    takes one input, of the images' shape, float32 in 0..1 or uint8; its first output's largest
    value is the class. Memory is taken for a batch at a time.

    \b
    Example:
      mars compile net.onnx --program net.mars
      mars eval net.mars --data cifar-10-binary.tar.gz
    """
    from ..datasets import load_dataset

    classify = _classifier(network, engine)
    dataset = load_dataset(data)[1]
    if images:
        dataset = dataset.first(images)
    right, seconds = 0, 0.0
    with progress_bar(len(dataset)) as progress:
        for first in range(0, len(dataset), batch):
            part = dataset.part(first, first + batch)
            begun = time.perf_counter()
            right += int((classify(part) == part.labels).sum())
            seconds += time.perf_counter() - begun
            progress(first + len(part))
    found = Evaluation(len(dataset), right, seconds)
    if as_json:
        fields = {**attrs.asdict(found), "accuracy": found.accuracy}
        write_text(json.dumps({**fields, "images_per_second": found.images_per_second}), None)
        return
    write_text(
        f"{found.images} images, accuracy {found.accuracy:.2%}, "
        f"{found.images_per_second:,.0f} images/s",
        None,
    )


def _classifier(network: str, engine: str | None) -> Classifier:
    if network.endswith(".mars") or Path(network).exists():
        from mars_runtime import Program

        return _program(Program.load(network), engine)
    from mars_runtime import PRESETS

    from .. import zoo
    from ..compiler import NamedGraph, build

    return _program(build([NamedGraph.of(zoo.load(network))], PRESETS["mars"]), engine)


def _program(program: Program, engine: str | None) -> Classifier:
    from mars_runtime import InputError, run

    if len(program.inputs) != 1:
        raise InputError(f"takes {len(program.inputs)} inputs, not one", where="network")
    entry, result = program.inputs[0], program.outputs[0]
    (port,) = (port for port in program.regions[0].inputs if port.name == entry)

    def classify(part: Dataset) -> npt.NDArray[np.int64]:
        pixels = _pixels(part, port.quantize.dtype)
        return _classes(run(program, {entry: pixels}, engine=engine)[result])

    return classify


def _pixels(part: Dataset, dtype: str) -> npt.NDArray[Any]:
    from mars_runtime import InputError

    if dtype == "float32":
        return part.images()
    if dtype == "uint8" and part.top == 255:
        return part.pixels
    raise InputError(
        f"takes {dtype}", where="network", hint="give it an input of float32 in 0..1, or of uint8"
    )


def _classes(results: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    classes: npt.NDArray[np.int64] = results.reshape(len(results), -1).argmax(1)
    return classes
