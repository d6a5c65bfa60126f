"""Exported libraries, loaded again to run by the model's names."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import tvm

from mars_runtime import tvm_bridge
from mars_runtime.errors import InputError

from ..description import WRITTEN_BY, check_library
from .api import CompiledModel
from .description import description

__all__ = ["load_library"]


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
    check_library(where)
    if where.endswith(".tar"):
        _check_archive(where)
    try:
        library = tvm.runtime.load_module(where)
    except (tvm.error.TVMError, RuntimeError, OSError, ValueError) as error:
        problem = str(error).strip().rpartition("\n")[2]
        raise InputError(f"is no library of TVM: {problem}", where=where, hint=WRITTEN_BY) from None
    said = description(library)
    if said is None:
        raise InputError("does not say its inputs and outputs", where=where, hint=WRITTEN_BY)
    return CompiledModel(library, None, said.report, said.inputs, said.output_names, {})


def _check_archive(path: str) -> None:
    """Check that an archive holds object files, which TVM links, and not another's package."""
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    except tarfile.ReadError:
        raise InputError("is no archive", where=path, hint=WRITTEN_BY) from None
    if not any(Path(name).suffix == ".o" for name in names):
        raise InputError(
            "is a package of tvmc, not a library" if "mod.json" in names else "holds no library",
            where=path,
            hint="tvmc-mars run takes what tvmc-mars compile wrote",
        )
