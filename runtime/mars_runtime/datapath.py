"""What CONV, POOL and ADD compute: operands from the memories, results into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import isa, timing
from .errors import MachineError, MemoryAccessError
from .kernels import convolve_group_sets, max_windows
from .maps import RAW_BITS, WORD_BYTES, WORD_CHANNELS, join_nibbles, split_nibbles
from .memory import Cells, ChipMemory, Core, whole
from .packing import block_parameter_bytes, unpack_parameters
from .rounding import MAX_SHIFT, divide_half_even

__all__ = ["ConvTile", "add_tile", "pool_tile"]

Array = npt.NDArray[Any]

# More than any tile that fits a bank needs, padding included: what a program can ask for at most.
_MOST_PIXELS = 2**21


def _steps(first: int, count: int, stride: int) -> slice:
    return slice(first, first + (count - 1) * stride + 1, stride)


def _requantize(apw: isa.Apw, scaled: Array, count: Array) -> Array:
    if int(count.max()) << apw.shift >= 2**63:
        raise MachineError(f"divides by {count.max()} << {apw.shift}, beyond 63 bits")
    code = divide_half_even(scaled, count << np.int64(apw.shift)) + apw.zero
    return np.asarray(np.clip(code, apw.low, apw.high))


def _target(memory: ChipMemory, apw: isa.Apw, at: isa.Pool | isa.Add, blocks: Array) -> _MapView:
    """Give the map that POOL or ADD writes, the tile in it checked before anything is computed."""
    view = _MapView(memory, apw)
    for block in blocks:
        view.check_tile(int(block), slice(at.y, at.y + at.height), slice(at.x, at.x + at.width))
    return view


class _MapView:
    """A map that lies in a bank, as a SAS, APW or RESIDUAL setting describes it."""

    def __init__(
        self,
        memory: ChipMemory,
        setting: isa.Sas | isa.Apw | isa.Residual,
        words: int | None = None,
    ) -> None:
        self.first = getattr(setting, "block", 0)
        self.planes = words or 1 + setting.wide
        self.shape = (setting.blocks, setting.height, setting.width)
        size = self.planes * setting.blocks * setting.height * setting.width
        stop = setting.base + size
        if stop > memory.banks[setting.bank].shape[1]:
            raise MemoryAccessError(
                f"bank {setting.bank} of {memory.banks[setting.bank].shape[1]} words addressed at "
                f"{setting.base}..{stop - 1}"
            )
        self.span = slice(setting.base, stop)
        self.cells = memory.bank_cells[setting.bank]
        self.data = memory.banks[setting.bank]

    def view(self, state: Array) -> Array:
        """Give a state of the cells as ``[plane, block, row, column]``."""
        return state[self.span].reshape(self.planes, *self.shape)

    def codes(self, blocks: Array | None = None) -> Array:
        """Give the codes of some blocks ``[N, block, row, column, 16]``."""
        grid = self.data[:, self.span].reshape(
            self.data.shape[0], self.planes, *self.shape, WORD_BYTES
        )
        chosen = grid if blocks is None else grid[:, :, blocks]
        return join_nibbles(chosen.swapaxes(0, 1))

    def window(
        self,
        sas: isa.Sas,
        tile: tuple[int, int],
        kernel: tuple[int, int],
        blocks: Array,
        fill: int,
        start: int,
        end: int,
        read: Callable[[Array], None] | None = None,
    ) -> tuple[Array, Array]:
        """Give the padded input of a tile, and which of its pixels lie inside the map.

        Reads are checked for the pixels that the window meets; ``read`` may mark fewer.
        """
        blocks = blocks - self.first
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < self.shape[0]:
            raise MemoryAccessError(
                f"channel blocks {blocks.min()}..{blocks.max()} of {self.shape[0]}"
            )
        y = sas.origin_y + np.arange(
            (tile[0] - 1) * sas.stride_y + (kernel[0] - 1) * sas.dilation_y + 1
        )
        x = sas.origin_x + np.arange(
            (tile[1] - 1) * sas.stride_x + (kernel[1] - 1) * sas.dilation_x + 1
        )
        if len(blocks) * len(y) * len(x) > _MOST_PIXELS:
            raise MachineError(f"reads a window of {len(y)} x {len(x)} pixels at once")
        inside_y = (y >= 0) & (y < self.shape[1])
        inside_x = (x >= 0) & (x < self.shape[2])
        patch = np.full(
            (self.data.shape[0], len(blocks), len(y), len(x), WORD_CHANNELS), fill, np.int16
        )
        if inside_y.any() and inside_x.any():
            rows = slice(y[inside_y][0], y[inside_y][-1] + 1)
            columns = slice(x[inside_x][0], x[inside_x][-1] + 1)
            py = slice(int(inside_y.argmax()), int(inside_y.argmax()) + rows.stop - rows.start)
            px = slice(
                int(inside_x.argmax()), int(inside_x.argmax()) + columns.stop - columns.start
            )
            stored = (np.arange(rows.start, rows.stop) + sas.row) % self.shape[1]
            patch[:, :, py, px] = self.codes(blocks)[:, :, stored, columns]
        met = np.zeros((len(blocks), *self.shape[1:]), bool)
        if read is None:
            for r in range(kernel[0]):
                for c in range(kernel[1]):
                    mark_tap(met, slice(None), sas, tile, r, c)
        else:
            read(met)
        mask = np.zeros(self.shape, bool)
        mask[blocks] = np.roll(met, sas.row, 1)
        self.cells.read((slice(None), mask), start, end, self.view)
        return patch, inside_y[:, None] & inside_x

    def write(self, block: int, y: int, x: int, codes: Array, start: int, end: int) -> None:
        """Write codes ``[N, row, column, 16]`` of one block."""
        rows, columns = slice(y, y + codes.shape[1]), slice(x, x + codes.shape[2])
        block = self.check_tile(block, rows, columns)
        self.cells.write((slice(None), block, rows, columns), start, end, self.view)
        grid = self.data[:, self.span].reshape(
            self.data.shape[0], self.planes, *self.shape, WORD_BYTES
        )
        words = split_nibbles(codes.astype(np.uint8), self.planes)
        grid[:, :, block, rows, columns] = words.swapaxes(0, 1)

    def check_tile(self, block: int, rows: slice, columns: slice) -> int:
        """Refuse a tile outside the map; give the stored block."""
        block -= self.first
        if (
            not 0 <= block < self.shape[0]
            or rows.stop > self.shape[1]
            or columns.stop > self.shape[2]
        ):
            raise MemoryAccessError(
                f"tile of block {block}, rows {rows.start}..{rows.stop - 1}, columns "
                f"{columns.start}..{columns.stop - 1} of a map of {self.shape}"
            )
        return block


def mark_tap(met: Array, block: Any, sas: isa.Sas, tile: tuple[int, int], r: int, c: int) -> None:
    """Mark the pixels ``met[block, row, column]`` that a tap of a tile reads."""
    ranges = []
    for offset, stride, count, size in (
        (r * sas.dilation_y + sas.origin_y, sas.stride_y, tile[0], met.shape[1]),
        (c * sas.dilation_x + sas.origin_x, sas.stride_x, tile[1], met.shape[2]),
    ):
        first = offset if offset >= 0 else offset + -(-(-offset) // stride) * stride
        last = min(offset + (count - 1) * stride, size - 1)
        ranges.append(slice(first, max(first, last + 1), stride))
    met[block, ranges[0], ranges[1]] = True


class ConvTile:
    """The data of one CONV on one core."""

    def __init__(
        self, memory: ChipMemory, core: Core, conv: isa.Conv, start: int, end: int
    ) -> None:
        self.memory, self.conv, self.core = memory, conv, core
        self.apw = self.core.config.output
        self.start, self.end = start, end
        self.tile = (conv.height * self.apw.pool_height, conv.width * self.apw.pool_width)
        self.images = memory.images
        pixels = self.tile[0] * self.tile[1]
        if pixels > _MOST_PIXELS:
            raise MachineError(f"computes a tile of {pixels} pixels at once")
        self.rows = slice(conv.y, conv.y + conv.height)
        self.columns = slice(conv.x, conv.x + conv.width)
        words = timing.RAW_WORDS if self.apw.mode == isa.MODE_RAW else None
        if words and self.tile != (conv.height, conv.width):
            raise MachineError("pools accumulators")
        self.out = _MapView(memory, self.apw, words)
        self.partial_at = conv.partial_base + timing.RAW_WORDS * pixels * core.number
        self.partial_words = timing.RAW_WORDS * pixels

    def execute(self, load: timing.DecodedLoad) -> None:
        """Convolve, finish and write every visit."""
        for visit in load.visits:  # before anything is computed for it
            self.out.check_tile(visit.block, self.rows, self.columns)
        self._mark_srams(load)
        patches = self._patches(load)
        parameters = self.conv.parameters
        size = block_parameter_bytes(self.apw.mode == isa.MODE_MULTIPLIER)
        for visit in load.visits:
            record = self.core.parameter.data[parameters : parameters + size]
            parameters += size
            bias, multiplier, shift = unpack_parameters(record)
            if visit.first:
                acc = np.broadcast_to(bias, (self.images, *self.tile, WORD_CHANNELS))
            else:
                acc = self._read_partial()
            for segment in visit.segments:
                if segment.context in patches:
                    acc = acc + self._products(segment, *patches[segment.context])
            _check_width(acc)
            if visit.last:
                self._finish(visit.block, acc, multiplier, shift)
            else:
                self._write_partial(acc)
        if any(not visit.first for visit in load.visits):
            # Marked last: what one visit has read another may overwrite, in order, by itself.
            cells, _, span = self._partial_store()
            cells.busy[span] = np.maximum(cells.busy[span], self.end)

    def _mark_srams(self, load: timing.DecodedLoad) -> None:
        core, conv, start, end = self.core, self.conv, self.start, self.end
        size = block_parameter_bytes(self.apw.mode == isa.MODE_MULTIPLIER) * len(load.visits)
        for sram, at, length in (
            (core.index, conv.descriptor, load.segments * isa.SEGMENT_BYTES),
            (core.index, conv.codes, load.codes * isa.CODE_BYTES),
            (core.parameter, conv.parameters, size),
        ):
            sram.cells.read(sram.span(at, length), start, end, whole)
        if conv.slot + load.codes > len(core.macros):
            raise MemoryAccessError(
                f"macro slots {conv.slot}..{conv.slot + load.codes - 1} of {len(core.macros)}"
            )
        core.slots.read(slice(conv.slot, conv.slot + load.codes), start, end, whole)

    def _patches(self, load: timing.DecodedLoad) -> dict[int, tuple[Array, dict[int, int]]]:
        """Gather each context's input once for all visits."""
        used: dict[int, set[tuple[int, int]]] = {}
        for visit in load.visits:
            for segment in visit.segments:
                met = timing.met(self.core.config.context(segment.context), segment)
                used.setdefault(segment.context, set()).update(
                    (segment.taps[place], segment.blocks[place]) for place in met
                )
        patches = {}
        for context, places in used.items():
            sas = self.core.config.context(context)
            if not places:
                continue
            blocks = sorted({block for _, block in places})
            where = {block: i for i, block in enumerate(blocks)}
            taps = sorted({tap for tap, _ in places})
            kernel = (max(taps) // sas.kernel_width + 1, sas.kernel_width)

            def mark(met: Array, sas: isa.Sas = sas, places: Any = places, at: Any = where) -> None:
                for tap, block in places:
                    r, c = divmod(tap, sas.kernel_width)
                    mark_tap(met, at[block], sas, self.tile, r, c)

            view = _MapView(self.memory, sas)
            patch, _ = view.window(
                sas, self.tile, kernel, np.array(blocks), sas.zero, self.start, self.end, mark
            )
            patches[context] = (patch.astype(np.float32), where)
        return patches

    def _products(
        self, segment: timing.LoadedSegment, patch: Array, where: dict[int, int]
    ) -> Array:
        sas = self.core.config.context(segment.context)
        met = timing.met(sas, segment)
        places = []
        for place in met:
            r, c = divmod(segment.taps[place], sas.kernel_width)
            places.append((where[segment.blocks[place]], r * sas.dilation_y, c * sas.dilation_x))
        weights = self.core.macros[segment.slot + np.array(met, np.int64)]
        products = convolve_group_sets(
            patch, weights, places, self.tile, (sas.stride_y, sas.stride_x)
        )
        return products << sas.shift

    def _partial_store(self) -> tuple[Cells, Array, slice]:
        memory, conv = self.memory, self.conv
        offchip = conv.partial == isa.PARTIAL_OFFCHIP
        at = self.partial_at - (memory.map_base if offchip else 0)
        cells = memory.map_cells if offchip else memory.bank_cells[conv.partial_bank]
        data = memory.maps if offchip else memory.banks[conv.partial_bank]
        if at < 0 or at + self.partial_words > data.shape[1]:
            raise MemoryAccessError(
                f"partial sums at word {at} of {cells.name} with {data.shape[1]} words"
            )
        return cells, data, slice(at, at + self.partial_words)

    def _read_partial(self) -> Array:
        cells, data, span = self._partial_store()
        cells.check_read(cells.ready[span], self.start)
        words = np.ascontiguousarray(data[:, span])
        return words.view("<i4").reshape(-1, *self.tile, WORD_CHANNELS).astype(np.int64)

    def _write_partial(self, acc: Array) -> None:
        cells, data, span = self._partial_store()
        cells.write(span, self.start, self.end, whole)
        flat = np.ascontiguousarray(acc.astype("<i4")).view(np.uint8)
        data[:, span] = flat.reshape(self.images, self.partial_words, WORD_BYTES)

    def _finish(self, block: int, acc: Array, multiplier: Array, shift: Array) -> None:
        apw, view, rows, columns = self.apw, self.out, self.rows, self.columns
        place = (slice(None), view.check_tile(block, rows, columns), rows, columns)
        residual = self.core.config.residual
        if residual:
            acc = acc + self._residual(residual, block, place, view)
            _check_width(acc)
        view.cells.write(place, self.start, self.end, view.view)
        if apw.mode == isa.MODE_RAW:
            self._write_raw(view, place[1], rows, columns, acc)
            return
        codes = max_windows(
            _apw_codes(apw, acc, multiplier, shift), apw.pool_height, apw.pool_width
        )
        grid = view.data[:, view.span].reshape(self.images, view.planes, *view.shape, WORD_BYTES)
        split = split_nibbles(codes.astype(np.uint8), view.planes)
        grid[:, :, place[1], rows, columns] = split.swapaxes(0, 1)

    def _write_raw(
        self, view: _MapView, block: int, rows: slice, columns: slice, acc: Array
    ) -> None:
        # [block][row][column][8 words]: a pixel's sixteen accumulators lie together.
        grid = view.data[:, view.span].reshape(
            self.images, *view.shape, timing.RAW_WORDS * WORD_BYTES
        )
        flat = np.ascontiguousarray(acc.astype("<i4")).view(np.uint8)
        grid[:, block, rows, columns] = flat.reshape(*acc.shape[:3], grid.shape[-1])

    def _residual(self, residual: isa.Residual, block: int, written: Any, out: _MapView) -> Array:
        view = _MapView(self.memory, residual)
        rows = slice(residual.y, residual.y + self.tile[0])
        columns = slice(residual.x, residual.x + self.tile[1])
        place = (slice(None), view.check_tile(block, rows, columns), rows, columns)
        in_place = (view.cells, view.span, view.shape, place) == (
            out.cells,
            out.span,
            out.shape,
            written,
        )
        if in_place:  # each pixel is read just before it is overwritten
            view.cells.check_read(view.view(view.cells.ready)[place], self.start)
        else:
            view.cells.read(place, self.start, self.end, view.view)
        codes = view.codes(np.array([place[1]]))[:, 0, rows, columns]
        return codes.astype(np.int64) << residual.shift


def _check_width(acc: Array) -> None:
    if np.abs(acc).max(initial=0) >= 2 ** (RAW_BITS - 1):
        raise MachineError(f"an accumulator leaves {RAW_BITS} bits")


def _apw_codes(apw: isa.Apw, acc: Array, multiplier: Array, shift: Array) -> Array:
    if apw.mode == isa.MODE_MULTIPLIER:
        if shift.size and shift.max() > MAX_SHIFT:
            raise MachineError(f"requantization shift {shift.max()} above {MAX_SHIFT}")
        code = divide_half_even(acc * multiplier, np.int64(1) << shift)
        return np.asarray(np.clip(code + apw.zero, apw.low, apw.high))
    top = 255 if apw.wide else 15
    one = np.int64(1) << np.int64(apw.shift)
    clamped = np.clip(acc, 0, one)
    # acc * (2**bits - 1) = (acc << bits) - acc: no multiplier.
    code = divide_half_even(clamped * top, one) + apw.zero
    return np.asarray(np.clip(code, apw.low, apw.high))


def pool_tile(
    memory: ChipMemory, pool: isa.Pool, core: Core, blocks: Array, start: int, end: int
) -> None:
    """Execute POOL on the blocks that a core is dealt."""
    sas, apw = core.config.context(0), core.config.output
    target, source = _target(memory, apw, pool, blocks), _MapView(memory, sas)
    average = pool.mode == isa.POOL_AVERAGE
    size = (pool.kernel_height, pool.kernel_width)
    patch, inside = source.window(
        sas, (pool.height, pool.width), size, blocks, 0 if average else -1, start, end
    )
    shape = (memory.images, len(blocks), pool.height, pool.width, WORD_CHANNELS)
    best = np.full(shape, 0 if average else -1, np.int64)
    count = np.zeros((pool.height, pool.width, 1), np.int64)
    for r in range(size[0]):
        for c in range(size[1]):
            rows = _steps(r * sas.dilation_y, pool.height, sas.stride_y)
            columns = _steps(c * sas.dilation_x, pool.width, sas.stride_x)
            pixels, hit = patch[:, :, rows, columns], inside[rows, columns, None]
            if average:
                best += np.where(hit, pixels - sas.zero, 0)
                count += hit
            else:
                best = np.maximum(best, pixels)
    if average:
        if pool.count_padding:
            count = np.full_like(count, size[0] * size[1])
        if count.min() < 1:
            raise MachineError("pools a window that lies wholly outside the map")
        best = _requantize(apw, best * pool.multiplier, count)
    elif best.min(initial=0) < 0:
        raise MachineError("pools a window that lies wholly outside the map")
    for i, block in enumerate(blocks):
        target.write(int(block), pool.y, pool.x, best[:, i], start, end)


def add_tile(
    memory: ChipMemory, add: isa.Add, core: Core, blocks: Array, start: int, end: int
) -> None:
    """Execute ADD on the blocks that a core is dealt."""
    apw = core.config.output
    target = _target(memory, apw, add, blocks)
    total = np.zeros(1, np.int64)
    for number, multiplier in ((0, add.multiplier_a), (1, add.multiplier_b)):
        if number > add.operands:
            continue
        sas = core.config.context(number)
        view = _MapView(memory, sas)
        tile = (add.height, add.width)
        patch, _ = view.window(sas, tile, (1, 1), blocks, sas.zero, start, end)
        rows = _steps(0, add.height, sas.stride_y)
        columns = _steps(0, add.width, sas.stride_x)
        total = total + (patch[:, :, rows, columns].astype(np.int64) - sas.zero) * multiplier
    codes = _requantize(apw, total * add.multiplier, np.ones(1, np.int64))
    for i, block in enumerate(blocks):
        target.write(int(block), add.y, add.x, codes[:, i], start, end)
