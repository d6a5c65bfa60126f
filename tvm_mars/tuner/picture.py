"""What a database holds, as a picture: convergence, cycles by layer, the best schedule's decisions.

Drawn by Vega-Lite, whose specification is made here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from mars_runtime.errors import MarsError, OptionError

from ..report.charts import BLUE, GREEN, GREY, OCHRE, ORANGE, PURPLE, RED, STEP, Spec
from ..schedule import Choice
from .changes import value_text
from .database import Database
from .outcome import Outcome, outcomes

__all__ = ["FORMATS", "draw", "specification"]

_WIDTH = 420  # pixels of a panel
_CELL = 76  # pixels of a decision's column
_ROW = 1.4 * STEP  # pixels of a layer
_SCHEDULES = {"default": GREY, "best": BLUE}
_RUNS = (BLUE, ORANGE, GREEN, PURPLE, RED, OCHRE)
_CHANGED, _SAME = "#cfe3f4", "#f3f4f6"  # behind black letters
_COSTS = {  # by objective: what the axis says, and what one of its units is of a record's
    "cycles": ("core cycles", 1),
    "energy": ("energy, µJ [A]", 1e6),
    "edp": ("core cycles x energy, µJ [A]", 1e6),
}


def draw(database: Database, kind: str) -> bytes:
    """Draw the searches of a database; the bytes of a file.

    Parameters
    ----------
    kind : str
        One of :data:`FORMATS`. A page of HTML loads nothing and shows values under the pointer.

    Raises
    ------
    OptionError
        If there is no such kind.
    MarsError
        If what draws is not installed.
    """
    if kind not in FORMATS:
        raise OptionError(f"{kind!r} is not one of {', '.join(FORMATS)}", where="kind of picture")
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise MarsError(
            "needs vl_convert, which is not installed",
            where="mars tune",
            hint="pip install 'tvm-mars[report]'",
        ) from None
    return FORMATS[kind](vl_convert, specification(list(outcomes(database))))


#: How a picture is made, by the end of its file's name.
FORMATS: dict[str, Callable[[Any, Spec], bytes]] = {
    "html": lambda vl, spec: vl.vegalite_to_html(spec, bundle=True).encode(),
    "png": lambda vl, spec: vl.vegalite_to_png(spec, scale=2),
    "svg": lambda vl, spec: vl.vegalite_to_svg(spec).encode(),
}


def specification(found: Sequence[Outcome]) -> Spec:
    """Give the Vega-Lite specification of a picture, its data in it."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 16,
        "spacing": 40,
        "config": {
            "font": "sans-serif",
            "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
            "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
            "title": {"anchor": "start", "fontSize": 15, "subtitleFontSize": 12, "offset": 12},
            "view": {"stroke": None},
            "concat": {"spacing": 24},
        },
        "vconcat": [_outcome(one) for one in found],
    }


def _outcome(found: Outcome) -> Spec:
    columns = list(dict.fromkeys(itertools.chain(*(layer.changes for layer in found.layers))))
    names = [field.name for field in attrs.fields(Choice) if field.name in columns]
    layers = [_bars(found), *([_decisions(found, names)] if names else [])]
    return {
        "title": {
            "text": found.network or f"workload {found.workload[:12]}",
            "subtitle": f"machine {found.arch[:12]}: default {found.default.cycles:,} core cycles, "
            f"best {found.best.cycles:,} ({found.gain:.3f}x) of {found.records:,} schedules",
        },
        "vconcat": [
            _convergence(found),
            {"hconcat": layers, "spacing": 8, "resolve": {"scale": {"y": "shared"}}},
        ],
        "resolve": {"scale": {"color": "independent"}},
    }


def _title(text: str, subtitle: str) -> Spec:
    return {"text": text, "subtitle": subtitle, "fontSize": 13, "subtitleColor": GREY}


# -- convergence -----------------------------------------------------------------------------------


def _convergence(found: Outcome) -> Spec:
    what, unit = _COSTS[found.objective]
    # A run that began anew in the same directory is another curve.
    names = [f"{number}: {run.name}" for number, run in enumerate(found.runs, 1)]
    rows = [
        {"search": name, "trial": trial, "cost": cost / unit}
        for name, run in zip(names, found.runs, strict=True)
        for trial, cost in _steps_down(run.best_costs)
    ]
    default = found.default.cost(found.objective) / unit
    y = {
        "field": "cost",
        "type": "quantitative",
        "title": what,
        "scale": {"zero": False, "nice": False, "padding": 8},
        "axis": {"format": ",.6~r", "tickCount": 5},
    }
    line = {
        "data": {"values": rows},
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "opacity": 0.7},
        "encoding": {
            "x": {
                "field": "trial",
                "type": "quantitative",
                "title": "trial",
                "scale": {"nice": False},
                "axis": {"tickMinStep": 1, "tickCount": 10, "format": ",d", "grid": False},
            },
            "y": y,
            "color": {
                "field": "search",
                "type": "nominal",
                "title": "search",
                "scale": {"domain": names, "range": list(itertools.islice(_colours(), len(names)))},
                "legend": {} if len(names) > 1 else None,
            },
            "tooltip": [
                {"field": "search", "type": "nominal"},
                {"field": "trial", "type": "quantitative"},
                {"field": "cost", "type": "quantitative", "title": what, "format": ",.6~r"},
            ],
        },
    }
    rule = {
        "data": {"values": [{"cost": default}]},
        "mark": {"type": "rule", "strokeDash": [4, 4], "color": GREY},
        "encoding": {"y": y},
    }
    return {
        "title": _title("Best so far", "dashed: the default"),
        "width": 2 * _WIDTH,
        "height": 180,
        "layer": [rule, line],
    }


def _steps_down(costs: Sequence[float]) -> Iterator[tuple[int, float]]:
    """Yield the trials that found a better one, counted from 1, and the last."""
    for trial, cost in enumerate(costs, 1):
        if trial in (1, len(costs)) or cost < costs[trial - 2]:
            yield trial, cost


def _colours() -> Iterator[str]:
    return itertools.cycle(_RUNS)


# -- layers ----------------------------------------------------------------------------------------


def _layer_axis(**more: Any) -> Spec:
    return {
        "field": "layer",
        "type": "nominal",
        "sort": None,
        "title": None,
        "scale": {"paddingInner": 0.25},
        "axis": {"labelLimit": 240, "labelPadding": 6, "domain": False, "ticks": False} | more,
    }


def _bars(found: Outcome) -> Spec:
    rows = [
        {"layer": layer.name, "schedule": schedule, "cycles": cycles}
        for layer in found.layers
        for schedule, cycles in zip(
            _SCHEDULES, (layer.default_cycles, layer.best_cycles), strict=True
        )
    ]
    return {
        "title": _title("Core cycles by layer", "what is filled ahead counts for the layer before"),
        "data": {"values": rows},
        "width": _WIDTH,
        "height": {"step": _ROW / 2},
        "mark": "bar",
        "encoding": {
            "y": _layer_axis(),
            "yOffset": {"field": "schedule", "sort": list(_SCHEDULES)},
            "x": {
                "field": "cycles",
                "type": "quantitative",
                "title": None,
                "axis": {"format": ",d", "tickCount": 5},
            },
            "color": {
                "field": "schedule",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(_SCHEDULES), "range": list(_SCHEDULES.values())},
                "legend": {"orient": "bottom"},
            },
            "tooltip": [
                {"field": "layer", "type": "nominal"},
                {"field": "schedule", "type": "nominal"},
                {"field": "cycles", "type": "quantitative", "format": ","},
            ],
        },
    }


def _decisions(found: Outcome, names: Sequence[str]) -> Spec:
    """Write the best schedule's decisions, those that the default has otherwise on blue."""
    rows = [
        {
            "layer": layer.name,
            "decision": name,
            "value": value_text(getattr(choice, name)),
            "default": value_text(getattr(default, name)),
            "changed": name in layer.changes,
        }
        for layer, choice, default in zip(
            found.layers, found.best.point.choices, found.default.point.choices, strict=True
        )
        for name in names
    ]
    x = {
        "field": "decision",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelAngle": 0, "labelPadding": 6, "domain": False, "ticks": False},
    }
    return {
        "title": _title("Decisions of the best", "blue: not as in the default"),
        "data": {"values": rows},
        "width": {"step": _CELL},
        "height": {"step": _ROW},
        "encoding": {"x": x, "y": _layer_axis(labels=False)},
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "white", "strokeWidth": 2},
                "encoding": {
                    "color": {
                        "condition": {"test": "datum.changed", "value": _CHANGED},
                        "value": _SAME,
                    },
                    "tooltip": [
                        {"field": name, "type": "nominal"}
                        for name in ("layer", "decision", "value", "default")
                    ],
                },
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "text": {"field": "value", "type": "nominal"},
                    "color": {
                        "condition": {"test": "datum.changed", "value": "black"},
                        "value": GREY,
                    },
                },
            },
        ],
    }
