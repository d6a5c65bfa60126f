"""Checks of option values that several classes of options share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mars_runtime.errors import OptionError

__all__ = ["at_least_one", "one_of", "require_one_of"]


def one_of(*values: object, kind: str = "") -> Any:
    """Give a validator for one of some values; ``kind`` goes before the name in its error."""

    def check(_: object, attribute: Any, value: object) -> None:
        require_one_of(f"{kind}{attribute.name}", value, values)

    return check


def require_one_of(name: str, value: object, values: Collection[object]) -> None:
    """Check that an option is one of some values.

    Raises
    ------
    OptionError
        If it is not.
    """
    if value not in values:
        known = ", ".join(map(repr, values))
        raise OptionError(f"{value!r}", where=name, hint=f"one of {known}")


def at_least_one(_: object, attribute: Any, value: int) -> None:
    """Validate a count."""
    if value < 1:
        raise OptionError(f"{value} is not positive", where=attribute.name)
