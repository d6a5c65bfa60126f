"""Schedules: every decision between a graph and its instruction stream, as one value.

:func:`plan` makes a schedule that is good without tuning; a tuner chooses among others.
"""

from .loads import make_loads
from .plan import Step, fuse_pools, plan, scheduled_steps, smallest_tile
from .types import LayerSchedule, Load, Piece, Place, Schedule, ScheduleError

__all__ = [
    "LayerSchedule",
    "Load",
    "Piece",
    "Place",
    "Schedule",
    "ScheduleError",
    "Step",
    "fuse_pools",
    "make_loads",
    "plan",
    "scheduled_steps",
    "smallest_tile",
]
