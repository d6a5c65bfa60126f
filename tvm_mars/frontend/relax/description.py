"""What an exported library says of itself.

The names of a model's inputs and outputs are not in what TVM exports. A function without arguments
gives them, with the report, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import tvm
from tvm import relax

from ..report import OffloadReport

if TYPE_CHECKING:
    from .api import InputSpec

__all__ = ["DESCRIPTION", "describe"]

DESCRIPTION = "mars_model"


def describe(
    mod: tvm.IRModule,
    inputs: Sequence[InputSpec],
    output_names: Sequence[str],
    report: OffloadReport,
) -> tvm.IRModule:
    """Give a module with the function that describes its ``main``."""
    text = json.dumps(
        {
            "inputs": [attrs.asdict(entry) for entry in inputs],
            "output_names": list(output_names),
            "report": report.to_json(),
        }
    )
    value = tvm.ir.StringImm(text)
    function = relax.Function([], relax.SeqExpr([], value), ret_ty=value.ty)
    mod = mod.clone()
    mod[DESCRIPTION] = function.with_attr("global_symbol", DESCRIPTION)
    return mod
