"""Tuning a model: its regions one after the other, into one database."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mars_runtime.errors import OptionError, UnsupportedError

from ..compiler import NamedGraph, with_channel_order
from ..graph import Graph
from ..options import CompileOptions
from ..schedule import Point
from .database import Database, Record, workload_key
from .ray_runner import RayOptions, connected
from .search import SearchOptions, search
from .space import Space

__all__ = ["Trial", "regions_of", "tune"]

EARLIER = 8  # schedules that a search takes from earlier records


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
    shape: Mapping[str, Sequence[int]] | None = None,
    num_trials_per_iter: int = 64,
    cost_model: str = "xgb",
    database: str = "json",
    arch: Any = "mars",
    channel_order: str = "given",
    objective: str = "cycles",
    runner: str = "local",
    num_workers: int | None = None,
    ray_address: str | None = None,
    trial_timeout: float = 60.0,
    resume: bool = False,
    seed: int | None = None,
    strategy: str = "evolution",
    patience: int | None = None,
    earlier: Database | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Database:
    """Search for the best schedules of a model's regions.

    Compile in ``with`` of the database that it gives, or of ``Database(work_dir)`` later, and the
    best schedule is used for every region whose workload and machine it has records of.

    Parameters
    ----------
    mod : path, onnx.ModelProto, tvm.IRModule, torch.export.ExportedProgram or Graph
        The model, as :func:`tvm_mars.compile` takes it, a module that is partitioned already, or
        an integer graph.
    work_dir : path
        Directory of the database.
    max_trials_global, max_trials_per_task : int
        Schedules that are measured, for all regions and at most for one.
    shape : mapping of str to sequence of int, optional
        Shapes of inputs that an ONNX model leaves open, as :func:`tvm_mars.compile` takes them.
        Records serve any batch.
    num_trials_per_iter : int
        Schedules that are measured between two fits of the cost model; at most an eighth of all.
    cost_model : "xgb" or "none"
        Whether a learned model picks what is measured.
    database : "json"
        Its form.
    arch : str, path, MarsArch or mapping
        The machine; that of a partitioned module.
    channel_order : "given" or "packed"
        As :class:`tvm_mars.CompileOptions` has it; that of a partitioned module. Records serve
        compilations with the same.
    objective : "cycles", "energy" or "edp"
        What is to be small.
    runner : "local" or "ray"
        Where schedules are measured: on this host, or on a Ray cluster, where what a lost worker
        was measuring is measured again. The result does not depend on it.
    num_workers : int, optional
        Processes that measure; one if not given, with the runner ``local`` this one. The result
        does not depend on it.
    ray_address : str, optional
        The cluster: ``HOST:PORT``, or ``auto`` for one of this host. Where this process is
        connected to one already, it is that. If not given, the one of ``RAY_ADDRESS``, else one
        that is started here, with a core for each worker, and ended when all is measured.
    trial_timeout : float
        Seconds that a worker of a cluster may take for a schedule; it is tried three times more.
    resume : bool
        Whether to take up records of an earlier search with the same options.
    seed : int, optional
        Of everything random; 0 if not given.
    strategy : "evolution", "random", "grid" or "annealing"
        How schedules are chosen.
    patience : int, optional
        Trials without a better one after which a region's search ends.
    earlier : Database, optional
        Records of other searches: the best schedules that they have of a region, on whatever
        machine, are measured early in its search.
    on_trial : callable
        Called after every trial.

    Raises
    ------
    OptionError
        If an option has no meaning.
    UnsupportedError
        If nothing of the model is on MARS.
    RunnerError
        If a worker process is lost; if Ray is not installed, its cluster cannot be reached or
        starts no worker, or a schedule was tried as often as allowed.
    DatabaseError
        If the records of ``work_dir`` cannot be read.
    """
    if database != "json":
        raise OptionError(f"{database!r} is not json", where="option database")
    if max_trials_global < 1:
        raise OptionError(f"{max_trials_global} is not above 0", where="option max_trials_global")
    if ray_address is not None and runner != "ray":
        raise OptionError("is for the runner ray", where="option ray_address")
    ray = RayOptions(address=ray_address, timeout=trial_timeout)
    asked = CompileOptions.from_mapping({"arch": arch, "channel_order": channel_order})
    machine = asked.arch
    spaces = [Space.of(graph, machine) for graph in regions_of(mod, asked, shape)]
    # Regions that are alike need one search.
    spaces = list({workload_key(one.graph, one.packed): one for one in spaces}.values())
    if not spaces:
        raise UnsupportedError(
            "nothing of it is on MARS",
            where="model",
            hint="tvm_mars.offload_report and --dump-offloads of compile say why",
        )
    share = max(1, max_trials_global // len(spaces))
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
        ray=ray,
        patience=patience,
    )
    names = _names(mod, len(spaces))
    records = Database(work_dir, objective)
    with contextlib.ExitStack() as stack:
        if runner == "ray":  # one connection for all regions
            stack.enter_context(connected(ray.address, options.workers))
        for number, space in enumerate(spaces):

            def report(record: Record, best: Record, number: int = number) -> None:
                on_trial(Trial(number, len(spaces), record.trial + 1, trials, record, best))

            first: tuple[Point, ...] = ()
            if earlier is not None:
                first = earlier.best_points(workload_key(space.graph, space.packed), EARLIER)
            begun = attrs.evolve(options, first=first)
            search(space, records, begun, resume=resume, name=names[number], on_trial=report)
    return records


def _names(mod: Any, regions: int) -> list[str]:
    """Give what a database calls a model's regions, by its file's name."""
    name = Path(mod).stem if isinstance(mod, (str, os.PathLike)) else ""
    if not name or regions == 1:
        return [name] * regions
    return [f"{name}, region {number}" for number in range(1, regions + 1)]


def regions_of(
    mod: Any, options: CompileOptions, shape: Mapping[str, Sequence[int]] | None = None
) -> list[Graph]:
    """Give the graphs of a model's regions as they are compiled, in the order in which they run."""
    return [
        with_channel_order(named, options.arch, options.channel_order).graph
        for named in _named_graphs(mod, options, shape)
    ]


def _named_graphs(
    mod: Any, options: CompileOptions, shape: Mapping[str, Sequence[int]] | None
) -> list[NamedGraph]:
    if isinstance(mod, NamedGraph):
        return [mod]
    if isinstance(mod, Graph):
        return [NamedGraph.of(mod)]
    from ..frontend import adapter

    ir = adapter()
    partitioned = ir.partition_for_mars(
        ir.import_model(mod, shape), arch=options.arch, channel_order=options.channel_order
    )
    return [NamedGraph.of(graph) for graph in ir.graphs_of(partitioned)]
