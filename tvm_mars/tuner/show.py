"""What a database holds, as text: convergence, and what the best schedules decide otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from rich.console import RenderableType

from ..report.layout import new_table, print_parts
from .changes import changes_text
from .database import Database, Record
from .outcome import Outcome, Run, outcomes

__all__ = ["database_data", "print_database"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def print_database(database: Database, file: IO[str]) -> None:
    """Print the searches of a database."""
    print_parts((part for found in outcomes(database) for part in _parts(found)), file)


def database_data(database: Database) -> list[dict[str, Any]]:
    """Give the searches of a database as plain data for JSON.

    ``cycles`` are core cycles, ``energy_pj`` picojoule, which rests on assumptions; ``best_cost``
    is, trial by trial, the least so far of what was to be small; ``changes`` hold the default's
    value and the best's.
    """
    return [
        {
            "workload": found.workload,
            "network": found.network,
            "arch": found.arch,
            "objective": found.objective,
            "default": _cost_data(found.default),
            "best": _cost_data(found.best),
            "layers": [
                {
                    "layer": layer.name,
                    "default_cycles": layer.default_cycles,
                    "best_cycles": layer.best_cycles,
                    "changes": {name: list(both) for name, both in layer.changes.items()},
                }
                for layer in found.layers
            ],
            "runs": [{"run": run.key, "best_cost": list(run.best_costs)} for run in found.runs],
        }
        for found in outcomes(database)
    ]


def _cost_data(record: Record) -> dict[str, Any]:
    return {"trial": record.trial, "cycles": record.cycles, "energy_pj": record.energy_pj}


def _parts(found: Outcome) -> Iterator[RenderableType]:
    name = f" {found.network}" if found.network else ""
    yield (
        f"workload {found.workload[:12]}{name} on machine {found.arch[:12]}, "
        f"{found.records} records"
    )
    yield from map(_convergence, found.runs)
    energy = found.default.energy_pj / found.best.energy_pj
    yield (
        f"default {found.default.cycles:,} cycles, best {found.best.cycles:,}: {found.gain:.3f}x, "
        f"energy {energy:.3f}x [A]"
    )
    yield _layers(found)
    yield ""


def _convergence(run: Run) -> str:
    """Give the best cost so far over the trials, as a row of bars."""
    best = run.best_costs
    places = [min(len(best) - 1, i * len(best) // _WIDTH) for i in range(min(_WIDTH, len(best)))]
    low, high = best[-1], best[0]
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    bars = "".join(_BARS[round((best[place] - low) * scale)] for place in places)
    return f"run {run.name}: {bars} best at trial {best.index(low) + 1} of {len(best)}"


def _layers(found: Outcome) -> RenderableType:
    table = new_table("layers", "layer")
    for column in ("default", "best"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("decisions of the best", overflow="fold")
    for layer in found.layers:
        table.add_row(
            layer.name,
            f"{layer.default_cycles:,}",
            f"{layer.best_cycles:,}",
            changes_text(layer.changes) or "as the default",
        )
    return table
