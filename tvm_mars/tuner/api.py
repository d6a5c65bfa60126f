"""Tuning a model: its regions one after the other, into one database."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from mars_runtime.arch import MarsArch
from mars_runtime.errors import OptionError

from ..compiler import NamedGraph
from ..graph import Graph
from ..options import CompileOptions
from ..pack import PackedConv
from ..schedule import Schedule
from ..schedule.applied import apply_schedules
from .database import Database, Record
from .search import SearchOptions, search
from .space import Space

__all__ = ["Trial", "regions_of", "tune"]


@attrs.frozen
class Trial:
    """A measured schedule, as a progress report has it.

    ``region`` counts from 0; ``done`` of ``trials`` were measured for it, ``best`` is the best.
    """

    region: int
    regions: int
    done: int
    trials: int
    record: Record
    best: Record


def tune(
    mod: Any,
    *,
    work_dir: str | os.PathLike[str],
    max_trials_global: int,
    max_trials_per_task: int | None = None,
    num_trials_per_iter: int = 64,
    cost_model: str = "xgb",
    database: str = "json",
    arch: Any = "mars",
    objective: str = "cycles",
    runner: str = "local",
    num_workers: int | None = None,
    resume: bool = False,
    seed: int | None = None,
    strategy: str = "evolution",
    patience: int | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Database:
    """Search for the best schedules of a model's regions.

    Compile in ``with`` of the database that it gives, or of ``Database(work_dir)`` later, and the
    best schedule is used for every region whose workload and machine it has records of.

    Parameters
    ----------
    mod : path, onnx.ModelProto, tvm.IRModule, torch.export.ExportedProgram or Graph
        The model, as :func:`tvm_mars.compile` takes it, or an integer graph.
    work_dir : path
        Directory of the database.
    max_trials_global, max_trials_per_task : int
        Schedules that are measured, for all regions and at most for one.
    num_trials_per_iter : int
        Schedules that are measured between two fits of the cost model; at most an eighth of all.
    cost_model : "xgb" or "none"
        Whether a learned model picks what is measured.
    database : "json"
        Its form.
    arch : str, path, MarsArch or mapping
        The machine.
    objective : "cycles", "energy" or "edp"
        What is to be small.
    runner : "local"
        Where schedules are measured: on this host.
    num_workers : int, optional
        Processes that measure; in this one if not given. The result does not depend on it.
    resume : bool
        Whether to take up records of an earlier search with the same options.
    seed : int, optional
        Of everything random; 0 if not given.
    strategy : "evolution", "random", "grid" or "annealing"
        How schedules are chosen.
    patience : int, optional
        Trials without a better one after which a region's search ends.
    on_trial : callable
        Called after every trial.

    Raises
    ------
    OptionError
        If an option has no meaning, or nothing of the model is on MARS.
    """
    if database != "json":
        raise OptionError(f"{database!r} is not json", where="option database")
    machine = CompileOptions.from_mapping({"arch": arch}).arch
    graphs = regions_of(mod, machine)
    if not graphs:
        raise OptionError(
            "nothing of the model is on MARS", where="option mod", hint="see the offload report"
        )
    share = max(1, max_trials_global // len(graphs))
    trials = min(share, max_trials_per_task or share)
    options = SearchOptions(
        trials=trials,
        batch=min(num_trials_per_iter, max(8, trials // 8)),
        objective=objective,
        strategy=strategy,
        cost_model=cost_model,
        seed=seed or 0,
        runner=runner,
        workers=num_workers or 1,
        patience=patience,
    )
    records = Database(work_dir, objective)
    for number, graph in enumerate(graphs):

        def report(record: Record, best: Record, number: int = number) -> None:
            on_trial(Trial(number, len(graphs), record.trial + 1, trials, record, best))

        search(Space.of(graph, machine), records, options, resume=resume, on_trial=report)
    return records


def regions_of(mod: Any, arch: MarsArch) -> list[Graph]:
    """Give the graphs of a model's regions, as a compilation meets them."""
    if isinstance(mod, NamedGraph):
        return [mod.graph]
    if isinstance(mod, Graph):
        return [mod]
    import tvm_mars

    found: list[Graph] = []

    def collect(graph: Graph, at: MarsArch, packed: Mapping[str, PackedConv]) -> Schedule | None:
        if at == arch:
            found.append(graph)
        return None

    token = apply_schedules(collect)
    try:
        tvm_mars.compile(mod, arch=arch)
    finally:
        token.var.reset(token)
    return found
