"""Tables and lines as text, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import IO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

__all__ = ["new_table", "print_parts", "wrapped"]

WIDTH = 80


def wrapped(line: str, first: str = "", rest: str = "  ") -> str:
    """Break a line of prose at 80 columns, with an indent of the first line and of the rest."""
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_parts(parts: Iterable[RenderableType], file: IO[str]) -> None:
    """Print tables and lines, 80 columns wide, without trailing blanks."""
    console = Console(file=file, width=WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def new_table(title: str, *columns: str) -> Table:
    """Give a table whose first column is text and whose others are numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    # Only the first column gives way: long names go over several lines, numbers never.
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table
