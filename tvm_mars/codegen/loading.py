"""Loads: when each is fetched and filled, and where it lies in the cores' memories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.maps import MapType
from mars_runtime.packing import group_set_bytes

from ..pack import PackedConv
from ..schedule.plan import Step
from ..schedule.types import LayerSchedule, ScheduleError
from .emitter import DMA, Emitter, Span, load_lanes
from .image import CoreImage, LoadImage

__all__ = ["Loaded", "Loader", "Turn", "turns"]

Tile = tuple[int, int, int, int]

_PAGE = 2048  # bytes: the default chunk of 8-bit group-sets


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


@attrs.frozen
class Loaded:
    """Where a load's tables and group-sets lie on every core, and what a CONV reads of each."""

    image: LoadImage
    index: int
    parameters: int
    slot: int = 0
    spans: dict[int, list[Span]] = attrs.field(factory=dict)


@attrs.define
class _Ring:
    """Addresses of a memory, handed out in turn; what is still needed is never handed out."""

    name: str
    size: int
    next: int = 0
    held: dict[int, tuple[int, int]] = attrs.field(factory=dict)  # by turn: first and end

    def take(self, length: int, turn: int, at: int | None = None) -> int:
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
                self.held[turn] = (start, start + length)
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
        self.turns = [(number, turn) for number, turn in enumerate(turns) if turn.load is not None]
        self.images, self.weights_base = images, weights_base
        fill = [_of_load(turn.schedule.fill_ahead, turn) for _, turn in self.turns]
        fetch = [_of_load(turn.schedule.fetch_ahead, turn) for _, turn in self.turns]
        self.fill_due = self._due(fill)
        self.fetch_due = self._due([max(pair) for pair in zip(fill, fetch, strict=True)])
        self.fetched = self.filled = 0  # loads
        self.open: set[int] = set()
        self.index = _Ring("index SRAM bytes", arch.index_sram_bits // 8)
        self.parameters = _Ring("parameter SRAM bytes", arch.parameter_sram_bits // 8)
        self.weight = [
            _Ring("weight SRAM bytes", arch.weight_sram_bits // 8) for _ in range(arch.cores)
        ]
        self.slots = _Ring("macro slots", 0)
        self.width = 0  # of the weights in the arrays
        self.loaded: dict[int, Loaded] = {}
        # By turn, where the cores' weights lie in their SRAM.
        self.waiting: dict[int, dict[int, tuple[int, list[Span]]]] = {}

    def _due(self, ahead: Sequence[int]) -> list[int]:
        """Give the turn before which each load is due; never before that of an earlier load."""
        due: list[int] = []
        for place, count in enumerate(ahead):
            first = self.turns[max(0, place - count)][0]
            due.append(max(first, due[-1]) if due else first)
        return due

    def own(self, turn: int) -> None:
        """Emit what a turn needs itself."""
        while self.filled < len(self.turns) and self.turns[self.filled][0] <= turn:
            self._next()

    def ahead(self, turn: int) -> None:
        """Emit what is due before a turn for later ones."""
        while self.filled < len(self.turns) and self.fill_due[self.filled] <= turn:
            self._next()
        while self.fetched < len(self.turns) and self.fetch_due[self.fetched] <= turn:
            self._fetch(*self.turns[self.fetched])
            self.fetched += 1

    def _next(self) -> None:
        """Fill the next load, which may have been fetched."""
        if self.fetched > self.filled:
            self._fill(*self.turns[self.filled])
        else:
            self._fetch_and_fill(*self.turns[self.filled])
            self.fetched += 1
        self.filled += 1

    def computes(self, cores: Sequence[int]) -> None:
        """Note that cores compute, which closes their arrays."""
        self.open.difference_update(cores)

    def after(self, turn: int) -> None:
        """Free what a turn needed."""
        for ring in (self.index, self.parameters, self.slots):
            ring.held.pop(turn, None)

    # -- one load --------------------------------------------------------------------------------

    def _image(self, turn: Turn) -> LoadImage:
        assert turn.load is not None
        return self.images[turn.schedule.layer][turn.load]

    def _fetch_and_fill(self, number: int, turn: Turn) -> None:
        """Fetch a load and fill the arrays, the two hops in chunks."""
        image = self._image(turn)
        self._prepare(image)
        self._tables(number, image)
        weight_bits = self.packed[turn.schedule.layer].weight_bits
        slot = self._slot(number, turn, image, weight_bits)
        size = group_set_bytes(weight_bits)
        chunk = min(turn.schedule.fetch_chunk, self.arch.weight_sram_bits // 8 // size)
        filling = _filling(image)
        most = max((part.group_sets for part in filling.values()), default=0)
        for start in range(0, most, chunk):
            for core, part in filling.items():
                count = min(chunk, part.group_sets - start)
                if count <= 0:
                    continue
                at = self.weight[core].take(count * size, number)
                pages = self._fetch_weights(core, part, start * size, count * size, at)
                self._fill_slots(core, at, slot + start, count, weight_bits, pages)
                del self.weight[core].held[number]

    def _fetch(self, number: int, turn: Turn) -> None:
        """Fetch a load that is filled later."""
        image = self._image(turn)
        self._tables(number, image)
        size = group_set_bytes(self.packed[turn.schedule.layer].weight_bits)
        self.waiting[number] = {}
        for core, part in _filling(image).items():
            length = part.group_sets * size
            at = self.weight[core].take(length, number)
            self.waiting[number][core] = at, self._fetch_weights(core, part, 0, length, at)

    def _fill(self, number: int, turn: Turn) -> None:
        """Fill the arrays from the weight SRAMs."""
        image = self._image(turn)
        weight_bits = self.packed[turn.schedule.layer].weight_bits
        self._prepare(image)
        slot = self._slot(number, turn, image, weight_bits)
        for core, (at, pages) in self.waiting.pop(number).items():
            self._fill_slots(core, at, slot, image.cores[core].group_sets, weight_bits, pages)
            del self.weight[core].held[number]

    def _prepare(self, image: LoadImage) -> None:
        closed = [core for core in _filling(image) if core not in self.open]
        if not closed:
            return
        mask = sum(1 << core for core in closed)
        self.out.emit(isa.Prepare(cores=mask), load_lanes(mask))
        self.open.update(closed)

    def _tables(self, number: int, image: LoadImage) -> None:
        """Fetch tables to the same addresses on every core, so that one CONV serves them all."""
        parts = image.cores.values()
        index = self.index.take(max(part.index_bytes for part in parts), number)
        parameters = self.parameters.take(max(part.parameter_bytes for part in parts), number)
        for core, part in image.cores.items():
            for memory, name, source, length, at in (
                (isa.MEMORY_INDEX, "index", part.index, part.index_bytes, index),
                (
                    isa.MEMORY_PARAMETER,
                    "parameter",
                    part.parameters,
                    part.parameter_bytes,
                    parameters,
                ),
            ):
                self._emit_fetch(
                    core, memory, source, length, at, [((name, core), at, at + length)]
                )
        self.loaded[number] = Loaded(image, index, parameters)

    def _slot(self, number: int, turn: Turn, image: LoadImage, weight_bits: int) -> int:
        """Give the first macro slot, the same on every core."""
        if self.slots.held and self.arch.dual_4bit_cells and weight_bits != self.width:
            raise ScheduleError(
                f"{weight_bits}-bit weights are filled beside {self.width}-bit ones, which lie "
                "otherwise in cells that hold two",
                where=turn.schedule.layer,
                hint="fill loads of one width ahead",
            )
        self.width, self.slots.size = weight_bits, self.arch.slots(weight_bits)
        count = max((part.group_sets for part in image.cores.values()), default=0)
        at = self.slots.take(count, number, 0 if turn.schedule.slots == "low" else None)
        loaded = self.loaded[number]
        spans: dict[int, list[Span]] = {
            core: [
                (("index", core), loaded.index, loaded.index + part.index_bytes),
                (("parameter", core), loaded.parameters, loaded.parameters + part.parameter_bytes),
                (("slots", core), at, at + part.group_sets),
            ]
            for core, part in image.cores.items()
        }
        self.loaded[number] = attrs.evolve(loaded, slot=at, spans=spans)
        return at

    def _fetch_weights(
        self, core: int, part: CoreImage, skip: int, length: int, at: int
    ) -> list[Span]:
        """Fetch some of a core's weights; give where they lie."""
        source, pages = self.weights_base + part.weights + skip, _pages(core, at, length)
        self._emit_fetch(core, isa.MEMORY_WEIGHT, source, length, at, pages)
        return pages

    def _emit_fetch(
        self, core: int, memory: int, source: int, length: int, at: int, writes: list[Span]
    ) -> None:
        self.out.emit(
            isa.Fetch(core=core, memory=memory, source=source, destination=at, length=length),
            DMA,
            writes=writes,
        )

    def _fill_slots(
        self, core: int, at: int, slot: int, count: int, weight_bits: int, reads: list[Span]
    ) -> None:
        self.out.emit(
            isa.Fill(
                core=core, source=at, slot=slot, count=count, weight_bits=int(weight_bits == 8)
            ),
            load_lanes(1 << core),
            reads,
            [(("slots", core), slot, slot + count)],
        )


def _pages(core: int, at: int, length: int) -> list[Span]:
    """Give some bytes of a weight SRAM in pages, of which each has few accesses."""
    end = at + length
    return [
        (("page", core, page), max(at, page * _PAGE), min(end, (page + 1) * _PAGE))
        for page in range(at // _PAGE, -(-end // _PAGE))
    ]


def _of_load(counts: Sequence[int], turn: Turn) -> int:
    assert turn.load is not None
    return counts[turn.load] if counts else 0


def _filling(image: LoadImage) -> dict[int, CoreImage]:
    """Give the cores that hold group-sets."""
    return {core: part for core, part in image.cores.items() if part.group_sets}
