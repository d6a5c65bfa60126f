"""What a point decides otherwise than another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from ..schedule import Choice, Point

__all__ = ["Changes", "changes", "changes_text", "value_text"]

#: The decisions of a layer that differ, with both values.
Changes = dict[str, tuple[Any, Any]]


def changes(old: Point, new: Point) -> Iterator[Changes]:
    """Yield for each layer the decisions that differ, with both values."""
    for before, after in zip(old.choices, new.choices, strict=True):
        both = {
            field.name: (getattr(before, field.name), getattr(after, field.name))
            for field in attrs.fields(Choice)
        }
        yield {name: (was, now) for name, (was, now) in both.items() if was != now}


def changes_text(changed: Changes) -> str:
    """Write a layer's as ``most 32 (was 0), join yes (was no)``; nothing for none."""
    return ", ".join(
        f"{name} {value_text(now)} (was {value_text(was)})" for name, (was, now) in changed.items()
    )


def value_text(value: Any) -> str:
    """Write what a decision may be: ``yes``, ``6 x 6``, ``next``, ``32``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return str(value)
