"""The architecture description: every number of the hardware is a field here, and only here.

Sources: **[P]** is Sie et al., "MARS: Multi-macro Architecture SRAM CIM-Based Accelerator with
Co-designed Compressed Neural Networks", TCAD 2022 (arXiv 2010.12861). **[A]** is assumed by this
project, because the paper does not say; every report marks such fields.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from .errors import ArchError
from .maps import WORD_CHANNELS

__all__ = ["PRESETS", "FieldInfo", "MarsArch", "load_arch"]

Overlap = Literal["none", "prefetch", "full"]
_OVERLAPS = ("none", "prefetch", "full")
_HOROWITZ = "[A] Horowitz, ISSCC 2014, 45 nm"


@attrs.frozen
class FieldInfo:
    """What is known of one field of :class:`MarsArch`."""

    name: str
    unit: str
    source: str
    doc: str

    @property
    def assumed(self) -> bool:
        """Whether the value is this project's assumption, not the paper's word."""
        return self.source.startswith("[A]")


def _check_number(instance: MarsArch, attribute: attrs.Attribute[Any], value: object) -> None:
    low, high = attribute.metadata["low"], attribute.metadata["high"]
    kind = int if attribute.type in (int, "int") else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise ArchError(
            f"{value!r} is not a number from {low} to {high}",
            where=f"architecture field {attribute.name}",
        )


def _check_kind(instance: MarsArch, attribute: attrs.Attribute[Any], value: object) -> None:
    if attribute.type in (bool, "bool"):
        good = isinstance(value, bool)
    elif attribute.name == "overlap":
        good = value in _OVERLAPS
    else:
        good = isinstance(value, str) and bool(value)
    if not good:
        wanted = attribute.metadata["unit"] or "text"
        raise ArchError(f"{value!r} is not {wanted}", where=f"architecture field {attribute.name}")


def _number(
    default: float, unit: str, source: str, doc: str, low: float = 1, high: float = 2**31
) -> Any:
    metadata = {"unit": unit, "source": source, "doc": doc, "low": low, "high": high}
    return attrs.field(default=default, validator=_check_number, metadata=metadata)


def _choice(default: Any, unit: str, source: str, doc: str) -> Any:
    metadata = {"unit": unit, "source": source, "doc": doc}
    return attrs.field(default=default, validator=_check_kind, metadata=metadata)


@attrs.frozen(kw_only=True, cache_hash=True)
class MarsArch:
    """A MARS machine.

    Every field has a unit, a source and bounds: ``mars arch`` prints them, :meth:`describe` gives
    them as data. The defaults are the preset ``mars``.

    Raises
    ------
    ArchError
        If a field is out of its bounds or two fields contradict each other.

    Examples
    --------
    >>> MarsArch().group_sets_per_core
    64
    >>> load_arch("mars", {"macro_write_bits": "64"}).macro_write_bits
    64
    """

    name: str = _choice("mars", "", "", "Name of this description.")

    cores: int = _number(4, "", "[P]", "CIM cores on the chip.", high=16)
    macros_per_core: int = _number(2, "", "[P]", "SRAM-CIM macros of a core.", high=16)
    partitions_per_macro: int = _number(
        8, "", "[P]", "Partitions of a macro; each computes one output channel.", high=16
    )
    weight_groups_per_partition: int = _number(
        64,
        "",
        "[P]",
        "Weight-groups that a partition holds; a core holds as many group-sets.",
        high=64,
    )
    weight_group: int = _number(
        WORD_CHANNELS,
        "weights",
        "[P]",
        "Inputs of one access, shared by the partitions; a 64-bit map word holds as many channels.",
        low=WORD_CHANNELS,
        high=WORD_CHANNELS,
    )
    core_clock_mhz: float = _number(100, "MHz", "[P]", "Clock of the cores.", low=0.001)
    top_clock_mhz: float = _number(
        400,
        "MHz",
        "[P]",
        "Clock of the top level; the shunter serves one core per cycle of it.",
        low=0.001,
    )

    banks: int = _number(2, "", "[P]", "Feature-map SRAMs, in ping-pong.", low=2, high=2)
    bank_bits: int = _number(
        512 * 1024, "bit", "[P]", "Size of one feature-map SRAM.", low=1024, high=64 * 2**20
    )
    weight_sram_bits: int = _number(
        256 * 1024,
        "bit",
        "[A]",
        "Weight SRAM of a core, between off-chip and macros.",
        low=2048,
        high=2**21,
    )
    index_sram_bits: int = _number(
        4 * 1024,
        "bit",
        "[A]",
        "Index SRAM of a core: index codes and load descriptors.",
        low=256,
        high=2**21,
    )
    parameter_sram_bits: int = _number(
        16 * 1024,
        "bit",
        "[A]",
        "Parameter SRAM of a core: biases and requantization multipliers of the loaded blocks.",
        low=2048,
        high=2**21,
    )

    offchip_bits_per_cycle: int = _number(
        128, "bit / core cycle", "[A] fitted to Table I", "Off-chip bandwidth of the chip."
    )
    macro_write_bits: int = _number(
        32,
        "bit / core cycle",
        "[A] fitted to Table I",
        "Second hop, weight SRAM to macros, per core.",
    )
    array_fill_cycles: int = _number(
        1400,
        "core cycles",
        "[A] fitted to Table I",
        "Fixed cost of opening a core's array for writing, once per load.",
        low=0,
    )
    overlap: Overlap = _choice(
        "none",
        "one of none, prefetch, full",
        "[A]",
        "What may run behind compute on the same core: nothing; the first hop; both hops.",
    )
    dual_4bit_cells: bool = _choice(
        False, "true or false", "[A]", "Whether an 8-bit cell holds two 4-bit weights."
    )
    zero_skipping: bool = _choice(
        True,
        "true or false",
        "[P]",
        "Whether all-zero group-sets are left out of storage and compute.",
    )

    accesses_4bit: int = _number(
        1, "", "[A] fits Table I", "Macro accesses per group-set and pixel, 4-bit inputs.", high=8
    )
    accesses_8bit: int = _number(
        2, "", "[A] fits Table I", "Macro accesses per group-set and pixel, 8-bit inputs.", high=16
    )
    macro_latency_cycles: int = _number(
        1, "core cycles", "[P]", "From an access to its result.", low=0, high=1024
    )
    apw_latency_cycles: int = _number(
        1, "core cycles", "[A]", "From the last result to the write of its word.", low=0, high=1024
    )
    issue_cycles: int = _number(
        1,
        "core cycles",
        "[A]",
        "Time in which the controller issues one instruction. Instructions travel while the "
        "off-chip port is idle: their bits and energy count, their time does not.",
        high=1024,
    )
    offchip_bytes: int = _number(
        2**30,
        "byte",
        "[A]",
        "Off-chip memory for programs, weights and maps.",
        low=2**16,
        high=2**31,
    )

    macro_access_pj: float = _number(
        22.0, "pJ", "[P] 2.2 mW x 10 ns; sources differ by 4x", "Energy of one macro access.", low=0
    )
    macro_write_pj_per_bit: float = _number(
        0.31, "pJ / bit", _HOROWITZ, "Writing a macro cell, taken as a 32 KB SRAM's.", low=0
    )
    bank_pj_per_bit: float = _number(
        0.44, "pJ / bit", _HOROWITZ, "Feature-map SRAM access, 64 KB interpolated.", low=0
    )
    core_sram_pj_per_bit: float = _number(
        0.31, "pJ / bit", _HOROWITZ, "Weight, index and parameter SRAM access, 32 KB.", low=0
    )
    offchip_pj_per_bit: float = _number(
        20.3, "pJ / bit", _HOROWITZ, "DRAM access: 1.3 nJ per 64 bit, the lower end.", low=0
    )

    def __attrs_post_init__(self) -> None:
        if self.macros_per_core * self.partitions_per_macro != self.weight_group:
            raise ArchError(
                f"{self.macros_per_core} macros x {self.partitions_per_macro} partitions give "
                f"{self.macros_per_core * self.partitions_per_macro} output channels, but a map "
                f"word holds {self.weight_group}",
                where="architecture",
                hint="keep macros_per_core * partitions_per_macro equal to weight_group",
            )
        if self.cores * self.core_clock_mhz > self.top_clock_mhz:
            raise ArchError(
                f"the shunter needs {self.cores * self.core_clock_mhz:g} MHz to serve "
                f"{self.cores} cores, the top level has {self.top_clock_mhz:g} MHz",
                where="architecture field top_clock_mhz",
                hint="raise top_clock_mhz",
            )

    # -- what follows from the fields ----------------------------------------------------------

    @property
    def kernel_block(self) -> int:
        """Output channels of a group-set."""
        return self.macros_per_core * self.partitions_per_macro

    @property
    def group_set_weights(self) -> int:
        """Weights of a group-set."""
        return self.kernel_block * self.weight_group

    @property
    def group_sets_per_core(self) -> int:
        """Group-sets of 8-bit weights that a core's macros hold."""
        return self.weight_groups_per_partition

    def slots(self, weight_bits: int) -> int:
        """Group-sets of the given weight width that a core's macros hold."""
        doubled = weight_bits == 4 and self.dual_4bit_cells
        return self.weight_groups_per_partition * (2 if doubled else 1)

    def accesses(self, input_bits: int) -> int:
        """Macro accesses per group-set and output pixel."""
        return self.accesses_4bit if input_bits == 4 else self.accesses_8bit

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates of all cores in one access."""
        return self.cores * self.group_set_weights

    @property
    def bank_words(self) -> int:
        """64-bit words of one feature-map SRAM."""
        return self.bank_bits // (4 * self.weight_group)

    @classmethod
    def describe(cls) -> tuple[FieldInfo, ...]:
        """Name, unit, source and meaning of every field."""
        return tuple(
            FieldInfo(f.name, f.metadata["unit"], f.metadata["source"], f.metadata["doc"])
            for f in attrs.fields(cls)
        )

    def to_dict(self) -> dict[str, object]:
        """Give the fields as plain data, for JSON or TOML."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> MarsArch:
        """Build an architecture from plain data; strings are read as their field's type.

        Raises
        ------
        ArchError
            If a field is unknown (the nearest names are given) or out of its bounds.
        """
        return PRESETS["mars"].replace(data)

    def replace(self, changes: Mapping[str, object]) -> MarsArch:
        """Give this architecture with some fields changed; strings are read as their type."""
        fields = {f.name: f for f in attrs.fields(type(self))}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 3)
                hint = f"did you mean {' or '.join(near)}?" if near else "see `mars arch`"
                raise ArchError("no such field", where=f"architecture field {name}", hint=hint)
            values[name] = _read(fields[name], value)
        return attrs.evolve(self, **values)


def _read(field: attrs.Attribute[Any], value: object) -> object:
    if not isinstance(value, str):
        return value
    kind = str(field.type)
    try:
        if "int" in kind:
            return int(value, 0)
        if "float" in kind:
            return float(value)
        if "bool" in kind:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    except (ValueError, KeyError):
        wanted = "true or false" if "bool" in kind else "a number"
        raise ArchError(
            f"{value!r} is not {wanted}", where=f"architecture field {field.name}"
        ) from None
    return value


_MARS = MarsArch()
PRESETS: dict[str, MarsArch] = {
    "mars": _MARS,
    # The other end of the fit to Table I: one slower hop, no fixed cost.
    "mars-80b": attrs.evolve(
        _MARS, name="mars-80b", offchip_bits_per_cycle=80, macro_write_bits=80, array_fill_cycles=0
    ),
    # The paper's baseline: the same hardware with zero skipping off in compute and in storage.
    "mars-dense": attrs.evolve(_MARS, name="mars-dense", zero_skipping=False),
}


def load_arch(
    source: str | os.PathLike[str] | MarsArch = "mars",
    changes: Mapping[str, object] | None = None,
) -> MarsArch:
    """Give an architecture by preset name or TOML file, with some fields changed.

    Parameters
    ----------
    source : str, path or MarsArch
        A preset (``mars``, ``mars-80b``, ``mars-dense``) or a TOML file whose keys are fields;
        its key ``base`` names the preset that it starts from.
    changes : mapping, optional
        Fields to change, as values or as text; unless it is among them, the name tells them.

    Raises
    ------
    ArchError
        If the preset, the file, a field or a value is not good.
    """
    if isinstance(source, MarsArch):
        arch = source
    elif str(source) in PRESETS:
        arch = PRESETS[str(source)]
    elif Path(source).suffix == ".toml":
        arch = _read_toml(Path(source))
    else:
        near = difflib.get_close_matches(str(source), PRESETS, 2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ArchError(
            f"{str(source)!r} is neither a preset ({', '.join(PRESETS)}) nor a .toml file",
            where="architecture",
            hint=f"{hint}see `mars arch --list`",
        )
    changed = arch.replace(changes) if changes else arch
    if changed == arch or changed.name != arch.name:
        return changed
    # Figures of a changed machine must not go by the name of the one that it was made of.
    text = ", ".join(f"{name}={value}" for name, value in (changes or {}).items())
    return attrs.evolve(changed, name=f"{arch.name} with {text}")


def _read_toml(path: Path) -> MarsArch:
    try:
        import tomllib
    except ModuleNotFoundError:  # CPython 3.10
        import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArchError(f"cannot be read: {error}", where=str(path)) from None
    base = fields.pop("base", "mars")
    if base not in PRESETS:
        raise ArchError(
            f"base {base!r} is not a preset", where=str(path), hint=f"one of {', '.join(PRESETS)}"
        )
    return PRESETS[base].replace({"name": path.stem, **fields})
