"""``mars explain``."""

from __future__ import annotations

import json
import logging
import sys

import click

from .base import MarsCommand, arch_options, input_shapes, read_arch, write_text
from .compiling import check_model, schedules

__all__ = ["explain_command"]


@click.command("explain", cls=MarsCommand)
@click.argument("model", metavar="MODEL.onnx")
@click.option("--op", metavar="NAME", help="An operator of the model, or a layer: tell more of it.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Share of zero group-sets that every layer is tried with.",
)
@click.option(
    "--input-shapes",
    "shapes",
    metavar='"NAME:[N,C,H,W] ..."',
    callback=input_shapes,
    help="Shapes of inputs that the model leaves open.",
)
@click.option("--tuned", metavar="DIR", help="With the best schedules that `mars tune` found.")
@arch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def explain_command(
    model: str,
    op: str | None,
    share: float,
    shapes: dict[str, tuple[int, ...]],
    tuned: str | None,
    arch: str,
    changes: dict[str, str],
    as_json: bool,
) -> None:
    """Say why a quantized model costs what it costs, and what could change that.

    For every operator whether it is on MARS, and why not; for every layer what bounds it (compute,
    loading weights, a port of a feature-map SRAM, off-chip memory), how many of its group-sets are
    skipped, and the cycles that more zero group-sets or another schedule could save. All of it is
    computed on the timed machine, none of it promised.

    \b
    Examples:
      mars explain net.onnx
      mars explain net.onnx --op /features/3/Conv
      mars explain net.onnx --tuned tuned
      mars explain net.onnx --share 0.95 --json | jq .layers[0].bound
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    machine = read_arch(arch, changes)
    check_model(model)
    from ..frontend import adapter  # imports TVM
    from ..options import CompileOptions
    from ..report.explain import explain
    from ..schedule.applied import schedule_of
    from ..schedule.plan import plan

    ir = adapter()
    partition = ir.partition_of(ir.import_model(model, shapes), CompileOptions(arch=machine))
    with schedules(tuned):
        found = explain(
            partition, machine, share=share, op=op, scheduler=schedule_of if tuned else plan
        )
    if as_json:
        write_text(json.dumps(found.to_dict(), indent=2), None)
        return
    from ..report.explain_text import print_explanation

    print_explanation(found, sys.stdout, in_full=op is not None)
