"""Exact integer rounding: half to even, as ONNX, torch.round and IEEE 754 round."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SHIFT", "divide_half_even"]

MAX_SHIFT = 62  # the largest power of two that divides as int64


def divide_half_even(value: npt.ArrayLike, divisor: npt.ArrayLike) -> npt.NDArray[Any]:
    """Divide integers and round half to even.

    Parameters
    ----------
    value, divisor : int64 arrays
        Broadcast against each other; divisors are positive.

    Examples
    --------
    >>> divide_half_even([1, 3, 5, -1, -3], 2)
    array([ 0,  2,  2,  0, -2])
    """
    value = np.asarray(value, np.int64)
    divisor = np.asarray(divisor, np.int64)
    quotient = value // divisor
    remainder = value - quotient * divisor
    # Compared as remainder against divisor - remainder: 2 * remainder may leave int64.
    other = divisor - remainder
    up = (remainder > other) | ((remainder == other) & (quotient & 1 == 1))
    return np.asarray(quotient + up)
