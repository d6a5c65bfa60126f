"""``mars profile``."""

from __future__ import annotations

import json
import sys

import click

from mars_runtime import Program

from .base import MarsCommand, write_file, write_text

__all__ = ["profile_command"]


@click.command("profile", cls=MarsCommand)
@click.argument("program", metavar="OUT.mars")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead.")
@click.option(
    "--trace",
    metavar="T.json",
    help="Also write a timeline that ui.perfetto.dev and chrome://tracing open.",
)
@click.option("--baseline/--no-baseline", default=True, help="Time the dense network as well.")
def profile_command(program: str, as_json: bool, trace: str | None, baseline: bool) -> None:
    """Say what one image costs on the machine that the program was compiled for.

    Tables by layer: cycles, what the cores wait for, accesses, energy, speed-up over the same
    hardware without skipping; then frames per second, GOPS and TOPS/W. What rests on assumptions
    says so. For another machine compile with another --arch.

    In the JSON a key carries its unit: _cycles are core cycles, _us microseconds, _pj picojoule,
    _bits bits; macro_cycles and stalls are summed over cores; shares are of 1.

    \b
    Examples:
      mars profile net.mars
      mars profile net.mars --json | jq .total.fps
      mars profile net.mars --no-baseline --trace net.json
    """
    from ..report import profile_program

    loaded = Program.load(program)
    if trace:
        _write_trace(loaded, trace)
    profile = profile_program(loaded, baseline=baseline)
    if as_json:
        write_text(json.dumps(profile.to_dict(), indent=2), None)
        return
    from ..report.text import print_profile

    print_profile(profile, sys.stdout)


def _write_trace(program: Program, path: str) -> None:
    from mars_runtime.trace import chrome_trace, record

    timelines = [record(region, program.arch) for region in program.regions]
    text = json.dumps(chrome_trace(timelines, program.arch))
    write_file(path, text.encode())
