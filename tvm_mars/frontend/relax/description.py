"""The function by which a library of Relax describes its model."""

from __future__ import annotations

import tvm
from tvm import relax

from ..description import DESCRIPTION, Description

__all__ = ["describe"]


def describe(mod: tvm.IRModule, description: Description) -> tvm.IRModule:
    """Give a module with the function that describes its ``main``."""
    value = tvm.ir.StringImm(description.to_json())
    function = relax.Function([], relax.SeqExpr([], value), ret_ty=value.ty)
    mod = mod.clone()
    mod[DESCRIPTION] = function.with_attr("global_symbol", DESCRIPTION)
    return mod
