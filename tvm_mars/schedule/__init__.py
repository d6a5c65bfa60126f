"""Schedules: every decision between a graph and its instruction stream, as one value.

:func:`plan` makes a schedule that is good without tuning; a tuner chooses among others.
"""

from .border import border_cuts, least_macro_cycles, met_pixels
from .choices import BORDERS, Border, Choice, Point, point_of
from .loads import make_loads
from .plan import Planner, Step, fuse_pools, plan, scheduled_steps, smallest_tile, tile_extents
from .types import (
    DEALINGS,
    HALOS,
    SLOTS,
    Dealing,
    Halo,
    LayerSchedule,
    Load,
    Piece,
    Place,
    Schedule,
    ScheduleError,
)

__all__ = [
    "BORDERS",
    "DEALINGS",
    "HALOS",
    "SLOTS",
    "Border",
    "Choice",
    "Dealing",
    "Halo",
    "LayerSchedule",
    "Load",
    "Piece",
    "Place",
    "Planner",
    "Point",
    "Schedule",
    "ScheduleError",
    "Step",
    "border_cuts",
    "fuse_pools",
    "least_macro_cycles",
    "make_loads",
    "met_pixels",
    "plan",
    "point_of",
    "scheduled_steps",
    "smallest_tile",
    "tile_extents",
]
