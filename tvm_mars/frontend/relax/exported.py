"""Exported libraries, loaded again to run by the model's names."""

from __future__ import annotations

import os

import tvm
from tvm import relax

from mars_runtime import tvm_bridge
from mars_runtime.errors import InputError

from ..description import DESCRIPTION, WRITTEN_BY, Description, check_library
from .api import CompiledModel

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
    try:
        library = tvm.runtime.load_module(where)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"is no library of TVM: {error}", where=where, hint=WRITTEN_BY) from None
    machine = relax.VirtualMachine(library, tvm.cpu())
    try:
        text = machine[DESCRIPTION]()
    except AttributeError:
        raise InputError(
            "does not say its inputs and outputs", where=where, hint=WRITTEN_BY
        ) from None
    said = Description.from_json(str(text))
    return CompiledModel(
        executable=library,
        program=None,
        report=said.report,
        inputs=said.inputs,
        output_names=said.output_names,
        timings={},
    )
