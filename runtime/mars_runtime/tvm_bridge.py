"""The packed functions that a TVM module with MARS regions calls.

``mars.runtime.knows(digest)`` tells whether a program is loaded, ``mars.runtime.load(digest,
text)`` loads one, ``mars.runtime.run(digest, region, count, inputs..., outputs...)`` runs a region.
:func:`register` makes them known to TVM, and the errors of MARS to its error handling.

Registration happens when both sides are there: at ``import mars_runtime`` if TVM has been imported,
else at ``import tvm`` through the entry point group ``tvm.backends``. So neither imports the other.
A TVM with Relay has no such group: there ``import tvm`` comes first.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from . import errors
from .errors import ProgramError
from .program import Program, load_cached

__all__ = ["register"]

_LOADED: OrderedDict[str, Program] = OrderedDict()
_MOST = 16  # programs kept; a module loads its own again when it was dropped


def knows(digest: str) -> int:
    """Tell whether a program is loaded (1 or 0)."""
    return int(digest in _LOADED)


def load(digest: str, text: str) -> int:
    """Load a program from base64 text.

    Raises
    ------
    ProgramError
        If the text is damaged or not a program.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ProgramError(f"is no base64 text: {error}", where="program in a module") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise ProgramError("does not have the digest it is named by", where="program in a module")
    _LOADED[digest] = load_cached(data)
    while len(_LOADED) > _MOST:
        _LOADED.popitem(last=False)
    return 0


def run(digest: str, region: int, count: int, *tensors: Any) -> int:
    """Run a region: the first ``count`` tensors are its inputs, the others receive its outputs."""
    from . import run_region

    _LOADED.move_to_end(digest)
    # Copies: a view of a tensor that came through generated code does not outlive the call.
    inputs = [tensor.numpy() for tensor in tensors[:count]]
    outputs = run_region(_LOADED[digest], region, inputs)
    for tensor, output in zip(tensors[count:], outputs, strict=True):
        tensor.copyfrom(output)
    return 0


def register() -> None:
    """Register the functions and errors with TVM; a second call does nothing."""
    find, register_function, register_error = _registries()
    if find("mars.runtime.run", allow_missing=True) is not None:
        return
    for name in errors.__all__:
        register_error(name, getattr(errors, name))
    for function in (knows, load, run):
        register_function(f"mars.runtime.{function.__name__}", function)


def _registries() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Give TVM's functions that find a global function, register one, and register an error."""
    try:
        import tvm_ffi
    except ModuleNotFoundError:  # the releases with Relay have no package of that name
        import tvm

        return tvm.get_global_func, tvm.register_func, tvm.error.register_error
    return tvm_ffi.get_global_func, tvm_ffi.register_global_func, tvm_ffi.register_error
