"""The exact arithmetic of the machine: convolution of group-sets, APW, on batches of images.

Products are summed in float32 by a matrix product where that is proved exact: the sum of 32
group-sets of 255 x -128 stays below 2**24, so that no addition of it rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .maps import WORD_CHANNELS

__all__ = ["convolve_group_sets", "max_windows"]

_EXACT = 2**24
_WORST_PRODUCT = 255 * 128
GROUP_SETS_PER_PRODUCT = _EXACT // (_WORST_PRODUCT * WORD_CHANNELS)

Array = npt.NDArray[Any]


def convolve_group_sets(
    patch: npt.NDArray[np.float32],
    weights: npt.NDArray[np.int8],
    places: Sequence[tuple[int, int, int]],
    out: tuple[int, int],
    stride: tuple[int, int],
) -> Array:
    """Multiply and add group-sets over a tile.

    Parameters
    ----------
    patch : float32 array ``[N, block, row, column, 16]``
        Codes of the input, padding included.
    weights : int8 array ``[n, input 16, output 16]``
        The group-sets.
    places : n triples (block, row, column)
        Where in the patch output pixel (0, 0) meets each group-set.

    Returns
    -------
    int64 array ``[N, height, width, 16]``
    """
    images = patch.shape[0]
    total = np.zeros((images, *out, WORD_CHANNELS), np.int64)
    for at in range(0, len(places), GROUP_SETS_PER_PRODUCT):
        chunk = places[at : at + GROUP_SETS_PER_PRODUCT]
        pixels = np.empty((images, *out, len(chunk), WORD_CHANNELS), np.float32)
        for i, (block, row, column) in enumerate(chunk):
            pixels[:, :, :, i] = patch[
                :,
                block,
                row : row + (out[0] - 1) * stride[0] + 1 : stride[0],
                column : column + (out[1] - 1) * stride[1] + 1 : stride[1],
            ]
        matrix = weights[at : at + len(chunk)].astype(np.float32).reshape(-1, WORD_CHANNELS)
        product = pixels.reshape(-1, len(matrix)) @ matrix
        total += product.reshape(total.shape).astype(np.int64)
    return total


def max_windows(codes: Array, height: int, width: int) -> Array:
    """Take the largest code of each window of ``[N, H, W, 16]``."""
    if height == width == 1:
        return codes
    images, rows, columns, channels = codes.shape
    windows = codes.reshape(images, rows // height, height, columns // width, width, channels)
    return np.asarray(windows.max(axis=(2, 4)))
