"""The commands of tvmc, extended: ``compile`` for MARS, ``run`` in this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from tvm.driver.tvmc import TVMCException
from tvm.driver.tvmc.main import REGISTERED_PARSER, register_parser

from mars_runtime.errors import MarsError

from .compiling import add_compile_options, drive_compile
from .running import drive_run
from .target import register
from .tuning import add_tune_options, drive_tune

__all__ = ["extend"]

PROGRAM = "tvmc-mars"

_ABOUT = """\
TVM's compiler driver, with MARS among its targets.

From a quantized ONNX model to its results:
  tvmc-mars compile --target="mars, llvm" net.onnx -o net.tar --dump-offloads -
  tvmc-mars run net.tar --inputs net.npz --outputs results.npz --print-top 3

Faster schedules, searched for on the timed machine:
  tvmc-mars tune --target="mars, llvm" net.onnx -o tuned --trials 256
  tvmc-mars compile --target="mars, llvm" net.onnx -o net.tar --tuning-records tuned

What MARS does not take is compiled for the other target, this machine unless -mtriple says
otherwise. `tvmc-mars compile --help` lists the options of the target under "target mars".
"""

Driver = Callable[[argparse.Namespace], int]

_DRIVERS = {"compile": drive_compile, "run": drive_run, "tune": drive_tune}


def extend() -> None:
    """Extend the commands of this process's tvmc."""
    register()
    if _extend_parsers not in REGISTERED_PARSER:
        register_parser(_extend_parsers)


def _extend_parsers(commands: Any, parser: argparse.ArgumentParser, _config: Any) -> None:
    parser.prog, parser.description, parser.epilog = PROGRAM, _ABOUT, None
    for name, command in commands.choices.items():
        command.prog = f"{PROGRAM} {name}"
    add_compile_options(commands.choices["compile"])
    add_tune_options(commands.choices["tune"])
    for name, drive in _DRIVERS.items():
        command = commands.choices[name]
        command.set_defaults(func=_told(drive, command.get_default("func")))


def _told(drive: Callable[[argparse.Namespace, Driver], int], original: Driver) -> Driver:
    """Give a command whose errors tvmc tells in its way."""

    def told(arguments: argparse.Namespace) -> int:
        try:
            return drive(arguments, original)
        except MarsError as error:
            raise TVMCException(str(error)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise TVMCException(f"{os.fspath(error.filename)}: {error.strerror}") from error

    return told
