"""How weights and parameters lie in the off-chip image, the SRAMs and the macros.

A group-set of 8-bit weights takes 256 bytes, ``[input / 4][output 16][input 4]``, the operand order
of dot-product instructions; 4-bit weights take half, two in a byte, the earlier in the low nibble.
The parameters of a kernel block are its 16 biases (int32), followed in multiplier mode by 16
multipliers (int32) and 16 shifts (uint8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .maps import WORD_CHANNELS

__all__ = [
    "LANES",
    "block_parameter_bytes",
    "group_set_bytes",
    "pack_group_sets",
    "pack_parameters",
    "unpack_group_sets",
    "unpack_nibbles",
    "unpack_parameters",
]

LANES = 4  # inputs of one 32-bit dot-product step


def group_set_bytes(weight_bits: int) -> int:
    """Bytes of a packed group-set."""
    return WORD_CHANNELS * WORD_CHANNELS * weight_bits // 8


def pack_group_sets(weights: npt.NDArray[np.int8], weight_bits: int) -> npt.NDArray[np.uint8]:
    """Pack group-sets ``[n, output 16, input 16]`` to bytes ``[n, group_set_bytes]``."""
    shaped = weights.reshape(-1, WORD_CHANNELS, WORD_CHANNELS // LANES, LANES)
    flat = np.ascontiguousarray(shaped.swapaxes(1, 2)).reshape(len(shaped), -1).view(np.uint8)
    if weight_bits == 8:
        return flat
    return np.asarray((flat[:, 0::2] & 15) | (flat[:, 1::2] << 4), np.uint8)


def unpack_group_sets(packed: npt.NDArray[np.uint8], weight_bits: int) -> npt.NDArray[np.int8]:
    """Unpack bytes to group-sets ``[n, input 16, output 16]``, the order of a matrix product."""
    flat = packed.reshape(-1, group_set_bytes(weight_bits))
    weights = unpack_nibbles(flat) if weight_bits == 4 else flat.view(np.int8)
    shaped = weights.reshape(-1, WORD_CHANNELS // LANES, WORD_CHANNELS, LANES)
    return np.ascontiguousarray(shaped.swapaxes(2, 3)).reshape(-1, WORD_CHANNELS, WORD_CHANNELS)


def unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Unpack 4-bit weights ``[n, bytes]`` to ``[n, 2 * bytes]``."""
    nibbles = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    nibbles[:, 0::2] = packed << 4
    nibbles[:, 1::2] = packed & 0xF0
    return nibbles.view(np.int8) >> 4


def block_parameter_bytes(with_multiplier: bool) -> int:
    """Bytes of a kernel block's parameters."""
    return WORD_CHANNELS * (4 + (4 + 1) * with_multiplier)


def pack_parameters(
    bias: npt.NDArray[Any], multiplier: npt.NDArray[Any] | None, shift: npt.NDArray[Any] | None
) -> npt.NDArray[np.uint8]:
    """Pack parameters of blocks, each ``[blocks, 16]``, to bytes ``[blocks, ...]``."""
    parts = [np.ascontiguousarray(bias, "<i4").view(np.uint8)]
    if multiplier is not None and shift is not None:
        parts += [np.ascontiguousarray(multiplier, "<i4").view(np.uint8), shift.astype(np.uint8)]
    return np.concatenate(parts, axis=1)


def unpack_parameters(
    packed: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Unpack one block's parameters: int64 biases, multipliers and shifts (empty in shift mode)."""
    words = packed[: len(packed) - len(packed) % (4 * WORD_CHANNELS)].view("<i4").astype(np.int64)
    shifts = packed[4 * len(words) :].astype(np.int64)
    return words[:WORD_CHANNELS], words[WORD_CHANNELS:], shifts
