"""The Relax frontend: what ``import tvm_mars`` registers with TVM, and the module passes.

Registered are the chains (``relax.backend.get_patterns_with_prefix("mars.")``), the code generator
``relax.ext.mars``, the pipeline ``mars`` and the target tag ``mars``.
"""

from __future__ import annotations

import tvm_ffi
from tvm import relax, target

from mars_runtime import tvm_bridge

from .api import CompiledModel, build_for_cpu, compile, import_model
from .codegen import codegen, graphs_of, partition_of, pipeline
from .exported import load_library
from .partition import offload_report, partition_for_mars, register_chains
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
    "pipeline",
    "quantize",
    "quantize_to_onnx",
    "read_region",
    "register",
]

IR = "Relax"


def register() -> None:
    """Register with TVM, once."""
    if tvm_ffi.get_global_func("relax.ext.mars", allow_missing=True) is not None:
        return
    tvm_ffi.register_global_func("relax.ext.mars", codegen)
    register_chains()
    relax.register_pipeline("mars")(pipeline)
    target.register_tag("mars", {"kind": "llvm", "keys": ["mars", "cpu"]})
    tvm_bridge.register()


register()
