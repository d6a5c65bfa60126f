"""``mars tune``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..tuner.search import COST_MODELS, OBJECTIVES, RUNNERS
from ..tuner.strategies import STRATEGIES
from .base import (
    CommandError,
    MarsCommand,
    arch_options,
    channel_order_option,
    input_shapes,
    read_arch,
    write_file,
    write_text,
)

if TYPE_CHECKING:
    from ..tuner.database import Database

__all__ = ["tune_command"]


def _picture(
    _ctx: click.Context, _parameter: click.Parameter, given: str | None
) -> tuple[str, str] | None:
    """Read a picture's file as its path and its kind."""
    if given is None:
        return None
    from ..tuner.picture import FORMATS

    kind = Path(given).suffix[1:].lower()
    if kind not in FORMATS:
        raise click.BadParameter(f"{given!r} does not end in .{', .'.join(FORMATS)}")
    if importlib.util.find_spec("vl_convert") is None:
        raise CommandError("a picture needs vl_convert: pip install 'tvm-mars[report]'")
    return given, kind


@click.command("tune", cls=MarsCommand)
@click.argument("model", metavar="MODEL.onnx", required=False)
@click.option("-D", "--work-dir", required=True, metavar="DIR", help="Directory of the database.")
@click.option(
    "-n",
    "--trials",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Schedules to measure, for all regions together.",
)
@click.option(
    "--input-shapes",
    "shapes",
    metavar='"NAME:[N,C,H,W] ..."',
    callback=input_shapes,
    help="Shapes of inputs that the model leaves open, where TVM has Relay; records serve any "
    "batch.",
)
@arch_options
@channel_order_option
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="cycles",
    show_default=True,
    help="What is to be small.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="evolution",
    show_default=True,
    help="How schedules are chosen.",
)
@click.option(
    "--cost-model",
    type=click.Choice(COST_MODELS),
    default="xgb",
    show_default=True,
    help="Whether a learned model picks what is measured.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option(
    "--runner",
    type=click.Choice(RUNNERS),
    default="local",
    show_default=True,
    help="Where schedules are measured: on this host, or on a Ray cluster; the result does not "
    "depend on it.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that measure; the result does not depend on it.",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT|auto",
    help="The cluster. [default: $RAY_ADDRESS, or one that is started here]",
)
@click.option(
    "--trial-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="What a worker of the cluster may take for a schedule, which is tried three times more.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    metavar="N",
    help="End after so many trials without a better one.",
)
@click.option(
    "--tuning-records",
    metavar="DIR",
    help="Directory of other records of the model, of any machine: their best are measured early.",
)
@click.option("--resume", is_flag=True, help="Take up a search with the same options.")
@click.option("--show", is_flag=True, help="Only print what the database holds.")
@click.option("--json", "as_json", is_flag=True, help="Print that as JSON instead.")
@click.option(
    "-o",
    "--output",
    metavar="FILE.html|.svg|.png",
    callback=_picture,
    help="Also draw it: convergence, cycles by layer and decisions beside the default's.",
)
def tune_command(
    model: str | None,
    work_dir: str,
    trials: int,
    shapes: dict[str, tuple[int, ...]],
    arch: str,
    changes: dict[str, str],
    channel_order: str,
    objective: str,
    strategy: str,
    cost_model: str,
    seed: int,
    runner: str,
    workers: int,
    ray_address: str | None,
    trial_timeout: float,
    patience: int | None,
    tuning_records: str | None,
    resume: bool,
    show: bool,
    as_json: bool,
    output: tuple[str, str] | None,
) -> None:
    """Search for faster schedules of a quantized ONNX model.

    Every schedule gives the same codes; their cycles are those of the timed machine. DIR keeps all
    that was measured: `mars compile --tuned DIR` uses the best of it, a search that was interrupted
    goes on with --resume.

    \b
    Examples:
      mars tune net.onnx -D tuned --trials 512 --workers 2
      mars tune -D tuned --show -o tuned.html
      mars compile net.onnx --program net.mars --tuned tuned
    """
    from ..tuner.database import Database

    if show:
        _print(Database.existing(work_dir, objective), as_json, output)
        return
    if model is None:
        raise click.UsageError("nothing to tune: give MODEL.onnx, or --show")
    machine = read_arch(arch, changes)
    from ..tuner.api import tune
    from ..tuner.progress import Progress
    from .compiling import check_model

    check_model(model)
    earlier = Database.existing(tuning_records, objective) if tuning_records else None
    with Progress() as progress:
        database = tune(
            model,
            work_dir=work_dir,
            max_trials_global=trials,
            shape=shapes,
            cost_model=cost_model,
            arch=machine,
            channel_order=channel_order,
            objective=objective,
            runner=runner,
            num_workers=workers,
            ray_address=ray_address,
            trial_timeout=trial_timeout,
            resume=resume,
            seed=seed,
            strategy=strategy,
            patience=patience,
            earlier=earlier,
            on_trial=progress.report,
        )
    _print(database, as_json, output)


def _print(database: Database, as_json: bool, output: tuple[str, str] | None) -> None:
    from ..tuner.show import database_data, print_database

    if as_json:
        write_text(json.dumps(database_data(database), indent=2), None)
    else:
        print_database(database, sys.stdout)
    if output is not None:
        from ..tuner.picture import draw

        path, kind = output
        write_file(path, draw(database, kind))
        click.echo(f"wrote {path}", err=True)
