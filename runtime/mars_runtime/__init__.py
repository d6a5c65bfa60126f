"""The MARS runtime: what a deployed program needs, and no compiler.

``import mars_runtime`` registers ``mars.runtime.run`` with TVM where TVM is installed, so that a
module that TVM exported can run its offloaded regions.
"""

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
from .run import run, run_region
from .timeline import Counters, LayerTime, Timeline

__all__ = [
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
