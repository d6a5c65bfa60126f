"""``mars ops``."""

from __future__ import annotations

import click

from .base import MarsCommand, write_text

__all__ = ["ops_command"]


@click.command("ops", cls=MarsCommand)
def ops_command() -> None:
    """Print which chains of operators MARS takes, and every limit on them.

    It is Markdown, made from the checks that the compiler applies; what breaks a limit stays on
    the CPU, and `mars compile --dump-offloads -` says which limit it was.

    \b
    Example:
      mars ops
    """
    from ..constraints import supported_ops
    from ..report.layout import wrapped

    write_text("\n".join(map(wrapped, supported_ops().splitlines())), None)
