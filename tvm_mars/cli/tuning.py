"""``mars tune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .base import MarsCommand, arch_options, read_arch

if TYPE_CHECKING:
    from ..tuner.api import Trial

__all__ = ["tune_command"]


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
@arch_options
@click.option(
    "--objective",
    type=click.Choice(["cycles", "energy", "edp"]),
    default="cycles",
    show_default=True,
    help="What is to be small.",
)
@click.option(
    "--strategy",
    type=click.Choice(["evolution", "random", "grid", "annealing"]),
    default="evolution",
    show_default=True,
    help="How schedules are chosen.",
)
@click.option(
    "--cost-model",
    type=click.Choice(["xgb", "none"]),
    default="xgb",
    show_default=True,
    help="Whether a learned model picks what is measured.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that measure; the result does not depend on it.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    metavar="N",
    help="End after so many trials without a better one.",
)
@click.option("--resume", is_flag=True, help="Take up a search with the same options.")
@click.option("--show", is_flag=True, help="Only print what the database holds.")
def tune_command(
    model: str | None,
    work_dir: str,
    trials: int,
    arch: str,
    changes: dict[str, str],
    objective: str,
    strategy: str,
    cost_model: str,
    seed: int,
    workers: int,
    patience: int | None,
    resume: bool,
    show: bool,
) -> None:
    """Search for faster schedules of a quantized ONNX model.

    Every schedule gives the same codes; their cycles are those of the timed machine. DIR keeps all
    that was measured: `mars compile --tuned DIR` uses the best of it, a search that was interrupted
    goes on with --resume.

    \b
    Examples:
      mars tune net.onnx -D tuned --trials 512 --workers 2
      mars tune -D tuned --show
      mars compile net.onnx --program net.mars --tuned tuned
    """
    from ..tuner.database import Database
    from ..tuner.show import print_database

    if show:
        if not Path(work_dir).is_dir():
            raise click.UsageError(f"{work_dir} is no directory")
        print_database(Database(work_dir, objective), sys.stdout)
        return
    if model is None:
        raise click.UsageError("nothing to tune: give MODEL.onnx, or --show")
    machine = read_arch(arch, changes)
    from ..tuner.api import tune
    from .compiling import check_model

    check_model(model)
    with _Progress() as progress:
        database = tune(
            model,
            work_dir=work_dir,
            max_trials_global=trials,
            cost_model=cost_model,
            arch=machine,
            objective=objective,
            num_workers=workers,
            resume=resume,
            seed=seed,
            strategy=strategy,
            patience=patience,
            on_trial=progress.report,
        )
    print_database(database, sys.stdout)


class _Progress:
    """A progress bar on stderr with the best so far."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("region {task.fields[region]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} trials, best {task.fields[best]} cycles"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.tasks: dict[int, int] = {}
        self.bar.start()
        return self

    def report(self, trial: Trial) -> None:
        """Show a trial."""
        from rich.progress import TaskID

        place, best = f"{trial.region + 1}/{trial.regions}", f"{trial.best.cycles:,}"
        if trial.region not in self.tasks:
            self.tasks[trial.region] = self.bar.add_task(
                "", total=trial.trials, region=place, best=best
            )
        self.bar.update(TaskID(self.tasks[trial.region]), completed=trial.done, best=best)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
