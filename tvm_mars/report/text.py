"""A profile as text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mars_runtime import MarsArch
from mars_runtime.timeline import STALLS

from .layout import new_table, print_parts
from .profile import PAPER_KERNEL, PAPER_MIN_INPUTS, LayerProfile, Profile

__all__ = ["ASSUMED", "ENERGY_PARTS", "cause_head", "print_profile", "total_rows"]

ASSUMED = "[A]"
# Column heads of the causes, where the cause's own name is not used.
_HEADS = {"latency": "drain"}
# Parts of an Energy: what they are called, and the field of the architecture behind them.
ENERGY_PARTS = {
    "macros": ("macro accesses", "macro_access_pj"),
    "macro_writes": ("writing macros", "macro_write_pj_per_bit"),
    "banks": ("feature-map SRAMs", "bank_pj_per_bit"),
    "core_srams": ("core SRAMs", "core_sram_pj_per_bit"),
    "offchip": ("off-chip memory", "offchip_pj_per_bit"),
}


def print_profile(profile: Profile, file: IO[str]) -> None:
    """Print a profile: time by layer, work by layer, energy, totals."""
    print_parts(_parts(profile), file)


def _parts(profile: Profile) -> Iterator[RenderableType]:
    yield from _head(profile)
    yield ""
    yield _time_table(profile)
    yield from _time_legend(profile)
    yield ""
    yield _work_table(profile)
    yield from _work_legend()
    yield ""
    yield _energy_table(profile)
    yield ""
    yield _totals(profile)
    yield ""
    yield (
        f"{ASSUMED} rests on figures that the paper on MARS does not give and this project "
        "assumed. So do all cycles that wait for weights. `mars arch` says which and why."
    )


# -- head ------------------------------------------------------------------------------------------


def _head(profile: Profile) -> Iterator[str]:
    arch = profile.arch
    regions = f" in {profile.regions} regions" if profile.regions != 1 else ""
    yield f"One image on {arch.name}: {arch.cores} cores at {arch.core_clock_mhz:g} MHz{regions}."
    yield (
        f"Weights: {arch.offchip_bits_per_cycle} bit/cycle from off-chip, then "
        f"{arch.macro_write_bits} bit/cycle and core into the"
    )
    yield (
        f"macros, {arch.array_fill_cycles} cycles to open an array, overlap with computing: "
        f"{arch.overlap} {ASSUMED}"
    )
    if profile.host_operators:
        yield f"Left to the CPU and not in these figures: {', '.join(profile.host_operators)}."
    if profile.reordered:
        yield f"The channels of {profile.reordered} maps are in another order than the model's."


# -- tables ----------------------------------------------------------------------------------------


def _time_table(profile: Profile) -> Table:
    causes = _causes(profile)
    heads = [cause_head(cause) for cause in causes]
    speedup = ["speed-up"] if profile.dense_cycles is not None else []
    table = new_table("Time by layer", "layer", "cycles", "busy", *heads, *speedup)
    for layer in profile.layers:
        table.add_row(
            _name(layer),
            f"{layer.cycles:,}",
            _percent(layer.macro_cycles, layer.core_cycles),
            *(_percent(layer.stalls[cause], layer.core_cycles) for cause in causes),
            *([_times(layer.speedup)] if speedup else []),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{profile.cycles:,}",
        _percent(profile.utilisation, 1),
        *(_percent(profile.stalls[cause], profile.core_cycles) for cause in causes),
        *([_times(profile.speedup)] if speedup else []),
        style="bold",
    )
    return table


def cause_head(cause: str) -> str:
    """Give the column head of a cause of stalls."""
    return _HEADS.get(cause, cause)


def _causes(profile: Profile) -> list[str]:
    """Give the causes of stalls that occur."""
    return [cause for cause, cycles in profile.stalls.items() if cycles]


def _time_legend(profile: Profile) -> Iterator[str]:
    causes = _causes(profile)
    yield "  busy: macros compute, in % of the cores' time. The rest of it by cause, in %:"
    for cause in causes:
        yield f"  {cause_head(cause)}: {STALLS[cause]}"
    absent = [cause for cause in STALLS if cause not in causes]
    if absent:
        yield f"  no time is lost to: {', '.join(absent)}"
    if profile.dense_cycles is not None:
        yield "  speed-up: over the same layer on the same hardware, no group-set skipped"


def _work_table(profile: Profile) -> Table:
    table = new_table(
        "Work by layer",
        "layer",
        "group-sets",
        "filled",
        "reads",
        "writes",
        "macros",
        "off-chip",
        "uJ",
    )
    for layer in profile.layers:
        table.add_row(_name(layer), *_work_cells(layer, profile.arch))
    counters, energy = profile.counters, profile.energy
    stored = sum(layer.group_sets for layer in profile.layers)
    dense = sum(layer.dense_group_sets for layer in profile.layers)
    table.add_section()
    table.add_row(
        "all",
        _share(stored, dense),
        "",
        _count(counters.map_reads),
        _count(counters.map_writes),
        _count(counters.macro_accesses),
        _kib(counters.offchip_bits),
        _microjoule(energy.total),
        style="bold",
    )
    return table


def _work_cells(layer: LayerProfile, arch: MarsArch) -> Iterator[str]:
    filled = layer.filled(arch)
    yield _share(layer.group_sets, layer.dense_group_sets)
    yield "" if filled is None else _percent(filled, 1)
    yield _count(layer.counters.map_reads)
    yield _count(layer.counters.map_writes)
    yield _count(layer.counters.macro_accesses)
    yield _kib(layer.counters.offchip_bits)
    yield _microjoule(layer.energy.total)


def _work_legend() -> Iterator[str]:
    yield "  group-sets: stored / of the dense layer, 16 kernels x 16 inputs x 1 tap each"
    yield "  filled: % of the multiplications that the layer has; the others are padding"
    yield "  reads, writes: accesses of the cores to the feature-map SRAMs"
    yield "  macros: accesses of single macros; k and M are 10^3 and 10^6"
    yield "  off-chip: KiB of weights, index codes, parameters, instructions and maps"
    yield "  uJ: energy, of which the next table shows the parts"


def _energy_table(profile: Profile) -> Table:
    table = new_table("Energy of one image", "part", "uJ", "share")
    table.add_column("per event", justify="right", no_wrap=True)
    table.add_column("source")
    energy = profile.energy
    sources = {info.name: info for info in profile.arch.describe()}
    for part, (name, field) in ENERGY_PARTS.items():
        picojoule = getattr(energy, part)
        info = sources[field]
        table.add_row(
            name,
            _microjoule(picojoule),
            _percent(picojoule, energy.total),
            f"{getattr(profile.arch, field):g} {info.unit.replace(' ', '')}",
            Text(info.source),
        )
    table.add_section()
    table.add_row("all", _microjoule(energy.total), _percent(1, 1), style="bold")
    return table


def _totals(profile: Profile) -> Table:
    table = Table(
        title="Totals",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning")
    for row in total_rows(profile):
        table.add_row(*row)
    return table


def total_rows(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """Give what a profile says of the whole: name, value and meaning."""
    yield (
        "latency",
        f"{profile.latency_us / 1e3:,.3f} ms",
        f"{profile.cycles:,} cycles, cold macros and weight SRAMs",
    )
    yield "FPS", f"{profile.fps:,.1f}", "1 / latency"
    yield (
        "FPS, steady state",
        f"{profile.steady_fps:,.1f}",
        f"images back to back: {profile.steady_cycles:,} cycles each, weights loaded for each",
    )
    if profile.dense_fps is not None:
        yield (
            "FPS, dense baseline",
            f"{profile.dense_fps:,.1f}",
            f"{profile.dense_cycles:,} cycles: no group-set skipped",
        )
        yield "speed-up", _times(profile.speedup), "over the dense baseline"
    yield (
        "GOPS",
        f"{profile.gops:,.1f}",
        f"dense-equivalent: {profile.operations / 1e6:,.3f} M operations x FPS",
    )
    if profile.paper_operations:
        yield (
            "  the paper's way",
            f"{profile.paper_gops:,.1f}",
            f"{profile.paper_operations / 1e6:,.3f} M operations: only {PAPER_KERNEL[0]}x"
            f"{PAPER_KERNEL[1]} convolutions with {PAPER_MIN_INPUTS} or more inputs, "
            f"{len(profile.paper_layers)} of {len(profile.layers)} layers",
        )
    yield (
        "TOPS/W, macros",
        _number(profile.tops_per_watt_macros),
        "dense-equivalent; macro accesses alone, "
        f"{1 - profile.energy.assumed_share:.0%} of the energy",
    )
    if profile.paper_operations:
        yield (
            "  the paper's way",
            _number(profile.paper_tops_per_watt),
            "operations and macro accesses of those layers",
        )
    yield (
        "TOPS/W, everything",
        _number(profile.tops_per_watt),
        f"{profile.energy.assumed_share:.0%} of the energy is assumed {ASSUMED}",
    )


# -- cells -----------------------------------------------------------------------------------------


def _name(layer: LayerProfile) -> str:
    """Give a layer's name, which may break before a fused pool."""
    return layer.name.replace("+", " +")


def _percent(part: float, whole: float) -> str:
    """Give a share in percent; nothing at all as a dot, so that what there is stands out."""
    if not part or not whole:
        return "."
    share = 100 * part / whole
    return "<0.1" if share < 0.05 else f"{share:.1f}"


def _count(number: int) -> str:
    if number < 10**5:
        return f"{number:,}"
    return f"{number / 1e3:,.0f}k" if number < 10**7 else f"{number / 1e6:,.1f}M"


def _share(stored: int, dense: int) -> str:
    return f"{_count(stored)}/{_count(dense)}" if dense else ""


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _kib(bits: int) -> str:
    return f"{bits / 8192:,.1f}"


def _microjoule(picojoule: float) -> str:
    return f"{picojoule / 1e6:,.2f}"
