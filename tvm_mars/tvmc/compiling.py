"""``tvmc-mars compile``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tvm.driver.tvmc import TVMCException

from ..tuner.database import FILES, Database
from .arguments import add_target_options, names_mars, target_as_asked
from .target import DUMP, NAME

__all__ = ["add_compile_options", "drive_compile"]


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the target."""
    add_target_options(
        parser,
        "What MARS takes goes to it, the rest to the target that follows it (--target="
        f'"{NAME}, llvm ..."); llvm for this machine where none does. --tuning-records takes '
        f"the directory that `tune` wrote for {NAME}, or a file of TVM's for the other target.",
    )


def drive_compile(
    arguments: argparse.Namespace, original: Callable[[argparse.Namespace], int]
) -> int:
    """Compile as tvmc does, with what the command line says of MARS.

    Raises
    ------
    TVMCException
        If the target or an option is not good.
    DatabaseError
        If tuning records cannot be read.
    """
    if not names_mars(arguments):
        _check_without_mars(arguments)
        return original(arguments)
    if arguments.executor == "aot" or arguments.output_format == "mlf":
        raise TVMCException(
            "tvmc packs an AOT executor for devices without Python, and MARS is simulated in "
            f"Python (compile for {NAME} with --executor graph and -f so)"
        )
    others = {}
    if arguments.dump_offloads:
        # tvmc's own report rests on spans, which know neither composites nor reasons.
        others[DUMP], arguments.dump_offloads = arguments.dump_offloads, ""
    with _schedules(arguments), target_as_asked(arguments, others):
        return original(arguments)


def _schedules(arguments: argparse.Namespace) -> AbstractContextManager[object]:
    """Give what applies records of MARS; a file's are of TVM's kernels, and stay with tvmc."""
    records = arguments.tuning_records
    if not records or (Path(records).is_file() and Path(records).name not in FILES):
        return nullcontext()
    arguments.tuning_records = ""
    return Database.existing(records)


def _check_without_mars(arguments: argparse.Namespace) -> None:
    if arguments.dump_offloads:
        raise TVMCException(
            f"--dump-offloads says what {NAME} takes, and --target does not name it "
            f'(try --target="{NAME}, {arguments.target}")'
        )
    if arguments.tuning_records and Path(arguments.tuning_records).is_dir():
        raise TVMCException(
            f"{arguments.tuning_records} is a directory, as records for {NAME} are, and --target "
            f'does not name it (try --target="{NAME}, {arguments.target}")'
        )
