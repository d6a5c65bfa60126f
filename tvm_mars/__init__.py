"""tvm-mars: quantized CNNs through TVM onto MARS, a compute-in-memory accelerator.

Importing this package stays quick and needs no TVM. What it adds to TVM (the chains, the code
generator ``relax.ext.mars``, the pipeline and the target tag ``mars``) is registered when both are
there: at ``import tvm_mars`` if TVM has been imported, at ``import tvm`` through TVM's entry point
group ``tvm.backends`` (which an installation of this package fills), and at the latest when one of
the functions below that need TVM is first used. They work on the IR that the installed TVM has:
Relay where it is there (``relay.ext.mars``), else Relax.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mars_runtime.arch import MarsArch

    from .constraints import supported_ops
    from .frontend.relax import (
        CompiledModel,
        QuantizeForMars,
        compile,
        offload_report,
        partition_for_mars,
        quantize,
    )
    from .options import CompileOptions
    from .tuner.api import tune
    from .tuner.database import Database

__all__ = [
    "CompileOptions",
    "CompiledModel",
    "Database",
    "MarsArch",
    "QuantizeForMars",
    "compile",
    "offload_report",
    "partition_for_mars",
    "quantize",
    "supported_ops",
    "tune",
]

_HOMES = {
    "CompileOptions": ".options",
    "Database": ".tuner.database",
    "MarsArch": "mars_runtime.arch",
    "supported_ops": ".constraints",
    "tune": ".tuner.api",
}
_OF_THE_IR = (
    "CompiledModel",
    "QuantizeForMars",
    "compile",
    "offload_report",
    "partition_for_mars",
    "quantize",
)


def __getattr__(name: str) -> Any:
    if name in _OF_THE_IR:
        from .frontend import adapter

        return getattr(adapter(), name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if "tvm.relay" in sys.modules or "tvm.relax" in sys.modules:
    importlib.import_module(".frontend", __name__).adapter()
