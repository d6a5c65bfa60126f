"""``tvmc-mars compile``, and what ``tune`` has to say of MARS."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm.driver.tvmc import TVMCException
from tvm.driver.tvmc.target import (
    is_inline_json,
    parse_target,
    reconstruct_target_args,
    target_from_cli,
)

from mars_runtime.errors import OptionError

from ..frontend.relay.codegen import compiling_for, host_target
from ..options import CompileOptions, read_assignment
from .target import CHANGES, DUMP, NAME, mars_options

__all__ = ["add_options", "drive_compile", "drive_tune"]

_NAMES = (*CompileOptions.describe(), CHANGES)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the target, named as tvmc names those of its own targets."""
    parser.set_defaults(target=NAME)
    group = parser.add_argument_group(
        f"target {NAME}",
        "What MARS takes goes to it, the rest to the target that follows it (--target="
        f'"{NAME}, llvm ..."); llvm for this machine where none does.',
    )
    for name, text in CompileOptions.describe().items():
        group.add_argument(f"--target-{NAME}-{name.replace('_', '-')}", help=text)
    group.add_argument(
        f"--target-{NAME}-{CHANGES}",
        metavar="FIELD=VALUE",
        action="append",
        type=_assignment,
        help="Change a field of the machine; may be repeated. `mars arch` lists the fields.",
    )


def drive_tune(arguments: argparse.Namespace, original: Callable[[argparse.Namespace], int]) -> int:
    """Tune as tvmc does, which is for kernels of TVM's own targets.

    Raises
    ------
    TVMCException
        If the target names MARS.
    """
    if NAME in [entry["name"] for entry in _parsed(arguments.target or "llvm")]:
        raise TVMCException(
            f"tvmc tunes kernels that TVM generates, and {NAME} has none (tune those that stay on "
            'the CPU: --target="llvm ...", and compile with --tuning-records)'
        )
    return original(arguments)


def drive_compile(
    arguments: argparse.Namespace, original: Callable[[argparse.Namespace], int]
) -> int:
    """Compile as tvmc does, with what the command line says of MARS.

    Raises
    ------
    TVMCException
        If the target or an option is not good.
    """
    options = _options(arguments)
    targets = _parsed(arguments.target)
    names = [entry["name"] for entry in targets]
    if NAME not in names:
        _check_without_mars(arguments, options)
        return original(arguments)
    if arguments.executor == "aot" or arguments.output_format == "mlf":
        raise TVMCException(
            "tvmc packs an AOT executor for devices without Python, and MARS is simulated in "
            f"Python (compile for {NAME} with --executor graph and -f so)"
        )
    if arguments.dump_offloads:
        # tvmc's own report rests on spans, which know neither composites nor reasons.
        options[DUMP], arguments.dump_offloads = arguments.dump_offloads, ""
    if names == [NAME]:
        arguments.target += ", llvm"
    if not any("mtriple" in entry["opts"] for entry in targets if entry["name"] == "llvm"):
        # The default of an LLVM build need not be the machine that it runs on.
        given = arguments.target_llvm_mtriple
        arguments.target_llvm_mtriple = given or str(host_target().attrs["mtriple"])
    with mars_options(options), compiling_for(_target(arguments)):
        return original(arguments)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the options of the target that the command line has beside the target's text."""
    given = {name: getattr(arguments, f"target_{NAME}_{name}") for name in _NAMES}
    return {name: value for name, value in given.items() if value is not None}


def _parsed(target: str) -> list[dict[str, Any]]:
    """Take the text of a target apart; a file or JSON names TVM's own alone."""
    if Path(target).is_file() or is_inline_json(target):
        return []
    try:
        return list(parse_target(target))
    except (ValueError, IndexError) as error:
        raise TVMCException(f"target {target!r} cannot be read: {error}") from error


def _check_without_mars(arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    if options:
        option = next(iter(options)).replace("_", "-")
        raise TVMCException(f"Passed --target-{NAME}-{option} but did not specify {NAME} target")
    if arguments.dump_offloads:
        raise TVMCException(
            f"--dump-offloads says what {NAME} takes, and --target does not name it "
            f'(try --target="{NAME}, {arguments.target}")'
        )


def _target(arguments: argparse.Namespace) -> tvm.target.Target:
    """Give the target beside MARS; what is wrong with it is told in a line."""
    try:
        return target_from_cli(arguments.target, reconstruct_target_args(arguments))[0]
    except (ValueError, tvm.error.TVMError) as error:
        problem = str(error).strip().rpartition("\n")[2]
        raise TVMCException(f"target {arguments.target!r}: {problem}") from error


def _assignment(text: str) -> tuple[str, str]:
    try:
        return read_assignment(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
