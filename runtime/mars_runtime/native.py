"""Machine code of the exact engine's kernels, made by LLVM for a processor and kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from .cache import code_digest, kept
from .kernel_code import VARIANTS, Kernel, module_text

__all__ = ["Library", "Processor", "host", "library", "machine_code", "variants"]


@attrs.frozen
class Processor:
    """What machine code is made for: LLVM's names of a target, a processor and its features."""

    triple: str
    cpu: str
    features: dict[str, bool]

    @property
    def arm(self) -> bool:
        """Whether it is an AArch64 processor."""
        return self.triple.startswith(("aarch64", "arm64"))

    def variants(self) -> tuple[str, ...]:
        """Name the variants that this processor executes, best first."""
        has = {name for name, on in self.features.items() if on}
        able = {
            "avx512-vnni": has >= {"avx512vnni", "avx512bw"},
            "avx-vnni": "avxvnni" in has or has >= {"avx512vnni", "avx512vl"},
            "avx2": "avx2" in has,
            "neon-dotprod": "dotprod" in has,
            "portable": True,
        }
        return tuple(name for name in VARIANTS if able[name])

    def target_machine(self) -> Any:
        """Give what LLVM compiles with."""
        import llvmlite.binding as llvm

        flags = ",".join(f"{'+' if on else '-'}{name}" for name, on in self.features.items())
        target = llvm.Target.from_triple(self.triple)
        return target.create_target_machine(
            cpu=self.cpu, features=flags, opt=3, reloc="pic", jit=True
        )


class Library:
    """Loaded machine code: addresses of kernels, and of the runner of steps."""

    def __init__(self, code: bytes, kernels: Sequence[Kernel], processor: Processor) -> None:
        import llvmlite.binding as llvm

        empty = llvm.parse_assembly(f'target triple = "{processor.triple}"')
        # Arm's code reaches 4 GiB. Only llvmlite's own memory manager places code and constants
        # together (llvm-project issue 71963); by default it is taken on Arm, not under emulation.
        self._engine = llvm.create_mcjit_compiler(  # which owns the target machine
            empty, processor.target_machine(), use_lmm=processor.arm
        )
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.addresses = {
            kernel: self.address(f"kernel{number}") for number, kernel in enumerate(kernels)
        }
        signature = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
        )
        # Called without the interpreter's lock, so that threads run side by side.
        self.run: Callable[..., None] = signature(self.address("run"))

    def address(self, function: str) -> int:
        """Give where a function lies."""
        return int(self._engine.get_function_address(function))


@functools.cache
def host() -> Processor:
    """Give this machine's processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = dict(sorted(llvm.get_host_cpu_features().items()))
    found = Processor(llvm.get_default_triple(), llvm.get_host_cpu_name(), features)
    if not found.arm:
        return found
    return attrs.evolve(found, features=features | _arm_features())


def _arm_features() -> dict[str, bool]:
    """Give what LLVM does not tell of an Arm processor, by asking the operating system.

    Scalable vectors are not used: a virtual machine may lack those that its processor has.
    """
    dot_products = sys.platform == "darwin"  # each of Apple's, from the first one on
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # where /proc is not mounted
            dot_products = _has_dot_products(Path("/proc/cpuinfo").read_text())
    return {"dotprod": dot_products, "sve": False}


def _has_dot_products(cpuinfo: str) -> bool:
    """Say whether all cores of a Linux machine have Armv8.2's dot products."""
    lines = [line.split() for line in cpuinfo.splitlines() if line.startswith("Features")]
    return bool(lines) and all("asimddp" in line for line in lines)


@functools.cache
def variants() -> tuple[str, ...]:
    """Name the variants that this machine's processor executes, best first."""
    return host().variants()


def machine_code(kernels: Sequence[Kernel], processor: Processor) -> bytes:
    """Compile kernels for a processor: an object file."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(module_text(kernels, processor.triple))
    module.verify()
    code: bytes = processor.target_machine().emit_object(module)
    return code


@functools.lru_cache(maxsize=64)
def library(kernels: tuple[Kernel, ...]) -> Library:
    """Give machine code for this machine's processor, from the cache if it is there."""
    import llvmlite

    processor = host()
    about = (code_digest(), llvmlite.__version__, processor, kernels)
    name = f"{hashlib.sha256(repr(about).encode()).hexdigest()}.o"
    code = kept(name, functools.partial(machine_code, kernels, processor))
    return Library(code, kernels, processor)
