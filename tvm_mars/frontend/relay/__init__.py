"""The Relay frontend: what ``import tvm_mars`` registers with a TVM that has Relay.

Registered are the pattern table ``mars``, the code generator ``relay.ext.mars`` and the target tag
``mars``.
"""

from __future__ import annotations

import tvm
from tvm.relay.op.contrib.register import register_pattern_table
from tvm.target.tag import register_tag

from mars_runtime import tvm_bridge

from .api import CompiledModel, build_for_cpu, compile
from .codegen import codegen, constant_updater, graphs_of, host_target, partition_of
from .description import LISTENER, listen
from .exported import load_library
from .importer import import_model
from .partition import offload_report, partition_for_mars, pattern_table
from .quantization import QuantizeForMars, quantize, quantize_to_onnx
from .regions import read_region

__all__ = [
    "IR",
    "CompiledModel",
    "QuantizeForMars",
    "build_for_cpu",
    "compile",
    "graphs_of",
    "import_model",
    "load_library",
    "offload_report",
    "partition_for_mars",
    "partition_of",
    "pattern_table",
    "quantize",
    "quantize_to_onnx",
    "read_region",
    "register",
]

IR = "Relay"


def register() -> None:
    """Register with TVM, once."""
    if tvm.get_global_func("relay.ext.mars", allow_missing=True) is not None:
        return
    tvm.register_func("relay.ext.mars", codegen)
    tvm.register_func("relay.ext.mars.constant_updater", constant_updater)
    tvm.register_func(LISTENER, listen)
    register_pattern_table("mars", pattern_table)
    triple = str(host_target().attrs["mtriple"])
    register_tag("mars", {"kind": "llvm", "keys": ["mars", "cpu"], "mtriple": triple})
    tvm_bridge.register()


register()
