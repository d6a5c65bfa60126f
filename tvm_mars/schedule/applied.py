"""Which schedule a compilation uses: one that was found for its graph before, or the default."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

from mars_runtime.arch import MarsArch

from ..graph import Graph
from ..pack import PackedConv
from .plan import plan
from .types import Schedule

__all__ = ["Source", "apply_schedules", "schedule_of"]

#: Gives a graph's schedule on a machine, or None for the default.
Source: TypeAlias = Callable[[Graph, MarsArch, Mapping[str, PackedConv]], Schedule | None]

_LOG = logging.getLogger("tvm_mars")

_sources: contextvars.ContextVar[tuple[Source, ...]] = contextvars.ContextVar("sources", default=())


def apply_schedules(source: Source) -> contextvars.Token[tuple[Source, ...]]:
    """Let compilations ask a source first; the token takes that back."""
    return _sources.set((source, *_sources.get()))


def schedule_of(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> Schedule:
    """Give the schedule that the sources have for a graph, else the default, with a warning.

    Raises
    ------
    CapacityError
        If even the smallest tile of a layer does not fit.
    """
    for source in _sources.get():
        found = source(graph, arch, packed)
        if found is not None:
            return found
    if _sources.get():
        _LOG.warning(
            "no tuning records of a region with %d layers on machine %s: it has the default "
            "schedule (records are of one network and one machine: tune it with the same options)",
            len(graph.layers),
            arch.name,
        )
    return plan(graph, arch, packed)
