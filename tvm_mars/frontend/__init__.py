"""From importers' operator chains to the integer graph: one description, an adapter for each IR."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

__all__ = ["adapter", "autoload"]


def adapter() -> ModuleType:
    """Import the adapter for the installed TVM's IR: Relay where TVM has it, else Relax."""
    ir = "relay" if importlib.util.find_spec("tvm.relay") else "relax"
    return importlib.import_module(f"{__name__}.{ir}")


def autoload() -> None:
    """Make MARS known to a TVM that is being imported (entry point group ``tvm.backends``).

    Importing the adapter registers it; one that is itself importing TVM does so when it goes on.
    Only a TVM without Relay has that group.
    """
    relax = f"{__name__}.relax"
    if relax not in sys.modules:
        importlib.import_module(relax)
