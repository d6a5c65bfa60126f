"""Timelines as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is the JSON object form of the Trace Event Format: complete events (``ph`` ``X``) with
``ts`` and ``dur`` in microseconds, at the core clock, and metadata events that name the lanes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import isa, timing
from .arch import MarsArch
from .machine import Machine
from .program import Region
from .timeline import Event, Timeline

__all__ = ["Recorder", "chrome_trace", "lane_rank", "occupancy", "record"]

_PROCESS = 1
_LAYERS = "layers"


class Recorder(Machine):
    """A machine that records the use of the banks' ports beside that of its units."""

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        super()._record(lane, name, start, end)
        instruction = self.region.instructions[self.index]
        if isinstance(instruction, isa.Move):
            super()._record(f"bank {instruction.bank} dma", name, start, end)

    def _book(self, number: int, name: str, start: int, end: int, cost: timing.Cost) -> None:
        super()._book(number, name, start, end, cost)
        for bank, (reads, writes) in enumerate(zip(cost.reads, cost.writes, strict=True)):
            if reads or writes:
                uses = f"{name}: {reads} reads, {writes} writes"
                super()._record(f"bank {bank} core {number}", uses, start, end)


def record(region: Region, arch: MarsArch) -> Timeline:
    """Give the timeline of a region with an event for each use of a unit or of a bank's port.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    return Recorder(region, arch, trace=True).run()


class _Occupancy(Machine):
    """A machine that adds up how long each unit and port is in use, layer by layer."""

    def __init__(self, region: Region, arch: MarsArch) -> None:
        super().__init__(region, arch, trace=True)
        self.busy: list[dict[str, int]] = [{} for _ in self.layers]

    def _use(self, lane: str, cycles: int) -> None:
        busy = self.busy[self.layer_number]
        busy[lane] = busy.get(lane, 0) + cycles

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        self._use(lane, end - start)

    def _book(self, number: int, name: str, start: int, end: int, cost: timing.Cost) -> None:
        super()._book(number, name, start, end, cost)
        self._use(f"core {number} macros", cost.macro_cycles)
        for bank, (reads, writes) in enumerate(zip(cost.reads, cost.writes, strict=True)):
            self._use(f"bank {bank} core {number}", reads + writes)


def occupancy(region: Region, arch: MarsArch) -> tuple[dict[str, int], ...]:
    """Give for each layer of a region the core cycles that its instructions use each unit.

    Returns
    -------
    tuple of dict
        By lane: ``dma``; each core's ``load``, ``compute`` and, within that, ``macros``; each
        bank's port to each core, one cycle an access.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    machine = _Occupancy(region, arch)
    machine.run()
    return tuple(machine.busy)


def chrome_trace(timelines: Sequence[Timeline], arch: MarsArch) -> dict[str, Any]:
    """Give the trace of regions that run one after the other.

    Parameters
    ----------
    timelines : sequence of Timeline
        As :func:`record` gives them.
    arch : MarsArch
        The machine that they ran on.

    Returns
    -------
    dict
        For JSON. Lanes (threads) are the layers, ``dma``, each core's ``load`` and ``compute``,
        and each bank's port to each core; ``args`` say the layer and the instruction's number.

    Examples
    --------
    >>> import json
    >>> from mars_runtime import Timeline, MarsArch
    >>> trace = chrome_trace([Timeline(0, ())], MarsArch())
    >>> json.dumps(trace)[:16]
    '{"traceEvents": '
    """
    names = {event.lane for timeline in timelines for event in timeline.events}
    ordered = [_LAYERS, *sorted(names, key=lane_rank)]
    lanes = {name: number for number, name in enumerate(ordered, 1)}
    events = [*_metadata(lanes, arch), *_complete(timelines, lanes, arch)]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"architecture": arch.name, "core_clock_mhz": arch.core_clock_mhz},
    }


def lane_rank(lane: str) -> tuple[int, list[int]]:
    """Order lanes: DMA, the cores' units by number, then the banks' ports."""
    kinds = ("dma", "core", "bank")
    return kinds.index(lane.split()[0]), [*map(int, re.findall(r"\d+", lane)), "compute" in lane]


def _metadata(lanes: dict[str, int], arch: MarsArch) -> Iterator[dict[str, Any]]:
    common = {"ph": "M", "pid": _PROCESS}
    yield {**common, "tid": 0, "name": "process_name", "args": {"name": f"MARS ({arch.name})"}}
    for name, tid in lanes.items():
        yield {**common, "tid": tid, "name": "thread_name", "args": {"name": name}}
        yield {**common, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _complete(
    timelines: Sequence[Timeline], lanes: dict[str, int], arch: MarsArch
) -> Iterator[dict[str, Any]]:
    offset = 0
    for region, timeline in enumerate(timelines):
        for event in (*_layer_events(timeline), *timeline.events):
            yield {
                "name": event.name,
                "cat": event.lane.split()[0],
                "ph": "X",
                "ts": (offset + event.start) / arch.core_clock_mhz,
                "dur": (event.end - event.start) / arch.core_clock_mhz,
                "pid": _PROCESS,
                "tid": lanes[event.lane],
                "args": {
                    "layer": timeline.layers[event.layer].name,
                    "region": region,
                    "instruction": event.index,
                    "cycles": event.end - event.start,
                },
            }
        offset += timeline.cycles


def _layer_events(timeline: Timeline) -> Iterable[Event]:
    return [
        Event(_LAYERS, layer.name, number, -1, layer.start, layer.start + layer.cycles)
        for number, layer in enumerate(timeline.layers)
    ]
