"""``mars report``."""

from __future__ import annotations

from pathlib import Path

import click

from mars_runtime import Program

from .base import MarsCommand, write_file

__all__ = ["report_command"]


@click.command("report", cls=MarsCommand)
@click.argument("program", metavar="OUT.mars")
@click.option(
    "-o", "--output", required=True, metavar="REPORT.html", help="File to write: one HTML page."
)
@click.option("--title", help="What the page calls the network; the file's name if not given.")
@click.option("--baseline/--no-baseline", default=True, help="Time the dense network as well.")
def report_command(program: str, output: str, title: str | None, baseline: bool) -> None:
    """Write what `mars profile` says, with pictures, as one HTML page that loads nothing.

    What runs where; cycles, stalls, accesses and energy by layer beside the dense baseline; a
    roofline; a timeline with a lane for each unit and port, to zoom into; the feature-map banks
    over time; each layer's zero group-sets; how full each filling of the macros is; the program's
    size; every figure of the machine, and whether it is assumed.

    \b
    Example:
      mars report net.mars -o net.html
    """
    from ..report.page import report_page

    loaded = Program.load(program)
    page = report_page(loaded, title or Path(program).stem, baseline=baseline)
    write_file(output, page.encode())
    click.echo(f"wrote {output}: {len(page.encode()) / 2**20:.1f} MiB", err=True)
