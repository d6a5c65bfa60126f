"""Exported libraries, loaded again to run by the model's names."""

from __future__ import annotations

import json
import os

import tvm
from tvm import relax

from mars_runtime import tvm_bridge
from mars_runtime.errors import InputError

from ..report import OffloadReport
from .api import CompiledModel, InputSpec
from .description import DESCRIPTION

__all__ = ["load_library"]


def load_library(path: str | os.PathLike[str]) -> CompiledModel:
    """Load what :meth:`CompiledModel.export_library` wrote.

    Raises
    ------
    InputError
        If the file is no library, or not one of these.
    """
    tvm_bridge.register()
    where = os.fspath(path)
    hint = "write it by `mars compile` or tvm_mars.compile(...).export_library(...)"
    try:
        library = tvm.runtime.load_module(where)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"is no library of TVM: {error}", where=where, hint=hint) from None
    machine = relax.VirtualMachine(library, tvm.cpu())
    try:
        text = machine[DESCRIPTION]()
    except AttributeError:
        raise InputError("does not say its inputs and outputs", where=where, hint=hint) from None
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
