"""Exported libraries, loaded again to run by the model's names."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import tvm
from tvm import relax

from mars_runtime import tvm_bridge
from mars_runtime.errors import InputError, ProgramError

from ..report import OffloadReport
from .api import CompiledModel, InputSpec
from .description import DESCRIPTION

__all__ = ["load_library"]

_HINT = "write it by `mars compile` or tvm_mars.compile(...).export_library(...)"
# An ELF header of 64 bit: where the table of sections starts, the size of an entry, their count.
_ELF = struct.Struct("=4s36xQ10xHH2x")


def load_library(path: str | os.PathLike[str]) -> CompiledModel:
    """Load what :meth:`CompiledModel.export_library` wrote.

    Raises
    ------
    InputError
        If the file cannot be read, is no library, or not one of these.
    ProgramError
        If the file is truncated, empty or of another format.
    """
    tvm_bridge.register()
    where = os.fspath(path)
    if sys.platform == "linux" and where.endswith(".so"):
        _check_elf(where)
    try:
        library = tvm.runtime.load_module(where)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"is no library of TVM: {error}", where=where, hint=_HINT) from None
    machine = relax.VirtualMachine(library, tvm.cpu())
    try:
        text = machine[DESCRIPTION]()
    except AttributeError:
        raise InputError("does not say its inputs and outputs", where=where, hint=_HINT) from None
    data = json.loads(str(text))
    return CompiledModel(
        executable=library,
        program=None,
        report=OffloadReport.from_json(data["report"]),
        inputs=tuple(
            InputSpec(entry["name"], tuple(entry["shape"]), entry["dtype"])
            for entry in data["inputs"]
        ),
        output_names=tuple(data["output_names"]),
        timings={},
    )


def _check_elf(path: str) -> None:
    """Check that a library is all there: the system ends a process that loads part of one.

    Linkers put the table of sections last.
    """
    try:
        with Path(path).open("rb") as file:
            header = file.read(_ELF.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    if not header.startswith(b"\x7fELF"):
        what = "is no library (ELF)" if header else "is empty"
        raise ProgramError(what, where=path, hint=_HINT)
    need = _ELF.size
    if len(header) == need:
        _, start, entry, count = _ELF.unpack(header)
        need = start + entry * count
    if size < need:
        raise ProgramError(f"is truncated: {size} bytes of at least {need}", where=path, hint=_HINT)
