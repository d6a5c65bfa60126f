"""Checks of option values that several classes of options share."""

from __future__ import annotations

from typing import Any

from mars_runtime.errors import OptionError

__all__ = ["at_least_one", "one_of"]


def one_of(*values: object, kind: str = "") -> Any:
    """Give a validator for one of some values; ``kind`` goes before the name in its error."""

    def check(_: object, attribute: Any, value: object) -> None:
        if value not in values:
            known = ", ".join(map(repr, values))
            raise OptionError(f"{value!r}", where=f"{kind}{attribute.name}", hint=f"one of {known}")

    return check


def at_least_one(_: object, attribute: Any, value: int) -> None:
    """Validate a count."""
    if value < 1:
        raise OptionError(f"{value} is not positive", where=attribute.name)
