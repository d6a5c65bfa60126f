"""Ranges: how a trained network's maps fit into 0..1.

Eq. 5 stores 0..1, a trained network's maps reach further, so each is divided by a constant, its
range, which goes into gamma and beta of the layer that gives it. Maps that meet in an addition, or
that a pool passes on, share theirs. Of the ranges tried, each map takes the one with the least
squared error, of its own codes and of the weights that the range scales.

Here are plain arrays, so that networks in training (:mod:`tvm_mars.qat`) and float networks of any
importer find their ranges by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from .fold import Freedom, noise, per_kernel, quantize_weight

__all__ = ["Kernels", "RangedMap", "choose_ranges", "result_range", "sample_stride"]

Array: TypeAlias = npt.NDArray[Any]

CANDIDATES = 40  # ranges that are tried, evenly spaced up to the largest value
SAMPLES = 100_000  # of a map's values, by which a range is chosen
WEIGHTS = 2**18  # of a layer, or every so many-th kernel, by which a range is chosen
ROOM = 1.5  # for the growth of a last layer's weights in training
PASSES = 2  # as a map's weights are scaled by its input's range, too, which is chosen like it


@attrs.frozen(eq=False)
class Kernels:
    """What one term of a map's sum quantizes.

    Parameters
    ----------
    input : str
        The map that it reads.
    normalized : float array ``[O, ...]``
        ``W^`` of eq. 6.
    scale : float array ``[O]``
        What multiplies it, as if no map were divided by anything.
    gamma : float array ``[O]`` or None
        Of the normalization behind it, if there is one: the deviation of the channel.
    freedom : Freedom, optional
        What the scaled weights may be divided by; None: nothing, as in eq. 7.
    """

    input: str
    normalized: Array
    scale: Array
    bits: int
    gamma: Array | None = None
    freedom: Freedom | None = None


@attrs.frozen(eq=False)
class RangedMap:
    """A map whose range is to be chosen.

    Parameters
    ----------
    values : float array, optional
        Samples of a map that eq. 5 stores; None of one that has no error of its own, such as a max
        pool's.
    tied : tuple of str
        Earlier maps whose range it shares.
    growth : float
        Its range over that of the maps that it is tied to.
    ceiling : float
        Where its ReLU ends, which only a range up to there does; ``values`` are those without.
    fixed : bool
        Whether its range is 1: a network's input, which is in 0..1.
    """

    name: str
    bits: int
    values: Array | None = None
    kernels: tuple[Kernels, ...] = ()
    tied: tuple[str, ...] = ()
    growth: float = 1.0
    ceiling: float = math.inf
    fixed: bool = False


def choose_ranges(maps: Sequence[RangedMap], moments: Mapping[str, float]) -> dict[str, float]:
    """Choose the range of every map.

    Parameters
    ----------
    maps : sequence of RangedMap
        In topological order.
    moments : mapping of str to float
        Mean square of each map that a kernel without a normalization reads.

    Returns
    -------
    dict of str to float
        By name.
    """
    groups = _groups(maps)
    bases = [_largest(members) for members in groups]
    ranges: dict[str, float] = {}

    def note(at: int) -> None:
        ranges.update({entry.name: bases[at] * factor for entry, factor in groups[at]})

    for at in range(len(groups)):
        note(at)
    for _ in range(PASSES):
        for at, members in enumerate(groups):
            bases[at] = _best(members, bases[at], ranges, moments)
            note(at)
    return ranges


def sample_stride(count: int, size: int) -> int:
    """Give the step by which some of a map's values are taken.

    Parameters
    ----------
    count, size : int
        Values of all images, and of one. The step has no factor in common with ``size``: a multiple
        of the width would meet one column alone.

    Examples
    --------
    >>> sample_stride(1_600_000, 16 * 16)
    17
    """
    stride = max(1, count // SAMPLES)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def result_range(peaks: Sequence[float], room: float = ROOM) -> float:
    """Give the power of two that brings the weights of a last layer below 1, with some room.

    Parameters
    ----------
    peaks : sequence of float
        The largest scaled weight of each term.
    """
    largest = max(peaks, default=0.0)
    return float(2.0 ** math.ceil(math.log2(room * largest))) if largest > 0 else 1.0


_Member: TypeAlias = "tuple[RangedMap, float]"


def _groups(maps: Sequence[RangedMap]) -> list[list[_Member]]:
    """Give the maps that share a range, each with its range over the group's."""
    members: dict[str, list[_Member]] = {}
    home: dict[str, str] = {}
    factors: dict[str, float] = {}
    for entry in maps:
        home[entry.name], factors[entry.name] = entry.name, 1.0
        members[entry.name] = [(entry, 1.0)]
        for name in entry.tied:
            into, moved = home[name], home[entry.name]
            if into == moved:
                continue
            ratio = factors[name] * entry.growth / factors[entry.name]
            for other, factor in members.pop(moved):
                home[other.name], factors[other.name] = into, factor * ratio
                members[into].append((other, factor * ratio))
    return list(members.values())


def _largest(members: Sequence[_Member]) -> float:
    """Give the range that holds every value of a group, 1 of one that is fixed or empty."""
    found = [
        min(float(entry.values.max()), entry.ceiling) / factor
        for entry, factor in members
        if entry.values is not None
    ]
    fixed = any(entry.fixed for entry, _ in members)
    return max(found) if found and not fixed and max(found) > 0 else 1.0


def _best(
    members: Sequence[_Member],
    now: float,
    ranges: Mapping[str, float],
    moments: Mapping[str, float],
) -> float:
    """Give the constant with the least squared error, summed over the maps that share it."""
    stored = [(entry, factor) for entry, factor in members if entry.values is not None]
    if not stored or any(entry.fixed for entry, _ in members):
        return now
    largest = _largest(members)
    spans = [largest * i / CANDIDATES for i in range(1, CANDIDATES + 1)]
    errors = [
        sum(_error(entry, span * factor, ranges, moments) for entry, factor in stored)
        for span in spans
    ]
    return spans[errors.index(min(errors))]


def _error(
    entry: RangedMap, span: float, ranges: Mapping[str, float], moments: Mapping[str, float]
) -> float:
    assert entry.values is not None
    noise = sum(_weight_error(kernels, span, ranges, moments) for kernels in entry.kernels)
    return _map_error(entry.values, span, entry.bits, entry.ceiling) + noise


def _map_error(values: Array, span: float, bits: int, ceiling: float) -> float:
    """Squared error of eq. 5 on a map over a range."""
    values, top = np.maximum(values, 0), 2**bits - 1
    codes = np.rint(np.minimum(values / span, 1) * top)
    wrong = codes * (span / top) - np.minimum(values, ceiling)
    return float(np.square(wrong).mean(dtype=np.float64))


def _weight_error(
    kernels: Kernels, span: float, ranges: Mapping[str, float], moments: Mapping[str, float]
) -> float:
    """Squared error of a map from the rounding and clamping of its scaled weights.

    The larger the range, the fewer codes the weights reach. A ReLU passes half of the noise.
    """
    some = slice(None, None, max(1, kernels.normalized.size // WEIGHTS))
    normalized, before = kernels.normalized[some], ranges[kernels.input]
    scale = kernels.scale[some] * (before / span)
    half = 2 ** (kernels.bits - 1)
    wanted = normalized * per_kernel(scale, normalized)
    gamma, unit = None if kernels.gamma is None else kernels.gamma[some], 1.0
    if kernels.freedom is not None:
        unit = 2.0 ** kernels.freedom.exponent(wanted, kernels.bits, gamma)
    got = quantize_weight(normalized, scale / unit, kernels.bits) * (unit * half / (half - 1))
    found = noise(got, wanted, gamma) / 2
    if gamma is not None:
        return found
    return found * (span / before) ** 2 * moments[kernels.input]
