"""Loads: when each is fetched and filled, and where it lies in the cores' memories."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.maps import WORD_CHANNELS, MapType
from mars_runtime.packing import group_set_bytes
from mars_runtime.timing import offchip_cycles

from ..pack import PackedConv
from ..schedule.plan import Step
from ..schedule.types import LayerSchedule, ScheduleError
from .emitter import DMA, Emitter, Lanes, TransferRun, compute_lanes, load_lanes
from .image import LoadImage, LoadParts

__all__ = ["Loaded", "Loader", "Turn", "turns"]

Tile = tuple[int, int, int, int]

_WEIGHT_CELL = group_set_bytes(4)


@attrs.frozen
class Turn:
    """What is computed between one load and the next: some tiles of a layer.

    ``load`` numbers the layer's load that they need; None for a pool or an addition.
    """

    step: Step
    schedule: LayerSchedule
    layer: int
    load: int | None
    tiles: tuple[tuple[int, Tile], ...]
    last: bool


def turns(
    steps: Sequence[Step], layers: Sequence[LayerSchedule], types: Mapping[str, MapType]
) -> Iterator[Turn]:
    """Yield a schedule's turns in program order; tiles go with their number."""
    for number, (step, schedule) in enumerate(zip(steps, layers, strict=True)):
        tiles = tuple(enumerate(schedule.tiles(types[step.output])))
        if not schedule.loads:
            yield Turn(step, schedule, number, None, tiles, True)
            continue
        passes = [(tile,) for tile in tiles] if schedule.order == "tiles" else [tiles]
        for place, part in enumerate(passes):
            for load in range(len(schedule.loads)):
                last = place == len(passes) - 1 and load == len(schedule.loads) - 1
                yield Turn(step, schedule, number, load, part, last)


@attrs.define(eq=False)
class Loaded:
    """Where a load's tables and group-sets lie on every core, who brought and who reads them."""

    image: LoadImage
    index: int
    parameters: int
    slot: int = 0
    fetched: dict[int, int] = attrs.field(factory=dict)  # by core, the last FETCH of its tables
    filled: dict[int, int] = attrs.field(factory=dict)  # by core, the last FILL
    readers: dict[Lanes, int] = attrs.field(factory=dict)  # by lanes, the last CONV
    ahead: int = 0  # bits that were fetched before it was filled

    @property
    def tables(self) -> tuple[int, int, int, int]:
        """CONV's ``descriptor``, ``codes``, ``parameters`` and ``slot``."""
        codes = self.index + self.image.parts.descriptor_bytes
        return self.index, codes, self.parameters, self.slot

    def before(self, cores: Iterable[int]) -> dict[Lanes, int]:
        """Give what must be done before a CONV of some cores."""
        after = {load_lanes(1 << core): self.filled[core] for core in cores if core in self.filled}
        after[DMA] = max(self.fetched[core] for core in cores)
        return after


class _Cells:
    """Which load each cell, of ``grain`` units, of one core's memory holds."""

    def __init__(self, core: int, size: int, grain: int = 1) -> None:
        self.lanes, self.grain = compute_lanes(1 << core), grain
        self.loads: list[Loaded | None] = [None] * -(-size // grain)

    def take(
        self, first: int, length: int, load: Loaded, chunk: int | None = None
    ) -> list[tuple[int, Lanes, int]]:
        """Give some units to a load; they are written in order, so many cells at a time or all.

        Returns
        -------
        What must be done before: the number of the first writing for which it must, lanes, and the
        last instruction there.
        """
        first, count = first // self.grain, length // self.grain
        chunk = chunk or count
        held = self.loads[first : first + count]
        self.loads[first : first + count] = [load] * count
        after: dict[tuple[int, Lanes], int] = {}
        for earlier in {*held}:
            if earlier is not None:
                part = held.index(earlier) // chunk
                for lanes, reader in earlier.readers.items():
                    if lanes & self.lanes and after.get((part, lanes), -1) < reader:
                        after[part, lanes] = reader
        return [(part, lanes, after[part, lanes]) for part, lanes in sorted(after)]


# Of a ring: size, next, and what is still needed.
_State: TypeAlias = tuple[int, int, tuple[tuple[int, int], ...]]


@attrs.define
class _Ring:
    """Addresses of a memory, handed out in turn; what is still needed is never handed out."""

    name: str
    size: int
    next: int = 0
    held: dict[Hashable, tuple[int, int]] = attrs.field(
        factory=dict
    )  # by who needs it: first and end

    @property
    def state(self) -> _State:
        """Size, next, and what is still needed."""
        return self.size, self.next, tuple(self.held.values())

    def take(self, length: int, turn: int, at: int | None = None) -> int:
        """Give the next cells, which a turn needs (see :meth:`find`)."""
        start = self.find(length, at)
        self.held[turn] = (start, start + length)
        return start

    def find(self, length: int, at: int | None = None) -> int:
        """Give the next cells, from the start again when the end is reached.

        Where those are still needed, the first behind something that is; ``at`` is tried instead of
        the next.
        """
        if at is None:
            at = self.next if self.next + length <= self.size else 0
        held = [(first, end) for first, end in self.held.values() if first < end]
        for start in (at, *sorted(end for _, end in held)):
            if start + length <= self.size and all(
                start >= end or first >= start + length for first, end in held
            ):
                self.next = start + length
                return start
        used = sum(end - first for first, end in held)
        raise ScheduleError(
            f"{length} {self.name} of {self.size} are wanted beside {used} of earlier loads",
            hint="fetch or fill fewer loads ahead, or make them smaller",
        )


class Loader:
    """Emits FETCH, PREPARE and FILL of every load before the turn for which it is due."""

    def __init__(
        self,
        arch: MarsArch,
        packed: Mapping[str, PackedConv],
        turns: Sequence[Turn],
        images: Mapping[str, Sequence[LoadImage]],
        weights_base: int,
        out: Emitter,
    ) -> None:
        self.arch, self.packed, self.out = arch, packed, out
        self.all_turns = turns
        self.turns = [(number, turn) for number, turn in enumerate(turns) if turn.load is not None]
        self.images, self.weights_base = images, weights_base
        fill = [_of_load(turn.schedule.fill_ahead, turn) for _, turn in self.turns]
        fetch = [_of_load(turn.schedule.fetch_ahead, turn) for _, turn in self.turns]
        self.fill_due = self._due(fill)
        self.fetch_due = self._due([max(pair) for pair in zip(fill, fetch, strict=True)])
        self.fetched = self.filled = 0  # loads
        self.started = 0  # group-sets fetched of the load behind those
        self.open: set[int] = set()
        self.index = _Ring("index SRAM bytes", arch.index_sram_bits // 8)
        self.parameters = _Ring("parameter SRAM bytes", arch.parameter_sram_bits // 8)
        cores, weight_bytes = range(arch.cores), arch.weight_sram_bits // 8
        self.weight = [_Ring("weight SRAM bytes", weight_bytes) for _ in cores]
        # For each core the last FILL from any cell of its weight SRAM, and from each.
        self.last_fill = [-1 for _ in cores]
        self.emptied = [[-1] * (weight_bytes // _WEIGHT_CELL) for _ in cores]
        self.index_cells = [_Cells(core, self.index.size, isa.CODE_BYTES) for core in cores]
        self.parameter_cells = [_Cells(core, self.parameters.size, WORD_CHANNELS) for core in cores]
        self.slot_cells = [_Cells(core, max(arch.slots(4), arch.slots(8))) for core in cores]
        self.slots = _Ring("macro slots", 0)
        self.placed: dict[int, int] = {}  # by turn, the first slot
        self.holders = [-1] * len(self.slot_cells[0].loads)  # by slot, the last load's turn
        self.width = 0  # of the weights in the arrays
        self.loaded: dict[int, Loaded] = {}
        self.waiting: dict[int, list[_Part]] = {}  # by turn, what is fetched and not filled
        # By turn and tile, which parts are fetched before it for a core; the last are behind all.
        self.behind: dict[tuple[int, int], list[tuple[_Part, int]]] = {}
        self.filled_before = 0  # loads, when this turn began
        self.opening = False  # whether arrays were opened in this turn

    def _due(self, ahead: Sequence[int]) -> list[int]:
        """Give the turn before which each load is due; never before that of an earlier load."""
        due: list[int] = []
        for place, count in enumerate(ahead):
            first = self.turns[max(0, place - count)][0]
            due.append(max(first, due[-1]) if due else first)
        return due

    def own(self, turn: int) -> None:
        """Emit what a turn needs itself."""
        self.filled_before, self.opening = self.filled, False
        while self.filled < len(self.turns) and self.turns[self.filled][0] <= turn:
            self._fill()

    def ahead(self, turn: int, tile: int = 0) -> None:
        """Emit what is due before a tile of a turn for later ones."""
        if not tile:
            while self.filled < len(self.turns) and self.fill_due[self.filled] <= turn:
                self._fill()
            while self.fetched < len(self.turns) and self.fetch_due[self.fetched] <= turn:
                self._fetch(self._part())
            self._deepen(turn)
        if self.behind:
            self._fetch_behind(turn, tile)

    def computes(self, cores: Sequence[int]) -> None:
        """Note that cores compute, which closes their arrays."""
        self.open.difference_update(cores)

    def after(self, turn: int) -> None:
        """Free what a turn needed."""
        if self.behind:
            self._fetch_behind(turn, len(self.all_turns[turn].tiles))
        for ring in (self.index, self.parameters, self.slots):
            ring.held.pop(turn, None)

    # -- fetching ahead --------------------------------------------------------------------------

    def _fetch_behind(self, turn: int, tile: int) -> None:
        """Fetch what is due before a tile of a turn, or behind the last of them."""
        for part, core in self.behind.pop((turn, tile), ()):
            self._fetch(part, core)

    def _deepen(self, turn: int) -> None:
        """Fetch what a turn's layer is to leave in the weight SRAMs.

        While arrays are filled, what the port can bring meanwhile; the rest core by core between
        the tiles that are computed until arrays are filled again, so that the others compute.
        """
        here = self.all_turns[turn]
        begins = not turn or self.all_turns[turn - 1].layer != here.layer
        if not here.schedule.fetch_depth or not (begins or self.filled > self.filled_before):
            return
        depth = here.schedule.fetch_depth
        spare = self._spare()
        while part := self._next_part(depth, spare):
            spare -= offchip_cycles(self.arch, self._fetch(part))
        parts = list(iter(lambda: self._next_part(depth), None))
        end = self.fill_due[self.filled] if self.filled < len(self.turns) else len(self.all_turns)
        alike = itertools.takewhile(
            lambda number: self.all_turns[number].layer == here.layer, range(turn, end)
        )
        places = [(one, tile) for one in alike for tile in range(len(self.all_turns[one].tiles))]
        places.append((places[-1][0], places[-1][1] + 1))
        for core in range(self.arch.cores):
            place = places[(len(places) - 1) * core // max(1, self.arch.cores - 1)]
            self.behind.setdefault(place, []).extend((part, core) for part in parts)

    def _spare(self) -> int:
        """Give for how many cycles the port is free while the arrays are filled in this turn."""
        spare = self.arch.array_fill_cycles if self.opening else 0
        for number, turn in self.turns[self.filled_before : self.filled]:
            loaded = self.loaded[number]
            parts = loaded.image.parts
            weight_bits = self.packed[turn.schedule.layer].weight_bits
            spare -= offchip_cycles(self.arch, parts.bits - loaded.ahead)
            spare += parts.fill_cycles(self.arch, weight_bits)
        return spare

    def _next_part(self, depth: int, cycles: int | None = None) -> _Part | None:
        """Give a place to what is fetched next, so far as it is wanted and has room.

        Parameters
        ----------
        depth : int
            Group-sets that the weight SRAMs are to hold.
        cycles : int, optional
            For how long the port may be taken.
        """
        wanted = depth - sum(part.count for parts in self.waiting.values() for part in parts)
        if wanted <= 0 or self.fetched == len(self.turns):
            return None
        _, turn = self.turns[self.fetched]
        parts = self._image(turn).parts
        if cycles is not None and parts.filling:
            row = len(parts.filling) * offchip_cycles(self.arch, 8 * self._size(turn))
            wanted = min(wanted, cycles // row)
            if wanted <= 0:
                return None
        try:
            return self._part(min(wanted, parts.most_group_sets - self.started))
        except ScheduleError:
            return None  # a memory is full

    def _part(self, count: int | None = None) -> _Part:
        """Give a place to some group-sets of the load that is fetched next, or to all that is left.

        Raises
        ------
        ScheduleError
            If they, or the load's tables, have no room.
        """
        number, turn = self.turns[self.fetched]
        image, first = self._image(turn), self.started
        size, most = self._size(turn), image.parts.most_group_sets
        count = most - first if count is None else count
        counts = {
            core: min(count, part.group_sets - first)
            for core, part in image.parts.filling.items()
            if part.group_sets > first
        }
        at = {core: (self.weight[core].find(own * size), own) for core, own in counts.items()}
        if number not in self.loaded:
            self._place_tables(number, image)
        for core, (start, own) in at.items():
            self.weight[core].held[number, first] = start, start + own * size
        part = _Part(number, first, count, at)
        self.waiting.setdefault(number, []).append(part)
        self.started += count
        if self.started == most:
            self.fetched, self.started = self.fetched + 1, 0
        return part

    def _fetch(self, part: _Part, core: int | None = None) -> int:
        """Fetch a part for one core or all, and before it tables that are missing there.

        Returns
        -------
        How many bits are fetched.
        """
        loaded, size = self.loaded[part.turn], self._size(self.all_turns[part.turn])
        image, length = loaded.image, 0
        cores = [one for one in image.parts.cores if core in (None, one)]
        missing = tuple([one for one in cores if one not in loaded.fetched])
        if missing:
            self._tables(loaded, missing)
            tables = [image.parts.cores[one] for one in missing]
            length += sum(one.index_bytes + one.parameter_bytes for one in tables)
        for one in cores:
            if one in part.at:
                at, count = part.at[one]
                source = self.weights_base + image.weights + image.parts.cores[one].weights
                source += part.first * size
                part.fetches[one] = self._fetch_weights(one, source, count * size, at)
                length += count * size
        loaded.ahead += 8 * length
        return 8 * length

    # -- one load --------------------------------------------------------------------------------

    def _image(self, turn: Turn) -> LoadImage:
        assert turn.load is not None
        return self.images[turn.schedule.layer][turn.load]

    def _size(self, turn: Turn) -> int:
        """Give the bytes of a group-set."""
        return group_set_bytes(self.packed[turn.schedule.layer].weight_bits)

    def _fill(self) -> None:
        """Fill the next load, and fetch of it what was not fetched before."""
        number, turn = self.turns[self.filled]
        image, weight_bits = self._image(turn), self.packed[turn.schedule.layer].weight_bits
        self._prepare(image)
        if number not in self.loaded:
            self._place_tables(number, image)
            self._tables(self.loaded[number], tuple(image.parts.cores))
        self._slot(number, turn, image, weight_bits)
        for part in self.waiting.pop(number, ()):
            for core, (at, count) in part.at.items():
                fetch = part.fetches[core]
                self._fill_slots(number, core, part.first, at, count, weight_bits, fetch)
                del self.weight[core].held[number, part.first]
        if self.fetched == self.filled:
            self._fetch_and_fill(number, turn, image, weight_bits)
            self.fetched, self.started = self.fetched + 1, 0
        self.filled += 1

    def _fetch_and_fill(self, number: int, turn: Turn, image: LoadImage, weight_bits: int) -> None:
        """Fetch what is left of a load and fill the arrays, the two hops in chunks."""
        loaded, begun = self.loaded[number], self.started
        room = self.arch.weight_sram_bits // 8 // group_set_bytes(weight_bits)
        chunk = min(turn.schedule.fetch_chunk, room)
        chunks = _chunks(
            image.parts,
            self.weights_base + image.weights,
            begun,
            chunk,
            weight_bits,
            loaded.slot,
            tuple([self.weight[core].state for core in image.parts.filling]),
        )
        after = []
        for fetch, core, lane, first, end in chunks.fetches:
            if self.last_fill[core] >= 0:
                after.append((fetch, DMA, lane, max(self.emptied[core][first:end])))
        for core, fills in chunks.fills.items():
            lane, count = load_lanes(1 << core), image.parts.cores[core].group_sets - begun
            readers = self.slot_cells[core].take(loaded.slot + begun, count, loaded, chunk)
            after += [(fills[part], lane, other, last) for part, other, last in readers]
        start = self.out.append(chunks.run, after)
        for core, next in chunks.next.items():
            self.weight[core].next = next
            loaded.filled[core] = self.last_fill[core] = start + chunks.fills[core][-1]
            for first, end, fill in chunks.emptied[core]:
                self.emptied[core][first:end] = [start + fill] * (end - first)

    def _prepare(self, image: LoadImage) -> None:
        closed = [core for core in image.parts.filling if core not in self.open]
        if not closed:
            return
        mask = sum(1 << core for core in closed)
        self.out.emit(isa.Prepare(cores=mask), load_lanes(mask))
        self.open.update(closed)
        self.opening = True

    def _place_tables(self, number: int, image: LoadImage) -> None:
        """Give tables the same addresses on every core, so that one CONV serves them all."""
        index, parameters = image.parts.most_index_bytes, image.parts.most_parameter_bytes
        at = self.index.find(index), self.parameters.find(parameters)
        self.index.held[number] = at[0], at[0] + index
        self.parameters.held[number] = at[1], at[1] + parameters
        self.loaded[number] = Loaded(image, *at)

    def _tables(self, loaded: Loaded, cores: tuple[int, ...]) -> None:
        """Fetch a load's tables for some of its cores."""
        index, parameters = loaded.index, loaded.parameters
        run = _table_run(loaded.image.parts, cores, loaded.image.tables, index, parameters)
        after = []
        for place, core in enumerate(cores):
            part = loaded.image.parts.cores[core]
            readers = self.index_cells[core].take(index, part.index_bytes, loaded)
            after += [(2 * place, DMA, lanes, reader) for _, lanes, reader in readers]
            readers = self.parameter_cells[core].take(parameters, part.parameter_bytes, loaded)
            after += [(2 * place + 1, DMA, lanes, reader) for _, lanes, reader in readers]
        start = self.out.append(run, after)
        loaded.fetched |= {core: start + 2 * place + 1 for place, core in enumerate(cores)}

    def _slot(self, number: int, turn: Turn, image: LoadImage, weight_bits: int) -> None:
        """Choose the first macro slot, the same on every core."""
        if self.slots.held and self.arch.dual_4bit_cells and weight_bits != self.width:
            raise ScheduleError(
                f"{weight_bits}-bit weights are filled beside {self.width}-bit ones, which lie "
                "otherwise in cells that hold two",
                where=turn.schedule.layer,
                hint="fill loads of one width ahead",
            )
        self.width, self.slots.size = weight_bits, self.arch.slots(weight_bits)
        if number not in self.placed:
            self._place()
        at = self.loaded[number].slot = self.placed.pop(number)
        end = at + image.parts.most_group_sets
        self.slots.held[number] = at, end
        self.holders[at:end] = [number] * (end - at)

    def _place(self) -> None:
        """Choose macro slots for the next load, and for all that are filled together with it."""
        first, due = self.filled, self.fill_due
        together = [
            self.turns[place]
            for place in itertools.takewhile(
                lambda place: due[place] == due[first], range(first, len(due))
            )
        ]
        try:
            self.placed, self.slots.next = self._places(together)
        except ScheduleError:  # they leave gaps: one behind the other they may fit
            self.slots.next = 0
            self.placed, self.slots.next = self._places(together, in_row=True)

    def _places(
        self, together: Sequence[tuple[int, Turn]], in_row: bool = False
    ) -> tuple[dict[int, int], int]:
        """Give the first slot of some loads by turn, and that behind the last.

        In a row they follow each other, where they would take the slots that were read longest ago.
        """
        ring = attrs.evolve(self.slots, held=dict(self.slots.held))
        found: dict[int, int] = {}
        for number, turn in together:
            count, slots = self._image(turn).parts.most_group_sets, turn.schedule.slots
            at = 0 if slots == "low" else None
            if slots == "oldest" and not in_row:
                at = self._oldest(ring, count)
            found[number] = ring.take(count, number, at)
        return found, ring.next

    def _oldest(self, ring: _Ring, count: int) -> int | None:
        """Give the first of so many slots that were read longest ago; None if none are free."""
        needed = self.turns[-1][0] + 1
        last = self.holders[: ring.size]  # loads are read in their turns
        for start, end in ring.held.values():
            last[start:end] = [needed] * (end - start)
        edges = {at for at in range(1, ring.size) if last[at] != last[at - 1]}
        starts = {0, ring.next} | edges | {edge - count for edge in edges | {ring.size}}
        ages = {
            start: max(last[start : start + count], default=-1)
            for start in starts
            if 0 <= start <= ring.size - count
        }
        oldest = min(ages.values(), default=needed)
        if oldest == needed:
            return None
        # At an end of the array they leave more in one piece.
        best = [start for start, age in ages.items() if age == oldest]
        return min(best, key=lambda start: (start not in (0, ring.size - count), start))

    def _fetch_weights(self, core: int, source: int, length: int, at: int) -> int:
        """Fetch a core's weights; give the number of the FETCH."""
        emptied = max(self.emptied[core][at // _WEIGHT_CELL : (at + length) // _WEIGHT_CELL])
        return self.out.emit(
            _fetch(core, isa.MEMORY_WEIGHT, source, at, length),
            DMA,
            {load_lanes(1 << core): emptied} if emptied >= 0 else {},
        )

    def _fill_slots(
        self,
        number: int,
        core: int,
        first: int,
        at: int,
        count: int,
        weight_bits: int,
        fetch: int,
    ) -> None:
        """Fill some of a load's slots, from the ``first`` on, with weights that a FETCH brought."""
        loaded = self.loaded[number]
        slot = loaded.slot + first
        readers = self.slot_cells[core].take(slot, count, loaded)
        after = {DMA: fetch, **{lanes: reader for _, lanes, reader in readers}}
        fill = self.out.emit(
            _fill(core, at, slot, count, int(weight_bits == 8)), load_lanes(1 << core), after
        )
        loaded.filled[core] = self.last_fill[core] = fill
        start, end = at // _WEIGHT_CELL, (at + count * group_set_bytes(weight_bits)) // _WEIGHT_CELL
        self.emptied[core][start:end] = [fill] * (end - start)


@attrs.frozen(eq=False)
class _Part:
    """Group-sets of a turn's load that are fetched before it is filled, each core's from one on.

    Parameters
    ----------
    first, count : int
        The first of them, and how many the core has that has most.
    at : dict
        By core, where they lie in its weight SRAM, and how many they are.
    fetches : dict
        By core, the FETCH that brought them.
    """

    turn: int
    first: int
    count: int
    at: dict[int, tuple[int, int]]
    fetches: dict[int, int] = attrs.field(factory=dict)


@attrs.frozen
class _Chunks:
    """FETCH and FILL of a load, chunk by chunk.

    Parameters
    ----------
    run : TransferRun
        The instructions; what follows numbers them from 0.
    fetches : list of (int, int, Lanes, int, int)
        FETCHes to what others emptied last: with core, its load unit, first cell of the weight SRAM
        and end.
    fills : dict
        By core, its FILLs.
    next : dict
        By core, the next address of the weight SRAM.
    emptied : dict
        By core, first cell of the weight SRAM, end, and the last FILL from there.
    """

    run: TransferRun
    fetches: list[tuple[int, int, Lanes, int, int]]
    fills: dict[int, list[int]]
    next: dict[int, int]
    emptied: dict[int, list[tuple[int, int, int]]]


@functools.lru_cache(maxsize=2048)
def _chunks(
    parts: LoadParts,
    weights: int,
    begun: int,
    chunk: int,
    weight_bits: int,
    slot: int,
    states: tuple[_State, ...],
) -> _Chunks:
    """Make FETCH and FILL of a load, which points with the same load share.

    The cores have ``begun`` group-sets of it already.

    Parameters
    ----------
    weights : int
        Off-chip address of the load's weights.
    states : tuple of (int, int, tuple)
        Of the weight SRAMs of the cores that hold group-sets.
    """
    size, out = group_set_bytes(weight_bits), Emitter()
    rings = {
        core: _Ring("weight SRAM bytes", length, next, dict(enumerate(held)))
        for core, (length, next, held) in zip(parts.filling, states, strict=True)
        if parts.cores[core].group_sets > begun
    }
    emptied = {core: [-1] * (rings[core].size // _WEIGHT_CELL) for core in rings}
    fetches, again = [], set()
    fills: dict[int, list[int]] = {core: [] for core in rings}
    for start in range(begun, parts.most_group_sets, chunk):
        for core, part in parts.filling.items():
            source, count = weights + part.weights, min(chunk, part.group_sets - start)
            if count <= 0:
                continue
            at, lanes = rings[core].find(count * size), load_lanes(1 << core)
            cells = slice(at // _WEIGHT_CELL, (at + count * size) // _WEIGHT_CELL)
            last = max(emptied[core][cells])
            if last >= 0:
                again.add(core)
            fetch = out.emit(
                _fetch(core, isa.MEMORY_WEIGHT, source + start * size, at, count * size),
                DMA,
                {lanes: last} if last >= 0 else {},
            )
            if core not in again:
                fetches.append((fetch, core, lanes, cells.start, cells.stop))
            fill = out.emit(
                _fill(core, at, slot + start, count, int(weight_bits == 8)), lanes, {DMA: fetch}
            )
            fills[core].append(fill)
            emptied[core][cells] = [fill] * (cells.stop - cells.start)
    ends = {core: _spans(cells) for core, cells in emptied.items()}
    next = {core: ring.next for core, ring in rings.items()}
    return _Chunks(out.run(), fetches, fills, next, ends)


@functools.lru_cache(maxsize=4096)
def _table_run(
    parts: LoadParts, cores: tuple[int, ...], tables: int, index: int, parameters: int
) -> TransferRun:
    """Make the FETCHes of a load's tables: for each core those of its codes and parameters."""
    out = Emitter()
    for core in cores:
        part = parts.cores[core]
        fetch = _fetch(core, isa.MEMORY_INDEX, tables + part.index, index, part.index_bytes)
        out.emit(fetch, DMA)
        source, length = tables + part.parameters, part.parameter_bytes
        out.emit(_fetch(core, isa.MEMORY_PARAMETER, source, parameters, length), DMA)
    return out.run()


def _spans(cells: Sequence[int]) -> list[tuple[int, int, int]]:
    """Give where a memory holds the same number, if it is not negative: first cell, end, number."""
    found, first = [], 0
    for number, same in itertools.groupby(cells):
        end = first + len(list(same))
        if number >= 0:
            found.append((first, end, number))
        first = end
    return found


# Points of a space share most of their instructions: equal ones are made once.


@functools.lru_cache(maxsize=65536)
def _fetch(core: int, memory: int, source: int, destination: int, length: int) -> isa.Fetch:
    return isa.Fetch(
        core=core, memory=memory, source=source, destination=destination, length=length
    )


@functools.lru_cache(maxsize=65536)
def _fill(core: int, source: int, slot: int, count: int, weight_bits: int) -> isa.Fill:
    return isa.Fill(core=core, source=source, slot=slot, count=count, weight_bits=weight_bits)


def _of_load(counts: Sequence[int], turn: Turn) -> int:
    assert turn.load is not None
    return counts[turn.load] if counts else 0
