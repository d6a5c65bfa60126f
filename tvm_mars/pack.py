"""Packing: a convolution's non-zero group-sets, kernel block by kernel block.

A group-set is 16 kernels x 16 input channels x 1 tap. Those that hold only zeros are left out,
unless the architecture has no zero skipping.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.maps import WORD_CHANNELS, MapType
from mars_runtime.packing import block_parameter_bytes

from .graph import Conv, ConvTerm

__all__ = ["PackedBlock", "PackedConv", "blocked", "pack_conv"]

Array = npt.NDArray[Any]


@attrs.frozen(eq=False)
class PackedBlock:
    """The group-sets of one kernel block, in the order in which a core walks them.

    ``terms``, ``taps``, ``inputs`` say which convolution term, tap and input-channel block each
    belongs to; ``weights`` is int8 ``[n, output 16, input 16]``.
    """

    terms: Array
    taps: Array
    inputs: Array
    weights: npt.NDArray[np.int8]
    _cuts: dict[tuple[int, int], list[tuple[int, int]]] = attrs.field(
        factory=dict, init=False, repr=False
    )

    @property
    def group_sets(self) -> int:
        """How many there are."""
        return len(self.terms)

    def segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut group-sets ``start .. stop`` into segments (see :class:`isa.Segment`)."""
        found = self._cuts.get((start, stop))
        if found is None:
            found = self._cuts[start, stop] = self._cut(start, stop)
        return found

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        if start == stop:
            return [(start, stop)]
        keys = self.segment_keys()[start:stop]
        changes = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1 + start
        bounds = [start, *(int(change) for change in changes), stop]
        return [
            (at, min(at + isa.GROUP_SETS_PER_SEGMENT, end))
            for begin, end in itertools.pairwise(bounds)
            for at in range(begin, end, isa.GROUP_SETS_PER_SEGMENT)
        ]

    def segment_keys(self) -> Array:
        """Give for each group-set the term, tap base and block base of its segment ``[n, 3]``."""
        return np.stack(
            (
                self.terms,
                self.taps // isa.TAPS_PER_SEGMENT,
                self.inputs // isa.BLOCKS_PER_SEGMENT,
            ),
            axis=1,
        )


@attrs.frozen(eq=False)
class PackedConv:
    """A packed convolution layer.

    ``bias`` (int64 ``[blocks, 16]``) includes the zero points' correction; ``multiplier`` and
    ``shift`` are None where the requantization is native or absent. ``dense_group_sets`` is the
    number without zero skipping.
    """

    name: str
    blocks: tuple[PackedBlock, ...]
    weight_bits: int
    dense_group_sets: int
    bias: Array
    multiplier: Array | None
    shift: Array | None

    @property
    def group_sets(self) -> int:
        """Stored group-sets of all blocks."""
        return sum(block.group_sets for block in self.blocks)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a kernel block's parameters."""
        return block_parameter_bytes(self.multiplier is not None)


def pack_conv(layer: Conv, types: Mapping[str, MapType], arch: MarsArch) -> PackedConv:
    """Pack a convolution layer for an architecture.

    The layer's terms share one weight width in the macros: 4 bits if all have it.
    """
    weight_bits = max(term.weight_bits for term in layer.terms)
    found = [_pack_term(term, arch.zero_skipping) for term in layer.terms]
    count = -(-types[layer.name].channels // arch.kernel_block)
    blocks = []
    for block in range(count):
        parts = [term_blocks[block] for term_blocks, _ in found]
        terms = np.repeat(np.arange(len(parts)), [len(taps) for taps, _, _ in parts])
        taps, inputs, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        blocks.append(PackedBlock(terms, taps, inputs, weights))
    multiplier = shift = None
    requant = layer.requant
    if requant is not None and not requant.native:
        multiplier = _by_block(requant.multiplier, types[layer.name].channels)
        shift = _by_block(requant.shift, types[layer.name].channels)
    return PackedConv(
        layer.name,
        tuple(blocks),
        weight_bits,
        sum(dense for _, dense in found),
        _by_block(corrected_bias(layer, types), types[layer.name].channels),
        multiplier,
        shift,
    )


def corrected_bias(layer: Conv, types: Mapping[str, MapType]) -> Array:
    """Give the biases (int64) with which stored codes may be accumulated as they are.

    ``sum(w * (code - z)) = sum(w * code) - z * sum(w)``: padding reads the code ``z`` and skipped
    group-sets have ``w = 0``, so that one constant per channel serves every pixel.
    """
    bias = layer.bias.astype(np.int64)
    for term in layer.terms:
        total = term.weight.astype(np.int64).sum(axis=(1, 2, 3))
        bias = bias - ((total * types[term.input].zero_point) << term.shift)
    if layer.residual:
        bias = bias - (types[layer.residual.input].zero_point << layer.residual.shift)
    return bias


def _by_block(values: Array, channels: int) -> Array:
    count = -(-channels // WORD_CHANNELS)
    padded = np.zeros(count * WORD_CHANNELS, np.int64)
    padded[:channels] = values
    return padded.reshape(count, WORD_CHANNELS)


BlockParts = tuple[Array, Array, npt.NDArray[np.int8]]


def _pack_term(term: ConvTerm, zero_skipping: bool) -> tuple[list[BlockParts], int]:
    """Give per kernel block the taps, input blocks and weights, and the dense count."""
    if term.groups == 1:
        grid = blocked(term.weight)
        found = _select(grid, 0, zero_skipping)
        return found, grid.shape[0] * grid.shape[2] * grid.shape[4]
    parts, dense = [], 0
    for first in range(0, len(term.weight), WORD_CHANNELS):
        window, base = _group_window(term, first)
        grid = blocked(window)
        parts += _select(grid, base, zero_skipping)
        dense += grid.shape[2] * grid.shape[4]
    return parts, dense


def _group_window(term: ConvTerm, first: int) -> tuple[npt.NDArray[np.int8], int]:
    """Spread one kernel block's grouped weights over the input blocks that its groups span."""
    weight = term.weight[first : first + WORD_CHANNELS]
    per_group = term.weight.shape[1]
    outputs_per_group = len(term.weight) // term.groups
    groups = (first + np.arange(len(weight))) // outputs_per_group
    base = int(groups[0]) * per_group // WORD_CHANNELS
    stop = -(-(int(groups[-1]) + 1) * per_group // WORD_CHANNELS)
    window = np.zeros((len(weight), (stop - base) * WORD_CHANNELS, *weight.shape[2:]), np.int8)
    for kernel, group in enumerate(groups):
        at = int(group) * per_group - base * WORD_CHANNELS
        window[kernel, at : at + per_group] = weight[kernel]
    return window, base


def blocked(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """View ``[O, C, KH, KW]`` as ``[output block, 16, input block, 16, tap]``, padded by zeros."""
    outputs, inputs = (-(-size // WORD_CHANNELS) for size in weight.shape[:2])
    taps = weight.shape[2] * weight.shape[3]
    shape = (outputs * WORD_CHANNELS, inputs * WORD_CHANNELS, taps)
    flat = weight.reshape(*weight.shape[:2], taps)
    if flat.shape != shape:
        padded = np.zeros(shape, np.int8)
        padded[: flat.shape[0], : flat.shape[1]] = flat
        flat = padded
    return flat.reshape(outputs, WORD_CHANNELS, inputs, WORD_CHANNELS, taps)


def _select(grid: npt.NDArray[np.int8], input_base: int, zero_skipping: bool) -> list[BlockParts]:
    outputs, _, inputs, _, taps = grid.shape
    if zero_skipping:
        kept = np.asarray(grid.any(axis=(1, 3))).transpose(0, 2, 1)
    else:
        kept = np.ones((outputs, taps, inputs), bool)
    out, tap, block = np.nonzero(kept)
    # Within an output block: segment by segment, then by tap and input block.
    block_base = (block + input_base) // isa.BLOCKS_PER_SEGMENT
    order = np.lexsort((block, tap, block_base, tap // isa.TAPS_PER_SEGMENT, out))
    out, tap, block = out[order], tap[order], block[order]
    weights = grid[out, :, block, :, tap]
    borders = np.searchsorted(out, np.arange(1, outputs))
    return list(
        zip(
            np.split(tap, borders),
            np.split(block + input_base, borders),
            np.split(weights, borders),
            strict=True,
        )
    )
