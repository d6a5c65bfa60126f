"""Reproduced figures as bar charts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mars_runtime.program import write_atomically

from .reproduce import Artefact, Series

__all__ = ["FORMATS", "draw", "write_plots"]

FORMATS = ("png", "svg")
LOGARITHMIC = 20  # from this ratio of the largest to the smallest bar on


def draw(artefact: Artefact) -> Figure:
    """Draw an artefact's series as grouped bars, the paper's statement as a line."""
    panels: dict[str, list[Series]] = {}
    for one in artefact.series:
        panels.setdefault(one.panel, []).append(one)
    figure = Figure(figsize=(6.0 * len(panels) + 2, 4.5), layout="constrained")
    figure.suptitle(artefact.title, fontsize="medium")
    for axes, series in zip(
        np.ravel(figure.subplots(1, len(panels), sharey=True)), panels.values(), strict=True
    ):
        _bars(axes, series)
        if artefact.statement is not None:
            text = f"the paper: at most {artefact.statement:g}"
            axes.axhline(artefact.statement, linestyle="--", color="0.3", label=text)
        axes.set_ylabel(artefact.axis)
        axes.legend(fontsize="small")
    return figure


def _bars(axes: Axes, series: Sequence[Series]) -> None:
    labels = list(dict.fromkeys(label for one in series for label in one.labels))
    width = 0.8 / len(series)
    for number, one in enumerate(series):
        places = np.array([labels.index(label) for label in one.labels])
        shift = (number - (len(series) - 1) / 2) * width
        axes.bar(places + shift, one.values, width, label=one.name)
    values = [value for one in series for value in one.values if value > 0]
    if values and max(values) >= LOGARITHMIC * min(values):
        axes.set_yscale("log")
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right")


def write_plots(found: Sequence[Artefact], folder: Path, kind: str) -> list[Path]:
    """Write a plot of each artefact that has one.

    Parameters
    ----------
    kind : str
        One of :data:`FORMATS`.

    Returns
    -------
    list of Path
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Without a date and with fixed names of parts, the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mars"}):
        for artefact in found:
            if not artefact.series:
                continue
            buffer = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            draw(artefact).savefig(buffer, format=kind, dpi=150, metadata=metadata)
            path = folder / f"{artefact.key}.{kind}"
            write_atomically(path, buffer.getvalue())
            written.append(path)
    return written
