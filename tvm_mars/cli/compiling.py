"""``mars compile``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from .base import (
    MarsCommand,
    arch_options,
    channel_order_option,
    input_shapes,
    read_arch,
    write_file,
    write_text,
)

__all__ = ["check_model", "compile_command", "schedules"]


@click.command("compile", cls=MarsCommand)
@click.argument("model", metavar="MODEL.onnx")
@click.option("-o", "--output", metavar="OUT.so", help="Shared library to write: the whole model.")
@click.option("--program", metavar="OUT.mars", help="Program to write: MARS's part of the model.")
@click.option(
    "--input-shapes",
    "shapes",
    metavar='"NAME:[N,C,H,W] ..."',
    callback=input_shapes,
    help="Shapes of inputs that the model leaves open; TVM with Relay needs the batch as well.",
)
@arch_options
@click.option(
    "--min-macs",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Leave regions with fewer multiply-accumulates per image to the CPU.",
)
@channel_order_option
@click.option(
    "--dump-offloads",
    metavar="PATH|-",
    help="Write what became of every operator, with the reason if the CPU keeps it.",
)
@click.option("--tuned", metavar="DIR", help="Use the best schedules that `mars tune` found.")
@click.option("--timing", is_flag=True, help="Say on stderr how long each stage took.")
@click.option("--json", "as_json", is_flag=True, help="Print operators and timings as JSON.")
def compile_command(
    model: str,
    output: str | None,
    program: str | None,
    shapes: dict[str, tuple[int, ...]],
    arch: str,
    changes: dict[str, str],
    min_macs: int,
    channel_order: str,
    dump_offloads: str | None,
    tuned: str | None,
    timing: bool,
    as_json: bool,
) -> None:
    """Compile a quantized ONNX model (QuantizeLinear and DequantizeLinear around its operators).

    What MARS takes is compiled for it, the rest by TVM for this machine's CPU. OUT.so holds both,
    for `mars run` or any process that imports tvm and mars_runtime; OUT.mars holds MARS's part
    alone, for `mars profile` and `mars disasm`, and for `mars run` if nothing is left to the CPU.

    \b
    Example:
      mars compile net.onnx -o net.so --program net.mars --dump-offloads -
    """
    if as_json and dump_offloads == "-":
        raise click.UsageError("--json prints what --dump-offloads - does: give one of them")
    if not (output or program or dump_offloads or as_json):
        raise click.UsageError("nothing to write: give -o, --program, --dump-offloads or --json")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    machine = read_arch(arch, changes)  # a wrong one is said before TVM is imported
    check_model(model)

    import tvm_mars
    from mars_runtime.errors import UnsupportedError

    with schedules(tuned):
        compiled = tvm_mars.compile(
            model,
            target="mars",
            shape=shapes,
            arch=machine,
            min_macs=min_macs,
            channel_order=channel_order,
        )
    if dump_offloads:
        write_text(str(compiled.report), dump_offloads)
    if program and compiled.program is None:
        raise UnsupportedError(
            "nothing was offloaded to MARS, so there is no program to write",
            where=model,
            hint="--dump-offloads - says why",
        )
    if program and compiled.program is not None:
        write_file(program, compiled.program.to_bytes())
    if output:
        compiled.export_library(output)
    for path in filter(None, (program, output)):
        click.echo(f"wrote {path}: {compiled.report.summary}", err=True)
    if as_json:
        report = json.loads(compiled.report.to_json())
        write_text(json.dumps({**report, "seconds": dict(compiled.timings)}, indent=2), None)
    if timing:
        _print_timings(compiled.timings)


def schedules(directory: str | None) -> AbstractContextManager[object]:
    """Give what lets a compilation use a database's schedules; without one, nothing."""
    if directory is None:
        return nullcontext()
    from ..tuner.database import Database

    return Database.existing(directory)


def check_model(model: str) -> None:
    """Refuse a model that is not there, before TVM is imported."""
    from mars_runtime.errors import InputError

    if not Path(model).is_file():
        raise InputError("no such file", where=model)


def _print_timings(timings: Mapping[str, float]) -> None:
    for stage, seconds in timings.items():
        click.echo(f"{stage:<12} {seconds:7.3f} s", err=True)
    click.echo(f"{'all':<12} {sum(timings.values()):7.3f} s", err=True)
