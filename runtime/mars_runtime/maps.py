"""Feature maps as the machine stores them: words of 16 channels, in nibble planes."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

__all__ = ["RAW_BITS", "WORD_BYTES", "WORD_CHANNELS", "MapType", "pack_map", "unpack_map"]

WORD_CHANNELS = 16  # a 64-bit word holds a nibble of each (the paper's map layout)
WORD_BYTES = WORD_CHANNELS // 2
RAW_BITS = 32  # a map of accumulators that nothing requantizes


@attrs.frozen
class MapType:
    """Shape and code range of a map, per image.

    ``bits`` is 4 or 8, or 32 for raw accumulators; ``zero_point`` is the stored code of zero.
    """

    channels: int
    height: int
    width: int
    bits: int
    zero_point: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (self.channels, self.height, self.width)

    @property
    def blocks(self) -> int:
        """Channel blocks."""
        return -(-self.channels // WORD_CHANNELS)

    @property
    def planes(self) -> int:
        """Words per pixel and channel block."""
        return self.bits * WORD_CHANNELS // (8 * WORD_BYTES)

    @property
    def words(self) -> int:
        """64-bit words of the whole map."""
        return self.planes * self.blocks * self.height * self.width

    def __str__(self) -> str:
        zero = f" z{self.zero_point}" if self.zero_point else ""
        return f"{self.channels}x{self.height}x{self.width} u{self.bits}{zero}"


def join_nibbles(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Give the codes of words: ``[planes, ..., 8]`` bytes to ``[..., 16]`` codes."""
    codes = np.empty((*planes.shape[1:-1], WORD_CHANNELS), np.uint8)
    codes[..., 0::2] = planes[0] & 15
    codes[..., 1::2] = planes[0] >> 4
    if len(planes) == 2:
        codes[..., 0::2] |= planes[1] << 4
        codes[..., 1::2] |= planes[1] & 0xF0
    return codes


def split_nibbles(codes: npt.NDArray[np.uint8], planes: int) -> npt.NDArray[np.uint8]:
    """Give the words of codes: ``[..., 16]`` codes to ``[planes, ..., 8]`` bytes."""
    even, odd = codes[..., 0::2], codes[..., 1::2]
    words = np.empty((planes, *even.shape), np.uint8)
    words[0] = (even & 15) | (odd << 4)
    if planes == 2:
        words[1] = (even >> 4) | (odd & 0xF0)
    return words


def pack_map(codes: npt.NDArray[Any], type: MapType) -> npt.NDArray[np.uint8]:
    """Store codes ``[N, C, H, W]`` as words ``[N, words, 8]``; absent channels hold code 0."""
    images = codes.shape[0]
    padded = np.zeros((images, type.blocks, WORD_CHANNELS, type.height, type.width), np.uint8)
    padded.reshape(images, -1, type.height, type.width)[:, : type.channels] = codes
    words = split_nibbles(padded.transpose(0, 1, 3, 4, 2), type.planes)
    return np.ascontiguousarray(words.swapaxes(0, 1)).reshape(images, type.words, WORD_BYTES)


def unpack_map(words: npt.NDArray[np.uint8], type: MapType) -> npt.NDArray[Any]:
    """Read codes (uint8) or accumulators (int32) ``[N, C, H, W]`` from words ``[N, words, 8]``."""
    images = words.shape[0]
    if type.bits == RAW_BITS:
        raw = np.ascontiguousarray(words).view("<i4")
        shaped = raw.reshape(images, type.blocks, type.height, type.width, WORD_CHANNELS)
    else:
        grid = words.reshape(images, type.planes, type.blocks, type.height, type.width, WORD_BYTES)
        shaped = join_nibbles(grid.swapaxes(0, 1))
    channels = shaped.transpose(0, 1, 4, 2, 3).reshape(images, -1, type.height, type.width)
    return np.ascontiguousarray(channels[:, : type.channels])
