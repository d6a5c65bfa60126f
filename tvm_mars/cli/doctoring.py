"""``mars doctor``."""

from __future__ import annotations

import json
import sys

import click

from .base import MarsCommand, write_text

__all__ = ["doctor_command"]


@click.command("doctor", cls=MarsCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def doctor_command(as_json: bool) -> None:
    """Say what is installed, and what each part is for.

    Versions of Python, tvm-mars and the packages that it uses, which TVM is there (Relax, Relay or
    none) and whether it imports, the compiler that it links libraries with, the processor's
    features, and caches with their sizes. It never fails: what is wrong is part of what it says.

    \b
    Examples:
      mars doctor
      mars doctor --json | jq .tvm
    """
    from ..doctor import examine

    found = examine()
    if as_json:
        write_text(json.dumps(found.to_dict(), indent=2), None)
        return
    from ..report.doctor_text import print_findings

    print_findings(found, sys.stdout)
