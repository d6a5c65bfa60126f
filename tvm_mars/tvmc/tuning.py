"""``tvmc-mars tune``: schedules for MARS by the search that ``mars tune`` runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvm.driver.tvmc import TVMCException, frontends
from tvm.driver.tvmc.transform import apply_graph_transforms, parse_graph_transform_args

from ..frontend.relay.partition import options_of
from ..tuner.api import tune
from ..tuner.database import Database
from ..tuner.progress import Progress
from ..tuner.search import COST_MODELS, OBJECTIVES, RUNNERS
from ..tuner.show import print_database
from ..tuner.strategies import STRATEGIES
from .arguments import (
    add_target_options,
    names_mars,
    not_without_mars,
    options_in_target,
    target_as_asked,
)
from .target import NAME, partition

__all__ = ["add_tune_options", "drive_tune"]

# What of the search --tuner decides, for those of TVM's tuners that it has.
_TUNERS: Mapping[str, Mapping[str, str]] = {
    "xgb": {},
    "ga": {"cost_model": "none"},
    "gridsearch": {"strategy": "grid"},
    "random": {"strategy": "random"},
}
# Options of the search that tvmc has no name for.
_OF_THE_SEARCH = (
    "objective",
    "strategy",
    "cost_model",
    "seed",
    "runner",
    "ray_address",
    "trial_timeout",
    "resume",
)
# Options that are about kernels on a device, which has to be reached and whose clock is not exact.
_OF_KERNELS = (
    "enable_autoscheduler",
    "min_repeat_ms",
    "number",
    "repeat",
    "rpc_key",
    "rpc_tracker",
    "target_host",
    "tasks",
    "timeout",
)


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the target and of the search."""
    add_target_options(
        parser,
        f"Where --target names {NAME}, the schedules of what MARS takes are tuned, on the timed "
        f"machine, and no kernels of the other target (tune those with that target alone). "
        "-o names a directory then, to which records are appended; --tuning-records another, the "
        "best of which are measured early. --trials, --early-stopping, --parallel (processes that "
        "measure; the result does not depend on it), --input-shapes, --model-format, the graph's "
        f"transforms and --tuner {', '.join(_TUNERS)} mean what they say above.",
    )
    group = parser.add_argument_group(f"search for target {NAME}")
    group.add_argument(
        "--objective", choices=OBJECTIVES, help="What is to be small. Defaults to 'cycles'."
    )
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="How schedules are chosen, whatever --tuner says. Defaults to 'evolution'.",
    )
    group.add_argument(
        "--cost-model",
        choices=COST_MODELS,
        help="Whether a learned model picks what is measured. Defaults to 'xgb'.",
    )
    group.add_argument("--seed", type=int, help="Of everything random. Defaults to 0.")
    group.add_argument(
        "--runner",
        choices=RUNNERS,
        help="Where schedules are measured: on this host or a Ray cluster. Defaults to 'local'.",
    )
    group.add_argument(
        "--ray-address",
        help="The cluster, HOST:PORT or auto. Defaults to $RAY_ADDRESS, or one started here.",
    )
    group.add_argument(
        "--trial-timeout",
        type=float,
        help="Seconds that a worker of the cluster may take for a schedule. Defaults to 60.",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="Take up the search with the same options in the directory of -o.",
    )
    parser.set_defaults(unset={name: parser.get_default(name) for name in _OF_KERNELS})


def drive_tune(arguments: argparse.Namespace, original: Callable[[argparse.Namespace], int]) -> int:
    """Tune MARS's part of a model; for other targets, as tvmc does.

    Raises
    ------
    TVMCException
        If the model is not there, the target or an option is not good, or the user interrupts.
    MarsError
        If nothing of the model is on MARS, records cannot be read, XGBoost or Ray is missing,
        or workers are lost.
    """
    given = {name: getattr(arguments, name) for name in _OF_THE_SEARCH}
    given = {name: value for name, value in given.items() if value is not None}
    if not names_mars(arguments):
        for name in given:
            raise not_without_mars(name.replace("_", "-"))
        return original(arguments)
    _check(arguments)
    model = frontends.load_model(
        arguments.FILE, arguments.model_format, shape_dict=arguments.input_shapes
    )
    with target_as_asked(arguments):
        mod = apply_graph_transforms(model.mod, parse_graph_transform_args(arguments))
        mod = partition(mod, model.params, **options_in_target(arguments))
        _tune(mod, arguments, {**_TUNERS[arguments.tuner], **given})
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not Path(arguments.FILE).is_file():
        raise TVMCException(
            f"Input file '{arguments.FILE}' doesn't exist, is a broken symbolic link, or a "
            "directory."
        )
    for name, unset in arguments.unset.items():
        if getattr(arguments, name) != unset:
            raise TVMCException(
                f"--{name.replace('_', '-')} is about kernels of TVM's own targets; schedules for "
                f"{NAME} are timed exactly, on this host (leave it out)"
            )
    if arguments.tuner not in _TUNERS:
        raise TVMCException(
            f"--tuner {arguments.tuner} is for kernels of TVM's own targets; {NAME} has "
            f"{', '.join(_TUNERS)} (more by --strategy and --cost-model)"
        )


def _tune(mod: Any, arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    records = arguments.tuning_records
    earlier = Database.existing(records, options.get("objective", "cycles")) if records else None
    try:
        with Progress() as progress:
            database = tune(
                mod,
                work_dir=arguments.output,
                max_trials_global=arguments.trials,
                arch=options_of(mod).arch,
                channel_order=options_of(mod).channel_order,
                num_workers=arguments.parallel,
                patience=arguments.early_stopping,
                earlier=earlier,
                on_trial=progress.report,
                **options,
            )
    except KeyboardInterrupt:
        raise TVMCException("interrupted (--resume goes on from what was measured)") from None
    print_database(database, sys.stdout)
