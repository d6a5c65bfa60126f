"""The target of a command line: TVM's text of it, and what the options say of MARS."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from .target import CHANGES, NAME, mars_options

__all__ = [
    "add_target_options",
    "names_mars",
    "not_without_mars",
    "options_in_target",
    "target_as_asked",
]

_NAMES = (*CompileOptions.describe(), CHANGES)


def add_target_options(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the options of the target, named as tvmc names those of its own targets."""
    parser.set_defaults(target=NAME)
    group = parser.add_argument_group(f"target {NAME}", about)
    for name, text in CompileOptions.describe().items():
        group.add_argument(f"--target-{NAME}-{name.replace('_', '-')}", help=text)
    group.add_argument(
        f"--target-{NAME}-{CHANGES}",
        metavar="FIELD=VALUE",
        action="append",
        type=_assignment,
        help="Change a field of the machine; may be repeated. `mars arch` lists the fields.",
    )


def names_mars(arguments: argparse.Namespace) -> bool:
    """Tell whether the target names MARS; if it does not, no option of MARS may be given.

    Raises
    ------
    TVMCException
        If the target cannot be read, or such an option is given.
    """
    if NAME in [entry["name"] for entry in _parsed(arguments.target)]:
        return True
    for name in _options(arguments):
        raise not_without_mars(f"target-{NAME}-{name.replace('_', '-')}")
    return False


def options_in_target(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the options of MARS in the target's text, which tvmc passes on where it compiles."""
    found: dict[str, Any] = {}
    for entry in _parsed(arguments.target):
        if entry["name"] == NAME:
            found.update(entry["opts"])
    return found


def not_without_mars(option: str) -> TVMCException:
    """Give the error of an option that is nothing without MARS, in tvmc's words."""
    return TVMCException(f"Passed --{option} but did not specify {NAME} target")


@contextmanager
def target_as_asked(
    arguments: argparse.Namespace, others: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Compile for the target that a command line asks for, completed, with its options of MARS.

    Parameters
    ----------
    others : mapping, optional
        Options of MARS beside those.

    Raises
    ------
    TVMCException
        If the target is not good.
    """
    targets = _parsed(arguments.target)
    if [entry["name"] for entry in targets] == [NAME]:
        arguments.target += ", llvm"
    if not any("mtriple" in entry["opts"] for entry in targets if entry["name"] == "llvm"):
        # The default of an LLVM build need not be the machine that it runs on.
        given = arguments.target_llvm_mtriple
        arguments.target_llvm_mtriple = given or str(host_target().attrs["mtriple"])
    target = _target(arguments)
    # Inside the target TVM requantizes as it does when it builds for it.
    with mars_options({**_options(arguments), **(others or {})}), compiling_for(target), target:
        yield


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
