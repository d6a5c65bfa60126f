"""Convolutions and pools of float maps ``[N, C, H, W]``, by matrix products of NumPy's BLAS."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import graph as ir
from .network import FloatPool, Term

__all__ = ["convolve", "mean_windows", "pool", "product_of_means"]

Array: TypeAlias = npt.NDArray[Any]


def convolve(x: Array, weight: Array, term: Term) -> Array:
    """Convolve a batch with other weights than the term's own, without bias."""
    if term.dense:
        return np.asarray(x.reshape(len(x), -1) @ weight.T)[:, :, None, None]
    padded = ir._pad(x, term.padding, 0)
    images, channels = padded.shape[:2]
    out = _out_size(padded, term)
    grouped = weight.reshape(term.groups, -1, *weight.shape[1:])
    total = np.zeros((images, term.groups, grouped.shape[1], out[0] * out[1]), x.dtype)
    for r, c, pixels in _taps(padded, term, out):
        columns = pixels.reshape(images, term.groups, channels // term.groups, -1)
        tap = grouped[:, :, :, r, c]
        # One input each: a sum of products would be a matrix product per channel.
        total += tap * columns if tap.shape[2] == 1 else tap @ columns
    return total.reshape(images, len(weight), *out)


def mean_windows(x: Array, term: Term) -> Array:
    """Give the mean of what each weight of a kernel meets, ``[C, KH, KW]`` or ``[I]`` (float64)."""
    if term.dense:
        return np.asarray(x.reshape(len(x), -1).mean(0, dtype=np.float64))
    padded = ir._pad(x, term.padding, 0)
    found = np.empty((padded.shape[1], *term.weight.shape[2:]), np.float64)
    for r, c, pixels in _taps(padded, term, _out_size(padded, term)):
        found[:, r, c] = pixels.mean((0, 2, 3), dtype=np.float64)
    return found


def product_of_means(weight: Array, means: Array, term: Term) -> Array:
    """Give the mean of a convolution, ``[O]``, by the means of what its weights meet."""
    if term.dense:
        return np.asarray(weight.astype(np.float64) @ means)
    grouped = weight.astype(np.float64).reshape(term.groups, -1, *weight.shape[1:])
    met = means.reshape(term.groups, 1, -1, *means.shape[1:])
    return np.asarray((grouped * met).sum((2, 3, 4)).reshape(-1))


def _out_size(padded: Array, term: Term) -> tuple[int, int]:
    kernel = term.weight.shape[2:]
    height, width = (
        ir.window_size(size, k, s, 0, 0, d)
        for size, k, s, d in zip(padded.shape[2:], kernel, term.stride, term.dilation, strict=True)
    )
    return height, width


def _taps(padded: Array, term: Term, out: tuple[int, int]) -> Any:
    kernel = (term.weight.shape[2], term.weight.shape[3])
    return ir._taps(padded, kernel, term.stride, out, term.dilation)


def pool(x: Array, layer: FloatPool) -> Array:
    """Pool a batch of maps, none of which is negative."""
    _, channels, height, width = x.shape
    # No map that is pooled is negative.
    padded = ir._pad(x, layer.padding, 0)
    source = ir.MapType(channels, height, width, 8)
    out = ir._window_shape(source, layer.kernel, layer.stride, layer.padding)
    taps = [pixels for _, _, pixels in ir._taps(padded, layer.kernel, layer.stride, out)]
    if layer.mode == "max":
        return np.asarray(np.maximum.reduce(taps))
    inside = ir._pad(np.ones((1, 1, *x.shape[2:]), x.dtype), layer.padding,
                     int(layer.count_include_pad))  # fmt: skip
    counts = [pixels for _, _, pixels in ir._taps(inside, layer.kernel, layer.stride, out)]
    return np.asarray(sum(taps) / sum(counts))
