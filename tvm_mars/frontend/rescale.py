"""TVM's ``qnn.requantize`` in the terms of MARS's requantization, proved equal or refused.

TVM rounds exact halves up or away from zero (``rounding``), in 64-bit integers or in floating
point (``compute_dtype``); MARS multiplies by 31 bits and rounds half to even. The two differ where
a product is an exact half, which most multipliers never give on accumulators of 32 bits, or where
TVM's floating point rounds twice. Where halves occur, one more unit in the multiplier moves them
away from zero, and a bit below the accumulator's last one, always set, moves them up. Whether that
is TVM's result for every accumulator that can occur is not argued but checked: both are monotone,
so they are equal if they are at the steps of one of them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import UnsupportedError
from mars_runtime.rounding import MAX_SHIFT

from ..graph import Requant
from .spec import Requantizer, Rescale

__all__ = ["Expressed", "express", "fixed_point", "limited", "rescale"]

Array: TypeAlias = npt.NDArray[Any]

_INT32 = 2**31
# Bits below the accumulator's last: as many as an exact half needs whose ratio is odd / 2**n.
_LIFTS = (0, 1, 2, 4, 8)
# (offset, nudge): what is added to the lifted accumulator, and to the multiplier.
_PLAIN, _AWAY, _UP = (0, 0), (0, 1), (1, 0)


def fixed_point(real: Array) -> tuple[Array, Array]:
    """Give int32 multipliers in [2**30, 2**31) and shifts: ``real`` to 31 bits.

    The quotient of float32 scales is taken in float64, whose products of two are exact.
    """
    if np.all(real == real[0]):
        real = real[:1]
    mantissa, exponent = np.frexp(real)
    multiplier = np.rint(np.ldexp(mantissa, 31))
    exponent = exponent + (multiplier == 2**31)
    multiplier = np.where(multiplier == 2**31, 2**30, multiplier)
    shift = 31 - exponent
    if shift.min() < 0:
        raise UnsupportedError(f"requantization multiplies by {real.max():g}, at most 2**31")
    over = np.maximum(shift - MAX_SHIFT, 0)  # so small that its low bits cannot matter
    return np.rint(np.ldexp(multiplier, -over)).astype(np.int64), shift - over


# -- what TVM computes -----------------------------------------------------------------------------


def rescale(spec: Rescale, steps: Array) -> Array:
    """Give what TVM's CPU build gives.

    Parameters
    ----------
    steps : int64 array ``[..., channels]``
        Integers of 32 bits.

    Raises
    ------
    UnsupportedError
        If TVM's own result leaves 32 bits.
    """
    limited = np.clip(steps, spec.floor, spec.ceiling)
    compute = _in_integers if spec.compute_dtype == "int64" else _in_floats
    result = compute(spec, limited)
    if result.size and np.abs(result).max() >= _INT32:
        raise _overflow(spec)
    return result


def limited(spec: Requantizer) -> Requantizer:
    """Give a requantizer whose codes have the limits that those of its steps leave them."""
    one, zero = spec.rescale, int(spec.codes.zero_point[0])
    low, high = spec.low, spec.high
    if one.floor.min() > -_INT32:
        low = int(np.clip(rescale(one, one.floor).min() + zero, low, high))
    if one.ceiling.max() < _INT32 - 1:
        high = int(np.clip(rescale(one, one.ceiling).max() + zero, low, high))
    return attrs.evolve(spec, low=low, high=high)


def _overflow(spec: Rescale) -> UnsupportedError:
    return UnsupportedError(
        f"TVM's requantization by {float(spec.ratio.max()):g} leaves 32 bits on these accumulators"
    )


def _in_integers(spec: Rescale, steps: Array) -> Array:
    mantissa, exponent = np.frexp(spec.ratio)
    multiplier = np.floor(np.ldexp(mantissa, 31) + 0.5).astype(np.int64)
    exponent = exponent + (multiplier == 2**31)
    multiplier = np.where(multiplier == 2**31, 2**30, multiplier)
    shift = (31 - exponent).astype(np.int64)
    if shift.min() < 1 or shift.max() > MAX_SHIFT:
        raise _overflow(spec)
    half = np.int64(1) << (shift - 1)
    # By a power of two TVM adds the half in 32 bits.
    halves = np.where(multiplier == 2**30, half >> 30, 0)
    if (np.abs(steps) + halves).max(initial=0) >= _INT32:
        raise _overflow(spec)
    product = steps * multiplier
    away = int(spec.rounding == "TONEAREST")
    return np.asarray((product + half - away * (product < 0)) >> shift)


def _in_floats(spec: Rescale, steps: Array) -> Array:
    real = np.dtype(spec.compute_dtype).type
    product = steps.astype(real) * spec.ratio.astype(real)
    if spec.rounding == "UPWARD":
        return np.asarray(np.floor(product + real(0.5))).astype(np.int64)
    whole = np.trunc(product)
    return np.asarray(whole + np.sign(product) * (np.abs(product - whole) >= 0.5)).astype(np.int64)


# -- the same on MARS ------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Expressed:
    """What computes a requantization: of ``(accumulator << lift) + offset`` (one per channel)."""

    requant: Requant
    lift: int
    offset: Array


def express(spec: Requantizer, lowest: Array, highest: Array, base: int, bits: int) -> Expressed:
    """Express a requantization of accumulators.

    Parameters
    ----------
    lowest, highest : int64 arrays, one per channel
        Which accumulators can occur.
    base, bits : int
        The code that is stored as 0, and the width of the stored codes.

    Raises
    ------
    UnsupportedError
        If MARS cannot give the same codes for all of them, with the ratio that it cannot express.
    """
    multiplier, shift = fixed_point(spec.rescale.ratio)
    multiplier, shift, _ = (
        np.array(array) for array in np.broadcast_arrays(multiplier, shift, lowest)
    )
    zero = int(spec.codes.zero_point[0]) - base
    if not 0 <= zero < 2**bits:
        return _express_moved(spec, lowest, highest, base, bits)
    requant = Requant(multiplier, shift, bits, zero, spec.low - base, spec.high - base)
    reach = int(max(np.abs(lowest).max(), np.abs(highest).max()))
    open_channels = np.ones(lowest.shape, bool)
    for lift in _LIFTS:
        if (reach << lift) + 1 >= _INT32 or int(shift.max()) + lift > MAX_SHIFT:
            break
        offset, nudge = np.zeros_like(lowest), np.zeros_like(lowest)
        open_channels = np.ones(lowest.shape, bool)
        for offsets, nudges in (_PLAIN, _AWAY, _UP) if lift else (_PLAIN, _AWAY):
            nudged = np.minimum(multiplier + nudges, _INT32 - 1)
            tried = attrs.evolve(requant, multiplier=nudged, shift=shift + lift)
            equal = _equal(spec, tried, lift, offsets, lowest, highest, base)
            offset[open_channels & equal] = offsets
            nudge[open_channels & equal] = nudges
            open_channels &= ~equal
        if not open_channels.any():
            nudged = np.minimum(multiplier + nudge, _INT32 - 1)
            return Expressed(_shortest(requant, nudged, shift + lift), lift, offset)
    raise _inexpressible(
        spec, float(np.broadcast_to(spec.rescale.ratio, lowest.shape)[open_channels][0]), reach
    )


def _express_moved(
    spec: Requantizer, lowest: Array, highest: Array, base: int, bits: int
) -> Expressed:
    """Express codes whose zero is no code of theirs: accumulators are moved by what it lacks.

    That is no whole number of accumulators, but one of parts of them as small as 32 bits allow.
    """
    multiplier, shift = fixed_point(spec.rescale.ratio)
    ratio = float(spec.rescale.ratio[0])
    wanted = int(spec.codes.zero_point[0]) - base
    zero = min(max(wanted, 0), 2**bits - 1)
    moved = (wanted - zero) / ratio
    reach = int(max(np.abs(lowest).max(), np.abs(highest).max()))
    lift = 30 - int(np.ceil(np.log2(reach + abs(moved) + 1)))
    requant = Requant(multiplier, shift + lift, bits, zero, spec.low - base, spec.high - base)
    for nearby in (0, -1, 1):
        offset = round(moved * 2.0**lift) + nearby
        if lift > 0 and _equal(spec, requant, lift, offset, lowest, highest, base).all():
            return Expressed(requant, lift, np.full_like(lowest, offset))
    raise _inexpressible(spec, ratio, reach)


def _inexpressible(spec: Requantizer, ratio: float, reach: int) -> UnsupportedError:
    return UnsupportedError(
        f"requantizes by {ratio:g} with rounding {spec.rescale.rounding} in "
        f"{spec.rescale.compute_dtype}: accumulators up to {reach} meet halves that MARS rounds to "
        "another code"
    )


def _shortest(requant: Requant, multiplier: Array, shift: Array) -> Requant:
    """Give one multiplier and shift for all channels where they are the same."""
    if len(set(multiplier.tolist())) == len(set(shift.tolist())) == 1:
        multiplier, shift = multiplier[:1], shift[:1]
    return attrs.evolve(requant, multiplier=multiplier, shift=shift)


def _equal(
    spec: Requantizer,
    requant: Requant,
    lift: int,
    offset: int,
    lowest: Array,
    highest: Array,
    base: int,
) -> Array:
    """Tell for each channel whether MARS gives TVM's code for every accumulator in its range.

    Looked at are the accumulators around each step of MARS's codes. Both give codes that never
    fall as accumulators rise, so between two of these with one code there is no other.
    """
    codes = np.arange(requant.low + 1, requant.high + 1)[:, None]
    # Where the product passes a half; float64 is within one of it.
    halves = np.ldexp((codes - requant.zero_point - 0.5) / requant.multiplier, requant.shift)
    near = np.floor(np.ldexp(halves - offset, -lift))
    near = np.clip(near, -2.0 * _INT32, 2.0 * _INT32).astype(np.int64)
    points = np.concatenate([near + step for step in (-2, -1, 0, 1, 2)])
    points = np.concatenate([points, lowest[None], highest[None]])
    points = np.sort(np.clip(points, lowest, highest), axis=0)
    ours = requant.apply(((points << lift) + offset)[..., None, None])[..., 0, 0] + base
    zero = int(spec.codes.zero_point[0])
    theirs = np.clip(rescale(spec.rescale, points) + zero, spec.low, spec.high)
    gaps = (np.diff(points, axis=0) > 1) & (np.diff(ours, axis=0) != 0)
    return np.asarray((ours == theirs).all(axis=0) & ~gaps.any(axis=0))
