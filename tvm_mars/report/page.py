"""A program's profile as one HTML page that needs nothing else: ``mars report``.

The page's figures are the profile's; its pictures come from the same timeline (:mod:`.observe`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from mars_runtime import MarsArch, Program, isa
from mars_runtime.errors import MarsError
from mars_runtime.timeline import Event

from .charts import LAYERS, METRICS, Chart, Placed, charts
from .drawings import picture
from .network import network
from .observe import Observation, observe
from .profile import Profile, profile_program
from .tables import time_table, work_table
from .text import ASSUMED, total_rows

__all__ = ["report_page"]

TEMPLATES = Path(__file__).parent / "templates"
# More events than this make a page slow; neighbours of a lane are then joined.
MOST_EVENTS = 20_000


# -- what the page shows ---------------------------------------------------------------------------


def _totals(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """Give the totals; a line that goes on from the one before says so by itself."""
    before = ""
    for name, value, meaning in total_rows(profile):
        if name.startswith(" "):
            name = f"{before}, {name.strip()}"
        else:
            before = name
        yield name, value, meaning


# -- what the timeline shows -----------------------------------------------------------------------


def _placed(
    observations: Sequence[Observation], names: Sequence[Sequence[str]]
) -> Iterator[tuple[Observation, int, Callable[[str], str], Sequence[str]]]:
    """Give each region's observation, its first cycle, and the page's names of its layers."""
    offset = 0
    for observation, shown in zip(observations, names, strict=True):
        known = {
            layer.name: name for layer, name in zip(observation.timeline.layers, shown, strict=True)
        }
        yield observation, offset, known.__getitem__, shown
        offset += observation.timeline.cycles


def _events(observations: Sequence[Observation], names: Sequence[Sequence[str]]) -> list[Placed]:
    found = []
    for observation, offset, _, shown in _placed(observations, names):
        for number, layer in enumerate(observation.timeline.layers):
            event = Event(
                LAYERS, shown[number], number, -1, layer.start, layer.start + layer.cycles
            )
            found.append(Placed(event, offset, shown[number]))
        for event in observation.timeline.events:
            found.append(Placed(event, offset, shown[event.layer]))
    return found


def joined(events: Sequence[Placed], most: int) -> list[Placed]:
    """Join neighbours of a lane, of one kind and layer, until at most ``most`` remain.

    The gaps that disappear are the shortest; different kinds and layers are never joined.
    """
    found, gap = list(events), 1
    while len(found) > most and gap < 2**40:
        merged: list[Placed] = []
        last: dict[str, int] = {}
        for placed in sorted(found, key=lambda one: one.offset + one.value.start):
            event = placed.value
            place = last.get(event.lane)
            before = merged[place] if place is not None else None
            if before is not None and place is not None and _alike(before, placed, gap):
                end = max(before.value.end, event.end)
                merged[place] = attrs.evolve(before, value=attrs.evolve(before.value, end=end))
                continue
            last[event.lane] = len(merged)
            merged.append(placed)
        found, gap = merged, 2 * gap
    return found


def _alike(one: Placed, other: Placed, gap: int) -> bool:
    return (
        one.layer == other.layer
        and one.offset == other.offset
        and one.value.name.split(":")[0] == other.value.name.split(":")[0]
        and other.value.start - one.value.end <= gap
    )


# -- the size --------------------------------------------------------------------------------------


def _size_rows(program: Program) -> Iterator[tuple[str, int, str]]:
    """Give the parts of a program file: name, bytes, what they hold."""
    kinds: dict[str, int] = {}
    fetched: dict[int, set[tuple[int, int]]] = {
        memory: set() for memory in (isa.MEMORY_WEIGHT, isa.MEMORY_INDEX, isa.MEMORY_PARAMETER)
    }
    sizes = dict.fromkeys(fetched, 0)
    for region in program.regions:
        for instruction in region.instructions:
            name = type(instruction).__name__.upper()
            kinds[name] = kinds.get(name, 0) + 1
            if isinstance(instruction, isa.Fetch):
                fetched[instruction.memory].add((instruction.source, instruction.length))
        for memory, spans in fetched.items():
            sizes[memory] += _covered(spans)
            spans.clear()
    count = sum(kinds.values())
    by_kind = ", ".join(f"{number:,} {name}" for name, number in kinds.items())
    yield "instructions", count * isa.INSTRUCTION_BYTES, f"{count:,}: {by_kind}"
    yield (
        "weights",
        sizes[isa.MEMORY_WEIGHT],
        "group-sets that are not all zero, for each core",
    )
    yield "index codes", sizes[isa.MEMORY_INDEX], "with the load descriptors"
    yield "parameters", sizes[isa.MEMORY_PARAMETER], "biases, multipliers and shifts"
    known = count * isa.INSTRUCTION_BYTES + sum(sizes.values())
    file = len(program.to_bytes())
    yield "the rest", file - known, "header, description of ports, layers and machine"
    yield "file", file, ""


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Count the bytes that spans (start, length) cover."""
    total = end = 0
    for start, length in sorted(spans):
        total += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return total


# -- the page --------------------------------------------------------------------------------------


def report_page(program: Program, title: str, *, baseline: bool = True) -> str:
    """Give a program's report as one HTML page that loads nothing.

    Parameters
    ----------
    program : Program
        As compiled or loaded.
    title : str
        What the page calls it.
    baseline : bool
        Whether to compile and time the dense network too.

    Raises
    ------
    MarsError
        If what draws the page is not installed.
    MachineError
        If an instruction does what the hardware cannot.
    ProgramError
        If the program has no region, or does not describe its network, which the baseline needs.
    """
    jinja2, vl_convert = _library("jinja2"), _library("vl_convert")
    profile = profile_program(program, baseline=baseline)
    observations = [observe(region, program.arch) for region in program.regions]
    names = _names(profile)
    by_region = [
        [name for name, layer in zip(names, profile.layers, strict=True) if layer.region == number]
        for number in range(len(program.regions))
    ]
    events = _events(observations, by_region)
    shown = joined(events, MOST_EVENTS)
    stays, fillings, maps = [], [], []
    opened = 0
    for observation, offset, name_of, _ in _placed(observations, by_region):
        stays += [Placed(stay, offset, name_of(stay.layer)) for stay in observation.stays]
        for filling in observation.fillings:
            numbered = attrs.evolve(filling, number=opened + filling.number)
            fillings.append(Placed(numbered, offset, name_of(filling.layer)))
        opened += len({filling.number for filling in observation.fillings})
        maps += [(name_of(one.layer), one, picture(one)) for one in observation.maps]
    made, tables = charts(profile, names, shown, stays, fillings)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page: str = environment.get_template("page.html").render(
        title=title,
        profile=profile,
        reasons=program.host_reasons,
        arch=program.arch,
        fields=_fields(program.arch),
        totals=[*_totals(profile)],
        time_table=time_table(profile, names),
        work_table=work_table(profile, names),
        networks=[
            network(region, shown_names)
            for region, shown_names in zip(program.regions, by_region, strict=True)
        ],
        names=names,
        spans=_spans(observations, by_region),
        metrics=[(metric, unit) for metric, (unit, _) in METRICS.items()],
        maps=maps,
        banks=range(program.arch.banks),
        sizes=[*_size_rows(program)],
        joined=len(events) - len(shown),
        events=len(shown),
        charts=made,
        data=_data(made, tables, profile, vl_convert.vegalite_to_vega),
        assumed=ASSUMED,
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        licences=(TEMPLATES / "licences.txt").read_text(encoding="utf-8"),
        vega=vl_convert.javascript_bundle(),
    )
    return page


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise MarsError(
            f"needs {name}, which is not installed",
            where="mars report",
            hint="pip install 'tvm-mars[report]'",
        ) from None


def _names(profile: Profile) -> list[str]:
    """Name layers on the page: with their region where there are several."""
    if profile.regions == 1:
        return [layer.name for layer in profile.layers]
    return [f"{layer.region}: {layer.name}" for layer in profile.layers]


def _spans(
    observations: Sequence[Observation], names: Sequence[Sequence[str]]
) -> list[tuple[str, int, int]]:
    """Give each layer's name on the page with its first and last cycle."""
    return [
        (name, offset + layer.start, offset + layer.start + layer.cycles)
        for observation, offset, _, shown in _placed(observations, names)
        for name, layer in zip(shown, observation.timeline.layers, strict=True)
    ]


def _fields(arch: MarsArch) -> list[tuple[Any, str, bool]]:
    """Give what is known of each field of the machine, its value, and whether it is assumed."""
    return [(info, str(getattr(arch, info.name)), info.assumed) for info in arch.describe()]


def _data(
    made: dict[str, Chart],
    tables: dict[str, Any],
    profile: Profile,
    compiled: Callable[[dict[str, Any]], dict[str, Any]],
) -> str:
    """Give what the page's script reads: JSON that cannot end the element that holds it."""
    data = {
        "charts": {
            name: {"spec": compiled(chart.spec), "renderer": chart.renderer}
            for name, chart in made.items()
        },
        "tables": tables,
        "cycles": profile.cycles,
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
