"""``mars zoo``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import click

from .base import (
    MarsCommand,
    arch_options,
    progress_bar,
    read_arch,
    write_file,
    write_text,
)

if TYPE_CHECKING:
    from ..datasets import Dataset
    from ..verification import Verification

__all__ = ["zoo_command"]

DIGITS = "digits"

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


@click.group("zoo", context_settings={"help_option_names": ["-h", "--help"]})
def zoo_command() -> None:
    """Trained networks that come with tvm-mars: integer codes, and how they were trained.

    \b
    Examples:
      mars zoo list
      mars zoo export vgg16-w8a4 -o vgg16.onnx
      mars compile vgg16.onnx --program vgg16.mars
      mars profile vgg16.mars
    """


@zoo_command.command("list", cls=MarsCommand)
@_json_option
def list_command(as_json: bool) -> None:
    """List the networks.

    zero: share of zero group-sets over all layers. test: test images classified rightly; dense: the
    same of the dense twin that was trained beside it. epochs: of the network and of that twin.
    """
    from .. import zoo
    from ..report import compression

    rows: list[dict[str, Any]] = []
    for name in zoo.names():
        record, graph = zoo.record(name), zoo.load(name)
        rows.append(
            {
                "name": name,
                "title": record.title,
                "data": record.data,
                "macs": graph.macs(),
                "zero_group_sets": compression(graph).zero_share,
                "accuracy": record.accuracy,
                "dense_accuracy": record.dense_accuracy,
                "epochs": record.epochs,
                "dense_epochs": record.dense_epochs,
                "bytes": zoo.size(name),
            }
        )
    if as_json:
        write_text(json.dumps(rows, indent=2), None)
        return
    from ..report.layout import new_table, print_parts

    table = new_table(
        "Zoo", "network", " MMAC", "  zero %", "  test %", " dense %", " epochs", "    KB"
    )
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['macs'] / 1e6:.1f}",
            f"{row['zero_group_sets']:.1%}"[:-1],
            f"{row['accuracy']:.2%}"[:-1],
            f"{row['dense_accuracy']:.2%}"[:-1],
            f"{row['epochs']}+{row['dense_epochs']}",
            f"{row['bytes'] / 1000:.0f}",
        )
    print_parts([table, "", "mars zoo info NAME tells how each was trained."], sys.stdout)


@zoo_command.command("info", cls=MarsCommand)
@click.argument("name")
@_json_option
def info_command(name: str, as_json: bool) -> None:
    """Tell how a network was trained, what it reached, and what each layer stores."""
    from .. import zoo
    from ..report import compression
    from ..report.layout import wrapped

    record, graph = zoo.record(name), zoo.load(name)
    if as_json:
        write_text(record.to_json(), None)
        return
    lines = [
        wrapped(f"{name}: {record.title}"),
        wrapped(
            f"data: {record.data}; {record.images['train']} images to train, "
            f"{record.images['test']} to test"
        ),
        wrapped(
            f"test accuracy {record.accuracy:.2%} after {record.epochs} epochs; its twin "
            f"({record.dense_title}) {record.dense_accuracy:.2%} after {record.dense_epochs}"
        ),
        wrapped(
            f"verified on {record.verified['images']} images: {record.verified['codes']:,} codes "
            "at every layer boundary; differing codes:"
        ),
        *(f"  {engine}: {count}" for engine, count in record.verified["differing codes"].items()),
        "",
        str(compression(graph)),
        "",
        *(wrapped(f"recipe: {json.dumps(recipe)}") for recipe in record.recipes),
    ]
    for title, history in (("dense twin", record.dense_history), ("network", record.history)):
        lines += ["", *_curve(title, history)] if history else []
    write_text("\n".join(lines), None)


def _curve(title: str, history: Any) -> Iterator[str]:
    """Give the training curve as lines."""
    yield f"{title}, by epoch: loss, zero group-sets of pruned layers, test accuracy"
    for entry in history:
        zero = f"{entry['zero group-sets']:.2%}" if "zero group-sets" in entry else "-"
        test = f"{entry['test accuracy']:.2%}" if "test accuracy" in entry else "-"
        yield f"  {entry['epoch']:>3} {entry['loss']:>8.4f} {zero:>8} {test:>8}"


@zoo_command.command("export", cls=MarsCommand)
@click.argument("name")
@click.option("-o", "--output", required=True, metavar="NET.onnx", help="File to write.")
def export_command(name: str, output: str) -> None:
    """Write a network as ONNX in Q/DQ form, for `mars compile` or any other tool."""
    from .. import zoo
    from ..onnx_export import to_onnx

    write_file(output, to_onnx(zoo.load(name)).SerializeToString())
    click.echo(f"wrote {output}", err=True)


@zoo_command.command("eval", cls=MarsCommand)
@click.argument("name")
@click.option(
    "--data",
    metavar="PATH",
    help="Test images: .npz, a binary CIFAR archive, a folder of idx files. The network digits "
    "takes scikit-learn's if none are given.",
)
@click.option("--images", type=click.IntRange(1), help="Take only the first ones.")
@click.option(
    "--batch", type=click.IntRange(1), default=100, show_default=True, help="Images at a time."
)
@arch_options
@_json_option
def eval_command(
    name: str,
    data: str | None,
    images: int | None,
    batch: int,
    arch: str,
    changes: dict[str, str],
    as_json: bool,
) -> None:
    """Run a network's test images on ONNX Runtime and on the simulated MARS.

    Says how many each classifies rightly, and in how many codes they differ at any layer boundary.
    The exit code is 1 if any does.
    """
    from .. import zoo
    from ..verification import compare, mars_engine, onnxruntime_engine

    graph = zoo.load(name)
    dataset = _test_images(name, data)
    if images:
        dataset = dataset.first(images)
    shape = graph.inputs[0].shape
    if dataset.pixels.shape[1:] != shape:
        from mars_runtime import InputError

        raise InputError(
            f"images {dataset.pixels.shape[1:]}, the network takes {shape}", where=data or name
        )
    try:
        engines = {"ONNX Runtime": onnxruntime_engine(graph)}
    except ModuleNotFoundError as error:
        raise click.ClickException(f"needs {error.name}: pip install {error.name}") from None
    engines["MARS"] = mars_engine(graph, read_arch(arch, changes), "auto")
    with progress_bar(len(dataset)) as progress:
        found = compare(engines, dataset, graph.outputs[0].value, batch=batch, progress=progress)
    _print_comparison(found, as_json)
    if not found.agree:
        sys.exit(1)


def _test_images(name: str, data: str | None) -> Dataset:
    if data is not None:
        from ..datasets import load_dataset

        return load_dataset(data)[1]
    if name != DIGITS:
        raise click.UsageError("give --data")
    from ..zoo import digits_dataset

    try:
        return digits_dataset()[1]
    except ModuleNotFoundError:
        raise click.ClickException("needs scikit-learn: pip install scikit-learn") from None


def _print_comparison(found: Verification, as_json: bool) -> None:
    if as_json:
        write_text(json.dumps(attrs.asdict(found), indent=2), None)
        return
    lines = [f"{found.images} images, {found.codes:,} codes at every layer boundary"]
    for engine, values in found.differing.items():
        worst = ", ".join(f"{name} {count}" for name, count in values.items()) or "none"
        lines.append(
            f"{engine:<14} accuracy {found.accuracy(engine):.2%}, "
            f"{found.images / found.seconds[engine]:.0f} images/s, differing codes: {worst}"
        )
    write_text("\n".join(lines), None)
