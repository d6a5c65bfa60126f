"""The tables of a page: a row for each layer, a column for each quantity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from mars_runtime.timeline import STALLS

from .charts import METRICS
from .profile import LayerProfile, Profile
from .text import ASSUMED, cause_head

__all__ = ["Cell", "Column", "PageTable", "time_table", "work_table"]


@attrs.frozen
class Cell:
    """A cell of a table; ``value`` is the number itself where ``text`` is a rounded one."""

    text: str
    value: float | None = None


@attrs.frozen
class Column:
    """A column of a table: its head, and what the head means."""

    head: str
    meaning: str = ""


@attrs.frozen
class PageTable:
    """A table whose rows are layers; ``total`` is its last row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    total: tuple[Cell, ...]


@attrs.frozen
class _Quantity:
    """What a column shows: of a layer, and of the whole if its sum means something."""

    column: Column
    cell: Callable[[LayerProfile], Cell]
    total: Cell


def _count(value: float | None, digits: int = 0) -> Cell:
    return Cell("") if value is None else Cell(f"{value:,.{digits}f}", value)


def _percent(share: float | None) -> Cell:
    if share is None:
        return Cell("")
    small = 0 < share < 0.0005
    return Cell(
        "<0.1\N{NO-BREAK SPACE}%"
        if small
        else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
        if share
        else "0",
        share,
    )


def _times(ratio: float | None) -> Cell:
    return Cell("") if ratio is None else Cell(f"{ratio:.2f}x", ratio)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def time_table(profile: Profile, names: Sequence[str]) -> PageTable:
    """Give each layer's cycles, beside the dense baseline's, and the shares of what they go to."""
    quantities = [
        _Quantity(
            Column("cycles", "core cycles from the end of the layer before to the end of this one"),
            lambda layer: _count(layer.cycles),
            _count(profile.cycles),
        )
    ]
    if profile.dense_cycles is not None:
        quantities += [
            _Quantity(
                Column("dense", "core cycles on the dense baseline: no group-set skipped"),
                lambda layer: _count(layer.dense_cycles),
                _count(profile.dense_cycles),
            ),
            _Quantity(
                Column("speed-up", "over the dense baseline"),
                lambda layer: _times(layer.speedup),
                _times(profile.speedup),
            ),
        ]
    quantities.append(
        _Quantity(
            Column("busy", "utilisation: share of the cores' time in which macros compute"),
            lambda layer: _percent(layer.utilisation),
            _percent(profile.utilisation),
        )
    )
    for cause, cycles in profile.stalls.items():
        if cycles:
            quantities.append(
                _Quantity(
                    Column(cause_head(cause), STALLS[cause]),
                    lambda layer, cause=cause: _percent(  # type: ignore[misc]
                        _share(layer.stalls[cause], layer.core_cycles)
                    ),
                    _percent(_share(cycles, profile.core_cycles)),
                )
            )
    return _layer_table("Time by layer", quantities, profile, names)


def work_table(profile: Profile, names: Sequence[str]) -> PageTable:
    """Give each layer's group-sets, accesses, transfers and energy, beside the dense baseline's."""
    stored = sum(layer.group_sets for layer in profile.layers)
    dense = sum(layer.dense_group_sets for layer in profile.layers)
    quantities = [
        _Quantity(
            Column("group-sets", "16 kernels x 16 inputs x 1 tap each, stored"),
            lambda layer: _count(layer.group_sets or None),
            _count(stored),
        ),
        _Quantity(
            Column("of", "group-sets of the dense layer"),
            lambda layer: _count(layer.dense_group_sets or None),
            _count(dense),
        ),
        _Quantity(
            Column("zero", "share of the group-sets that are all zero"),
            lambda layer: _percent(_zero(layer.group_sets, layer.dense_group_sets)),
            _percent(_zero(stored, dense)),
        ),
        _Quantity(
            Column("filled", "share of the executed multiplications that the layer has"),
            lambda layer: _percent(layer.filled(profile.arch)),
            Cell(""),
        ),
    ]
    shown: dict[str, tuple[str, str, int]] = {
        "feature-map reads": ("reads", "accesses of the cores to the feature-map SRAMs", 0),
        "feature-map writes": ("writes", "accesses of the cores to the feature-map SRAMs", 0),
        "macro accesses": ("macros", "accesses of single macros", 0),
        "off-chip transfers": (
            "off-chip KiB",
            "weights, index codes, parameters, instructions, maps",
            1,
        ),
        "energy": ("energy µJ", f"all parts, {ASSUMED} but for macro accesses", 2),
    }
    for metric, (head, meaning, digits) in shown.items():
        _, value = METRICS[metric]
        quantities.append(_summed(Column(head, meaning), value, digits, profile.layers, False))
        if profile.dense_layers:
            column = Column(f"{head}, dense", f"{meaning}; on the dense baseline")
            quantities.append(_summed(column, value, digits, profile.dense_layers, True))
    return _layer_table("Work by layer", quantities, profile, names)


def _summed(
    column: Column,
    value: Callable[[LayerProfile], float],
    digits: int,
    layers: Sequence[LayerProfile],
    dense: bool,
) -> _Quantity:
    twins = {(layer.region, layer.name): layer for layer in layers}

    def cell(layer: LayerProfile) -> Cell:
        one = twins.get((layer.region, layer.name)) if dense else layer
        return Cell("") if one is None else _count(value(one), digits)

    return _Quantity(column, cell, _count(sum(map(value, layers)), digits))


def _zero(stored: int, dense: int) -> float | None:
    return 1 - stored / dense if dense else None


def _layer_table(
    caption: str, quantities: Sequence[_Quantity], profile: Profile, names: Sequence[str]
) -> PageTable:
    return PageTable(
        caption,
        tuple(quantity.column for quantity in quantities),
        tuple(
            (name, tuple(quantity.cell(layer) for quantity in quantities))
            for name, layer in zip(names, profile.layers, strict=True)
        ),
        tuple(quantity.total for quantity in quantities),
    )
