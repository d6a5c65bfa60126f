"""The exact engine's machine code for Arm, executed by an emulator in this process's memory."""

from __future__ import annotations

import ctypes
import functools

import llvmlite.binding as llvm
import numpy as np
import unicorn
from unicorn import arm64_const as registers

from mars_runtime.kernel_code import Kernel, module_text
from mars_runtime.native import Library, Processor, machine_code

__all__ = ["ARM", "EmulatedLibrary", "assembly", "library"]

#: Any AArch64 processor with Armv8.2's dot products.
ARM = Processor("aarch64-linux-gnu", "generic", {"neon": True, "dotprod": True, "sve": False})

PAGE_BYTES = 4096
STACK_BYTES = 2**16
HERE = 0x1000  # returning to this address, where nothing lies, ends a call
ENABLE_VECTORS = 3 << 20  # of the register that traps them


class EmulatedLibrary(Library):
    """Machine code for Arm, placed by LLVM in this process and run by an emulator.

    The emulator sees the memory of this process, at its own addresses: each page as it is reached.
    """

    def __init__(self, code: bytes, kernels: tuple[Kernel, ...]) -> None:
        super().__init__(code, kernels, ARM)
        self.run = functools.partial(self._call, self.address("run"))

    def _call(self, function: int, *arguments: int) -> None:
        processor = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        processor.ctl_set_cpu_model(registers.UC_CPU_ARM64_MAX)
        processor.reg_write(registers.UC_ARM64_REG_CPACR_EL1, ENABLE_VECTORS)
        processor.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, _map_page)
        stack = np.zeros(STACK_BYTES, np.uint8)
        top = (stack.ctypes.data + STACK_BYTES) // 16 * 16
        processor.reg_write(registers.UC_ARM64_REG_SP, top)
        processor.reg_write(registers.UC_ARM64_REG_LR, HERE)
        for number, argument in enumerate(arguments):
            processor.reg_write(registers.UC_ARM64_REG_X0 + number, argument)
        processor.emu_start(function, HERE)
        assert processor.reg_read(registers.UC_ARM64_REG_SP) == top


def _map_page(
    processor: unicorn.Uc, access: int, address: int, size: int, value: int, data: object
) -> bool:
    first = address // PAGE_BYTES * PAGE_BYTES
    # What is read may reach into the next page, which is asked for in its turn.
    processor.mem_map_ptr(first, PAGE_BYTES, unicorn.UC_PROT_ALL, ctypes.c_void_p(first))
    return True


def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def assembly(kernels: tuple[Kernel, ...], processor: Processor) -> str:
    """Give the assembly that kernels are compiled to."""
    _initialize()
    text = module_text(kernels, processor.triple)
    return str(processor.target_machine().emit_assembly(llvm.parse_assembly(text)))


@functools.lru_cache(maxsize=64)
def library(kernels: tuple[Kernel, ...]) -> EmulatedLibrary:
    """Compile kernels for Arm."""
    _initialize()
    return EmulatedLibrary(machine_code(kernels, ARM), kernels)
