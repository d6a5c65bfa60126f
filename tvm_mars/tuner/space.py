"""The space of a graph's schedules on a machine: what each choice may be, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.maps import MapType
from mars_runtime.packing import group_set_bytes
from mars_runtime.timeline import Timeline
from mars_runtime.timing import RAW_WORDS, fill_cost, offchip_cycles

from ..codegen import time_schedule
from ..compiler import pack
from ..graph import Conv, Graph, Pool
from ..pack import PackedConv
from ..schedule import (
    BORDERS,
    DEALINGS,
    HALOS,
    SLOTS,
    Border,
    Choice,
    LayerSchedule,
    Load,
    Planner,
    Point,
    Schedule,
    ScheduleError,
    Step,
    fuse_pools,
    met_pixels,
    plan,
    point_of,
    tile_extents,
)
from ..schedule.border import runs
from ..schedule.loads import chained_loads
from ..schedule.windows import shares_rows

__all__ = ["Share", "Space"]

CHUNKS = (4, 8, 16, 32)
LEADS = (0, 1, 2, 3)
DEPTHS = (0, 8, 16, 24, 32, 48, 64)
TILES = 4  # times as many tiles as the default has


@attrs.frozen
class Share:
    """What falls to the core that has most of a layer: group-sets, macro cycles, loads, CONVs.

    As if the map was one tile. ``busy`` are the cycles of the macros, or of the port to which a
    kernel block is written where that takes longer.
    """

    group_sets: int
    cycles: int
    busy: int
    loads: int
    convs: int


@attrs.frozen(eq=False)
class Space:
    """All schedules of a graph on a machine, the default one among them.

    Raises
    ------
    CapacityError
        If even the smallest tile of a layer does not fit the machine.
    """

    graph: Graph
    arch: MarsArch
    packed: Mapping[str, PackedConv]
    default: Point
    fusible: dict[str, int] = attrs.field(init=False)
    _loads: dict[tuple[object, ...], tuple[Load, ...]] = attrs.field(factory=dict, init=False)
    _shares: dict[tuple[object, ...], Share] = attrs.field(factory=dict, init=False)
    _domains: dict[int, dict[str, tuple[Any, ...]]] = attrs.field(factory=dict, init=False)
    _borders: dict[tuple[str, bool], tuple[Border, ...]] = attrs.field(factory=dict, init=False)

    @classmethod
    def of(cls, graph: Graph, arch: MarsArch) -> Space:
        """Make the space around a graph's default schedule."""
        packed = pack(graph, arch)
        pools = [layer.name for layer in graph.layers if isinstance(layer, Pool)]
        schedule = plan(graph, arch, packed)
        try:
            apart = plan(graph, arch, packed, pools)
        except CapacityError:  # a pool's window does not fit as a map, which is smaller as sums
            apart = None
        return cls(graph, arch, packed, point_of(graph, schedule, apart))

    @fusible.default
    def _find_fusible(self) -> dict[str, int]:
        """Find the pools that may be fused: by its and by its convolution's name, its position."""
        places = {layer.name: index for index, layer in enumerate(self.graph.layers)}
        pools = [(step.layer.name, step.pool.name) for step in fuse_pools(self.graph) if step.pool]
        return {name: places[pair[1]] for pair in pools for name in pair}

    # -- from a point to its schedule ------------------------------------------------------------

    def realize(self, point: Point) -> Schedule:
        """Make a point's schedule.

        Raises
        ------
        ScheduleError
            If the machine or a layer cannot do what a choice asks for.
        """
        planner = self._planner()
        layers = planner.follow(point, self.loads)
        return planner.schedule(self._with_leads(layers, point))

    def time(self, point: Point) -> Timeline:
        """Give the timeline of a point's schedule; raises as :meth:`realize`."""
        try:
            return time_schedule(self.graph, self.arch, self.packed, self.realize(point))
        except CapacityError as error:
            raise ScheduleError(error.problem, where=error.where, hint=error.hint) from None

    def legal(self, point: Point) -> str | None:
        """Tell why a point is refused; None if it is not."""
        try:
            self.time(point)
        except ScheduleError as error:
            return str(error)
        return None

    def loads(self, layer: Conv, choice: Choice) -> tuple[Load, ...]:
        """Give the loads that a layer has by a choice, made once for all points."""
        key = (
            layer.name,
            choice.row_groups,
            choice.most,
            choice.dealing,
            choice.chained,
            choice.border,
        )
        if key not in self._loads:
            self._loads[key] = self._make_loads(layer, choice)
        return self._loads[key]

    def share(self, layer: Conv, choice: Choice) -> Share:
        """Give what falls to the core that has most of a layer; raises as :meth:`realize`."""
        loads = self.loads(layer, choice)
        key = (layer.name, choice.row_groups, choice.border, loads)
        if key not in self._shares:
            by_tap = self._cycles(layer, choice.border)
            first = np.cumsum([0, *(cycles.shape[1] for cycles in by_tap)])
            together = np.concatenate(by_tap, axis=1)
            out, residual = self.graph.types[layer.name], layer.residual
            cuts = self._planner().cuts(Step(layer), choice.border)
            heights, widths = (
                np.array([count for _, count in runs(0, length, at)])
                for length, at in zip((out.height, out.width), cuts, strict=True)
            )
            pixels = np.outer(heights, widths).reshape(-1)
            finish = RAW_WORDS if layer.requant is None else 1
            finish += self.graph.types[residual.input].planes if residual else 0
            held = [0] * self.arch.cores
            work, busy = [0] * self.arch.cores, [0] * self.arch.cores
            for load in loads:
                for core, pieces in enumerate(load.cores):
                    held[core] += load.group_sets(core)
                    for piece in pieces:
                        block = self.packed[layer.name].blocks[piece.block]
                        own = slice(piece.start, piece.stop)
                        places = first[block.terms[own]] + block.taps[own]
                        words = RAW_WORDS * ((not piece.first) + (not piece.last))
                        words += finish if piece.last else 0
                        macros = together[:, places].sum(axis=1)
                        work[core] += int(macros.sum())
                        busy[core] += int(np.maximum(macros, words * pixels).sum())
            rows = -(-out.height // choice.row_groups)
            parts = (1 + -(-len(cuts[0]) // choice.row_groups)) * (1 + len(cuts[1]))
            self._shares[key] = Share(
                max(held),
                -(-max(work) * rows // out.height),
                -(-max(busy) * rows // out.height),
                len(loads),
                len(loads) * parts,
            )
        return self._shares[key]

    def _cycles(self, layer: Conv, border: Border) -> list[npt.NDArray[Any]]:
        """Give for each term, by part and tap, the macro cycles of a group-set on one core."""
        types, out = self.graph.types, self.graph.types[layer.name]
        cuts = self._planner().cuts(Step(layer), border)
        return [
            self.arch.accesses(types[term.input].bits)
            * met_pixels(self.arch, term, types[term.input], (out.height, out.width), cuts)
            for term in layer.terms
        ]

    def _make_loads(self, layer: Conv, choice: Choice) -> tuple[Load, ...]:
        if choice.chained:
            return chained_loads(self.packed[layer.name], self.arch)
        if not 1 <= choice.row_groups <= self.arch.cores:
            raise ScheduleError(
                f"{choice.row_groups} groups of {self.arch.cores} cores", where=layer.name
            )
        cycles = None
        if choice.border != "whole":
            # A core's filling takes its time, too.
            fill = fill_cost(self.arch, 1, self.packed[layer.name].weight_bits).cycles
            cycles = [fill + each.sum(axis=0) for each in self._cycles(layer, choice.border)]
        return self._planner().make_loads(
            layer, choice.row_groups, choice.most, choice.dealing, cycles
        )

    def _planner(self) -> Planner:
        return Planner(self.graph, self.arch, self.packed)

    def _with_leads(self, layers: Sequence[LayerSchedule], point: Point) -> list[LayerSchedule]:
        """Let loads join the one before where they fit beside it, and give the others their lead.

        A load that every tile repeats is on its own.
        """
        chosen = {one.name: c for one, c in zip(self.graph.layers, point.choices, strict=True)}
        joined = self._joined(layers, chosen)
        found = []
        ahead = 0
        for entry in layers:
            choice = chosen[entry.layer]
            fill, fetch = [], []
            for _ in entry.loads:
                ahead = ahead + 1 if next(joined) else choice.fill_lead
                fill.append(ahead)
                fetch.append(ahead + choice.fetch_lead)
            found.append(
                attrs.evolve(
                    entry,
                    fill_ahead=tuple(fill) if any(fill) else (),
                    fetch_ahead=tuple(fetch) if any(fetch) else (),
                )
            )
        return found

    def _joined(
        self, layers: Sequence[LayerSchedule], chosen: Mapping[str, Choice]
    ) -> Iterator[bool]:
        """Tell for each load whether it joins the one before.

        They are gathered from the last on, so that the arrays that are not filled whole are the
        first, when there is most to compute.
        """
        found: list[bool] = []
        slots = index = parameters = width = 0
        open_group = False  # whether the load behind would join
        for entry in reversed(layers):
            repeated = entry.order == "tiles" and len(entry.loads) > 1
            weight_bits = self.packed[entry.layer].weight_bits if entry.loads else 0
            for load in reversed(entry.loads):
                size = self._size(entry.layer, load)
                alike = weight_bits == width or not self.arch.dual_4bit_cells
                fits = (
                    alike
                    and slots + size[0] <= self.arch.slots(weight_bits)
                    and 8 * (index + size[1]) <= self.arch.index_sram_bits
                    and 8 * (parameters + size[2]) <= self.arch.parameter_sram_bits
                )
                joins = open_group and fits and not repeated  # the load behind this one
                if not joins:
                    slots = index = parameters = 0
                if found:
                    found[-1] = joins
                slots, index, parameters = slots + size[0], index + size[1], parameters + size[2]
                open_group, width = chosen[entry.layer].join and not repeated, weight_bits
                found.append(False)
        return reversed(found)

    def _size(self, layer: str, load: Load) -> tuple[int, int, int]:
        """Give what a load takes of each core: macro slots, index and parameter bytes."""
        packed = self.packed[layer]
        counts = [load.group_sets(core) for core in load.active]
        segments = max(
            sum(
                len(packed.blocks[piece.block].segments(piece.start, piece.stop))
                for piece in load.cores[core]
            )
            for core in load.active
        )
        pieces = max(len(load.cores[core]) for core in load.active)
        return (
            max(counts),
            segments * isa.SEGMENT_BYTES + max(counts) * isa.CODE_BYTES,
            pieces * packed.parameter_bytes,
        )

    # -- what may be chosen ----------------------------------------------------------------------

    def domain(self, index: int) -> dict[str, tuple[Any, ...]]:
        """Give for each decision of a layer the values worth trying, its default's among them.

        What one value needs of another (partial sums of split blocks, a tile of the banks) is not
        told here: such points are refused by :meth:`realize`. Decisions that make no difference
        have one value.
        """
        if index not in self._domains:
            self._domains[index] = self._domain(index)
        return self._domains[index]

    def _domain(self, index: int) -> dict[str, tuple[Any, ...]]:
        layer, default = self.graph.layers[index], self.default.choices[index]
        out = self.graph.types[layer.name]
        rows = [(height, out.width) for height in tile_extents(out.height)]
        columns = [(1, width) for width in tile_extents(out.width)[1:]]
        # Smaller tiles need less room, which the default's have, and take more drains and issues.
        limit = TILES * _tiles(out, default.tile)
        found: dict[str, tuple[Any, ...]] = {
            "tile": tuple(tile for tile in (*rows, *columns) if _tiles(out, tile) <= limit),
            "staged": (False, True),
            "bank": tuple(range(self.arch.banks)),
        }
        if isinstance(layer, Conv):
            found |= self._load_domain(layer, default, out.height)
            open_ = {*self._cutting(layer, False), *self._cutting(layer, True)}
            found["border"] = tuple(border for border in BORDERS if border in open_)
        else:
            found |= {"block_tile": tuple(tile_extents(out.blocks))}
        if self.fusible.get(layer.name) == index:
            found |= {"fused": (False, True)}
        if self._shares_rows(self.default, index):
            found |= {"halo": HALOS}
        return {
            name: values if getattr(default, name) in values else (getattr(default, name), *values)
            for name, values in found.items()
        }

    def _load_domain(self, layer: Conv, default: Choice, height: int) -> dict[str, tuple[Any, ...]]:
        packed, cores = self.packed[layer.name], self.arch.cores
        capacity = self.arch.slots(packed.weight_bits)
        heaviest = max(block.group_sets for block in packed.blocks)
        shared = {1, 2, cores, max(1, cores // len(packed.blocks))}
        groups = sorted(n for n in shared if n <= min(cores, height))
        whole = [Choice(tile=(1, 1), block_tile=1, row_groups=count) for count in groups]
        busiest = max(
            sum(load.group_sets(core) for load in self.loads(layer, choice))
            for choice in whole
            for core in range(cores)
        )
        # Kernel blocks are cut where their sums have a place, or where the array cuts them.
        words = cores * RAW_WORDS * self.graph.types[layer.name].height
        cuts = words * self.graph.types[layer.name].width <= self.arch.bank_words
        eighths = {capacity * eighths // 8 for eighths in range(1, 7)}
        most = {-(-heaviest // 2), heaviest, 2 * heaviest, *eighths}
        least = 1 if cuts else heaviest
        limits = sorted(n for n in most if least <= n < min(capacity, busiest))
        alone = sum(isinstance(one, Conv) for one in self.graph.layers) == 1
        many = bool(limits) or busiest > capacity
        splits = cuts or heaviest > capacity
        chains = len(packed.blocks) == 1 and packed.group_sets > 1
        chain: dict[str, tuple[Any, ...]] = {
            "join": (False, True),
            "fill_lead": LEADS,
            "fetch_lead": LEADS,
            "slots": SLOTS,
        }
        if self.arch.overlap == "none" and not alone and self._port_lacks(packed.weight_bits):
            chain["fetch_depth"] = DEPTHS
        return (
            ({} if alone and not many else chain)
            | {
                "order": ("loads", "tiles") if many else (default.order,),
                "partial": ("bank", "offchip") if splits else (default.partial,),
                "row_groups": tuple(groups),
                "most": (0, *limits),
                "chunk": tuple(n for n in CHUNKS if n < 2 * min(busiest, capacity)),
                "apart": (False, True),
                "dealing": DEALINGS if len(packed.blocks) > 2 else (default.dealing,),
            }
            | ({"chained": (False, True)} if chains else {})
        )

    def _port_lacks(self, weight_bits: int) -> bool:
        """Tell whether all cores' arrays are filled faster than the port fetches for them."""
        slots = self.arch.slots(weight_bits)
        filled = self.arch.array_fill_cycles + fill_cost(self.arch, slots, weight_bits).cycles
        bits = 8 * group_set_bytes(weight_bits) * slots * self.arch.cores
        return offchip_cycles(self.arch, bits) > filled

    def _cutting(self, layer: Conv, fused: bool) -> tuple[Border, ...]:
        """Give the choices of a border that cut more than the one before."""
        key = (layer.name, fused)
        if key not in self._borders:
            pool = (
                self.graph.layers[self.fusible[layer.name]] if layer.name in self.fusible else None
            )
            step = Step(layer, pool if fused and isinstance(pool, Pool) else None)
            cuts = {self._planner().cuts(step, border): border for border in reversed(BORDERS)}
            self._borders[key] = tuple(border for border in BORDERS if border in cuts.values())
        return self._borders[key]

    def decisions(self, point: Point, index: int) -> dict[str, tuple[Any, ...]]:
        """Give those decisions of a layer that are open, and make a difference beside the others.

        A layer whose pool is fused writes the pool's map, about which the pool decides.
        """
        layer, domain = self.graph.layers[index], dict(self.domain(index))
        pool = self.fusible.get(layer.name)
        fused = pool is not None and point.choices[pool].fused
        if isinstance(layer, Conv):
            domain["border"] = self._cutting(layer, fused)
        idle: tuple[str, ...] = ()
        if fused:
            idle = ("block_tile",) if pool == index else ("tile", "staged", "bank")
        if "halo" in domain and not self._shares_rows(point, index):
            idle += ("halo",)
        return {n: values for n, values in domain.items() if len(values) > 1 and n not in idle}

    def _shares_rows(self, point: Point, index: int) -> bool:
        """Tell whether tiles of a layer share rows of an input that is moved in for them."""
        layer, writer = self.graph.layers[index], self.writer(point, index)
        if isinstance(layer, Pool) and point.choices[index].fused:
            return False
        pool = self.graph.layers[writer]
        step = Step(layer, pool if isinstance(pool, Pool) and writer != index else None)
        layers = zip(self.graph.layers, point.choices, strict=True)
        offchip = {other.name: choice.staged for other, choice in layers}
        staged = [offchip.get(name, True) for name in layer.inputs]
        return shares_rows(step, self.graph.types, point.choices[writer].tile, staged)

    def writer(self, point: Point, index: int) -> int:
        """Give the layer that decides where a layer's result is written: it, or its fused pool."""
        pool = self.fusible.get(self.graph.layers[index].name, index)
        return pool if point.choices[pool].fused else index

    def drawn(self, rng: random.Random, point: Point, index: int, share: float) -> Point:
        """Give a point with some decisions of a layer drawn anew; it may be refused.

        Parameters
        ----------
        share : float
            Probability with which each decision is drawn.
        """
        domain = self.domain(index)
        drawn = {
            name: rng.choice(values) for name, values in domain.items() if rng.random() < share
        }
        return replaced(point, index, **drawn)

    def neighbours(self, point: Point, index: int) -> Iterator[Point]:
        """Yield the points that differ in one decision of one layer."""
        for name, values in self.decisions(point, index).items():
            for value in values:
                if value != getattr(point.choices[index], name):
                    yield replaced(point, index, **{name: value})


def _tiles(out: MapType, tile: tuple[int, int]) -> int:
    return -(-out.height // tile[0]) * -(-out.width // tile[1])


def replaced(point: Point, index: int, **decisions: Any) -> Point:
    """Give a point with some decisions of one layer replaced."""
    choices = list(point.choices)
    choices[index] = attrs.evolve(choices[index], **decisions)
    return Point(tuple(choices))
