"""Reproduced tables as text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

from rich.console import RenderableType

from .layout import new_table, print_parts, wrapped
from .reproduce import NOT_RUN, Artefact, Cell

__all__ = ["print_artefacts"]

NOTHING = "-"


def print_artefacts(found: Sequence[Artefact], file: IO[str]) -> None:
    """Print tables: in each cell the paper's figure, ours, and by how much that is off."""
    print_parts(_parts(found), file)


def _parts(found: Sequence[Artefact]) -> Iterator[RenderableType]:
    for artefact in found:
        yield artefact.title
        table = new_table("", "", *(f"  {name}" for name in artefact.columns.values()))
        for row in artefact.rows:
            ran = row.source != NOT_RUN
            cells = [
                _text(row.cells[name], NOTHING if ran else NOT_RUN) if name in row.cells else ""
                for name in artefact.columns
            ]
            table.add_row(f"{row.name}, {row.source}" if ran else row.name, *cells)
        yield table
        for note in artefact.notes:
            yield wrapped(note, first="  ", rest="    ")
        yield ""
    yield "cells: the paper's / ours, and ours over the paper's less one; - is not stated"


def _text(cell: Cell, missing: str) -> str:
    mark = "!" if cell.misprint else ""
    stated = _number(cell.paper, cell.digits, NOTHING)
    ours = _number(cell.ours, cell.digits, missing)
    off = "" if cell.deviation is None else f" {100 * cell.deviation:+.1f}%"
    return f"{stated}{mark} / {ours}{off}"


def _number(value: float | None, digits: int, missing: str) -> str:
    return missing if value is None else f"{value:,.{digits}f}"
