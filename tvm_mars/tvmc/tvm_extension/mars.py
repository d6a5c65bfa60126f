"""What such a tvmc looks for: a ``TVMExtension``."""

from __future__ import annotations

from typing import Any

from tvm.driver.tvmc.extensions import TVMExtension

from tvm_mars.tvmc.target import register

__all__ = ["MarsExtension"]


class MarsExtension(TVMExtension):  # type: ignore[misc]
    """Makes MARS a target of the tvmc that loads it."""

    def __init__(self) -> None:
        register()

    def uma_backends(self) -> list[Any]:
        """Give none: UMA's backends generate C, and a program for MARS is none."""
        return []
