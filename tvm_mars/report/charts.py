"""The charts of a page: Vega-Lite specifications, and the tables that they draw.

A specification names its table; the page fills it in. All take their ink from signals (``ink``,
``grid``), so that a page changes between light and dark without drawing anew, and the layers that
they show from the signal ``shown``, a part of a layer's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from mars_runtime import MarsArch
from mars_runtime.timeline import STALLS, Event
from mars_runtime.trace import lane_rank

from .profile import Profile
from .text import ENERGY_PARTS, cause_head

__all__ = ["METRICS", "Chart", "Placed", "charts", "table"]

# Chosen for 3:1 against both a white and a near-black page.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY, OCHRE = (
    "#2f7fc1",
    "#c77700",
    "#1a936f",
    "#c2492f",
    "#8e63b8",
    "#7d8590",
    "#a8842c",
)
LABEL_DECADES = (0.4, 0.15)  # what a name takes in the roofline, in powers of ten
SLATE = "#5b6b7b"  # 4.5:1 under white letters
STEP = 20  # pixels of a bar or lane
LAYERS = "layers"  # the lane of the layers
COMPUTING = "computing"
_CAUSE_COLOURS = {
    "weights": ORANGE,
    "maps": GREEN,
    "cores": GREY,
    "issue": PURPLE,
    "ports": RED,
    "latency": OCHRE,
}
_ENERGY_COLOURS = dict(
    zip(
        (name for name, _ in ENERGY_PARTS.values()),
        (BLUE, PURPLE, GREEN, OCHRE, ORANGE),
        strict=True,
    )
)
_MACHINE_COLOURS = {"this program": BLUE, "dense baseline": GREY}
_STAY_COLOURS = {"map": GREEN, "partial sums": RED}
_KIND_COLOURS = {
    LAYERS: SLATE,
    "CONV": BLUE,
    "POOL": GREEN,
    "ADD": PURPLE,
    "PREPARE": GREY,
    "FILL": RED,
    "FETCH": ORANGE,
    "MOVE": OCHRE,
}

# What can be compared with the dense baseline: its name, its unit, and the value of a layer.
METRICS: dict[str, tuple[str, Any]] = {
    "latency": ("core cycles", lambda layer: layer.cycles),
    "energy": ("µJ", lambda layer: layer.energy.total / 1e6),
    "group-sets stored": ("group-sets", lambda layer: layer.group_sets),
    "feature-map reads": ("port accesses", lambda layer: layer.counters.map_reads),
    "feature-map writes": ("port accesses", lambda layer: layer.counters.map_writes),
    "macro accesses": ("accesses", lambda layer: layer.counters.macro_accesses),
    "macro cells written": ("KiB", lambda layer: layer.counters.macro_write_bits / 8192),
    "off-chip transfers": ("KiB", lambda layer: layer.counters.offchip_bits / 8192),
}

Table = dict[str, Any]
Spec = dict[str, Any]


@attrs.frozen
class Chart:
    """A chart: its Vega-Lite specification, how it is drawn, and the colours of its key.

    The key is the page's own: it wraps where the page is narrow, and the keyboard reaches it.
    """

    spec: Spec
    renderer: str = "svg"
    key: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Placed:
    """A value of some region at its place in the whole program: ``offset`` cycles after its start.

    ``layer`` is the layer's name on the page.
    """

    value: Any
    offset: int
    layer: str


def table(rows: Iterable[dict[str, Any]]) -> Table:
    """Give rows with equal keys as columns and rows, which take less room."""
    listed = list(rows)
    columns = list(listed[0]) if listed else []
    return {"columns": columns, "rows": [[row[name] for name in columns] for row in listed]}


def charts(
    profile: Profile,
    names: Sequence[str],
    events: Sequence[Placed],
    stays: Sequence[Placed],
    fillings: Sequence[Placed],
) -> tuple[dict[str, Chart], dict[str, Table]]:
    """Give the charts by the identifier of their place on the page, and their tables.

    Parameters
    ----------
    names : sequence of str
        Each layer's name on the page.
    events, stays, fillings : sequences of Placed
        Of :class:`Event`, :class:`Stay` and :class:`Filling`.
    """
    arch = profile.arch
    lanes = [LAYERS, *sorted({p.value.lane for p in events} - {LAYERS}, key=lane_rank)]
    causes = _part_colours(profile)
    found = {
        "time": Chart(_stacked("parts", "core cycles, all cores", causes), key=causes),
        "energy": Chart(_stacked("energy", "energy, µJ", _ENERGY_COLOURS), key=_ENERGY_COLOURS),
        "roofline": Chart(_roofline(arch)),
        "timeline": Chart(_timeline(lanes), "canvas", _KIND_COLOURS),
        **{
            f"bank{bank}": Chart(_bank(arch, bank), "canvas", _STAY_COLOURS)
            for bank in range(arch.banks)
        },
        "fillings": Chart(_fillings(), "canvas"),
    }
    tables = {
        "parts": table(_parts(profile, names)),
        "energy": table(_energy(profile, names)),
        "layers": table(_points(profile, names)),
        "roofs": table(_roofs(profile, names)),
        "events": table(map(_event, events)),
        "stays": table(map(_stay, stays)),
        "fillings": table(map(_filling, fillings)),
    }
    if profile.dense_layers:
        found["comparison"] = Chart(_comparison(), key=_MACHINE_COLOURS)
        tables["comparison"] = table(_compared(profile, names))
    return found, tables


# -- tables ----------------------------------------------------------------------------------------


def _part_colours(profile: Profile) -> dict[str, str]:
    """Give the colours of computing and of the causes of stalls that occur, by their heads."""
    causes = {cause_head(cause): _CAUSE_COLOURS[cause] for cause in STALLS if profile.stalls[cause]}
    return {COMPUTING: BLUE, **causes}


def _parts(profile: Profile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    shown = _part_colours(profile)
    for layer, name in zip(profile.layers, names, strict=True):
        stalls = {cause_head(cause): cycles for cause, cycles in layer.stalls.items()}
        cycles = {COMPUTING: layer.macro_cycles, **stalls}
        for rank, part in enumerate(shown):
            yield {
                "layer": name,
                "part": part,
                "rank": rank,
                "value": cycles[part],
                "share": cycles[part] / layer.core_cycles if layer.core_cycles else 0,
            }


def _energy(profile: Profile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for layer, name in zip(profile.layers, names, strict=True):
        for rank, (part, (label, _)) in enumerate(ENERGY_PARTS.items()):
            picojoule = getattr(layer.energy, part)
            yield {
                "layer": name,
                "part": label,
                "rank": rank,
                "value": picojoule / 1e6,
                "share": picojoule / layer.energy.total if layer.energy.total else 0,
            }


def _compared(profile: Profile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    twins = {(layer.region, layer.name): layer for layer in profile.dense_layers}
    mine, dense = _MACHINE_COLOURS
    for metric, (unit, value) in METRICS.items():
        for layer, name in zip(profile.layers, names, strict=True):
            twin = twins.get((layer.region, layer.name))
            for machine, one in ((mine, layer), (dense, twin)):
                if one is not None:
                    yield {
                        "metric": metric,
                        "unit": unit,
                        "layer": name,
                        "machine": machine,
                        "value": value(one),
                    }


def _points(profile: Profile, names: Sequence[str]) -> list[dict[str, Any]]:
    """Place layers in the roofline: by what macros execute, and by what the layer is worth."""
    found = []
    for layer, name in zip(profile.layers, names, strict=True):
        bytes_moved = layer.counters.offchip_bits / 8
        executed = layer.counters.macs(profile.arch)
        if not executed or not layer.cycles or not bytes_moved:
            continue
        for counted, macs in (("executed", executed), ("dense-equivalent", layer.macs)):
            if macs:
                found.append(
                    {
                        "layer": name,
                        "counted": counted,
                        "intensity": macs / bytes_moved,
                        "speed": macs / layer.cycles,
                        "label": "",
                    }
                )
    _label([point for point in found if point["counted"] == "executed"])
    return found


def _label(points: list[dict[str, Any]]) -> None:
    """Write a layer's name beside its point; points whose names would collide share one."""
    groups: list[list[dict[str, Any]]] = []
    for point in sorted(points, key=lambda one: -one["speed"]):
        for group in groups:
            aside = abs(math.log10(group[0]["intensity"] / point["intensity"]))
            below = abs(math.log10(group[0]["speed"] / point["speed"]))
            if aside < LABEL_DECADES[0] and below < LABEL_DECADES[1]:
                group.append(point)
                break
        else:
            groups.append([point])
    for first, *others in groups:
        first["label"] = first["layer"] + (f" and {len(others)} more" if others else "")


def _roofs(profile: Profile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    arch = profile.arch
    at = [point["intensity"] for point in _points(profile, names)] or [1.0]
    bandwidth = arch.offchip_bits_per_cycle / 8  # bytes per core cycle
    peaks = {
        f"{bits}-bit activations": arch.macs_per_cycle / arch.accesses(bits) for bits in (4, 8)
    }
    left, right = min(at) / 2, max(*at, 2 * max(peaks.values()) / bandwidth) * 5
    for roof, peak in peaks.items():
        for intensity in (left, peak / bandwidth, right):
            speed = min(peak, intensity * bandwidth)
            yield {"roof": roof, "intensity": intensity, "speed": speed}


def _event(placed: Placed) -> dict[str, Any]:
    event: Event = placed.value
    return {
        "lane": event.lane,
        "kind": LAYERS if event.lane == LAYERS else event.name.split(" ")[0].rstrip(":"),
        "name": event.name,
        "layer": placed.layer,
        "instruction": event.index,
        "start": placed.offset + event.start,
        "end": placed.offset + event.end,
    }


def _stay(placed: Placed) -> dict[str, Any]:
    stay = placed.value
    return {
        "bank": stay.bank,
        "base": stay.base,
        "top": stay.base + stay.words,
        "layer": placed.layer,
        "what": stay.what,
        "start": placed.offset + stay.start,
        "end": placed.offset + stay.end,
    }


def _filling(placed: Placed) -> dict[str, Any]:
    filling = placed.value
    return {
        "number": filling.number,
        "core": f"core {filling.core}",
        "layer": placed.layer,
        "group-sets": filling.group_sets,
        "slots": filling.slots,
        "share": filling.group_sets / filling.slots,
        "start": placed.offset + filling.start,
    }


# -- specifications --------------------------------------------------------------------------------


_INK = {"expr": "ink"}
_SHOWN: Spec = {"filter": "shown === '' || indexof(lower(datum.layer), shown) >= 0"}
_LAYER_AXIS: Spec = {
    "field": "layer",
    "type": "nominal",
    "sort": None,
    "title": None,
    "axis": {"labelLimit": 140},
}


def _chart(body: Spec, params: Sequence[Spec] = (), *, height: Any = None) -> Spec:
    return {
        "width": "container",
        "height": {"step": STEP} if height is None else height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": None,
        "params": [
            {"name": "ink", "value": "#1f2328"},
            {"name": "grid", "value": "#d0d7de"},
            {"name": "shown", "value": ""},
            *params,
        ],
        "config": {
            "font": "system-ui, sans-serif",
            "axis": {
                "labelColor": _INK,
                "titleColor": _INK,
                "gridColor": {"expr": "grid"},
                "domainColor": {"expr": "grid"},
                "tickColor": {"expr": "grid"},
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
            },
            "legend": {
                "labelColor": _INK,
                "titleColor": _INK,
                "labelFontSize": 12,
                "orient": "top",
                "direction": "horizontal",
                "layout": {"top": {"direction": "vertical", "anchor": "start"}},
                "symbolLimit": 20,
            },
            "view": {"stroke": None},
        },
        **body,
    }


def _number(field: str, title: str | None = None, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title or field, **more}


def _colours(field: str, colours: Mapping[str, str], title: str | None = None) -> Spec:
    return {
        "field": field,
        "type": "nominal",
        "title": title,
        "scale": {"domain": list(colours), "range": list(colours.values())},
        "legend": {} if title else None,
    }


def _stacked(data: str, title: str, colours: Mapping[str, str]) -> Spec:
    """Stack parts in a bar per layer.

    The signal ``shares`` shows them as shares of it, ``part`` one of them alone.
    """
    return _chart(
        {
            "data": {"name": data},
            "transform": [
                _SHOWN,
                {"filter": "part === '' || datum.part === part"},
                {"calculate": "shares ? datum.share : datum.value", "as": "x"},
            ],
            "mark": {"type": "bar", "height": {"band": 0.8}},
            "encoding": {
                "y": _LAYER_AXIS,
                "x": {
                    **_number("x", title),
                    "axis": {
                        "labelExpr": "shares ? format(datum.value, '.0%') : datum.label",
                        "tickCount": {"expr": "ceil(width / 90)"},
                        "format": "~s",
                    },
                },
                "color": _colours("part", colours),
                "order": {"field": "rank"},
                "tooltip": [
                    {"field": "layer", "type": "nominal"},
                    {"field": "part", "type": "nominal"},
                    _number("value", title, format=",.6~r"),
                    _number("share", format=".1%"),
                ],
            },
        },
        [{"name": "shares", "value": False}, {"name": "part", "value": ""}],
    )


def _comparison() -> Spec:
    return _chart(
        {
            "data": {"name": "comparison"},
            "transform": [{"filter": "datum.metric === metric"}, _SHOWN],
            "mark": {"type": "bar"},
            "encoding": {
                "y": _LAYER_AXIS,
                "yOffset": {"field": "machine", "sort": list(_MACHINE_COLOURS)},
                "x": {
                    **_number("value"),
                    "title": None,
                    "axis": {"tickCount": {"expr": "ceil(width / 90)"}, "format": "~s"},
                },
                "color": _colours("machine", _MACHINE_COLOURS),
                "tooltip": [
                    {"field": "layer", "type": "nominal"},
                    {"field": "machine", "type": "nominal"},
                    {"field": "metric", "type": "nominal"},
                    _number("value", format=",.6~r"),
                    {"field": "unit", "type": "nominal"},
                ],
            },
        },
        [{"name": "metric", "value": next(iter(METRICS))}],
        height={"step": STEP // 2},
    )


def _roofline(arch: MarsArch) -> Spec:
    log = {"type": "log", "nice": False, "padding": 12}
    x = _number("intensity", "multiply-accumulates per off-chip byte", scale=log)
    y = _number("speed", "multiply-accumulates per core cycle", scale=log)
    axis = {"tickCount": 6, "format": "~s", "grid": False}
    marks = {"executed": "circle", "dense-equivalent": "diamond"}
    return _chart(
        {
            "layer": [
                {
                    "data": {"name": "roofs"},
                    "mark": {"type": "line", "color": ORANGE, "strokeWidth": 2},
                    "encoding": {
                        "x": {**x, "axis": axis},
                        "y": {**y, "axis": axis},
                        "strokeDash": {
                            "field": "roof",
                            "title": f"roof, {arch.cores} cores",
                            "legend": {"symbolStrokeColor": ORANGE},
                        },
                    },
                },
                {
                    "data": {"name": "layers"},
                    "transform": [_SHOWN],
                    "mark": {
                        "type": "point",
                        "size": 70,
                        "strokeWidth": 2,
                        "filled": False,
                        "opacity": 1,
                    },
                    "encoding": {
                        "x": x,
                        "y": y,
                        "shape": {
                            "field": "counted",
                            "title": "layers",
                            "scale": {"domain": list(marks), "range": list(marks.values())},
                        },
                        "color": _colours(
                            "counted", {"executed": BLUE, "dense-equivalent": GREY}, "layers"
                        ),
                        "tooltip": [
                            {"field": "layer", "type": "nominal"},
                            {"field": "counted", "type": "nominal"},
                            _number("intensity", "MAC per off-chip byte", format=",.4~r"),
                            _number("speed", "MAC per core cycle", format=",.4~r"),
                        ],
                    },
                },
                {
                    "data": {"name": "layers"},
                    "transform": [_SHOWN],
                    "mark": {"type": "text", "dx": 8, "align": "left", "color": _INK},
                    "encoding": {"x": x, "y": y, "text": {"field": "label"}},
                },
            ]
        },
        height=340,
    )


# Charts over time show the cycles `lo` to `hi`.
_WINDOW: Sequence[Spec] = ({"name": "lo", "value": 0}, {"name": "hi", "value": 1})
_IN_WINDOW: Spec = {"filter": "datum.end >= lo && datum.start <= hi"}
_TIME_SCALE: Spec = {
    "domainMin": {"expr": "lo"},
    "domainMax": {"expr": "hi"},
    "nice": False,
    "zero": False,
}
_TIME: Spec = {
    **_number("start", "core cycles"),
    "scale": _TIME_SCALE,
    "axis": {"tickCount": {"expr": "ceil(width / 90)"}},
}
_SPAN_TOOLTIP = [_number("start", format=","), _number("end", format=",")]


def _timeline(lanes: Sequence[str]) -> Spec:
    y = {
        "field": "lane",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(lanes)},
        "sort": None,
    }
    return _chart(
        {
            "data": {"name": "events"},
            "transform": [_SHOWN, _IN_WINDOW],
            "layer": [
                {
                    "mark": {"type": "rect", "clip": True, "height": {"band": 0.85}},
                    "encoding": {
                        "x": _TIME,
                        "x2": {"field": "end"},
                        "y": y,
                        "color": _colours("kind", _KIND_COLOURS),
                        "tooltip": [
                            {"field": "lane", "type": "nominal"},
                            {"field": "name", "type": "nominal"},
                            {"field": "layer", "type": "nominal"},
                            _number("instruction"),
                            *_SPAN_TOOLTIP,
                        ],
                    },
                },
                _names_inside("name", f"datum.lane === '{LAYERS}'", y),
            ],
        },
        _WINDOW,
    )


def _names_inside(field: str, which: str, y: Spec) -> Spec:
    """Write names into the spans that have room for some letters, at a height of its own."""
    width = "scale('x', min(datum.end, hi)) - scale('x', max(datum.start, lo))"
    return {
        "transform": [
            {"filter": which},
            {"calculate": "max(datum.start, lo)", "as": "left"},
            {"calculate": "(datum.base + datum.top) / 2", "as": "middle"},
        ],
        "mark": {
            "type": "text",
            "align": "left",
            "dx": 4,
            "clip": True,
            "limit": {"expr": f"max(1, {width} - 8)"},
            "opacity": {"expr": f"{width} > 30 ? 1 : 0"},
            "color": "white",
        },
        "encoding": {
            "x": {"field": "left", "type": "quantitative"},
            "y": y,
            "text": {"field": field},
        },
    }


def _bank(arch: MarsArch, bank: int) -> Spec:
    y = {
        **_number("base", "word"),
        "scale": {"domain": [0, arch.bank_words], "nice": False},
        "axis": {"tickCount": 4},
    }
    return _chart(
        {
            "data": {"name": "stays"},
            "transform": [{"filter": f"datum.bank === {bank}"}, _SHOWN, _IN_WINDOW],
            "layer": [
                {
                    "mark": {"type": "rect", "clip": True, "stroke": _INK, "strokeWidth": 0.6},
                    "encoding": {
                        "x": _TIME,
                        "x2": {"field": "end"},
                        "y": y,
                        "y2": {"field": "top"},
                        "color": _colours("what", _STAY_COLOURS),
                        "tooltip": [
                            {"field": "layer", "type": "nominal"},
                            {"field": "what", "type": "nominal"},
                            _number("base", "first word", format=","),
                            _number("top", "end word", format=","),
                            *_SPAN_TOOLTIP,
                        ],
                    },
                },
                _names_inside(
                    "layer",
                    f"datum.top - datum.base > {arch.bank_words / 12}",
                    {**y, "field": "middle"},
                ),
            ],
        },
        _WINDOW,
        height=150,
    )


def _fillings() -> Spec:
    return _chart(
        {
            "data": {"name": "fillings"},
            "transform": [_SHOWN],
            "mark": {"type": "rect", "stroke": {"expr": "grid"}, "strokeWidth": 0.5},
            "encoding": {
                "x": {
                    "field": "number",
                    "type": "ordinal",
                    "title": "filling, in order",
                    "axis": {"labelOverlap": True, "labelAngle": 0},
                },
                "y": {"field": "core", "type": "nominal", "title": None},
                "color": {
                    **_number("share", "slots written"),
                    "scale": {"domain": [0, 1], "range": ["#cfe3f5", "#0b4a8f"]},
                    "legend": {"format": ".0%", "gradientLength": 160},
                },
                "tooltip": [
                    {"field": "layer", "type": "nominal"},
                    {"field": "core", "type": "nominal"},
                    _number("group-sets"),
                    _number("slots", "slots of the core"),
                    _number("start", "begins at cycle", format=","),
                ],
            },
        }
    )
