"""Machine code of the exact engine's kernels, made by LLVM for this processor and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from .cache import code_digest, kept
from .kernel_code import VARIANTS, Kernel, module_text

__all__ = ["Library", "library", "variants"]


class Library:
    """Loaded machine code: addresses of kernels, and of the runner of steps."""

    def __init__(self, engine: Any, kernels: Sequence[Kernel]) -> None:
        self._engine = engine  # owns the code
        self.addresses = {
            kernel: int(engine.get_function_address(f"kernel{number}"))
            for number, kernel in enumerate(kernels)
        }
        signature = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
        )
        # Called without the interpreter's lock, so that threads run side by side.
        self.run = signature(engine.get_function_address("run"))


@functools.cache
def _host() -> tuple[Any, str, dict[str, bool]]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm, llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features())


@functools.cache
def variants() -> tuple[str, ...]:
    """Name the variants that this processor executes, best first."""
    _, _, features = _host()
    vnni = features.get("avx512vnni", False)
    able = {
        "avx512-vnni": vnni and features.get("avx512bw", False),
        "avx-vnni": features.get("avxvnni", False) or (vnni and features.get("avx512vl", False)),
        "avx2": features.get("avx2", False),
        "portable": True,
    }
    return tuple(name for name in VARIANTS if able[name])


@functools.lru_cache(maxsize=64)
def library(kernels: tuple[Kernel, ...]) -> Library:
    """Give machine code for some kernels, from the cache if it is there."""
    llvm, cpu, features = _host()
    import llvmlite

    about = (code_digest(), llvmlite.__version__, cpu, sorted(features.items()), kernels)
    name = f"{hashlib.sha256(repr(about).encode()).hexdigest()}.o"
    target = llvm.Target.from_default_triple()
    flags = ",".join(f"{'+' if on else '-'}{feature}" for feature, on in sorted(features.items()))
    machine = target.create_target_machine(cpu=cpu, features=flags, opt=3, reloc="pic", jit=True)

    def compiled() -> bytes:
        module = llvm.parse_assembly(module_text(kernels, target.triple, features))
        module.verify()
        code: bytes = machine.emit_object(module)
        return code

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(kept(name, compiled)))
    engine.finalize_object()
    return Library(engine, kernels)
