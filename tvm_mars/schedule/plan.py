"""The default schedule: places, tiles and loop order of every layer, without search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias

import attrs
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import CapacityError
from mars_runtime.maps import MapType
from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import RAW_WORDS, WORD_BITS, fill_cost, offchip_cycles

from ..graph import Conv, Graph, Layer, Pool
from ..pack import PackedConv
from .border import border_cuts
from .loads import make_loads
from .types import Dealing, Halo, LayerSchedule, Load, Place, Schedule, ScheduleError
from .windows import extents, overlaps, shares_rows

if TYPE_CHECKING:
    from .choices import Border, Choice, Point

# A staged input, by its position among the layer's inputs; "output"; "partial".
Item: TypeAlias = int | str

__all__ = [
    "Step",
    "fuse_pools",
    "plan",
    "scheduled_steps",
    "smallest_tile",
]


@attrs.frozen
class Step:
    """A layer, with the max pool that its APW does while writing (or None)."""

    layer: Layer
    pool: Pool | None = None

    @property
    def output(self) -> str:
        """The map that is written."""
        return self.pool.name if self.pool else self.layer.name

    @property
    def pooling(self) -> tuple[int, int]:
        """Rows and columns of the fused pool's window."""
        return self.pool.kernel if self.pool else (1, 1)


def fuse_pools(graph: Graph, apart: Container[str] = ()) -> tuple[Step, ...]:
    """Fuse each max pool into the convolution before it where the APW can do it while writing.

    Its windows must not overlap, need no padding, and nothing else may read the convolution.
    Pools named in ``apart`` are not fused.
    """
    consumers = graph.consumers()
    left = {out.value for out in graph.outputs}
    fused: dict[str, Pool] = {}
    limit = isa.field_limit(isa.Apw, "pool_height")
    for layer in graph.layers:
        if not isinstance(layer, Pool) or layer.mode != "max" or layer.name in apart:
            continue
        source = next((one for one in graph.layers if one.name == layer.input), None)
        if (
            isinstance(source, Conv)
            and source.requant is not None
            and consumers[source.name] == (layer.name,)
            and source.name not in left
            and layer.stride == layer.kernel
            and max(layer.kernel) <= limit
            and not any(layer.padding)
        ):
            fused[source.name] = layer
    pools = {pool.name for pool in fused.values()}
    return tuple(
        Step(layer, fused.get(layer.name)) for layer in graph.layers if layer.name not in pools
    )


def scheduled_steps(graph: Graph, schedule: Schedule) -> tuple[Step, ...]:
    """Give the steps that a schedule is for: a layer that writes a pool's map has it fused."""
    layers = {layer.name: layer for layer in graph.layers}
    steps = []
    for entry in schedule.layers:
        pool = layers[entry.output] if entry.output != entry.layer else None
        assert pool is None or isinstance(pool, Pool)
        steps.append(Step(layers[entry.layer], pool))
    return tuple(steps)


# -- places ----------------------------------------------------------------------------------------


class _Banks:
    """Free words of the banks."""

    def __init__(self, banks: int, words: int, used: Sequence[tuple[Place, int]] = ()) -> None:
        self.count, self.words = banks, words
        self.used = list(used)

    def find(self, bank: int, size: int) -> Place | None:
        """Give the first gap of a bank that holds ``size`` words."""
        at = 0
        taken = sorted((p.base, length) for p, length in self.used if p.bank == bank)
        for base, length in taken:
            if base - at >= size:
                break
            at = max(at, base + length)
        return Place(bank, at) if at + size <= self.words else None

    def take(self, place: Place, size: int) -> None:
        self.used.append((place, size))

    def place(
        self, sizes: Mapping[Item, int], banks: Mapping[Item, int]
    ) -> dict[Item, Place] | None:
        """Find room for all of some items, each in its bank."""
        room, found = self.copy(), {}
        for item, size in sizes.items():
            spot = room.find(banks[item], size)
            if spot is None:
                return None
            room.take(spot, size)
            found[item] = spot
        return found

    def copy(self) -> _Banks:
        return _Banks(self.count, self.words, self.used)


@attrs.frozen
class _Option:
    """A way to run a step, with its estimated cycles beside compute."""

    cost: int
    schedule: LayerSchedule


class _NoRoom(Exception):
    def __init__(self, index: int) -> None:
        self.index = index


class Planner:
    """Makes schedules of a graph: by default, or following given choices."""

    def __init__(self, graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> None:
        self.graph, self.arch, self.types = graph, arch, graph.types
        self.packed = packed
        self.left = {out.value for out in graph.outputs}
        self.loads: dict[str, dict[int, tuple[Load, ...]]] = {}  # by the number of row groups

    def _load_cycles(self, layer: str, load: Load) -> int:
        """Estimate one filling: the fixed cost, then the slower hop."""
        packed = self.packed[layer]
        counts = [load.group_sets(core) for core in load.active]
        filled = fill_cost(self.arch, max(counts), packed.weight_bits)
        fetched = 8 * sum(counts) * group_set_bytes(packed.weight_bits)
        hops = max(filled.cycles, offchip_cycles(self.arch, fetched))
        return self.arch.array_fill_cycles + hops

    def _loads(self, layer: Conv) -> dict[int, tuple[Load, ...]]:
        spare = self.arch.cores // len(self.packed[layer.name].blocks)
        groups = {1, max(1, min(spare, self.types[layer.name].height))}
        return {count: self.make_loads(layer, count) for count in sorted(groups)}

    def make_loads(
        self,
        layer: Conv,
        row_groups: int,
        most: int = 0,
        dealing: Dealing = "heaviest",
        cycles: Sequence[npt.ArrayLike] | None = None,
    ) -> tuple[Load, ...]:
        """Give a layer's loads for so many groups of cores (see :func:`make_loads`).

        All taps of a term cost the same, unless it is said what they do.
        """
        if cycles is None:
            cycles = [self.arch.accesses(self.types[term.input].bits) for term in layer.terms]
        packed = self.packed[layer.name]
        return make_loads(packed, self.arch, cycles, row_groups, most, dealing)

    def plan(self, apart: Iterable[str] = ()) -> Schedule:
        """Make the default schedule; pools named in ``apart`` are not fused."""
        self.loads = {
            layer.name: self._loads(layer) for layer in self.graph.layers if isinstance(layer, Conv)
        }
        inputs = {entry.name for entry in self.graph.inputs}
        alone = set(apart)
        spilled = set(inputs)
        self.divide(alone)
        while True:
            try:
                layers = self._attempt(spilled)
            except _NoRoom as full:
                victim = self._victim(full.index, spilled)
                pool = self.steps[full.index].pool
                if victim is not None:
                    spilled.add(victim)
                elif pool is not None:  # a window of pixels does not fit: one pixel may
                    alone.add(pool.name)
                    spilled = set(inputs)
                    self.divide(alone)
                else:
                    self._refuse(self.steps[full.index])
            else:
                return self.schedule(layers)

    def schedule(self, layers: Sequence[LayerSchedule]) -> Schedule:
        """Put layers together."""
        consumers = self.graph.consumers()
        spills = [e.output for e in layers if e.output_staged and consumers[e.output]]
        return Schedule(tuple(layers), tuple(spills))

    def divide(self, apart: Container[str]) -> None:
        """Divide the graph into steps, and find where each value is used last."""
        self.steps = fuse_pools(self.graph, apart)
        self.last_use: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            self.last_use.setdefault(step.output, i)
            for name in step.layer.inputs:
                self.last_use[name] = i

    def _refuse(self, step: Step) -> NoReturn:
        need, have = smallest_tile(step, self.types, self.arch) or (0, 0)
        raise CapacityError(
            "its smallest tile does not fit the feature-map SRAMs",
            op=step.layer.name,
            need=need,
            have=have,
            unit="words",
            hint="leave this operator to the CPU, or enlarge bank_bits",
        ) from None

    def _victim(self, index: int, spilled: set[str]) -> str | None:
        """Choose the value to spill: alive at this step, next used furthest away, then largest."""
        alive = [
            other.output
            for i, other in enumerate(self.steps[:index])
            if self.last_use[other.output] >= index and other.output not in spilled
        ]

        def priority(name: str) -> tuple[int, int, str]:
            uses = [i for i in range(index, len(self.steps)) if self._reads(i, name)]
            return (uses[0], self.types[name].words, name)

        return max(alive, key=priority, default=None)

    def _reads(self, index: int, name: str) -> bool:
        return name in self.steps[index].layer.inputs

    def _attempt(self, spilled: set[str]) -> list[LayerSchedule]:
        resident: dict[str, Place] = {}
        layers = []
        for i, step in enumerate(self.steps):
            used = [(place, self.types[name].words) for name, place in resident.items()]
            banks = _Banks(self.arch.banks, self.arch.bank_words, used)
            options = list(self._options(i, step, banks, resident, step.output in spilled))
            if not options:
                raise _NoRoom(i)
            chosen = min(options, key=lambda option: option.cost).schedule
            layers.append(chosen)
            if not chosen.output_staged:
                resident[step.output] = chosen.place
            for name in [name for name in resident if self.last_use[name] <= i]:
                del resident[name]
        return layers

    def choices(self, point: Point) -> tuple[Choice, ...]:
        """Divide the graph into the steps that a point wants; give the choice for each.

        Raises
        ------
        ScheduleError
            If there are not as many choices as layers, or a layer cannot be fused.
        """
        layers = self.graph.layers
        if len(layers) != len(point.choices):
            raise ScheduleError(f"{len(point.choices)} choices for {len(layers)} layers")
        chosen = {layer.name: one for layer, one in zip(layers, point.choices, strict=True)}
        self.divide({name for name, choice in chosen.items() if not choice.fused})
        fused = {step.pool.name for step in self.steps if step.pool}
        for name, choice in chosen.items():
            if choice.fused and name not in fused:
                raise ScheduleError("nothing before it can do it while writing", where=name)
        return tuple(_step_choice(step, chosen) for step in self.steps)

    def follow(
        self, point: Point, loads_of: Callable[[Conv, Choice], tuple[Load, ...]]
    ) -> tuple[LayerSchedule, ...]:
        """Make the layers that a point's choices ask for, loads one after the other.

        Parameters
        ----------
        loads_of : callable
            The loads that a layer has by a choice.

        Raises
        ------
        ScheduleError
            If the machine or a layer cannot do what a choice asks for.
        """
        choices = self.choices(point)
        resident: dict[str, Place] = {}
        layers = []
        for i, (step, choice) in enumerate(zip(self.steps, choices, strict=True)):
            layer = step.layer
            loads: tuple[Load, ...] = ()
            if isinstance(layer, Conv):
                loads = loads_of(layer, choice)
            layers.append(self._followed(i, step, choice, loads, resident))
            if not choice.staged:
                resident[step.output] = layers[-1].place
            for name in [name for name in resident if self.last_use[name] <= i]:
                del resident[name]
        return tuple(layers)

    def _followed(
        self,
        index: int,
        step: Step,
        choice: Choice,
        loads: tuple[Load, ...],
        resident: Mapping[str, Place],
    ) -> LayerSchedule:
        def refuse(problem: str) -> NoReturn:
            raise ScheduleError(problem, where=step.layer.name)

        out = self.types[step.output]
        (height, width), modes = choice.tile, _partial_modes(loads, choice.row_groups)
        if not (choice.row_groups <= height <= out.height and 1 <= width <= out.width):
            refuse(f"a tile of {height}x{width} in {choice.row_groups} groups of {out}")
        if not 1 <= choice.block_tile <= out.blocks:
            refuse(f"{choice.block_tile} channel blocks of {out.blocks}")
        partial = "none" if modes == ("none",) else choice.partial
        if partial not in modes:
            refuse(f"partial sums {partial}, which {choice.row_groups} groups would do in turn")
        if choice.chained and (choice.row_groups != 1 or partial == "offchip"):
            refuse("a chain of cores passes its sums on in a bank, all of the tile")
        many = len(loads) > 1
        whole = choice.tile == (out.height, out.width)
        if many and partial == "bank" and choice.order == "loads" and not whole:
            refuse("its bank holds the partial sums of one tile, which each load would leave")
        used = [(place, self.types[name].words) for name, place in resident.items()]
        banks = _Banks(self.arch.banks, self.arch.bank_words, used)
        place = None
        if not choice.staged:
            places = self._resident_places(index, step, banks, resident, out)
            place = next((one for one in places if one.bank == choice.bank), None)
            if place is None:
                refuse(f"bank {choice.bank} has no room for {out.words} words of output")
            banks.take(place, out.words)
        arranged = self._arrange(
            step, banks, resident, place, choice.tile, choice.block_tile, partial == "bank"
        )
        if arranged is None:
            refuse(f"what a tile of {height}x{width} needs does not fit the banks")
        row_cuts, column_cuts = self.cuts(step, choice.border)
        return attrs.evolve(
            self._layer_schedule(
                step,
                loads,
                choice.tile,
                choice.block_tile,
                partial,
                choice.row_groups,
                place,
                arranged,
                resident,
                choice.halo,
            ),
            order=choice.order if many else "loads",
            fetch_chunk=choice.chunk,
            slots=choice.slots,
            fetch_depth=choice.fetch_depth,
            apart=choice.apart,
            chained=choice.chained,
            row_cuts=row_cuts,
            column_cuts=column_cuts,
        )

    def _layer_schedule(
        self,
        step: Step,
        loads: tuple[Load, ...],
        tile: tuple[int, int],
        block_tile: int,
        partial: Literal["none", "bank", "offchip"],
        row_groups: int,
        place: Place | None,
        arranged: Mapping[Item, Place],
        resident: Mapping[str, Place],
        halo: Halo = "keep",
    ) -> LayerSchedule:
        staged = tuple(name not in resident for name in step.layer.inputs)
        keeps = halo == "keep" and shares_rows(step, self.types, tile, staged)
        return LayerSchedule(
            step.layer.name,
            step.output,
            loads,
            tile,
            block_tile,
            "loads",
            self._input_places(step, resident, arranged),
            staged,
            place or arranged["output"],
            place is None,
            copy_out=place is not None and step.output in self.left,
            partial=partial,
            partial_place=arranged.get("partial"),
            row_groups=row_groups,
            halo="keep" if keeps else "reload",
        )

    def cuts(self, step: Step, border: Border) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Give the written rows and columns at which a step's CONVs end by a choice."""
        if border == "whole" or not isinstance(step.layer, Conv):
            return (), ()
        rows, columns = border_cuts(self.arch, step, self.types)
        return rows, columns if border == "both" else ()

    # -- options of a step -------------------------------------------------------------------

    def _options(
        self,
        index: int,
        step: Step,
        banks: _Banks,
        resident: Mapping[str, Place],
        offchip: bool,
    ) -> Iterator[_Option]:
        out = self.types[step.output]
        if not offchip:
            for place in self._resident_places(index, step, banks, resident, out):
                room = banks.copy()
                room.take(place, out.words)
                yield from self._tilings(step, room, resident, place)
        yield from self._tilings(step, banks, resident, None)

    def _resident_places(
        self,
        index: int,
        step: Step,
        banks: _Banks,
        resident: Mapping[str, Place],
        out: MapType,
    ) -> Iterator[Place]:
        layer = step.layer
        if isinstance(layer, Conv) and layer.residual and not step.pool:
            name = layer.residual.input
            in_place = (
                name in resident
                and self.last_use[name] == index
                and name not in [term.input for term in layer.terms]
                and self.types[name].words == out.words
                and self.types[name].bits == out.bits
            )
            if in_place:
                yield resident[name]
                return
        reading = resident.get(layer.inputs[0])
        first = 1 - reading.bank if reading else 1
        for bank in (first, 1 - first):
            place = banks.find(bank, out.words)
            if place is not None:
                yield place

    def _tilings(
        self, step: Step, banks: _Banks, resident: Mapping[str, Place], place: Place | None
    ) -> Iterator[_Option]:
        for row_groups, loads in self.loads.get(step.layer.name, {1: ()}).items():
            for partial in _partial_modes(loads, row_groups):
                for tile, block_tile in self._tiles(step):
                    if tile[0] < row_groups:
                        break
                    arranged = self._arrange(
                        step, banks, resident, place, tile, block_tile, partial == "bank"
                    )
                    if arranged is None:
                        continue
                    schedule = self._layer_schedule(
                        step,
                        loads,
                        tile,
                        block_tile,
                        partial,
                        row_groups,
                        place,
                        arranged,
                        resident,
                    )
                    yield from self._orders(step, schedule, resident)
                    break

    def _input_places(
        self, step: Step, resident: Mapping[str, Place], arranged: Mapping[Item, Place]
    ) -> tuple[Place, ...]:
        # A residual that has no place of its own is moved to where the output is written.
        return tuple(
            resident.get(name) or arranged.get(i) or arranged["output"]
            for i, name in enumerate(step.layer.inputs)
        )

    def _orders(
        self, step: Step, schedule: LayerSchedule, resident: Mapping[str, Place]
    ) -> Iterator[_Option]:
        """Give both loop orders where they differ and are possible."""
        if len(schedule.loads) <= 1 or schedule.partial != "bank":
            yield _Option(self._cost(step, schedule, resident), schedule)
        if len(schedule.loads) > 1:
            schedule = attrs.evolve(schedule, order="tiles")
            yield _Option(self._cost(step, schedule, resident), schedule)

    def _tiles(self, step: Step) -> Iterator[tuple[tuple[int, int], int]]:
        out = self.types[step.output]
        block_tiles = [out.blocks] if isinstance(step.layer, Conv) else tile_extents(out.blocks)
        for block_tile in block_tiles:
            for height in tile_extents(out.height):
                yield (height, out.width), block_tile
            for width in tile_extents(out.width)[1:]:
                yield (1, width), block_tile

    def _arrange(
        self,
        step: Step,
        banks: _Banks,
        resident: Mapping[str, Place],
        place: Place | None,
        tile: tuple[int, int],
        block_tile: int,
        partial: bool,
    ) -> dict[Item, Place] | None:
        """Find places for what a tile needs in the banks beside what is resident there."""
        items = staging_sizes(step, self.types, tile, block_tile, place is None, resident)
        if partial:
            pixels = tile[0] * tile[1] * math.prod(step.pooling)
            items["partial"] = self.arch.cores * pixels * RAW_WORDS
        reading = resident.get(step.layer.inputs[0])
        best: tuple[int, dict[Item, Place]] | None = None
        for choice in itertools.product(range(banks.count), repeat=len(items)):
            chosen = dict(zip(items, choice, strict=True))
            writing = place.bank if place else chosen["output"]
            source = reading.bank if reading else chosen[0]
            # Input and output in one bank share its port; partial sums belong to the output's.
            conflicts = 2 * (writing == source) + (chosen.get("partial", writing) != writing)
            if best is not None and conflicts >= best[0]:
                continue
            found = banks.place(items, chosen)
            if found is not None:
                best = (conflicts, found)
        return best[1] if best else None

    def _cost(self, step: Step, schedule: LayerSchedule, resident: Mapping[str, Place]) -> int:
        """Estimate the cycles of a step, without overlap."""
        arch, out, loads = self.arch, self.types[step.output], schedule.loads
        height, width = schedule.tile
        tiles = -(-out.height // height) * -(-out.width // width)
        by_tile = schedule.order == "tiles"
        cost = (tiles if by_tile else 1) * sum(
            self._load_cycles(schedule.layer, load) for load in loads
        )
        words = self._moved_words(step, schedule, tiles, resident)
        cost += (1 if by_tile else max(1, len(loads))) * offchip_cycles(arch, words * WORD_BITS)
        if schedule.output_staged:  # it leaves, and comes back where it is used
            cost += offchip_cycles(arch, 2 * out.words * WORD_BITS)
        pooled = math.prod(step.pooling)
        if schedule.partial == "offchip":
            splits = sum(not piece.last for load in loads for core in load.cores for piece in core)
            words = 2 * RAW_WORDS * out.height * out.width * pooled
            cost += offchip_cycles(arch, splits * words * WORD_BITS)
        pixels = tiles * -(-height // schedule.row_groups) * width * pooled
        accesses = arch.accesses(self.types[step.layer.inputs[0]].bits)
        busiest = sum(
            max(sum(max(1, accesses * piece.group_sets) for piece in core) for core in load.cores)
            for load in loads
        )
        return cost + busiest * pixels

    def _moved_words(
        self, step: Step, schedule: LayerSchedule, tiles: int, resident: Mapping[str, Place]
    ) -> int:
        """Estimate the words that move in for all tiles of a step."""
        sizes = staging_sizes(step, self.types, schedule.tile, schedule.block_tile, False, resident)
        shared, most = overlaps(step, self.types), extents(step, self.types, schedule.tile)
        words = 0
        for i, name in enumerate(step.layer.inputs):
            size = sizes.get(i, 0)
            if schedule.halo == "keep" and shared[i]:
                words += size // most[i][0] * self.types[name].height
            else:
                words += tiles * size
        return words


def _step_choice(step: Step, chosen: Mapping[str, Choice]) -> Choice:
    """Give a step's choice: a layer's own, but for the map that a fused pool writes."""
    choice, written = chosen[step.layer.name], chosen[step.output]
    return attrs.evolve(choice, tile=written.tile, staged=written.staged, bank=written.bank)


def _partial_modes(
    loads: Sequence[Load], row_groups: int
) -> tuple[Literal["none", "bank", "offchip"], ...]:
    if not any(load.splits for load in loads):
        return ("none",)
    # Groups would take turns at the off-chip port.
    return ("bank", "offchip") if row_groups == 1 else ("bank",)


def tile_extents(size: int) -> list[int]:
    """Give the tile extents to try: ``size`` cut into equal parts, largest first."""
    return sorted({-(-size // parts) for parts in range(1, size + 1)}, reverse=True)


def staging_sizes(
    step: Step,
    types: Mapping[str, MapType],
    tile: tuple[int, int],
    block_tile: int,
    output_staged: bool,
    resident: Container[str],
) -> dict[Item, int]:
    """Words that a tile needs in the banks for what is not resident there.

    Keys are positions among the layer's inputs, and ``"output"``. A residual that the output may
    overwrite shares its place.
    """
    layer, out = step.layer, types[step.output]
    sizes: dict[Item, int] = {}
    windows = extents(step, types, tile)
    for i, (name, window) in enumerate(zip(layer.inputs, windows, strict=True)):
        if name in resident:
            continue
        source = types[name]
        is_residual = isinstance(layer, Conv) and i == len(layer.terms)
        if is_residual and output_staged and not step.pool and source.bits == out.bits:
            continue
        blocks = source.blocks if isinstance(layer, Conv) else block_tile
        sizes[i] = source.planes * blocks * window[0] * window[1]
    if output_staged:
        blocks = out.blocks if isinstance(layer, Conv) else block_tile
        sizes["output"] = out.planes * blocks * tile[0] * tile[1]
    return sizes


def smallest_tile(
    step: Step, types: Mapping[str, MapType], arch: MarsArch
) -> tuple[int, int] | None:
    """Tell whether a step fits the banks at all.

    Returns
    -------
    None if it fits; otherwise the words that one map of its smallest tile needs and a bank has, or
    all of them need and all banks have.
    """
    sizes = staging_sizes(step, types, (1, 1), 1, True, ())
    banks = _Banks(arch.banks, arch.bank_words)
    for choice in itertools.product(range(arch.banks), repeat=len(sizes)):
        if banks.place(sizes, dict(zip(sizes, choice, strict=True))) is not None:
            return None
    largest = max(sizes.values())
    if largest > arch.bank_words:
        return largest, arch.bank_words
    return sum(sizes.values()), arch.banks * arch.bank_words


def plan(
    graph: Graph,
    arch: MarsArch,
    packed: Mapping[str, PackedConv],
    apart: Iterable[str] = (),
) -> Schedule:
    """Make the default schedule of a graph.

    Maps stay in the banks where they fit, in ping-pong; a residual sum overwrites its residual;
    what does not fit is spilled off-chip, furthest next use first, and moved in tiles. Max pools
    are fused where they can be, but for those named in ``apart``.

    Raises
    ------
    CapacityError
        If even the smallest tile of a layer does not fit.
    """
    return Planner(graph, arch, packed).plan(apart)
