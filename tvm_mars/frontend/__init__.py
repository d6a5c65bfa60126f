"""From importers' operator chains to the integer graph: one description, an adapter for each IR."""

from __future__ import annotations

import importlib
import sys

__all__ = ["autoload"]


def autoload() -> None:
    """Make MARS known to a TVM that is being imported (entry point group ``tvm.backends``).

    Importing the adapter registers it; one that is itself importing TVM does so when it goes on.
    """
    adapter = f"{__name__}.relax"
    if adapter not in sys.modules:
        importlib.import_module(adapter)
