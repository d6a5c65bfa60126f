"""Layers laid out for the kernels: maps in memory, lists of vectors, tables of tiles, steps.

Maps lie as ``[image][channel block][row][column][16]`` bytes with a border of the zero point, so
that a group-set's inputs lie at one offset from any output pixel; a layer is a list of such offsets
and 64-byte vectors of weights for each kernel block, with all-zero vectors left out. A chunk of
images goes through the layers together; the early layers, whose maps are large, are run for a few
images at a time, so that maps stay in the cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from . import isa, native
from .errors import CapacityError
from .kernel_code import (
    ENTRY_PARAMETERS,
    FIELDS,
    PARAMETER_BYTES,
    VARIANTS,
    AddKernel,
    ConvKernel,
    EntryKernel,
    Kernel,
    PoolKernel,
    Requantization,
    Run,
)
from .layers import AddLayer, ConvLayer, Entry, Layer, Layers, Map, PoolLayer, Source
from .maps import RAW_BITS, WORD_CHANNELS
from .packing import LANES

__all__ = ["Plan", "dot_products", "map_bytes"]

Array: TypeAlias = npt.NDArray[Any]
Pair: TypeAlias = tuple[int, int]
_Made: TypeAlias = tuple[Kernel, dict[str, Any]]  # a step: its kernel and its numbers by field

CACHE_BYTES = 192 * 1024  # of a layer's maps, that are to stay in the processor's cache
MOST_BYTES = 2**31  # tables hold offsets of 32 bits
ALIGNMENT = 64
MOST_STEPS = 2**30  # that conversion to 32 bits can take
# A quotient below 512 that is no tie differs from one by at least half the divisor's inverse: more
# than the 2**-45 by which float64 rounds it.
MOST_DIVISOR = 2**44
WEIGHT_VECTOR_BYTES = WORD_CHANNELS * LANES
PIXELS_OF_AN_ENTRY = 16


@attrs.frozen
class _Buffer:
    """Where a map's images lie in the arena, each with its border."""

    map: Map
    border: tuple[int, int]  # rows above, columns to the left
    rows: int
    columns: int
    images: int
    start: int
    zero: int

    @property
    def unit(self) -> int:
        """Bytes of a pixel and block."""
        return WORD_CHANNELS * (RAW_BITS // 8 if self.map.bits == RAW_BITS else 1)

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.rows * self.columns * self.unit

    @property
    def pitch(self) -> int:
        """Bytes of an image."""
        return -(-self.map.blocks * self.block // ALIGNMENT) * ALIGNMENT

    def at(self, y: Any, x: Any) -> Any:
        """Give the byte offset of a pixel of block 0."""
        return ((y + self.border[0]) * self.columns + x + self.border[1]) * self.unit

    def view(self, arena: Array) -> Array:
        """Give the images ``[N, block, row, column, 16]`` without the border."""
        size = self.unit // WORD_CHANNELS
        shape = (self.images, self.map.blocks, self.map.height, self.map.width, WORD_CHANNELS)
        strides = (self.pitch, self.block, self.columns * self.unit, self.unit, size)
        type = np.dtype(np.int32 if self.map.bits == RAW_BITS else np.uint8)
        first = arena[self.start + int(self.at(0, 0)) :]
        return np.ndarray(shape, type, first.data, 0, strides)


class _Constants:
    """Arrays that steps point to, in one block of memory."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.size = 0

    def add(self, array: Array) -> int:
        """Append an array; give where it lies."""
        at = self.size
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padded = -(-flat.size // ALIGNMENT) * ALIGNMENT
        self.parts.append(np.pad(flat, (0, padded - flat.size)))
        self.size += padded
        return at


@attrs.frozen
class _Reference:
    """A pointer in a step: to the arena, advanced image by image, or to the constants."""

    offset: int
    buffer: _Buffer | None = None


@attrs.frozen
class _Given:
    """An offset from the values that are given for an input, advanced image by image."""

    offset: int
    pitch: int


@attrs.frozen
class _Word:
    """A pointer in a step to one of the words behind the arena's maps."""

    number: int


class Plan:
    """Layers made ready for a chunk of images and a number of threads.

    Parameters
    ----------
    layers : Layers
    variant : str
        One of :data:`mars_runtime.kernel_code.VARIANTS`.
    images : int
        Images of the chunk, a power of two.
    threads : int
        Threads that share each layer.
    """

    def __init__(self, layers: Layers, variant: str, images: int, threads: int) -> None:
        self.layers, self.variant, self.images, self.threads = layers, variant, images, threads
        self.groups = list(self._groups())
        self.entry_group = self.groups[0] if self.groups else images
        self.buffers = self._buffers()
        last = self.buffers[-1]
        # Behind the last pixel, as much as a vector of adjacent ones can reach beyond it.
        self.words_start = last.start + last.images * last.pitch + ALIGNMENT
        self.arena_bytes = self.words_start + 8 * (len(layers.inputs) + 1)
        if self.arena_bytes >= MOST_BYTES:
            raise CapacityError(
                "maps do not fit the exact engine's offsets",
                op="region",
                need=self.arena_bytes,
                have=MOST_BYTES,
                unit="bytes",
                hint="run it with engine='machine'",
            )
        constants = _Constants()
        made = [
            step
            for number, entry in enumerate(layers.inputs)
            for step in self._entries(number, entry, constants)
        ]
        entries = len(made)
        made += [
            self._step(layer, group, constants)
            for layer, group in zip(layers.layers, self.groups, strict=True)
        ]
        kernels = tuple(dict.fromkeys(kernel for kernel, _ in made))
        self.library = native.library(kernels)
        self.constants = _aligned(constants.size)
        self.constants[:] = np.concatenate(constants.parts)
        order = list(self._order([self.entry_group] * entries + self.groups, len(made), 0, images))
        self.steps, self.moving = self._sequence(made, order)

    # -- memory --------------------------------------------------------------------------------

    def _groups(self) -> Iterator[int]:
        """Give for each layer how many images it does at a time."""
        group = 1
        for layer in self.layers.layers:
            maps = {layer.out, *_read(layer)}
            size = sum(map_bytes(self.layers.maps[number]) for number in maps)
            wanted = 1 << max(0, CACHE_BYTES // size).bit_length() >> 1
            group = max(group, min(wanted, self.images))
            yield group

    def _buffers(self) -> list[_Buffer]:
        maps = self.layers.maps
        least = [(0, 0)] * len(maps)
        most = [(map.height, map.width) for map in maps]
        images = [1] * len(maps)
        zeros = [0] * len(maps)
        for layer, group in zip(self.layers.layers, self.groups, strict=True):
            images[layer.out] = max(images[layer.out], group)
            for number in _read(layer):
                images[number] = max(images[number], group)
            for source, first, stop in _reach(layer, maps[layer.out]):
                number = source.map
                zeros[number] = source.zero
                least[number] = _each(min, least[number], first)
                most[number] = _each(max, most[number], stop)
        for entry in self.layers.inputs:
            images[entry.map] = max(images[entry.map], self.entry_group)
        for number in self.layers.outputs:
            images[number] = self.images
        buffers = []
        start = 0
        for number, map in enumerate(maps):
            border = (-least[number][0], -least[number][1])
            rows, columns = most[number][0] + border[0], most[number][1] + border[1]
            buffer = _Buffer(map, border, rows, columns, images[number], start, zeros[number])
            buffers.append(buffer)
            start += buffer.images * buffer.pitch
        return buffers

    def arena(self) -> Array:
        """Give memory for the maps, borders filled."""
        arena = _aligned(self.arena_bytes)
        for buffer in self.buffers:
            size = buffer.images * buffer.pitch
            arena[buffer.start : buffer.start + size] = buffer.zero
        return arena

    # -- steps ---------------------------------------------------------------------------------

    def words(self, arena: Array) -> Array:
        """Give the int64 words behind the maps: addresses of the inputs; if one was refused."""
        return arena[self.words_start : self.arena_bytes].view(np.int64)

    def _sequence(self, made: Sequence[_Made], order: Sequence[Pair]) -> tuple[Array, Array]:
        """Lay out steps, each for the images from one on; which numbers the arena moves."""
        steps = np.zeros((len(order), len(FIELDS)), np.int64)
        moving = np.zeros(steps.shape, bool)
        base = self.constants.ctypes.data
        for row, (number, image) in enumerate(order):
            kernel, fields = made[number]
            steps[row, 0] = self.library.addresses[kernel]
            for name, value in fields.items():
                column = FIELDS.index(name)
                if isinstance(value, _Given):
                    steps[row, column] = value.offset + image * value.pitch
                elif isinstance(value, _Word):
                    steps[row, column] = self.words_start + 8 * value.number
                    moving[row, column] = True
                elif not isinstance(value, _Reference):
                    steps[row, column] = value
                elif value.buffer is None:
                    steps[row, column] = base + value.offset
                else:
                    buffer = value.buffer
                    slot = image % buffer.images
                    steps[row, column] = buffer.start + slot * buffer.pitch + value.offset
                    moving[row, column] = True
        return steps, moving

    def _order(self, groups: Sequence[int], stop: int, image: int, count: int) -> Iterator[Pair]:
        """Give layers before ``stop`` for some images, each with the first image of its group.

        Before a layer does its group, the layers before it do theirs, as often as it takes.
        """
        if not stop:
            return
        own = groups[stop - 1]
        first = next(i for i in range(stop) if groups[i] == own)
        for at in range(image, image + count, own):
            yield from self._order(groups, first, at, own)
            yield from ((number, at) for number in range(first, stop))

    def _step(self, layer: Layer, group: int, constants: _Constants) -> _Made:
        if isinstance(layer, ConvLayer):
            return self._conv(layer, group, constants)
        if isinstance(layer, PoolLayer):
            return self._pool(layer, group, constants)
        return self._add(layer, group, constants)

    def _work(self, constants: _Constants, weights: Sequence[int], tiles: int) -> _Reference:
        """Share a layer among threads: by tiles if all get enough of them, else by blocks."""
        blocks, threads = len(weights), self.threads
        if tiles >= 4 * threads or blocks == 1:
            cuts = [tiles * i // threads for i in range(threads + 1)]
            rows = [(0, blocks, *cut) for cut in itertools.pairwise(cuts)]
        else:
            load = np.concatenate([[0], np.cumsum(np.asarray(weights) + 4)])
            goals = load[-1] * np.arange(1, threads) / threads
            cuts = [0, *np.searchsorted(load, goals).tolist(), blocks]
            rows = [(*cut, 0, tiles) for cut in itertools.pairwise(cuts)]
        return _Reference(constants.add(np.array(rows, np.int64)))

    def _entries(self, number: int, entry: Entry, constants: _Constants) -> Iterator[_Made]:
        """Give the steps of an input: whole channel blocks, and what is left of one."""
        out, quantize, group = self.buffers[entry.map], entry.quantize, self.entry_group
        height, width = out.map.height, out.map.width
        plane = height * width * np.dtype(quantize.dtype).itemsize
        columns = min(PIXELS_OF_AN_ENTRY, 1 << width.bit_length() >> 1)
        image, row = np.arange(group)[:, None, None], np.arange(height)[:, None]
        column = _firsts(width, columns)
        parts = (
            image * entry.channels * plane + (row * width + column) * (plane // (height * width)),
            image * out.pitch + out.at(row, column),
        )
        tiles = np.stack(np.broadcast_arrays(*parts), axis=-1).reshape(-1, 2).astype(np.int32)
        clip = quantize.clip or (0.0, 0.0)
        reals = (*clip, quantize.factor, quantize.scale, quantize.zero_point)
        rows = np.array([*reals, quantize.low, quantize.high], np.float32)
        assert len(rows) == len(ENTRY_PARAMETERS)
        common = {
            "tiles": _Reference(constants.add(tiles)),
            "parameters": _Reference(constants.add(np.repeat(rows, WORD_CHANNELS))),
            "given": _Word(number),
            "refused": _Word(len(self.layers.inputs)),
            "source_block": WORD_CHANNELS * plane,
            "out_block": out.block,
            "low": quantize.low,
            "high": quantize.high,
        }
        whole = entry.channels // WORD_CHANNELS
        for first, stop, channels in (
            (0, whole, WORD_CHANNELS),
            (whole, out.map.blocks, entry.channels % WORD_CHANNELS),
        ):
            if first == stop:
                continue
            kernel = EntryKernel(
                quantize.dtype,
                channels,
                plane,
                columns,
                quantize.clip is not None,
                quantize.factor != 1.0,
                quantize.scale != 1.0,
                quantize.zero_point != 0,
            )
            offset = first * WORD_CHANNELS * plane
            yield (
                kernel,
                common
                | {
                    "source0": _Given(offset, entry.channels * plane),
                    "out": _Reference(first * out.block, out),
                    "work": self._work(constants, [0] * (stop - first), len(tiles)),
                },
            )

    def _conv(self, layer: ConvLayer, group: int, constants: _Constants) -> _Made:
        apw, out = layer.apw, self.buffers[layer.out]
        window = (apw.pool_height, apw.pool_width)
        variant = VARIANTS[self.variant]
        tile = _tile(out.map, group, window, variant.pixels)
        pixels = math.prod(tile) * math.prod(window)
        split = 4 if pixels <= 4 else 2 if pixels <= 8 else 1
        if pixels * split > 2 * variant.pixels:
            split = 1
        sources = [(source, self.buffers[source.map]) for source in layer.sources]
        order = sorted(range(len(sources)), key=lambda i: -sources[i][0].shift)
        ordered = [sources[i] for i in order]
        # Between two sources the sum is shifted by the difference, behind the last by the rest.
        shifts = [source.shift for source, _ in ordered] + [0]
        reads = [(buffer, source.stride, source.origin, window) for source, buffer in ordered]
        residual = None
        if layer.residual:
            residual = self.buffers[layer.residual[0]]
            reads.append((residual, (1, 1), (0, 0), window))
        runs, (starts, offsets, weights) = self._lists(layer, order, group, tile, split)
        tiles = [_tiles(out.map, group, tile, *read) for read in reads]
        if residual is None:
            tiles.append(np.zeros(len(tiles[0]) if tiles else 0, np.int64))
        written = (out, (1, 1), (0, 0), (1, 1))
        ends = _tiles(out.map, group, tile, *written)
        if not reads:
            tiles = [np.zeros_like(ends)]
        table = np.column_stack([*tiles, ends]).astype(np.int32)
        scaling = _Scaling.of(layer, _bias(layer, variant.offset))
        kernel = ConvKernel(
            self.variant,
            tuple(
                tuple(_run(_places(tile, *read), meet) for meet in masks)
                for read, masks in zip(reads, runs, strict=False)
            ),
            tuple(a - b for a, b in itertools.pairwise(shifts)),
            _places(tile, *reads[-1]) if residual else None,
            math.prod(window),
            _places(tile, *written),
            scaling.numbers,
            scaling.monotone,
            apw.zero != 0,
            (scaling.low, scaling.high) != (0, 255),
            split,
            _diagonal(layer),
        )
        counts = np.diff(starts[:: max(1, sum(map(len, runs)))]).tolist()
        fields = {
            "work": self._work(constants, counts or [0] * out.map.blocks, len(table)),
            **{f"source{i}": _Reference(0, buffer) for i, (_, buffer) in enumerate(ordered)},
            "out": _Reference(0, out),
            "starts": _Reference(constants.add(starts)),
            "offsets": _Reference(constants.add(offsets)),
            "weights": _Reference(constants.add(weights)),
            "parameters": _Reference(constants.add(scaling.parameters)),
            "tiles": _Reference(constants.add(table)),
            "out_block": out.block,
            "zero": apw.zero,
            "low": scaling.low,
            "high": scaling.high,
        }
        if residual is not None and layer.residual:
            fields["residual"] = _Reference(0, residual)
            fields["residual_block"] = residual.block
            fields["residual_shift"] = layer.residual[1]
        return kernel, fields

    def _lists(
        self, layer: ConvLayer, order: Sequence[int], group: int, tile: Tile, split: int
    ) -> tuple[list[list[Mask]], tuple[Array, Array, Array]]:
        """Give a layer's non-zero vectors, by block, source and run, in whole groups of ``split``.

        First which pixels of a tile meet the map in each run of each source, in that order.
        """
        if not order:
            nothing = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 64), np.int8)
            return [], nothing
        places, vectors = _vectors(layer)
        block, place, y, x, channel = places.T
        pixel = np.array([self.buffers[s.map].unit for s in layer.sources])
        row = np.array([self.buffers[s.map].columns for s in layer.sources])
        area = np.array([self.buffers[s.map].block for s in layer.sources])
        offset = (y * row[place] + x) * pixel[place]
        offset += channel // WORD_CHANNELS * area[place] + channel % WORD_CHANNELS
        runs: list[list[Mask]] = []
        run = np.zeros(len(places), np.int64)
        for number in order:
            own = place == number
            masks, which = self._masks(layer, number, group, tile, places[own])
            run[own] = np.where(which >= 0, which + sum(map(len, runs)), which)
            runs.append(masks)
        blocks, count = self.layers.maps[layer.out].blocks, sum(map(len, runs))
        key = block * count + run
        sorting = np.lexsort((offset, key))
        sorting = sorting[run[sorting] >= 0]
        sizes = np.bincount(key[sorting], minlength=blocks * count)
        padded = -(-sizes // split) * split
        starts = np.concatenate([[0], np.cumsum(padded)])
        # Where each vector goes: behind what pads the lists before its own.
        extra = starts[:-1] - np.concatenate([[0], np.cumsum(sizes)])[:-1]
        to = np.arange(len(sorting)) + np.repeat(extra, sizes)
        offsets = np.zeros(starts[-1] + 1, np.int32)
        weights = np.zeros((starts[-1] + 1, WEIGHT_VECTOR_BYTES), np.int8)
        offsets[to] = offset[sorting]
        weights[to] = vectors.reshape(-1, WEIGHT_VECTOR_BYTES)[sorting]
        return runs, (starts.astype(np.int32), offsets, weights)

    def _masks(
        self, layer: ConvLayer, number: int, group: int, tile: Tile, places: Array
    ) -> tuple[list[Mask], Array]:
        """Give a source's runs by the pixels that meet the map; each vector's run, -1 for none."""
        source, out = layer.sources[number], self.layers.maps[layer.out]
        window = (layer.apw.pool_height, layer.apw.pool_width)
        pixels = math.prod(tile) * math.prod(window)
        if source.zero or VARIANTS[self.variant].offset:  # what lies outside adds to the sums
            return [(True,) * pixels], np.zeros(len(places), np.int64)
        if not len(places):
            return [], np.zeros(0, np.int64)
        map = self.layers.maps[source.map]
        (y, rows), (x, columns) = (_distinct(places[:, 2 + axis]) for axis in (0, 1))
        meets = [
            _meeting(
                taps,
                LANES if axis and _diagonal(layer) else 1,
                _firsts((out.height, out.width)[axis], tile[1 + axis]) * window[axis],
                np.arange(tile[1 + axis] * window[axis]),
                source.stride[axis],
                source.origin[axis],
                (map.height, map.width)[axis],
            )
            for axis, taps in enumerate((y, x))
        ]
        met = (
            meets[0].reshape(len(y), 1, 1, tile[1], 1, window[0], 1)
            & meets[1].reshape(1, len(x), 1, 1, tile[2], 1, window[1])
        ).repeat(tile[0], axis=2)
        met = met.reshape(-1, pixels)
        masks, which = np.unique(met, axis=0, return_inverse=True)
        empty = int(not masks[0].any())
        which = which.reshape(len(y), len(x))[rows, columns] - empty  # all False is the least
        return [tuple(mask) for mask in masks[empty:].tolist()], which

    def _pool(self, layer: PoolLayer, group: int, constants: _Constants) -> _Made:
        source, out = self.buffers[layer.source.map], self.buffers[layer.out]
        rows, row_counts = _windows(layer, out.map.height, source.map.height, 0)
        columns, column_counts = _windows(layer, out.map.width, source.map.width, 1)
        image = np.arange(group)[:, None, None]
        count = row_counts[:, None] * column_counts
        if layer.count_padding:
            count = np.full_like(count, math.prod(layer.kernel))
        shape = (group, out.map.height, out.map.width)
        parts = (
            image * source.pitch + source.at(rows[:, None], columns),
            image * out.pitch + out.at(np.arange(shape[1])[:, None], np.arange(shape[2])),
            row_counts[:, None],
            column_counts,
            count,
        )
        table = np.stack([np.broadcast_to(part, shape) for part in parts], axis=-1)
        apw = layer.apw
        tiles = table.reshape(-1, len(parts)).astype(np.int32)
        most = int(count.max())
        exact = most * 255 * abs(layer.multiplier) < 2**53 and most << apw.shift < MOST_DIVISOR
        kernel = PoolKernel(layer.mode == isa.POOL_AVERAGE, "float64" if exact else "int64")
        return kernel, {
            "work": self._work(constants, [0] * out.map.blocks, len(tiles)),
            "source0": _Reference(0, source),
            "out": _Reference(0, out),
            "tiles": _Reference(constants.add(tiles)),
            "source_block": source.block,
            "out_block": out.block,
            "row": layer.dilation[0] * source.columns * source.unit,
            "column": layer.dilation[1] * source.unit,
            "source_zero": layer.source.zero,
            "multiplier": layer.multiplier,
            "shift": apw.shift,
            "zero": apw.zero,
            "low": apw.low,
            "high": apw.high,
        }

    def _add(self, layer: AddLayer, group: int, constants: _Constants) -> _Made:
        out, apw = self.buffers[layer.out], layer.apw
        buffers = [self.buffers[source.map] for source in layer.sources]
        tiles = [
            _tiles(out.map, group, (1, 1, 1), buffer, source.stride, source.origin, (1, 1))
            for buffer, source in zip(buffers, layer.sources, strict=True)
        ]
        ends = _tiles(out.map, group, (1, 1, 1), out, (1, 1), (0, 0), (1, 1))
        table = np.column_stack([*tiles, ends]).astype(np.int32)
        less = -sum(s.zero * m for s, m in zip(layer.sources, layer.multipliers, strict=True))
        numbers = (less, layer.multiplier, *_shifting(apw.shift))
        parameters = np.repeat(np.array(numbers, np.int64)[:, None], WORD_CHANNELS, axis=1)
        fields = {
            "work": self._work(constants, [0] * out.map.blocks, len(table)),
            "out": _Reference(0, out),
            "out_block": out.block,
            "parameters": _Reference(constants.add(parameters)),
            "tiles": _Reference(constants.add(table)),
            "zero": apw.zero,
            "low": apw.low,
            "high": apw.high,
        }
        strides = ("source_block", "residual_block")
        for i, (buffer, multiplier) in enumerate(zip(buffers, layer.multipliers, strict=True)):
            fields[f"source{i}"] = _Reference(0, buffer)
            fields[strides[i]] = buffer.block
            fields[f"multiplier{i}"] = multiplier
        return AddKernel(len(buffers)), fields


def _aligned(size: int) -> Array:
    whole = np.zeros(size + 2 * ALIGNMENT, np.uint8)
    first = -whole.ctypes.data % ALIGNMENT
    return whole[first : first + size]


def map_bytes(map: Map) -> int:
    return map.blocks * map.height * map.width * WORD_CHANNELS


def dot_products(layer: Layer, out: Map) -> int:
    """Count dot products of 16 outputs with four inputs, per image, or more than there are."""
    if not isinstance(layer, ConvLayer):
        return 0
    pixels = out.height * out.width * layer.apw.pool_height * layer.apw.pool_width
    each = 1 if _diagonal(layer) else WORD_CHANNELS // LANES
    return pixels * len(layer.weights) * each


_CHANNELS = np.arange(WORD_CHANNELS)


def _on_diagonal(layer: ConvLayer) -> Array:
    """Give the weights ``[n, 16]`` with which outputs meet their own channel."""
    return layer.weights[:, _CHANNELS // LANES, _CHANNELS, _CHANNELS % LANES]


def _diagonal(layer: ConvLayer) -> bool:
    """Say whether no output meets another channel than its own, as in depthwise layers."""
    return bool(np.count_nonzero(layer.weights) == np.count_nonzero(_on_diagonal(layer)))


def _vectors(layer: ConvLayer) -> tuple[Array, Array]:
    """Give a layer's non-zero vectors: output block, source, row, column, channel; weights.

    A vector's weights ``[output 16, 4]`` meet four channels of one pixel, from ``channel`` on. In a
    diagonal layer, where three of those would be zeros, they meet four adjacent pixels.
    """
    if not _diagonal(layer):
        group_set, lane = np.nonzero(layer.weights.any(axis=(2, 3)))
        places = layer.group_sets[group_set]
        places[:, 4] = places[:, 4] * WORD_CHANNELS + lane * LANES
        return places, layer.weights[group_set, lane]
    weights = _on_diagonal(layer)
    present = weights.any(axis=1)
    places, weights = layer.group_sets[present], weights[present]
    places[:, 4] *= WORD_CHANNELS
    number = places[:, 3] % LANES
    places[:, 3] -= number
    places, vector = np.unique(places, axis=0, return_inverse=True)
    vectors = np.zeros((len(places), WORD_CHANNELS, LANES), np.int8)
    vectors[vector.reshape(-1), :, number] = weights
    return places, vectors


def _read(layer: Layer) -> Iterator[int]:
    """Give the maps that a layer reads."""
    sources = (layer.source,) if isinstance(layer, PoolLayer) else layer.sources
    yield from (source.map for source in sources)
    if isinstance(layer, ConvLayer) and layer.residual:
        yield layer.residual[0]


def _each(choose: Callable[[int, int], int], a: Sequence[int], b: Sequence[int]) -> Pair:
    return choose(a[0], b[0]), choose(a[1], b[1])


def _reach(layer: Layer, out: Map) -> Iterator[tuple[Source, Pair, Pair]]:
    """Give how far sources are read: first row and column, and those behind the last."""
    if isinstance(layer, PoolLayer):  # which leaves out what lies outside
        return
    size, window = (out.height, out.width), (1, 1)
    if isinstance(layer, ConvLayer):
        window = (layer.apw.pool_height, layer.apw.pool_width)
    for place, source in enumerate(layer.sources):
        taps = np.zeros((1, 2), np.int64)
        if isinstance(layer, ConvLayer):
            taps = layer.group_sets[layer.group_sets[:, 1] == place, 2:4]
        last = [
            (size[i] * window[i] - 1) * source.stride[i] + int(taps[:, i].max()) for i in (0, 1)
        ]
        origin = source.origin
        yield source, origin, (origin[0] + last[0] + 1, origin[1] + last[1] + 1)


def _windows(layer: PoolLayer, count: int, size: int, axis: int) -> tuple[Array, Array]:
    """Give along one axis the first position inside the map of each window, and their number."""
    step = layer.dilation[axis]
    first = np.arange(count) * layer.source.stride[axis] + layer.source.origin[axis]
    skipped = np.maximum(0, -(first // step))
    stop = np.clip((size - 1 - first) // step + 1, 0, layer.kernel[axis])
    return first + skipped * step, np.maximum(0, stop - skipped)


Tile: TypeAlias = tuple[int, int, int]
Mask: TypeAlias = tuple[bool, ...]  # of a tile's pixels


@functools.lru_cache(maxsize=1024)
def _tile(out: Map, group: int, window: Pair, most: int) -> Tile:
    """Choose images, rows and columns of a tile, so that all tiles together cost least.

    A tile costs its pixels, and about one more for its weights; the last ones overlap.
    """
    each = math.prod(window)

    def cost(tile: Tile) -> float:
        count = math.prod(
            -(-size // part)
            for size, part in zip((group, out.height, out.width), tile, strict=True)
        )
        return count * (max(4, math.prod(tile) * each) + 1)

    tiles = [
        (images, rows, columns)
        for images in range(1, min(group, most) + 1)
        for rows in range(1, min(out.height, most // images) + 1)
        for columns in range(1, min(out.width, most // images // rows) + 1)
        if images * rows * columns * each <= most or images * rows * columns == 1
    ]
    return min(tiles, key=cost)


def _firsts(size: int, part: int) -> Array:
    return np.minimum(np.arange(0, size, part), size - part)


def _tiles(
    out: Map, group: int, tile: Tile, buffer: _Buffer, stride: Pair, origin: Pair, window: Pair
) -> Array:
    """Give for each tile the byte offset of its first pixel in a map."""
    image = _firsts(group, tile[0])[:, None, None] * buffer.pitch
    y = _firsts(out.height, tile[1])[:, None] * window[0] * stride[0] + origin[0]
    x = _firsts(out.width, tile[2]) * window[1] * stride[1] + origin[1]
    return np.asarray(image + buffer.at(y, x)).reshape(-1)


def _distinct(numbers: Array) -> tuple[Array, Array]:
    """Give the different ones of many numbers close to each other, and which each is."""
    least = numbers.min()
    present = np.bincount(numbers - least) > 0
    return np.flatnonzero(present) + least, (np.cumsum(present) - 1)[numbers - least]


def _meeting(
    taps: Array, span: int, firsts: Array, pixels: Array, stride: int, origin: int, extent: int
) -> Array:
    """Say which rows (or columns) of a tile meet the map, in one tile at least: ``[tap, row]``."""
    place = (firsts[:, None] + pixels) * stride + origin
    at = place + (taps[:, None] + np.arange(span))[:, :, None, None]  # [tap, span, tile, row]
    return np.asarray(((at >= 0) & (at < extent)).any(axis=(1, 2)))


def _run(places: Sequence[int], mask: Mask) -> Run:
    """Give the places of the pixels that meet a map."""
    return tuple(place if met else None for place, met in zip(places, mask, strict=True))


def _places(
    tile: Tile, buffer: _Buffer, stride: Pair, origin: Pair, window: Pair
) -> tuple[int, ...]:
    """Give the byte offsets of a tile's pixels from its first, window by window."""
    image, y, x, row, column = np.meshgrid(*map(np.arange, (*tile, *window)), indexing="ij")
    rows = (y * window[0] + row) * stride[0]
    columns = (x * window[1] + column) * stride[1]
    offset = image * buffer.pitch + (rows * buffer.columns + columns) * buffer.unit
    return tuple(offset.reshape(-1).tolist())


def _shifting(shift: int) -> tuple[int, int, int]:
    """Give shift, addend and tie mask with which int64 are shifted and rounded half to even."""
    return shift, (1 << shift >> 1) - 1 if shift else 0, 1 if shift else 0


def _bias(layer: ConvLayer, offset: int) -> Array:
    """Give the bias, int32, of a layer from whose codes ``offset`` is taken.

    Sums wrap at 32 bits on the way; that the layer's own fit is known.
    """
    bias = layer.bias.copy()
    if offset:
        shifts = np.array([source.shift for source in layer.sources], np.int64)
        block, place = layer.group_sets[:, :2].T
        sums = layer.weights.sum(axis=(1, 3), dtype=np.int64)
        np.add.at(bias, block, offset * sums << shifts[place][:, None])
    return bias.astype(np.int32)


@attrs.frozen(eq=False)
class _Scaling:
    """In which numbers a layer is requantized, and its parameters by block."""

    numbers: Requantization
    monotone: bool
    low: int
    high: int
    parameters: Array

    @classmethod
    def of(cls, layer: ConvLayer, bias: Array) -> _Scaling:
        """Choose the cheapest numbers that hold every product of a layer.

        Its sums begin at ``bias``, int32.
        """
        apw = layer.apw
        raw, by_shift = apw.mode == isa.MODE_RAW, apw.mode == isa.MODE_SHIFT
        top = 255 if apw.wide else 15
        one = min(1 << apw.shift, 2**31 - 1)
        if by_shift:
            shape = layer.bias.shape
            multiplier, shift = np.full(shape, top), np.full(shape, apw.shift)
        elif raw:
            multiplier, shift = np.ones_like(layer.bias), np.zeros_like(layer.bias)
        else:
            multiplier, shift = layer.multiplier, layer.shift
        # A product beyond the largest code may be rounded: it stays beyond.
        reach = min(layer.worst, one) if by_shift else layer.worst
        factors = [abs(int(m)) for m in multiplier.flat]
        largest = max(factors) * reach
        steps = max(m * layer.worst / 2 ** int(s) for m, s in zip(factors, shift.flat, strict=True))
        numbers: Requantization = "int64"
        if raw:
            numbers = "raw"
        elif largest < 2**24 and steps < MOST_STEPS:
            numbers = "float32"
        elif largest < 2**53 and steps < MOST_STEPS:
            numbers = "float64"
        scale = multiplier / 2.0**shift
        integers = [
            multiplier,
            *np.moveaxis(np.vectorize(_shifting, otypes=[int] * 3)(shift), 0, 0),
        ]
        eights = integers if numbers == "int64" else [scale.view(np.int64), *integers[1:]]
        parameters = np.zeros((len(layer.bias), PARAMETER_BYTES), np.uint8)
        parts = [bias, scale.astype(np.float32), *eights]
        for at, part in zip((0, 64, 128, 256, 384, 512), parts, strict=True):
            data = np.ascontiguousarray(part).view(np.uint8)
            parameters[:, at : at + data.shape[1]] = data
        codes = (apw.zero, apw.zero + top) if by_shift else (0, 255)  # of accumulators from 0 to 1
        low, high = np.clip(codes, apw.low, apw.high)
        return cls(numbers, bool((multiplier >= 0).all()), int(low), int(high), parameters)
