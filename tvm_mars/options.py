"""The options of a compilation: one frozen class, which reads strings too."""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from mars_runtime.arch import MarsArch, load_arch
from mars_runtime.errors import OptionError

__all__ = [
    "CHANNEL_ORDERS",
    "CompileOptions",
    "read_assignment",
    "require_channel_order",
    "require_known",
]

CHANNEL_ORDERS = ("given", "packed")


def _option(default: Any, doc: str) -> Any:
    return attrs.field(default=default, metadata={"doc": doc})


@attrs.frozen(kw_only=True)
class CompileOptions:
    """How to compile.

    Every way to compile (Python keyword, pipeline, RunCodegen, command line) ends here.

    Examples
    --------
    >>> CompileOptions.from_mapping({"arch": "mars-dense", "min_macs": "1000"}).min_macs
    1000
    """

    arch: MarsArch = _option(load_arch("mars"), "Preset or .toml file of the machine.")
    min_macs: int = _option(0, "Regions with fewer multiply-accumulates per image stay on the CPU.")
    channel_order: str = _option(
        "given",
        "Order of channels inside the network: given, or packed, in which fewer group-sets hold a "
        "weight. The codes that leave are the same.",
    )

    def __attrs_post_init__(self) -> None:
        if self.min_macs < 0:
            raise OptionError(f"{self.min_macs} is negative", where="option min_macs")
        require_channel_order(self.channel_order)

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Name and meaning of every option."""
        return {field.name: field.metadata["doc"] for field in attrs.fields(cls)}

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> CompileOptions:
        """Read options; values may be text, ``arch`` a preset, a file or a mapping of fields.

        Raises
        ------
        OptionError
            If an option is unknown (the nearest names are given) or its value cannot be read.
        ArchError
            If the architecture is not good.
        """
        known = [field.name for field in attrs.fields(cls)]
        values: dict[str, Any] = {}
        require_known(given, known)
        for name, value in given.items():
            values[name] = _READERS[name](name, value)
        return cls(**values)

    def require_same(self, asked: CompileOptions, names: Iterable[str]) -> None:
        """Check that what these options made serves others as well.

        Raises
        ------
        OptionError
            If one of ``names`` differs.
        """
        for name in names:
            have, want = getattr(self, name), getattr(asked, name)
            if have != want:
                raise OptionError(
                    f"the module is partitioned for {_brief(have)}, not for {_brief(want)}",
                    where=f"option {name}",
                    hint="give the module as it was before it was partitioned",
                )

    def to_json(self) -> str:
        """Give the options as text that :meth:`from_json` reads."""
        return json.dumps(attrs.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CompileOptions:
        """Read what :meth:`to_json` wrote."""
        return cls.from_mapping(json.loads(text))


def read_assignment(text: str) -> tuple[str, str]:
    """Read ``FIELD=VALUE``, as command lines take it.

    Raises
    ------
    OptionError
        If the text has another form.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise OptionError(f"{text!r} is not FIELD=VALUE")
    return name.strip(), value.strip()


def require_channel_order(given: str) -> None:
    """Check an order of channels.

    Raises
    ------
    OptionError
        If it is none of :data:`CHANNEL_ORDERS`.
    """
    if given not in CHANNEL_ORDERS:
        raise OptionError(
            f"{given!r} is not {' or '.join(CHANNEL_ORDERS)}", where="option channel_order"
        )


def require_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Check the names of options.

    Raises
    ------
    OptionError
        If one is unknown; the nearest names are given.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {list(known)}"
            raise OptionError("no such option", where=f"option {name}", hint=hint)


def _brief(value: Any) -> str:
    return value.name if isinstance(value, MarsArch) else str(value)


def _read_arch(name: str, value: Any) -> MarsArch:
    if isinstance(value, Mapping):
        return MarsArch.from_dict(value)
    return load_arch(value)


def _read_int(name: str, value: Any) -> int:
    try:
        return int(value, 0) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise OptionError(f"{value!r} is not an integer", where=f"option {name}") from None


def _read_text(name: str, value: Any) -> str:
    return str(value)


_READERS = {"arch": _read_arch, "min_macs": _read_int, "channel_order": _read_text}
