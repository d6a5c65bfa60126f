"""What computing a tile sets on the cores and touches in the banks, from its schedule alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.maps import MapType
from mars_runtime.stopwatch import Computes

from ..graph import Conv, Graph
from ..schedule import LayerSchedule, Place, Schedule, Step, scheduled_steps
from ..schedule.border import skipped_taps
from ..schedule.types import Part, Share
from ..schedule.windows import Window, input_windows
from .emitter import Span
from .loading import Tile

__all__ = [
    "APW",
    "ConvWork",
    "Group",
    "Held",
    "Settings",
    "Source",
    "Sums",
    "TileCode",
    "conv_work",
    "mask",
    "nothing_held",
    "sas",
    "set_register",
    "target_fields",
    "tile_code",
    "tile_sources",
    "without_loads",
]

Setting: TypeAlias = isa.Sas | isa.Apw | isa.Residual
_Kind = TypeVar("_Kind", isa.Sas, isa.Apw, isa.Residual)

#: What a register is set to, without cores: SAS, or APW with the residual that is added to it.
Settings: TypeAlias = tuple[Setting, ...]

#: A core's registers: its input contexts, then the APW.
APW = isa.field_limit(isa.Sas, "context") + 1

#: What the registers hold: by register and core.
Held: TypeAlias = tuple[tuple[Settings, ...], ...]


def nothing_held(cores: int) -> Held:
    """Give the registers of some cores before any is set."""
    return (((),) * cores,) * (APW + 1)


@attrs.frozen
class Source:
    """Where a tile's input lies in a bank: the map or the staged part of it.

    ``row`` is the stored row that is its first, behind the last one lies the first stored.
    """

    place: Place
    type: MapType
    block: int
    blocks: int
    height: int
    width: int
    origin: tuple[int, int]
    row: int = 0

    @property
    def span(self) -> Span:
        """Words that it occupies."""
        size = self.type.planes * self.blocks * self.height * self.width
        return (("bank", self.place.bank), self.place.base, self.place.base + size)


@attrs.frozen(eq=False)
class _Needs:
    """What computing a part of a convolution's tile sets, and where in the map it writes."""

    part: Part
    settings: tuple[tuple[int, Settings], ...]  # by register
    position: tuple[int, int]


@attrs.frozen(eq=False)
class ConvWork:
    """What computing a convolution's tile needs, whatever the load."""

    tile: Tile
    windows: tuple[Window, ...]
    sources: tuple[Source, ...]
    shares: tuple[tuple[Share, tuple[_Needs, ...]], ...]
    reads: tuple[Span, ...]
    writes: Span


@functools.lru_cache(maxsize=8192)
def conv_work(graph: Graph, arch: MarsArch, schedule: LayerSchedule, tile: Tile) -> ConvWork:
    """Give what computing a convolution's tile needs, which schedules with other loads share."""
    (step,) = scheduled_steps(graph, Schedule((schedule,)))
    layer, types = step.layer, graph.types
    assert isinstance(layer, Conv)
    windows = input_windows(step, types, tile, schedule.kept)
    sources = tile_sources(step, schedule, types, windows, 0, None)
    target, (y, x), writes = target_fields(
        step, schedule, types, tile, 0, types[step.output].blocks
    )
    ph, pw = step.pooling
    apw = isa.Apw(**_conv_apw(step, layer, target))

    def needs(part: Part) -> _Needs:
        at = part.y * ph, part.x * pw
        rows = (tile[0] * ph + at[0], part.height * ph)
        columns = (tile[1] * pw + at[1], part.width * pw)
        settings: list[tuple[int, Settings]] = []
        for context, (term, source) in enumerate(zip(layer.terms, sources, strict=False)):
            setting = sas(
                context,
                source,
                at,
                term.stride,
                term.dilation,
                term.kernel[1],
                term.shift,
                skipped_taps(arch, term, source.type, rows, columns),
            )
            settings.append((context, (setting,)))
        residual = _residual(step, layer, schedule, tile, sources, at)
        settings.append((APW, (apw,) if residual is None else (apw, residual)))
        return _Needs(part, tuple(settings), (y + part.y, x + part.x))

    return ConvWork(
        tile,
        windows,
        sources,
        tuple(
            (share, tuple(needs(part) for part in schedule.parts(tile, share)))
            for share in schedule.shares(tile, arch.cores)
        ),
        tuple(source.span for source in sources),
        writes,
    )


def without_loads(schedule: LayerSchedule) -> LayerSchedule:
    """Give a layer's schedule as far as :func:`conv_work` depends on it."""
    return LayerSchedule(
        schedule.layer,
        schedule.output,
        (),
        schedule.tile,
        0,
        "tiles",
        schedule.inputs,
        schedule.staged,
        schedule.place,
        schedule.output_staged,
        row_groups=schedule.row_groups,
        row_cuts=schedule.row_cuts,
        column_cuts=schedule.column_cuts,
        halo=schedule.halo,
    )


def tile_sources(
    step: Step,
    schedule: LayerSchedule,
    types: Mapping[str, MapType],
    windows: Sequence[Window],
    block: int,
    blocks: int | None,
) -> tuple[Source, ...]:
    """Say where each input of a tile lies; of staged ones some channel blocks or all."""
    sources = []
    for name, window, place, staged in zip(
        step.layer.inputs, windows, schedule.inputs, schedule.staged, strict=True
    ):
        kind = types[name]
        if staged:
            count = kind.blocks if blocks is None else blocks
            size = window.height, window.width
            sources.append(Source(place, kind, block, count, *size, window.origin, window.row))
        else:
            origin = (window.origin[0] + window.y, window.origin[1] + window.x)
            sources.append(Source(place, kind, 0, kind.blocks, kind.height, kind.width, origin))
    return tuple(sources)


def sas(
    context: int,
    source: Source,
    at: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    kernel_width: int = 1,
    shift: int = 0,
    skip: int = 0,
) -> isa.Sas:
    """Give an input context for a part of a tile, from the pixel ``at`` on."""
    return isa.Sas(
        context=context,
        bank=source.place.bank,
        base=source.place.base,
        block=source.block,
        blocks=source.blocks,
        height=source.height,
        width=source.width,
        wide=int(source.type.bits == 8),
        zero=source.type.zero_point,
        shift=shift,
        stride_y=stride[0],
        stride_x=stride[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
        origin_y=source.origin[0] + at[0] * stride[0],
        origin_x=source.origin[1] + at[1] * stride[1],
        kernel_width=kernel_width,
        skip=skip,
        row=source.row,
    )


def target_fields(
    step: Step,
    schedule: LayerSchedule,
    types: Mapping[str, MapType],
    tile: Tile,
    block: int,
    blocks: int,
) -> tuple[dict[str, int], tuple[int, int], Span]:
    """Give the output's place as APW fields, the tile's position in it, and its words."""
    kind = types[step.output]
    if schedule.output_staged:
        height, width, at = tile[2], tile[3], (0, 0)
    else:
        height, width, at = kind.height, kind.width, (tile[0], tile[1])
        block, blocks = 0, kind.blocks
    place = schedule.place
    size = kind.planes * blocks * height * width
    fields = {
        "bank": place.bank,
        "base": place.base,
        "block": block,
        "blocks": blocks,
        "height": height,
        "width": width,
        "wide": int(kind.bits == 8),
    }
    return fields, at, (("bank", place.bank), place.base, place.base + size)


def _conv_apw(step: Step, layer: Conv, target: Mapping[str, int]) -> dict[str, int]:
    requant = layer.requant
    ph, pw = step.pooling
    if requant is None:
        return {"mode": isa.MODE_RAW, **target}
    native = requant.native
    return {
        "mode": isa.MODE_SHIFT if native else isa.MODE_MULTIPLIER,
        "shift": int(requant.shift[0]) if native else 0,
        "zero": requant.zero_point,
        "low": requant.low,
        "high": requant.high,
        "pool_height": ph,
        "pool_width": pw,
        **target,
    }


def _residual(
    step: Step,
    layer: Conv,
    schedule: LayerSchedule,
    tile: Tile,
    sources: Sequence[Source],
    at: tuple[int, int],
) -> isa.Residual | None:
    if layer.residual is None:
        return None
    source = sources[-1]
    staged = schedule.staged[-1]
    ph, pw = step.pooling
    return isa.Residual(
        bank=source.place.bank,
        base=source.place.base,
        blocks=source.blocks,
        height=source.height,
        width=source.width,
        wide=int(source.type.bits == 8),
        shift=layer.residual.shift,
        y=at[0] + (0 if staged else tile[0] * ph),
        x=at[1] + (0 if staged else tile[1] * pw),
    )


@attrs.frozen
class Group:
    """Cores that compute with one CONV for each part of a tile; whether a sum is cut there."""

    cores: tuple[int, ...]
    splits: bool


@attrs.frozen
class Sums:
    """Where a tile's partial sums lie: fields of CONV, and words for a written pixel.

    All cores of a chain pass their sums on in one place, that of the last core.
    """

    partial: int
    bank: int
    base: int
    words: int
    chained: bool


@attrs.frozen(eq=False)
class TileCode:
    """Instructions that compute a tile.

    Parameters
    ----------
    computes : Computes
        SAS, APW, RESIDUAL and CONV, in a row.
    convs, by_group : tuples of (int, int, Group)
        Each CONV's place, twice; each group's first CONV and its last.
    held : Held
        The registers in the end.
    """

    computes: Computes
    convs: tuple[tuple[int, int, Group], ...]
    by_group: tuple[tuple[int, int, Group], ...]
    held: Held


@functools.lru_cache(maxsize=8192)
def tile_code(
    work: ConvWork,
    tables: tuple[int, int, int, int],
    groups: tuple[tuple[Group, ...], ...],
    sums: Sums,
    held: Held,
) -> TileCode:
    """Give the instructions that compute a tile with a load.

    Parameters
    ----------
    tables : (int, int, int, int)
        Where the load lies: CONV's ``descriptor``, ``codes``, ``parameters`` and ``slot``.
    groups : tuple of tuple of Group
        For each share of the tile; none where the load has nothing for it.
    held : Held
        The cores' registers before.
    """
    descriptor, codes, parameters, slot = tables
    instructions: list[isa.Instruction] = []
    places: dict[Group, list[int]] = {}
    most_rows, width, last_core = work.shares[0][0].height, work.tile[3], len(held[APW]) - 1
    for (share, parts), its_groups in zip(work.shares, groups, strict=True):
        if not its_groups:
            continue
        cores = [core for group in its_groups for core in group.cores]
        region, held_apart = (last_core, 1) if sums.chained else (share.cores[0], len(share.cores))
        before = most_rows * width * region
        for needs in parts:
            part = needs.part
            for register, settings in needs.settings:
                held, set_anew = set_register(held, cores, register, settings)
                instructions += set_anew
            for group in its_groups:
                places.setdefault(group, []).append(len(instructions))
                lower = part.pixels * (group.cores[0] if sums.chained else share.cores[0])
                at = sums.base + sums.words * (before - lower)
                instructions.append(
                    isa.Conv(
                        cores=mask(group.cores),
                        descriptor=descriptor,
                        codes=codes,
                        parameters=parameters,
                        slot=slot,
                        y=needs.position[0],
                        x=needs.position[1],
                        height=part.height,
                        width=part.width,
                        partial=sums.partial if group.splits else 0,
                        partial_bank=sums.bank if group.splits else 0,
                        partial_base=at if group.splits else 0,
                    )
                )
            before += part.pixels * held_apart
    by_group = tuple([(all[0], all[-1], group) for group, all in places.items()])
    convs = sorted((place, group.cores, group) for group, all in places.items() for place in all)
    return TileCode(
        Computes(tuple(instructions)),
        tuple([(place, place, group) for place, _, group in convs]),
        by_group,
        held,
    )


def set_register(
    held: Held, cores: Sequence[int], register: int, settings: Settings
) -> tuple[Held, list[Setting]]:
    """Set a register of the cores that do not hold the settings; give what all hold then.

    Returns
    -------
    The registers after that, and the instructions.
    """
    before = held[register]
    changed = [core for core in cores if before[core] != settings]
    if not changed:
        return held, []
    kept = min(_kept(before[core], settings) for core in changed)
    after = tuple(settings if core in changed else earlier for core, earlier in enumerate(before))
    instructions = [_on_cores(setting, mask(changed)) for setting in settings[kept:]]
    return (*held[:register], after, *held[register + 1 :]), instructions


def mask(cores: Iterable[int]) -> int:
    """Give the mask of some cores."""
    return sum([1 << core for core in cores])


def _kept(before: Settings, settings: Settings) -> int:
    """Give how many settings of a register stand as they are, the later ones set anew or added."""
    if len(before) > len(settings):
        return 0  # what was added is cleared by the first
    kept = 0
    while kept < len(before) and before[kept] == settings[kept]:
        kept += 1
    return kept


@functools.lru_cache(maxsize=16384)
def _on_cores(setting: _Kind, cores: int) -> _Kind:
    """Give a setting for a mask of cores; equal ones are made once."""
    return attrs.evolve(setting, cores=cores)
