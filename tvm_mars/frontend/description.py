"""What an exported library says of itself, whatever the IR.

The names of a model's inputs and outputs are not in what TVM exports. A function without arguments
gives them, with the report, as JSON.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import attrs

from mars_runtime.errors import InputError, ProgramError

from .ports import InputSpec
from .report import OffloadReport

__all__ = ["DESCRIPTION", "WRITTEN_BY", "Description", "check_library"]

DESCRIPTION = "mars_model"  # the function's name in a library
WRITTEN_BY = "write it by `mars compile` or tvm_mars.compile(...).export_library(...)"

# An ELF header of 64 bit: where the table of sections starts, the size of an entry, their count.
_ELF = struct.Struct("=4s36xQ10xHH2x")


@attrs.frozen
class Description:
    """A compiled model's inputs, the names of its outputs, and what is offloaded."""

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    report: OffloadReport

    def to_json(self) -> str:
        """Give the description as text that :meth:`from_json` reads."""
        return json.dumps(
            {
                "inputs": [attrs.asdict(entry) for entry in self.inputs],
                "output_names": list(self.output_names),
                "report": self.report.to_json(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        inputs = tuple(
            InputSpec(entry["name"], tuple(entry["shape"]), entry["dtype"])
            for entry in data["inputs"]
        )
        names = tuple(data["output_names"])
        return cls(inputs, names, OffloadReport.from_json(data["report"]))


def check_library(path: str) -> None:
    """Check that a library is all there: the system ends a process that loads part of one.

    Linkers put the table of sections last.

    Raises
    ------
    InputError
        If the file cannot be read.
    ProgramError
        If it is truncated, empty or of another format.
    """
    if sys.platform != "linux" or not path.endswith(".so"):
        return
    try:
        with Path(path).open("rb") as file:
            header = file.read(_ELF.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    if not header.startswith(b"\x7fELF"):
        what = "is no library (ELF)" if header else "is empty"
        raise ProgramError(what, where=path, hint=WRITTEN_BY)
    need = _ELF.size
    if len(header) == need:
        _, start, entry, count = _ELF.unpack(header)
        need = start + entry * count
    if size < need:
        raise ProgramError(
            f"is truncated: {size} bytes of at least {need}", where=path, hint=WRITTEN_BY
        )
