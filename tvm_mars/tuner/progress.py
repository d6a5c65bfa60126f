"""How a search comes on: a bar on stderr, with the best so far."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from .api import Trial

__all__ = ["Progress"]


class Progress:
    """A bar for each region while in ``with``; give :meth:`report` to :func:`tvm_mars.tune`."""

    def __enter__(self) -> Progress:
        columns = (
            TextColumn("region {task.fields[region]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} trials, best {task.fields[best]} cycles"),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=Console(stderr=True))
        self.tasks: dict[int, TaskID] = {}
        self.bars.start()
        return self

    def report(self, trial: Trial) -> None:
        """Show a trial."""
        place, best = f"{trial.region + 1}/{trial.regions}", f"{trial.best.cycles:,}"
        if trial.region not in self.tasks:
            self.tasks[trial.region] = self.bars.add_task(
                "", total=trial.trials, region=place, best=best
            )
        self.bars.update(self.tasks[trial.region], completed=trial.done, best=best)

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
