"""The off-chip image: what FETCH brings to the cores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.packing import (
    group_set_bytes,
    pack_group_sets,
    pack_parameters,
)
from mars_runtime.stopwatch import Loads
from mars_runtime.timing import DecodedLoad, LoadedSegment, Visit, fill_cost

from ..pack import PackedBlock, PackedConv
from ..schedule import Load, Piece

__all__ = ["Content", "CoreImage", "Image", "LoadImage", "LoadParts", "decoded_load", "load_parts"]

Content: TypeAlias = Literal["all", "tables", "sizes"]


@attrs.frozen
class CoreImage:
    """Where one core's part of a load lies off-chip, in bytes from the load's tables or weights."""

    index: int
    index_bytes: int
    parameters: int
    parameter_bytes: int
    weights: int
    group_sets: int


@attrs.frozen(eq=False)
class LoadParts:
    """A load's cores, all of them and those that hold group-sets, and what they take in all.

    Descriptors are padded to the longest, so that one CONV finds every core's codes.
    """

    cores: dict[int, CoreImage]
    filling: dict[int, CoreImage]
    descriptor_bytes: int
    table_bytes: int
    weight_bytes: int
    most_index_bytes: int
    most_parameter_bytes: int
    most_group_sets: int

    @property
    def bits(self) -> int:
        """Bits that are fetched."""
        return 8 * (self.table_bytes + self.weight_bytes)

    def fill_cycles(self, arch: MarsArch, weight_bits: int) -> int:
        """Give the cycles in which open arrays are filled, all cores at once."""
        return fill_cost(arch, self.most_group_sets, weight_bits).cycles if self.filling else 0


@attrs.frozen
class LoadImage:
    """A load's parts and where its tables and weights begin, in bytes."""

    parts: LoadParts
    tables: int
    weights: int


class Image:
    """The off-chip image: tables (index codes, descriptors, parameters) first, then weights.

    Parameters
    ----------
    content : "all", "tables" or "sizes"
        What is written: everything; all but the weights, enough for a timeline; nothing, where
        only addresses are wanted.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.tables: list[bytes] = []
        self.weights: list[bytes] = []
        self.table_bytes = self.weight_bytes = 0

    def add_load(self, packed: PackedConv, load: Load) -> LoadImage:
        """Add a load's data; weight addresses count from the end of the tables."""
        parts = load_parts(packed, load)
        image = LoadImage(parts, self.table_bytes, self.weight_bytes)
        self.table_bytes += parts.table_bytes
        self.weight_bytes += parts.weight_bytes
        for core in load.active if self.content != "sizes" else ():
            pieces = load.cores[core]
            descriptor, codes = _index_words(packed, pieces)
            index = descriptor.ljust(parts.descriptor_bytes, b"\0") + codes
            self.tables += [index, _parameters(packed, pieces)]
            if self.content == "all":
                self.weights += [
                    pack_group_sets(
                        packed.blocks[piece.block].weights[piece.start : piece.stop],
                        packed.weight_bits,
                    ).tobytes()
                    for piece in pieces
                    if piece.group_sets
                ]
        return image


@functools.lru_cache(maxsize=16384)
def load_parts(packed: PackedConv, load: Load) -> LoadParts:
    """Give where the parts of a load's cores lie."""
    longest = isa.SEGMENT_BYTES * max(
        (_segments(packed, load.cores[core]) for core in load.active), default=0
    )
    cores = {}
    tables = weights = 0
    for core in load.active:
        group_sets = load.group_sets(core)
        index_bytes = longest + group_sets * isa.CODE_BYTES
        parameter_bytes = len(load.cores[core]) * packed.parameter_bytes
        cores[core] = CoreImage(
            tables, index_bytes, tables + index_bytes, parameter_bytes, weights, group_sets
        )
        tables += index_bytes + parameter_bytes
        weights += group_sets * group_set_bytes(packed.weight_bits)
    return LoadParts(
        cores,
        {core: part for core, part in cores.items() if part.group_sets},
        longest,
        tables,
        weights,
        max((part.index_bytes for part in cores.values()), default=0),
        max((part.parameter_bytes for part in cores.values()), default=0),
        max((part.group_sets for part in cores.values()), default=0),
    )


def _segments(packed: PackedConv, pieces: Sequence[Piece]) -> int:
    return sum(
        len(packed.blocks[piece.block].segments(piece.start, piece.stop)) for piece in pieces
    )


@functools.lru_cache(maxsize=16384)
def decoded_load(packed: PackedConv, load: Load) -> Loads:
    """Give what the machine makes of each core's tables (macro slots count from 0)."""
    return tuple([_decoded(packed, pieces) if pieces else None for pieces in load.cores])


def _decoded(packed: PackedConv, pieces: Sequence[Piece]) -> DecodedLoad:
    visits, slot = [], 0
    for piece in pieces:
        block = packed.blocks[piece.block]
        segments = []
        for start, stop in block.segments(piece.start, piece.stop):
            context = int(block.terms[start]) if start < stop else 0
            taps = tuple(block.taps[start:stop].tolist())
            segments.append(
                LoadedSegment(context, taps, tuple(block.inputs[start:stop].tolist()), slot)
            )
            slot += stop - start
        visits.append(Visit(piece.block, piece.first, piece.last, tuple(segments)))
    return DecodedLoad(tuple(visits), sum(len(visit.segments) for visit in visits), slot)


def _parameters(packed: PackedConv, pieces: Sequence[Piece]) -> bytes:
    blocks = [piece.block for piece in pieces]
    multiplier = None if packed.multiplier is None else packed.multiplier[blocks]
    shift = None if packed.shift is None else packed.shift[blocks]
    return pack_parameters(packed.bias[blocks], multiplier, shift).tobytes()


def _index_words(packed: PackedConv, pieces: Sequence[Piece]) -> tuple[bytes, bytes]:
    """Give the load descriptor and the index codes of one core's pieces."""
    segments, codes = [], []
    for number, piece in enumerate(pieces):
        block = packed.blocks[piece.block]
        bounds = block.segments(piece.start, piece.stop)
        for place, (start, stop) in enumerate(bounds):
            is_last_of_piece = place == len(bounds) - 1
            segments.append(
                _segment(
                    block,
                    start,
                    stop,
                    out_block=piece.block,
                    first=piece.first and place == 0,
                    last=piece.last and is_last_of_piece,
                    end=number == len(pieces) - 1 and is_last_of_piece,
                )
            )
            codes.append(_index_codes(block, start, stop))
    descriptor = b"".join(
        isa.pack_word(segment).to_bytes(isa.SEGMENT_BYTES, "little") for segment in segments
    )
    return descriptor, b"".join(codes)


def _segment(
    block: PackedBlock, start: int, stop: int, *, out_block: int, first: bool, last: bool, end: bool
) -> isa.Segment:
    empty = start == stop
    return isa.Segment(
        out_block=out_block,
        block_base=0 if empty else int(block.inputs[start]) // isa.BLOCKS_PER_SEGMENT,
        tap_base=0 if empty else int(block.taps[start]) // isa.TAPS_PER_SEGMENT,
        context=0 if empty else int(block.terms[start]),
        empty=int(empty),
        first=int(first),
        last=int(last),
        end=int(end),
    )


def _index_codes(block: PackedBlock, start: int, stop: int) -> bytes:
    if start == stop:
        return b""
    taps = block.taps[start:stop] % isa.TAPS_PER_SEGMENT
    inputs = block.inputs[start:stop] % isa.BLOCKS_PER_SEGMENT
    # The words of a segment differ in tap, block and the first bit alone.
    common = isa.pack_word(isa.IndexCode(count=(stop - start) % isa.GROUP_SETS_PER_SEGMENT))
    tap_unit = isa.pack_word(isa.IndexCode(tap=1))
    words = common + taps * tap_unit + inputs
    words[0] += isa.pack_word(isa.IndexCode(first=1))
    return bytes(words.astype("<u2").tobytes())
