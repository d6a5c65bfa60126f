"""What a program computes, free of its schedule: whole layers, read off its instructions.

The lifter is the machine without an image: every check of the executing machine is made, on
addresses, times, tokens, poison. Beside that it follows what each word of the banks and of the
off-chip memory stands for, and each macro slot's place in the off-chip image. When a layer ends,
its tiles, loads and partial sums must fit together to one whole map whose pixels are all computed
alike. What is lifted is proved: nothing is taken from the program's description of the network.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from . import isa, timing
from .arch import MarsArch
from .layers import AddLayer, ConvLayer, Entry, Layer, Layers, Map, PoolLayer, Source
from .machine import Machine, transfer_words
from .maps import RAW_BITS, WORD_CHANNELS
from .memory import Core
from .packing import (
    LANES,
    block_parameter_bytes,
    group_set_bytes,
    unpack_nibbles,
    unpack_parameters,
)
from .program import Region

__all__ = ["NotLifted", "lift"]

Array: TypeAlias = npt.NDArray[Any]

POISON = -1
GROUP_SET_VECTORS = WORD_CHANNELS // LANES


class NotLifted(Exception):
    """A program does what no whole layer describes: it is left to the machine."""


def lift(region: Region, arch: MarsArch) -> Layers:
    """Read a region's layers off its instructions.

    Raises
    ------
    MachineError
        If the machine cannot execute the region.
    NotLifted
        If the region is no sequence of whole layers, or an accumulator could leave 32 bits.
    """
    return _Lifter(region, arch).lift()


# -- what instructions compute ---------------------------------------------------------------------


@attrs.frozen
class _Reading:
    """A :class:`Source` as one tile has it: ``at`` is the map's pixel under its first pixel."""

    map: int
    stride: tuple[int, int]
    at: tuple[int, int]
    zero: int
    shift: int

    def of_layer(self, y: int, x: int) -> Source:
        """Give the source for a tile at ``(y, x)``."""
        origin = (self.at[0] - y * self.stride[0], self.at[1] - x * self.stride[1])
        return Source(self.map, self.stride, origin, self.zero, self.shift)


# Group-sets of one segment: source, rows, columns, input blocks, byte addresses, weight width.
_Segment: TypeAlias = tuple[
    _Reading, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]
]


# A kernel block's parameters, sources, places and weights.
_Block: TypeAlias = tuple[bytes, tuple[Source, ...], bytes, bytes]


@attrs.frozen
class _Sum:
    """Accumulators of a tile, finished or in part."""

    block: int
    tile: tuple[int, int]
    bias: bytes
    segments: tuple[_Segment, ...]


@attrs.frozen
class _Write:
    """One block of a tile, as written to a bank; its words have the tags from ``tag`` on."""

    tag: int
    block: int
    tile: tuple[int, int]
    apw: isa.Apw
    content: Any


@attrs.frozen
class _Finished:
    """What CONV wrote: a sum, its last parameters, the residual with the pixel it starts at."""

    sum: _Sum
    parameters: bytes
    residual: tuple[int, int, tuple[int, int]] | None


@attrs.frozen
class _Passed:
    """What POOL or ADD wrote: the instruction without its place, and what it read."""

    instruction: isa.Pool | isa.Add
    readings: tuple[_Reading, ...]
    dilation: tuple[int, int]


_Pass: TypeAlias = tuple[isa.Pool | isa.Add, tuple[Source, ...], tuple[int, int]]


class _Grid:
    """Word numbers of a map: ``[plane][block][row][column]``, then a pixel's accumulators."""

    def __init__(self, blocks: int, height: int, width: int, apw: isa.Apw) -> None:
        raw = apw.mode == isa.MODE_RAW
        self.depth = timing.RAW_WORDS if raw else 1
        self.planes = 1 if raw else 1 + apw.wide
        self.shape = (blocks, height, width)
        self.words = self.planes * blocks * height * width * self.depth

    def tile(self, block: int, y: int, x: int, height: int, width: int) -> Array:
        """Give the words of a tile of one block."""
        blocks, rows, columns = self.shape
        plane = np.arange(self.planes)[:, None, None, None] * blocks + block
        row = plane * rows + np.arange(y, y + height)[:, None, None]
        column = row * columns + np.arange(x, x + width)[:, None]
        return (column * self.depth + np.arange(self.depth)).reshape(-1)

    def pixel(self, word: int) -> tuple[int, int, int]:
        """Give block, row and column of a word of the first plane."""
        _, rows, columns = self.shape
        pixel = word // self.depth
        return pixel // (rows * columns), pixel // columns % rows, pixel % columns


_WITHOUT_DATA = (isa.Fetch, isa.Prepare, isa.Sas, isa.Apw, isa.Residual, isa.Sync, isa.Halt)
_PLACE = ("cores", "signal", "wait", "bank", "base", "block", "blocks", "height", "width", "y", "x")
_Kind = TypeVar("_Kind", bound=isa.Instruction)


def _bare(instruction: _Kind) -> _Kind:
    """Give an instruction with the fields that say where at their defaults."""
    fields = attrs.fields_dict(type(instruction))
    place: dict[str, Any] = {name: fields[name].default for name in _PLACE if name in fields}
    return attrs.evolve(instruction, **place)


class _Lifter(Machine):
    def __init__(self, region: Region, arch: MarsArch) -> None:
        super().__init__(region, arch, images=0)
        memory = self._data()
        self.banks = [np.full(bank.shape[1], POISON, np.int64) for bank in memory.banks]
        self.offchip = np.full(memory.maps.shape[1], POISON, np.int64)
        self.weights = [np.zeros(core.weight.size, np.int64) for core in self.cores]
        self.slots = [[(0, 0)] * len(core.macros) for core in self.cores]
        self.maps: list[Map] = []
        self.first_tags: list[int] = []  # of each map's words
        self.zeros: dict[int, int] = {}
        self.next_tag = self.layer_tag = 0
        self.writes: list[_Write] = []
        self.moves: list[tuple[isa.Move, Array]] = []
        self.sums: dict[int, _Sum] = {}  # partial sums by their first word's tag
        self.found: list[Layer] = []

    def lift(self) -> Layers:
        cells = self._data().map_cells
        for port in self.region.inputs:
            kind, at = port.type, port.address - self.image_words
            cells.ready[at : at + kind.words] = 1
            first = self._new_map(Map(kind.blocks, kind.height, kind.width, kind.bits), kind.words)
            self._offchip_map(port.address, kind.words)[:] = np.arange(first, first + kind.words)
        inputs = tuple(
            Entry(port.name, number, port.type.channels, port.quantize)
            for number, port in enumerate(self.region.inputs)
        )
        self.layer_tag = self.next_tag
        self.run()
        outputs = []
        for out in self.region.outputs:
            kind, at = out.type, out.address - self.image_words
            cells.check_read(cells.ready[at : at + kind.words], self.now)
            tags = self._offchip_map(out.address, kind.words)
            map = self._map_of(int(tags[0]))
            if self.maps[map] != Map(kind.blocks, kind.height, kind.width, kind.bits):
                raise NotLifted(f"output {out.name} is {self.maps[map]}, no {kind}")
            first = self.first_tags[map]
            _require(np.array_equal(tags, np.arange(first, first + kind.words)), "output is mixed")
            outputs.append(map)
        return Layers(tuple(self.maps), tuple(self.found), inputs, tuple(outputs))

    def _offchip_map(self, address: int, words: int) -> Array:
        at = address - self.image_words
        return self.offchip[at : at + words]

    def _new_map(self, map: Map, words: int) -> int:
        first = self._tags(words)
        self.maps.append(map)
        self.first_tags.append(first)
        return first

    def _tags(self, count: int) -> int:
        first = self.next_tag
        self.next_tag += count
        return first

    def _map_of(self, tag: int) -> int:
        _require(0 <= tag < self.layer_tag, "reads what no finished layer wrote")
        return bisect.bisect_right(self.first_tags, tag) - 1

    # -- instructions --------------------------------------------------------------------------

    def _step(self, instruction: isa.Instruction, wait: int, signal: int) -> None:
        super()._step(instruction, wait, signal)
        if isinstance(instruction, isa.Fetch) and instruction.memory == isa.MEMORY_WEIGHT:
            source = np.arange(instruction.source, instruction.source + instruction.length)
            to = slice(instruction.destination, instruction.destination + instruction.length)
            self.weights[instruction.core][to] = source
        elif isinstance(instruction, isa.Fill):
            self._follow_fill(instruction)
        elif isinstance(instruction, isa.Move):
            self._follow_move(instruction)
        elif isinstance(instruction, isa.Conv):
            for number in timing.core_list(instruction.cores, self.arch.cores):
                self._follow_conv(instruction, self.cores[number])
        elif isinstance(instruction, (isa.Pool, isa.Add)):
            numbers = timing.core_list(instruction.cores, self.arch.cores)
            for place, number in enumerate(numbers):
                blocks = timing.dealt_blocks(
                    instruction.block, instruction.blocks, place, len(numbers)
                )
                self._follow_pass(instruction, self.cores[number], blocks.tolist())
        else:
            known = isinstance(instruction, _WITHOUT_DATA)
            _require(known, f"{type(instruction).__name__.upper()} is not followed")

    def _follow_fill(self, fill: isa.Fill) -> None:
        bits = 8 if fill.weight_bits else 4
        size = group_set_bytes(bits)
        source = self.weights[fill.core][fill.source : fill.source + fill.count * size]
        for i in range(fill.count):
            group_set = source[i * size : (i + 1) * size]
            first = int(group_set[0])
            _require(int(group_set[-1]) == first + size - 1, "a group-set of pieces")
            self.slots[fill.core][fill.slot + i] = (first, bits)

    def _follow_move(self, move: isa.Move) -> None:
        bank = transfer_words(move, move.base, move.plane, move.pitch)
        address = move.address - self.image_words
        offchip = transfer_words(move, address, move.offchip_plane, move.offchip_pitch)
        if move.direction == isa.MOVE_IN:
            self.banks[move.bank][bank] = self.offchip[offchip]
            return
        tags = self.banks[move.bank][bank]
        self.offchip[offchip] = tags
        own = offchip[tags >= self.layer_tag]
        if len(own):
            self.moves.append((move, own))

    def _read(self, sas: isa.Sas, tile: tuple[int, int], reach: tuple[int, int]) -> _Reading:
        """Say what a context reads for a tile whose taps reach so far."""
        map, block, y, x = self._window(sas, (0, 0, 0), (sas.blocks, sas.height, sas.width))
        _require(block == sas.block, "other blocks are meant")
        size = self.maps[map].height, self.maps[map].width
        for at, length, origin, first, steps in (
            (y, sas.height, sas.origin_y, 0, ((tile[0] - 1) * sas.stride_y, reach[0])),
            (x, sas.width, sas.origin_x, 1, ((tile[1] - 1) * sas.stride_x, reach[1])),
        ):
            # What lies outside the window must lie outside the map.
            _require(at == 0 or origin >= 0, "reads before a window")
            last = origin + sum(steps)
            _require(at + length == size[first] or last < length, "reads behind a window")
        return _Reading(
            map,
            (sas.stride_y, sas.stride_x),
            (sas.origin_y + y, sas.origin_x + x),
            sas.zero,
            sas.shift,
        )

    def _window(
        self,
        setting: isa.Sas | isa.Residual,
        first: tuple[int, int, int],
        shape: tuple[int, int, int],
    ) -> tuple[int, int, int, int]:
        """Give map, block, row and column where a part of a setting's window begins."""
        planes, height, width = 1 + setting.wide, setting.height, setting.width
        _require(min(shape) > 0, "an empty map")
        size = planes * setting.blocks * height * width
        tags = self.banks[setting.bank][setting.base : setting.base + size]
        rows = tags.reshape(planes, setting.blocks, height, width)
        if isinstance(setting, isa.Sas):
            rows = np.roll(rows, -setting.row, 2)
        part = tuple(slice(at, at + count) for at, count in zip(first, shape, strict=True))
        window = rows[(slice(None), *part)]
        begin = int(window[0, 0, 0, 0])
        map = self._map_of(begin)
        whole = self.maps[map]
        area = whole.height * whole.width
        at = begin - self.first_tags[map]
        block, y, x = at // area, at // whole.width % whole.height, at % whole.width
        expected = (
            begin
            + np.arange(planes)[:, None, None, None] * whole.blocks * area
            + np.arange(shape[0])[:, None, None] * area
            + np.arange(shape[1])[:, None] * whole.width
            + np.arange(shape[2])
        )
        fits = block + shape[0] <= whole.blocks and whole.bits == 4 * planes
        fits = fits and y + shape[1] <= whole.height and x + shape[2] <= whole.width
        _require(fits and np.array_equal(window, expected), "reads a window of several maps")
        return map, block, y, x

    # -- convolution ---------------------------------------------------------------------------

    def _follow_conv(self, conv: isa.Conv, core: Core) -> None:
        apw = core.config.output
        load = self._load_of(core, conv)
        tile = (conv.height * apw.pool_height, conv.width * apw.pool_width)
        size = block_parameter_bytes(apw.mode == isa.MODE_MULTIPLIER)
        readings = self._readings(load, core, tile)
        partial = self._partial(conv, core, tile)
        for number, visit in enumerate(load.visits):
            at = conv.parameters + size * number
            parameters = core.parameter.data[at : at + size].tobytes()
            if visit.first:
                acc = _Sum(visit.block, tile, parameters[: 4 * WORD_CHANNELS], ())
            else:
                acc = self._partial_sum(partial, visit.block, tile)
            segments = tuple(
                self._segment(readings[segment.context], segment, core, tile)
                for segment in visit.segments
                if segment.taps
            )
            acc = attrs.evolve(acc, segments=acc.segments + segments)
            if not visit.last:
                first = self._tags(len(partial))
                partial[:] = np.arange(first, first + len(partial))
                self.sums[first] = acc
                continue
            residual = None
            if core.config.residual:
                residual = self._residual(core.config.residual, visit.block, tile)
            content = _Finished(acc, parameters, residual)
            self._write(apw, visit.block, conv, content)

    def _readings(
        self, load: timing.DecodedLoad, core: Core, tile: tuple[int, int]
    ) -> dict[int, _Reading]:
        taps: dict[int, set[int]] = {}
        for visit in load.visits:
            for segment in visit.segments:
                taps.setdefault(segment.context, set()).update(segment.taps)
        found = {}
        for number, places in taps.items():
            if not places:
                continue
            sas = core.config.context(number)
            last = (max(places) // sas.kernel_width, max(p % sas.kernel_width for p in places))
            reach = (last[0] * sas.dilation_y, last[1] * sas.dilation_x)
            found[number] = self._read(sas, tile, reach)
        return found

    def _segment(
        self,
        reading: _Reading,
        segment: timing.LoadedSegment,
        core: Core,
        tile: tuple[int, int],
    ) -> _Segment:
        sas = core.config.context(segment.context)
        if sas.skip:
            # A layer multiplies them as well: with padding that adds nothing.
            walked = set(timing.met(sas, segment))
            skipped = tuple(t for place, t in enumerate(segment.taps) if place not in walked)
            padding = not sas.zero and not timing.taps_inside(sas, *tile, skipped)
            _require(padding, "passes over taps that meet the map")
        slots = self.slots[core.number][segment.slot : segment.slot + len(segment.taps)]
        addresses, bits = zip(*slots, strict=True)
        return (
            reading,
            tuple(tap // sas.kernel_width * sas.dilation_y for tap in segment.taps),
            tuple(tap % sas.kernel_width * sas.dilation_x for tap in segment.taps),
            segment.blocks,
            addresses,
            bits,
        )

    def _partial(self, conv: isa.Conv, core: Core, tile: tuple[int, int]) -> Array:
        words = timing.RAW_WORDS * tile[0] * tile[1]
        at = conv.partial_base + words * core.number
        if conv.partial == isa.PARTIAL_OFFCHIP:
            return self._offchip_map(at, words)
        return self.banks[conv.partial_bank][at : at + words]

    def _partial_sum(self, partial: Array, block: int, tile: tuple[int, int]) -> _Sum:
        first = int(partial[0])
        found = self.sums.get(first)
        _require(
            found is not None
            and (found.block, found.tile) == (block, tile)
            and np.array_equal(partial, np.arange(first, first + len(partial))),
            "continues another sum",
        )
        assert found is not None
        return found

    def _residual(
        self, residual: isa.Residual, block: int, tile: tuple[int, int]
    ) -> tuple[int, int, tuple[int, int]]:
        # No more than is read: what was written in place before is no longer the residual's.
        first = (block, residual.y, residual.x)
        map, found, y, x = self._window(residual, first, (1, *tile))
        _require(found == block, "adds another block")
        return map, residual.shift, (y, x)

    def _write(
        self, apw: isa.Apw, block: int, at: isa.Conv | isa.Pool | isa.Add, content: Any
    ) -> None:
        grid = _Grid(apw.blocks, apw.height, apw.width, apw)
        words = grid.tile(block - apw.block, at.y, at.x, at.height, at.width)
        tag = self._tags(len(words))
        self.banks[apw.bank][apw.base + words] = np.arange(tag, tag + len(words))
        self.writes.append(_Write(tag, block, (at.height, at.width), apw, content))

    # -- pools and additions -------------------------------------------------------------------

    def _follow_pass(
        self, instruction: isa.Pool | isa.Add, core: Core, blocks: Sequence[int]
    ) -> None:
        if not blocks:
            return
        tile = (instruction.height, instruction.width)
        settings = [core.config.context(0)]
        reach = (0, 0)
        if isinstance(instruction, isa.Pool):
            reach = (
                (instruction.kernel_height - 1) * settings[0].dilation_y,
                (instruction.kernel_width - 1) * settings[0].dilation_x,
            )
        elif instruction.operands:
            settings.append(core.config.context(1))
        readings = tuple(self._read(sas, tile, reach) for sas in settings)
        bare = _bare(instruction)
        dilation = (settings[0].dilation_y, settings[0].dilation_x)
        for block in blocks:
            content = _Passed(bare, readings, dilation)
            self._write(core.config.output, block, instruction, content)

    # -- layers --------------------------------------------------------------------------------

    def _end_layer(self) -> None:
        super()._end_layer()
        if self.writes:
            self._finish()
        self.writes, self.moves, self.sums = [], [], {}
        self.layer_tag = self.next_tag

    def _finish(self) -> None:
        """Fit a layer's writes together to a map, and name its words."""
        apw = self.writes[0].apw
        bare = _bare(apw)
        _require(
            all(_bare(write.apw) == bare for write in self.writes),
            "a layer of several requantizations",
        )
        grid, words = self._whole(apw)
        numbers = np.full(self.next_tag - self.layer_tag, POISON, np.int64)
        _require(len(words) == grid.words and int(words.min()) >= self.layer_tag, "holes in a map")
        numbers[words - self.layer_tag] = np.arange(len(words))
        places = []
        for write in self.writes:
            at = int(numbers[write.tag - self.layer_tag])
            _require(at >= 0, "a tile is written for nothing")
            block, y, x = grid.pixel(at)
            height, width = write.tile
            fits = block == write.block and y + height <= grid.shape[1]
            _require(fits and x + width <= grid.shape[2], "a tile outside its map")
            expected = grid.tile(block, y, x, height, width)
            first = write.tag - self.layer_tag
            _require(np.array_equal(numbers[first : first + len(expected)], expected), "torn tile")
            places.append((y, x))
        written = sum(
            grid.planes * grid.depth * write.tile[0] * write.tile[1] for write in self.writes
        )
        _require(written == grid.words, "a pixel is written twice")
        bits = RAW_BITS if apw.mode == isa.MODE_RAW else 4 * grid.planes
        self.found.append(self._layer(places, bare, Map(*grid.shape, bits)))
        first = self._new_map(Map(*grid.shape, bits), grid.words)
        for memory in (*self.banks, self.offchip):
            own = (memory >= self.layer_tag) & (memory < first)
            number = numbers[memory[own] - self.layer_tag]
            memory[own] = np.where(number < 0, POISON, first + number)

    def _whole(self, apw: isa.Apw) -> tuple[_Grid, Array]:
        """Give a layer's whole map and the tags of its words: off-chip if it was moved there."""
        if not self.moves:
            grid = _Grid(apw.blocks, apw.height, apw.width, apw)
            return grid, self.banks[apw.bank][apw.base : apw.base + grid.words]
        shapes = {(move.offchip_pitch, move.offchip_plane) for move, _ in self.moves}
        _require(len(shapes) == 1, "a map of several shapes")
        pitch, plane = shapes.pop()
        unit = _Grid(1, 1, 1, apw)
        start = min(int(words.min()) for _, words in self.moves)
        stop = max(int(words.max()) for _, words in self.moves) + 1
        blocks, rest = divmod(stop - start, plane * unit.planes)
        _require(not rest and not pitch % unit.depth and not plane % pitch, "a map in part")
        grid = _Grid(blocks, plane // pitch, pitch // unit.depth, apw)
        return grid, self.offchip[start:stop]

    def _layer(self, places: Sequence[tuple[int, int]], apw: isa.Apw, out: Map) -> Layer:
        number = len(self.maps)
        _require(out.bits != 4 or apw.high < 16, "codes beyond four bits")
        passes = {
            self._pass_of(write, place) for write, place in zip(self.writes, places, strict=True)
        }
        _require(len(passes) == 1, "a layer of several passes")
        passed = passes.pop()
        if passed is None:
            return self._conv_layer(places, apw, out, number)
        instruction, sources, dilation = passed
        for source in sources:
            self._note_zero(source)
        _require(
            all(self.maps[source.map].blocks >= out.blocks for source in sources), "blocks missing"
        )
        # Sums that leave 32 bits are the machine's.
        if isinstance(instruction, isa.Pool):
            kernel = (instruction.kernel_height, instruction.kernel_width)
            _require(kernel[0] * kernel[1] * 255 < 2**31, "a window too large")
            layer = PoolLayer(
                number,
                sources[0],
                apw,
                instruction.mode,
                kernel,
                dilation,
                bool(instruction.count_padding),
                instruction.multiplier,
            )
            if layer.mode == isa.POOL_MAX:
                _require(self.maps[sources[0].map].bits == out.bits, "a pool changes the width")
                for axis in range(2):
                    self._check_windows(layer, out, axis)
            return layer
        multipliers = (instruction.multiplier_a, instruction.multiplier_b)[: len(sources)]
        tops = [2 ** self.maps[source.map].bits - 1 for source in sources]
        most = sum(top * abs(m) for top, m in zip(tops, multipliers, strict=True))
        _require(most < 2**31, "multipliers too large")
        return AddLayer(number, sources, multipliers, apw, instruction.multiplier)

    def _check_windows(self, layer: PoolLayer, out: Map, axis: int) -> None:
        size = (self.maps[layer.source.map].height, self.maps[layer.source.map].width)[axis]
        first = np.arange((out.height, out.width)[axis]) * layer.source.stride[axis]
        first += layer.source.origin[axis]
        taps = first[:, None] + np.arange(layer.kernel[axis]) * layer.dilation[axis]
        _require(bool(((taps >= 0) & (taps < size)).any(1).all()), "a window outside its map")

    def _note_zero(self, source: Source) -> None:
        zero = self.zeros.setdefault(source.map, source.zero)
        _require(zero == source.zero, "a map with two zero points")

    @staticmethod
    def _pass_of(write: _Write, place: tuple[int, int]) -> _Pass | None:
        if not isinstance(write.content, _Passed):
            return None
        sources = tuple(reading.of_layer(*place) for reading in write.content.readings)
        return write.content.instruction, sources, write.content.dilation

    def _conv_layer(
        self, places: Sequence[tuple[int, int]], apw: isa.Apw, out: Map, number: int
    ) -> ConvLayer:
        blocks: dict[int, _Block] = {}
        residuals = set()
        stored: dict[Any, Any] = {}  # group-sets by where they were found: tiles share most
        for write, (y, x) in zip(self.writes, places, strict=True):
            y, x = y * apw.pool_height, x * apw.pool_width
            content = write.content
            segments = tuple(
                (segment[0].of_layer(y, x), *segment[1:]) for segment in content.sum.segments
            )
            if segments not in stored:
                stored[segments] = self._group_sets(segments)
            parameters = content.sum.bias + content.parameters[4 * WORD_CHANNELS :]
            found = (parameters, *stored[segments])
            _require(blocks.setdefault(write.block, found) == found, "tiles of several weights")
            residual = content.residual
            _require(residual is None or residual[2] == (y, x), "adds another place")
            residuals.add(residual and residual[:2])
        _require(len(residuals) == 1, "a residual in part")
        sources = tuple(dict.fromkeys(s for block in blocks.values() for s in block[1]))
        contexts = isa.field_limit(isa.Sas, "context") + 1
        _require(len(sources) <= contexts, f"more than {contexts} inputs")
        rows, weights = self._joined(blocks, sources)
        parameters = [
            unpack_parameters(np.frombuffer(blocks[block][0], np.uint8))
            for block in range(out.blocks)
        ]
        bias, multiplier, shift = (np.stack(part) for part in zip(*parameters, strict=True))
        residual = residuals.pop()
        layer = ConvLayer(number, sources, apw, residual, rows, weights, bias, multiplier, shift, 0)
        if residual:
            # The residual has the pixels of the convolution, before the pool.
            source = self.maps[residual[0]]
            size = (out.height * apw.pool_height, out.width * apw.pool_width)
            fits = source.height >= size[0] and source.width >= size[1]
            _require(fits, "a residual of another size")
            _require(source.blocks >= out.blocks and source.bits < RAW_BITS, "residual missing")
        worst = self._worst(layer)
        _require(worst < 2 ** (RAW_BITS - 1), f"accumulators may reach {worst}")
        return attrs.evolve(layer, worst=worst)

    def _group_sets(self, segments: Iterable[Any]) -> tuple[tuple[Source, ...], bytes, bytes]:
        """Give a block's sources, its places ``[n, 4]`` in order, and its weights."""
        sources: dict[Source, int] = {}
        table, stored = [np.zeros((0, 4), np.int64)], [np.zeros((0, 2), np.int64)]
        for source, rows, columns, inputs, addresses, bits in segments:
            self._note_zero(source)
            place = [sources.setdefault(source, len(sources))] * len(rows)
            table.append(np.array([place, rows, columns, inputs], np.int64).T)
            stored.append(np.array([addresses, bits], np.int64).T)
        places = np.concatenate(table)
        order = np.lexsort(places.T[::-1])
        weights = self._unpacked(np.concatenate(stored)[order])
        return tuple(sources), places[order].tobytes(), weights.tobytes()

    @staticmethod
    def _joined(blocks: Mapping[int, _Block], sources: Sequence[Source]) -> tuple[Array, Array]:
        rows, weights = [], []
        for number in sorted(blocks):
            _, own, places, packed = blocks[number]
            table = np.frombuffer(places, np.int64).reshape(-1, 4)
            whole = np.array([sources.index(source) for source in own], np.int64)
            block = np.full(len(table), number)
            place = whole[table[:, 0]] if len(own) else block
            order = np.argsort(place, kind="stable")
            rows.append(np.column_stack([block, place, table[:, 1:]])[order])
            shape = (len(table), GROUP_SET_VECTORS, WORD_CHANNELS, LANES)
            weights.append(np.frombuffer(packed, np.int8).reshape(shape)[order])
        return np.concatenate(rows), np.concatenate(weights)

    def _unpacked(self, stored: Array) -> Array:
        image = np.frombuffer(self.region.image, np.uint8)
        size = group_set_bytes(8)
        weights = np.empty((len(stored), size), np.int8)
        for bits in (4, 8):
            chosen = stored[:, 1] == bits
            packed = image[stored[chosen, 0][:, None] + np.arange(group_set_bytes(bits))]
            weights[chosen] = unpack_nibbles(packed) if bits == 4 else packed.view(np.int8)
        return weights.reshape(-1, GROUP_SET_VECTORS, WORD_CHANNELS, LANES)

    def _worst(self, layer: ConvLayer) -> int:
        """Bound the accumulators, in any order of summation."""
        worst = np.abs(layer.bias)
        magnitude = np.abs(layer.weights.astype(np.int64)).sum(axis=(1, 3))
        for place, source in enumerate(layer.sources):
            top = 2 ** self.maps[source.map].bits - 1
            chosen = layer.group_sets[:, 1] == place
            part = np.zeros_like(worst)
            np.add.at(part, layer.group_sets[chosen, 0], magnitude[chosen])
            _require(int(part.max()) * top < 2**31 and source.shift < 32, "products too large")
            worst = worst + (part * max(top, source.zero) << source.shift)
        if layer.residual:
            map, shift = layer.residual
            worst = worst + ((2 ** self.maps[map].bits - 1) << shift)
        return int(worst.max())


def _require(good: Any, reason: str) -> None:
    if not good:
        raise NotLifted(reason)
