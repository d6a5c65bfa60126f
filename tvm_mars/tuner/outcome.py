"""What the searches of a database came to: what its table, its JSON and its picture show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs

from .changes import Changes, changes
from .database import Database, Record

__all__ = ["LayerOutcome", "Outcome", "Run", "outcomes"]


@attrs.frozen
class Run:
    """A search: the best cost so far, trial by trial."""

    key: str
    best_costs: tuple[float, ...]

    @property
    def name(self) -> str:
        """The beginning of its key, which tells runs apart."""
        return self.key[:8]


@attrs.frozen
class LayerOutcome:
    """A layer's core cycles in the default and in the best schedule, and what differs there."""

    name: str
    default_cycles: int
    best_cycles: int
    changes: Changes


@attrs.frozen(kw_only=True)
class Outcome:
    """What was found for a workload on a machine, both named by their digests."""

    workload: str
    network: str
    arch: str
    objective: str
    records: int
    runs: tuple[Run, ...]
    default: Record
    best: Record
    layers: tuple[LayerOutcome, ...]

    @property
    def gain(self) -> float:
        """How many times as long the default takes."""
        return self.default.cycles / self.best.cycles


def outcomes(database: Database) -> Iterator[Outcome]:
    """Yield what was found for each workload and machine of a database."""
    for workload, arch in dict.fromkeys((one.workload, one.arch) for one in database.records):
        records, best = database.of(workload, arch), database.best(workload, arch)
        assert best is not None
        known = database.workloads[workload]
        default = records[0]  # with which every search begins
        yield Outcome(
            workload=workload,
            network=known.name,
            arch=arch,
            objective=database.objective,
            records=len(records),
            runs=tuple(_runs(records, database.objective)),
            default=default,
            best=best,
            layers=tuple(
                map(
                    LayerOutcome,
                    known.layers,
                    default.layer_cycles,
                    best.layer_cycles,
                    changes(default.point, best.point),
                )
            ),
        )


def _runs(records: list[Record], objective: str) -> Iterator[Run]:
    for key, run in itertools.groupby(records, key=lambda one: one.run):
        costs = itertools.accumulate((one.cost(objective) for one in run), min)
        yield Run(key, tuple(costs))
