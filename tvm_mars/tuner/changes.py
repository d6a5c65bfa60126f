"""What a point decides otherwise than another."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ..schedule import Choice, Point

__all__ = ["changes", "decisions"]


def decisions(old: Choice, new: Choice) -> Iterator[tuple[str, str]]:
    """Yield the decisions of a step that differ: their names, and both values as text."""
    for field in attrs.fields(Choice):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was != now:
            yield field.name, f"{now} (was {was})"


def changes(old: Point, new: Point) -> Iterator[str]:
    """Yield for each step what differs, empty for nothing: ``most 32 (was 0), join True ...``."""
    for before, after in zip(old.steps, new.steps, strict=True):
        yield ", ".join(f"{name} {values}" for name, values in decisions(before, after))
