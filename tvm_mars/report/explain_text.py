"""An explanation as text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from rich.console import RenderableType
from rich.table import Table

from mars_runtime.timeline import STALLS

from .explain import BOUNDS, FILLED, NARROW, Explanation, GroupSets, LayerExplanation
from .layout import new_table, print_parts

__all__ = ["print_explanation"]

ASSUMED = "[A]"


def print_explanation(found: Explanation, file: IO[str], *, in_full: bool) -> None:
    """Print the operators and layers as tables, or each layer in full."""
    parts = _details(found) if in_full else _overview(found)
    print_parts(parts, file)


# -- all -------------------------------------------------------------------------------------------


def _overview(found: Explanation) -> Iterator[RenderableType]:
    yield _operators(found)
    if found.host_operators:
        yield f"on the CPU, of any kind: {', '.join(found.host_operators)}"
    if not found.layers:
        yield from ("", "Nothing is on MARS. `mars ops` lists what it takes.")
        return
    yield ""
    yield _layers(found)
    yield from _legend(found)


def _operators(found: Explanation) -> Table:
    table = new_table("Operators", "operator")
    table.add_column("kind", no_wrap=True)
    table.add_column("where, and why")
    where = {name: layer for layer in found.layers for name in layer.operators}
    for decision in found.decisions:
        layer = where.get(decision.name)
        text = f"CPU: {decision.reason}"
        if decision.offloaded:
            text = "MARS" if layer is None else f"MARS, layer {_place(found, layer)}"
        table.add_row(decision.name, decision.op, text)
    return table


def _place(found: Explanation, layer: LayerExplanation) -> str:
    """Name a layer, with its region if there are several."""
    several = any(other.region for other in found.layers)
    return f"{layer.region}:{layer.name}" if several else layer.name


def _layers(found: Explanation) -> Table:
    saved = f"at {100 * found.share:g} %"
    table = new_table(
        f"Layers on {found.arch.name}",
        "layer",
        "cycles",
        *(f" {name}" for name in BOUNDS),
        " zero %",
        "    gap",
        f"  {saved}",
    )
    for layer in found.layers:
        gain = found.saved.get((layer.region, layer.name))
        table.add_row(
            _place(found, layer).replace("+", " +"),
            f"{layer.cycles:,}",
            *(_share(layer, name) for name in BOUNDS),
            f"{100 * layer.group_sets.zero_share:.1f}" if layer.group_sets else "",
            f"{layer.schedule_gap:,}",
            "" if gain is None else f"{gain:,}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{found.cycles:,}",
        *("" for _ in BOUNDS),
        "",
        f"{found.cycles - found.least:,}",
        f"{sum(found.saved.values()):,}",
        style="bold",
    )
    return table


def _share(layer: LayerExplanation, name: str) -> str:
    """Give how much of a layer's time something is busy, marked where it is the most."""
    mark = "*" if name == layer.bound else " "
    return f"{100 * layer.busy[name] / max(1, layer.cycles):.1f}{mark}"


def _legend(found: Explanation) -> Iterator[str]:
    yield "  In % of the layer's cycles, * what is busy longest and so bounds it:"
    for name, text in BOUNDS.items():
        yield f"  {name}: {text}"
    yield "  zero: share of its group-sets that are zero, and neither stored nor computed"
    yield "  gap: the most cycles that another schedule of the same work can save, for the"
    yield "  macros' work has to be done and, unless overlap is full, the writing of their"
    yield "  weights beside it. In all: above what no schedule beats, opening of arrays"
    yield "  counted too (docs/tuning.md); `mars tune` searches, and need not get there"
    yield f"  at {100 * found.share:g} %: cycles saved, recompiled, if each layer had that share of"
    yield "  zero group-sets or more; nothing is said of accuracy"
    if found.tuned:
        yield "  Cycles are those of the tuned schedules, by which a layer's time may hold the"
        yield "  loads of later ones; what is recompiled has the default schedule, and so has"
        yield "  what it is compared with"
    yield f"  load and off-chip rest on assumed rates {ASSUMED}: `mars arch` says which"
    yield ""
    yield from _channel_order(found)
    yield ""
    yield "mars explain MODEL --op NAME tells more of one operator or layer."


def _channel_order(found: Explanation) -> Iterator[str]:
    """Say what another order of channels would save."""
    counts = [layer.group_sets for layer in found.layers if layer.group_sets is not None]
    stored, packed = (sum(getattr(one, name) for one in counts) for name in ("stored", "packed"))
    if packed == stored:
        yield "No order of channels was found in which fewer group-sets would be stored."
        return
    yield f"With --channel-order packed (mars compile, mars tune) {packed:,} group-sets of"
    yield f"{stored:,} are stored, and {found.packed_saved:,} cycles saved, recompiled."
    if found.tuned:
        yield "  before and after with the default schedule: nothing is tuned for that order"


# -- one -------------------------------------------------------------------------------------------


def _details(found: Explanation) -> Iterator[RenderableType]:
    for decision in found.decisions:
        where = "on MARS" if decision.offloaded else f"on the CPU: {decision.reason}"
        yield f"{decision.op} {decision.name} is {where}"
        if not decision.offloaded:
            yield "  `mars ops` lists every limit"
    for layer in found.layers:
        yield ""
        yield f"layer {_place(found, layer)} ({layer.kind}): {layer.cycles:,} cycles"
        if layer.group_sets is not None:
            yield ""
            yield from _stored(layer.group_sets, found.arch.zero_skipping)
        yield ""
        yield from _time(layer, found.arch.cores)
        yield ""
        yield from _changes(layer, found)


def _stored(found: GroupSets, skipping: bool) -> Iterator[str]:
    yield (
        f"{found.stored:,} of {found.dense:,} group-sets are stored; "
        f"{found.zero_share:.1%} are zero and skipped"
    )
    if not skipping:
        yield "  none is skipped because the machine's zero_skipping is off"
    elif found.stored:
        yield "  the others are not skipped because one weight that is not zero keeps all 256"
        yield "  of a group-set; weights that are not zero in them:"
        low = 1
        for high, count in zip(FILLED, found.filled, strict=True):
            yield f"    {low:>3} to {high:>3}: {count:>7,} group-sets ({count / found.stored:.1%})"
            low = high + 1
    full = FILLED[-1]
    if found.usable < full:
        yield f"  a group-set has at most {found.usable} of its {full} weights here, for lack of"
        yield "  kernels or inputs, or for groups: the others are padding"
    yield f"  {found.zero_weights:.1%} of the layer's weights are zero; if the others lay together,"
    yield f"  {found.gathered:,} group-sets would hold them"
    if found.packed != found.stored:
        yield f"  with --channel-order packed {found.packed:,} group-sets are stored"


def _time(layer: LayerExplanation, cores: int) -> Iterator[str]:
    yield f"bounded by {layer.bound}: {BOUNDS[layer.bound]}"
    for name, cycles in layer.busy.items():
        yield f"  {name:<9} {cycles:>11,} cycles, {cycles / max(1, layer.cycles):.1%}"
    waits = {cause: cycles for cause, cycles in layer.stalls.items() if cycles}
    if waits:
        yield "of all cores' time without computing:"
        for cause, cycles in sorted(waits.items(), key=lambda item: -item[1]):
            yield f"  {cycles / (cores * max(1, layer.cycles)):>6.1%} {STALLS[cause]}"


def _changes(layer: LayerExplanation, found: Explanation) -> Iterator[RenderableType]:
    yield "what could change it, computed:"
    yield f"  another schedule: at most {layer.schedule_gap:,} cycles less, for {layer.floor:,} are"
    yield "  needed in any (`mars tune` searches, and need not get there)"
    if layer.narrow_compute is not None:
        yield (
            f"  inputs of {NARROW} bits: {layer.narrow_compute:,} cycles of compute instead of "
            f"{layer.busy['compute']:,}"
        )
    if layer.what_if:
        table = new_table(
            "  more zero group-sets in this layer, the network recompiled",
            "  zero",
            "  layer's cycles",
            "  cycles saved in all",
            "  squared weights removed",
        )
        for one in layer.what_if:
            table.add_row(
                f"  {one.share:.0%}", f"{one.cycles:,}", f"{one.saved:,}", f"{one.removed:.1%}"
            )
        yield table
        if found.tuned:
            yield "  before and after with the default schedule: nothing is tuned for these"
        yield "  removed: of the sum of all weights' squares, in the smallest group-sets, which"
        yield "  go first; what that costs in accuracy only a test set tells"
