"""What a database holds, as text: convergence, and what the best schedules decide otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rich.console import RenderableType

from ..report.layout import new_table, print_parts
from .changes import changes
from .database import Database, Record

__all__ = ["database_data", "print_database"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def print_database(database: Database, file: IO[str]) -> None:
    """Print the searches of a database."""
    print_parts(_parts(database), file)


def database_data(database: Database) -> list[dict[str, Any]]:
    """Give the searches of a database as plain data for JSON.

    ``cycles`` are core cycles, ``energy_pj`` picojoule, which rests on assumptions; ``best_cost``
    is, trial by trial, the least so far of what was to be small.
    """
    found = []
    for workload, arch in dict.fromkeys((one.workload, one.arch) for one in database.records):
        records, best = database.of(workload, arch), database.best(workload, arch)
        assert best is not None
        runs = [list(run) for _, run in itertools.groupby(records, key=lambda one: one.run)]
        found.append(
            {
                "workload": workload,
                "network": database.workloads.get(workload, ""),
                "arch": arch,
                "objective": database.objective,
                "default": _cost_data(records[0]),
                "best": _cost_data(best),
                "runs": [
                    {
                        "run": run[0].run,
                        "best_cost": _best_costs(run, database.objective),
                    }
                    for run in runs
                ],
            }
        )
    return found


def _best_costs(records: Sequence[Record], objective: str) -> list[float]:
    """Give the best cost so far over the trials."""
    return list(itertools.accumulate((one.cost(objective) for one in records), min))


def _cost_data(record: Record) -> dict[str, Any]:
    return {"trial": record.trial, "cycles": record.cycles, "energy_pj": record.energy_pj}


def _parts(database: Database) -> Iterator[RenderableType]:
    keys = dict.fromkeys((one.workload, one.arch) for one in database.records)
    for workload, arch in keys:
        records = database.of(workload, arch)
        best = database.best(workload, arch)
        assert best is not None
        name = database.workloads.get(workload, "")
        yield f"workload {workload[:12]} {name} on machine {arch[:12]}, {len(records)} records"
        for _, run in itertools.groupby(records, key=lambda one: one.run):
            yield from _convergence(list(run), database.objective)
        first = records[0]
        time, energy = first.cycles / best.cycles, first.energy_pj / best.energy_pj
        yield (
            f"default {first.cycles:,} cycles, best {best.cycles:,}: {time:.3f}x, "
            f"energy {energy:.3f}x [A]"
        )
        yield _changes(first, best)
        yield ""


def _convergence(records: Sequence[Record], objective: str) -> Iterator[str]:
    """Give the best cost so far over the trials, as a row of bars."""
    best = _best_costs(records, objective)
    places = [min(len(best) - 1, i * len(best) // _WIDTH) for i in range(min(_WIDTH, len(best)))]
    low, high = best[-1], best[0]
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    bars = "".join(_BARS[round((best[place] - low) * scale)] for place in places)
    found = next(number for number, cost in enumerate(best, 1) if cost == low)
    yield f"run {records[0].run[:8]}: {bars} best at trial {found} of {len(records)}"


def _changes(first: Record, best: Record) -> RenderableType:
    table = new_table("what the best decides otherwise than the default", "decisions")
    for number, changed in enumerate(changes(first.point, best.point)):
        table.add_row(f"step {number}: {changed or 'nothing'}")
    return table
