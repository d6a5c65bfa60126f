"""The function by which a library of Relay describes its model.

A compiled function of this TVM gives numbers alone, so this one hands its text to a function of the
process that asks.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import tvm
from tvm import tir

from ..description import DESCRIPTION, Description

__all__ = ["LISTENER", "describe", "description", "listen"]

LISTENER = "mars.model.describe"

_HEARD: ContextVar[list[str] | None] = ContextVar("mars_relay_description", default=None)


def describe(library: Any, description: Description, target: tvm.target.Target) -> None:
    """Add the function that describes a model to the library that TVM built of it."""
    said = tir.call_packed(LISTENER, description.to_json())
    function = tir.PrimFunc([], tir.Evaluate(said)).with_attr("global_symbol", DESCRIPTION)
    built = tvm.build(tvm.IRModule({DESCRIPTION: function}), target=target)
    library.get_lib().import_module(built)


def description(library: tvm.runtime.Module) -> Description | None:
    """Give what a library says of its model, None if it says nothing."""
    try:
        function = library.get_function(DESCRIPTION, query_imports=True)
    except AttributeError:
        return None
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        function()
    finally:
        _HEARD.reset(token)
    return Description.from_json(heard[0])


def listen(text: str) -> int:
    """Hear a description: the function that libraries call as ``mars.model.describe``."""
    heard = _HEARD.get()
    if heard is not None:
        heard.append(str(text))
    return 0
