"""``mars reproduce``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from .base import CommandError, MarsCommand, arch_options, read_arch, write_text

__all__ = ["reproduce_command"]

ALL = "all"
NAMES = ("table1", "table2", "table3", "table4", "fig10", "fig11", "fig12")


@click.command("reproduce", cls=MarsCommand)
@click.argument("names", nargs=-1, type=click.Choice([*NAMES, ALL]))
@arch_options
@click.option("--plots", metavar="DIR", help="Also write bar charts; needs matplotlib.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["png", "svg"]),
    default="png",
    show_default=True,
    help="Of the charts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def reproduce_command(
    names: tuple[str, ...],
    arch: str,
    changes: dict[str, str],
    plots: str | None,
    kind: str,
    as_json: bool,
) -> None:
    """Compute the paper's tables and figures, and print them beside the paper's.

    Each cell holds the paper's figure, ours and the deviation. Ours are of networks of random
    weights at the published sparsities and of the zoo, on the timed machine with the default
    schedule; accuracies are the zoo's. What needs a training that the zoo has not is printed as
    not run, what rests on assumptions is marked. All of it takes about a minute.

    \b
    Examples:
      mars reproduce table4
      mars reproduce all --plots plots
      mars reproduce table1 --arch mars-80b --json
    """
    machine = read_arch(arch, changes)
    if plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            raise CommandError("--plots needs matplotlib: pip install 'tvm-mars[plots]'") from None
    from ..report.reproduce import reproduce

    wanted = [name for name in NAMES if not names or name in names or ALL in names]
    with _progress() as progress:
        found = reproduce(wanted, machine, on_profile=progress)
    if as_json:
        write_text(json.dumps([artefact.to_dict() for artefact in found], indent=2), None)
    else:
        from ..report.reproduce_text import print_artefacts

        print_artefacts(found, sys.stdout)
    if plots is not None:
        from ..report.reproduce_plots import write_plots

        for path in write_plots(found, Path(plots), kind):
            click.echo(f"wrote {path}", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show on a terminal which network was profiled last."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console

    with Console(stderr=True).status("profiling") as status:
        yield lambda name: status.update(f"profiled {name}")
