"""What a program does to the machine's memories, watched while its timeline is made.

A profile counts; this module keeps what the counts were made of: which group-sets each layer
multiplies, what each filling writes into the macros, which maps lie where in the banks and when.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np

from mars_runtime import MarsArch, Region, isa, timing
from mars_runtime.timeline import Timeline
from mars_runtime.trace import Recorder

from ..graph import Conv
from ..pack import pack_conv
from ..skeleton import graph_from_json

__all__ = ["Filling", "GroupSetMap", "Observation", "Stay", "observe"]

# A group-set of a layer: kernel block, convolution term, tap, input-channel block.
GroupSet = tuple[int, int, int, int]


@attrs.frozen
class Filling:
    """What one opening of a core's array has written into it.

    ``number`` counts the PREPARE instructions of the region, ``layer`` is the one that holds the
    instruction, ``slots`` are those that the core has for weights of that width.
    """

    number: int
    core: int
    layer: str
    group_sets: int
    slots: int
    start: int


@attrs.frozen
class Stay:
    """A map's stay in a bank: words ``base .. base + words - 1``, from first write to last use.

    A map that is written over in place ends where that begins. ``layer`` is the one that wrote it,
    ``what`` is ``map`` or ``partial sums``.
    """

    bank: int
    base: int
    words: int
    layer: str
    what: str
    start: int
    end: int


@attrs.frozen
class GroupSetMap:
    """Which group-sets a convolution has, and which of them are stored.

    ``dense`` are those without zero skipping; one of them is (kernel block, term, tap, input
    block). ``taps`` and ``blocks`` are each term's taps and input-channel blocks.
    """

    layer: str
    dense: frozenset[GroupSet]
    stored: frozenset[GroupSet]
    out_blocks: int
    taps: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def zero_share(self) -> float:
        """Share of the dense layer's group-sets that is not stored."""
        return 1 - len(self.stored) / len(self.dense)


@attrs.frozen
class Observation:
    """A region's timeline with the events of every unit and port, and what it did to memories."""

    timeline: Timeline
    fillings: tuple[Filling, ...]
    stays: tuple[Stay, ...]
    maps: tuple[GroupSetMap, ...]


@attrs.define
class _Live:
    """A map that lies in a bank now."""

    stay: Stay
    end: int

    @property
    def stop(self) -> int:
        return self.stay.base + self.stay.words

    def closed(self, at: int | None = None) -> Stay:
        end = self.end if at is None else min(self.end, at)
        return attrs.evolve(self.stay, end=max(end, self.stay.start))


class _Observer(Recorder):
    """A recorder that looks at instructions as they are booked."""

    def __init__(self, region: Region, arch: MarsArch) -> None:
        super().__init__(region, arch, trace=True)
        self.multiplied: dict[str, set[GroupSet]] = {}
        self.fillings: list[Filling] = []
        self.stays: list[Stay] = []
        self._live: list[list[_Live]] = [[] for _ in range(arch.banks)]
        self._opened: dict[int, int] = {}  # by core: the place of its open array in fillings
        self._prepared: dict[int, int] = {}  # by instruction: its number among PREPAREs
        self._seen: set[tuple[str, int]] = set()
        self._loads: dict[int, timing.DecodedLoad] = {}

    def _record(self, lane: str, name: str, start: int, end: int) -> None:
        super()._record(lane, name, start, end)
        instruction = self.region.instructions[self.index]
        if lane.endswith("load") and isinstance(instruction, isa.Prepare):
            self._open(int(lane.split()[1]), start)
        elif lane.endswith("load") and isinstance(instruction, isa.Fill):
            self._fills(instruction)
        elif lane == "dma" and isinstance(instruction, isa.Move):
            last = instruction.plane * (instruction.planes - 1)
            last += instruction.pitch * (instruction.rows - 1) + instruction.words
            if instruction.direction == isa.MOVE_IN:
                self._write(instruction.bank, instruction.base, last, "map", start, end)
            else:
                self._read(instruction.bank, instruction.base, last, end)

    def _open(self, core: int, start: int) -> None:
        number = self._prepared.setdefault(self.index, len(self._prepared))
        self._opened[core] = len(self.fillings)
        self.fillings.append(Filling(number, core, self.layer.name, 0, 1, start))

    def _fills(self, fill: isa.Fill) -> None:
        place = self._opened[fill.core]
        before = self.fillings[place]
        self.fillings[place] = attrs.evolve(
            before,
            group_sets=before.group_sets + fill.count,
            slots=self.arch.slots(8 if fill.weight_bits else 4),
        )

    def _book(self, number: int, name: str, start: int, end: int, cost: timing.Cost) -> None:
        super()._book(number, name, start, end, cost)
        instruction = self.region.instructions[self.index]
        core = self.cores[number]
        config = core.config
        contexts: set[int] = set()
        if isinstance(instruction, isa.Conv):
            load = self._load_of(core, instruction)
            self._multiplies(load)
            contexts = {s.context for visit in load.visits for s in visit.segments}
            if load.splits and instruction.partial == isa.PARTIAL_BANK:
                pooled = config.output.pool_height * config.output.pool_width
                words = timing.RAW_WORDS * instruction.height * instruction.width * pooled
                base = instruction.partial_base + words * number
                self._write(instruction.partial_bank, base, words, "partial sums", start, end)
        elif isinstance(instruction, (isa.Pool, isa.Add)):
            two = isinstance(instruction, isa.Add) and instruction.operands
            contexts = {0, 1} if two else {0}
        for context in contexts:
            sas = config.context(context)
            words = (1 + sas.wide) * sas.blocks * sas.height * sas.width
            self._read(sas.bank, sas.base, words, end)
        if config.residual:
            kept = config.residual
            words = (1 + kept.wide) * kept.blocks * kept.height * kept.width
            self._read(kept.bank, kept.base, words, end)
        if any(cost.writes):
            apw = config.output
            planes = timing.RAW_WORDS if apw.mode == isa.MODE_RAW else 1 + apw.wide
            words = planes * apw.blocks * apw.height * apw.width
            self._write(apw.bank, apw.base, words, "map", start, end)

    # -- group-sets --------------------------------------------------------------------------------

    def _multiplies(self, load: timing.DecodedLoad) -> None:
        key = (self.layer.name, id(load))
        if key in self._seen:
            return
        self._seen.add(key)
        self._loads[id(load)] = load  # kept, so that no other takes its id
        found = self.multiplied.setdefault(self.layer.name, set())
        for visit in load.visits:
            for segment in visit.segments:
                found.update(
                    (visit.block, segment.context, tap, block)
                    for tap, block in zip(segment.taps, segment.blocks, strict=True)
                )

    # -- banks -------------------------------------------------------------------------------------

    def _read(self, bank: int, base: int, words: int, end: int) -> None:
        for live in self._live[bank]:
            if live.stay.base < base + words and base < live.stop:
                live.end = max(live.end, end)

    def _write(self, bank: int, base: int, words: int, what: str, start: int, end: int) -> None:
        """Note a write; a map that it overlaps has gone, unless it is the same one."""
        mine = Stay(bank, base, words, self.layer.name, what, start, end)
        kept = []
        for live in self._live[bank]:
            if live.stop <= base or base + words <= live.stay.base:
                kept.append(live)
            elif attrs.evolve(mine, start=live.stay.start, end=live.stay.end) == live.stay:
                mine, end = live.stay, max(live.end, end)
            else:
                self.stays.append(live.closed(start))
        self._live[bank] = [*kept, _Live(mine, end)]

    def all_stays(self) -> Iterator[Stay]:
        """Give every stay in a bank, in order of time."""
        open_ones = [live.closed() for bank in self._live for live in bank]
        yield from sorted([*self.stays, *open_ones], key=lambda s: (s.start, s.bank, s.base))


def observe(region: Region, arch: MarsArch) -> Observation:
    """Make a region's timeline and watch it.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    observer = _Observer(region, arch)
    timeline = observer.run()
    maps = tuple(_maps(region, arch, observer.multiplied)) if region.network else ()
    return Observation(timeline, tuple(observer.fillings), tuple(observer.all_stays()), maps)


def _maps(
    region: Region, arch: MarsArch, multiplied: dict[str, set[GroupSet]]
) -> Iterator[GroupSetMap]:
    graph = graph_from_json(region.network)
    everything = attrs.evolve(arch, zero_skipping=False)
    names = {part: layer.name for layer in region.layers for part in layer.name.split("+")}
    for layer in graph.layers:
        if not isinstance(layer, Conv) or layer.name not in names:
            continue
        packed = pack_conv(layer, graph.types, everything)
        dense = {
            (number, *map(int, place))
            for number, block in enumerate(packed.blocks)
            for place in np.stack((block.terms, block.taps, block.inputs), axis=1)
        }
        yield GroupSetMap(
            names[layer.name],
            frozenset(dense),  # type: ignore[arg-type]
            frozenset(multiplied.get(names[layer.name], ())),
            len(packed.blocks),
            tuple(term.kernel[0] * term.kernel[1] for term in layer.terms),
            tuple(graph.types[term.input].blocks for term in layer.terms),
        )
