"""The MARS runtime: what a deployed program needs, and no compiler.

A module that TVM exported runs its offloaded regions through functions that this package registers
with TVM: at this import if TVM is there already, else when TVM is imported (by its entry point
group ``tvm.backends``).
"""

import sys

from .arch import PRESETS, MarsArch, load_arch
from .energy import Energy, energy_of
from .errors import (
    ArchError,
    CapacityError,
    InputError,
    MachineError,
    MarsError,
    OptionError,
    ProgramError,
    UnsupportedError,
)
from .machine import Machine, simulate
from .program import Program, Region, load_cached
from .run import ENGINES, run, run_region
from .timeline import Counters, LayerTime, Timeline

__all__ = [
    "ENGINES",
    "PRESETS",
    "ArchError",
    "CapacityError",
    "Counters",
    "Energy",
    "InputError",
    "LayerTime",
    "Machine",
    "MachineError",
    "MarsArch",
    "MarsError",
    "OptionError",
    "Program",
    "ProgramError",
    "Region",
    "Timeline",
    "UnsupportedError",
    "energy_of",
    "load_arch",
    "load_cached",
    "run",
    "run_region",
    "simulate",
]

if "tvm_ffi" in sys.modules or hasattr(sys.modules.get("tvm"), "register_func"):
    from .tvm_bridge import register

    register()
