"""Equations 6 to 8 on NumPy arrays: from trained weights to weight codes.

Eq. 6 divides tanh(W) by its largest magnitude in each group of kernels. Trained weights are not to
be bent by a tanh, so they count as its results: the latent weights of eq. 6 are ``atanh(s * W)``
with any ``s`` that keeps them finite, and ``W^ = W / max|W|`` whatever ``s`` is. That is how
:mod:`tvm_mars.qat` takes over a trained network, too.

Source: Sie et al., TCAD 2022, eq. 6 to 8.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from ..graph import EXACT

__all__ = ["Freedom", "group_peak", "noise", "per_kernel", "quantize_weight", "round_bias"]

Array: TypeAlias = npt.NDArray[Any]

GUARD = 2  # bits that sums, and so biases, keep below the last one of their map's codes
SUMS = EXACT / 2  # of weights and codes; the rest is for the bias


def group_peak(weight: Array, group: int) -> Array:
    """Largest magnitude in each group of kernels, one per kernel; 1 where all are zero.

    Examples
    --------
    >>> group_peak(np.array([[0.5, -2.0], [1.0, 0.0], [0.0, 0.0]]), 2)
    array([2., 2., 1.])
    """
    peak = np.abs(weight).reshape(len(weight), -1).max(1)
    blocks = np.pad(peak, (0, -len(peak) % group)).reshape(-1, group).max(1)
    blocks = np.where(blocks > 0, blocks, np.ones_like(blocks))
    return np.asarray(blocks.repeat(group)[: len(peak)])


def per_kernel(values: Array, weight: Array) -> Array:
    """Shape one value per kernel so that it multiplies weights."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


@attrs.frozen
class Freedom:
    """What a term's weights may be divided by before eq. 8: powers of two.

    The sums then lie on another power of two, which costs the machine nothing: its requantization
    shifts anyway.

    Parameters
    ----------
    lowest, highest : int
        Between which the exponent is.
    largest_code : int
        Of the map that the weights meet: their sums are to stay in the integers of float32.
    """

    lowest: int
    highest: int
    largest_code: int

    @classmethod
    def of(cls, input_bits: int, weight_bits: int, result_bits: int) -> Freedom:
        """Give that of a term whose sums eq. 5 makes codes of ``result_bits``."""
        grid = input_bits + weight_bits - 1
        # The clamped sums, times 2**bits - 1, are to stay in the integers of float32 as well.
        lowest = grid + result_bits - EXACT.bit_length() + 1
        return cls(lowest, grid - result_bits - GUARD, 2**input_bits - 1)

    def exponent(self, scaled: Array, bits: int, gamma: Array | None = None) -> int:
        """Give the exponent with the least error of eq. 7 and 8 on scaled weights.

        Parameters
        ----------
        scaled : float array ``[O, ...]``
            ``scale * W^``.
        gamma : float array ``[O]``, optional
            See :func:`noise`. Without it, the error is the weights' own.
        """
        sums = np.abs(scaled).reshape(len(scaled), -1)
        peak, total = float(sums.max()), float(sums.sum(1).max())
        if peak == 0:
            return min(max(0, self.lowest), self.highest)
        half = 2 ** (bits - 1)
        fitting = math.log2(total * half * self.largest_code / SUMS)
        lowest = max(self.lowest, math.ceil(fitting))
        whole = max(min(math.ceil(math.log2(peak)), self.highest), lowest)
        ones = np.ones(len(scaled), scaled.dtype)

        def error(exponent: int) -> float:
            unit = 2.0**exponent
            return noise(quantize_weight(scaled, ones / unit, bits) * unit, scaled, gamma)

        best, least = whole, error(whole)
        while best > lowest and (smaller := error(best - 1)) < least:
            best, least = best - 1, smaller
        return best


def noise(got: Array, wanted: Array, gamma: Array | None) -> float:
    """Mean square, over the channels, of what the errors of their kernels add to their sums.

    Parameters
    ----------
    got, wanted : float array ``[O, ...]``
        Weights, and what they should be.
    gamma : float array ``[O]`` or None
        Of the normalization behind them, if there is one: the deviation of each channel, so that
        the relative error of its kernel makes that share of it noise. Without one, over the mean
        square of the input, as the weights' errors are independent.
    """
    wrong = np.square(got - wanted).reshape(len(wanted), -1).sum(1)
    if gamma is None:
        return float(wrong.mean())
    power = np.square(wanted).reshape(len(wanted), -1).sum(1)
    share = wrong / np.where(power > 0, power, 1.0)
    return float((np.square(gamma) * share).mean())


def quantize_weight(normalized: Array, scale: Array, bits: int) -> Array:
    """Eq. 7 and 8: ``round(clamp(scale * W^, -1, 1) * (2**(bits-1) - 1)) / 2**(bits-1)``.

    Parameters
    ----------
    normalized : float array ``[O, ...]``
        ``W^``.
    scale : float array ``[O]``
        ``gamma / sqrt(var + eps)``.

    Examples
    --------
    >>> 128 * quantize_weight(np.array([[1.0, -0.25]]), np.array([1.0]), 8)
    array([[127., -32.]])
    """
    half = 2 ** (bits - 1)
    scaled = normalized * per_kernel(scale.astype(normalized.dtype), normalized)
    return np.asarray(np.rint(np.clip(scaled, -1, 1) * (half - 1)) / half)


def round_bias(bias: Array, grid: int) -> Array:
    """Round half to even to codes of ``2**-grid``, int32."""
    info = np.iinfo(np.int32)
    return np.clip(np.rint(bias * 2.0**grid), info.min, info.max).astype(np.int32)
