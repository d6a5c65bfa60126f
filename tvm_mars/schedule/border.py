"""Taps that only meet padding: which they are for part of a map, where a map is cut for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.maps import MapType
from mars_runtime.timing import inside

from ..graph import Conv, ConvTerm
from ..pack import PackedConv

if TYPE_CHECKING:
    from .plan import Step

__all__ = ["border_cuts", "least_macro_cycles", "met_pixels", "runs", "skipped_taps"]

# One axis of a term: kernel, stride, dilation, padding before the map, size of the map.
_Axis: TypeAlias = tuple[int, int, int, int, int]


def skipped_taps(
    arch: MarsArch,
    term: ConvTerm,
    source: MapType,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> int:
    """Give the mask of taps that SAS may pass over for some pixels, as :class:`isa.Sas` has it.

    A bit stands for a tap within the sub-kernel; in a kernel of more taps than a sub-kernel has,
    for all that share it.

    Parameters
    ----------
    rows, columns : (int, int)
        First pixel of the convolution's output, and how many.
    """
    if not _passes_over(arch, source):
        return 0
    vertical, horizontal = _axes(term, source)
    return _skipped(_met(vertical, *rows), _met(horizontal, *columns))


def border_cuts(
    arch: MarsArch, step: Step, types: Mapping[str, MapType]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the written rows and columns of a convolution from which on it meets other taps."""
    layer, out = step.layer, types[step.output]
    assert isinstance(layer, Conv)
    found: tuple[set[int], set[int]] = (set(), set())
    for term in layer.terms:
        source = types[term.input]
        if not _passes_over(arch, source):
            continue
        size = (out.height, out.width)
        for axis, cuts in enumerate(_cuts(*_axes(term, source), size, step.pooling)):
            found[axis].update(cuts)
    return tuple(sorted(found[0])), tuple(sorted(found[1]))


def met_pixels(
    arch: MarsArch,
    term: ConvTerm,
    source: MapType,
    size: tuple[int, int],
    cuts: tuple[Sequence[int], Sequence[int]],
    pooling: tuple[int, int] = (1, 1),
) -> npt.NDArray[Any]:
    """Give for each part of a map and each tap of a term how many pixels take accesses for it.

    Parameters
    ----------
    size : (int, int)
        Rows and columns written.
    cuts : two sequences of int
        Written rows and columns at which the map is cut into parts. In a part a tap that meets the
        map from any pixel takes accesses for all.
    pooling : (int, int)
        Pixels of the convolution for a written one.

    Returns
    -------
    int array ``[parts, taps]``, parts row by row
    """
    found = []
    for axis, written, at, pool in zip(_axes(term, source), size, cuts, pooling, strict=True):
        pieces = [(first * pool, count * pool) for first, count in runs(0, written, at)]
        met = [_met(axis, *piece) for piece in pieces]
        pixels = np.array([count for _, count in pieces])[:, None]
        found.append(pixels * (np.array(met) if _passes_over(arch, source) else np.ones_like(met)))
    rows, columns = found
    parts, taps = len(rows) * len(columns), rows.shape[1] * columns.shape[1]
    return np.asarray(np.einsum("ir,jc->ijrc", rows, columns).reshape(parts, taps))


def least_macro_cycles(
    arch: MarsArch, step: Step, packed: PackedConv, types: Mapping[str, MapType]
) -> npt.NDArray[Any]:
    """Give the macro cycles of a convolution if every written pixel has a CONV of its own.

    Returns
    -------
    int array ``[kernel blocks]``
    """
    layer, out = step.layer, types[step.output]
    assert isinstance(layer, Conv)
    size, cuts = (out.height, out.width), (range(out.height), range(out.width))
    found = np.zeros(len(packed.blocks), np.int64)
    for number, term in enumerate(layer.terms):
        source = types[term.input]
        by_tap = met_pixels(arch, term, source, size, cuts, step.pooling).sum(axis=0)
        accesses = arch.accesses(source.bits)
        taps = (block.taps[block.terms == number] for block in packed.blocks)
        found += [accesses * int(by_tap[one].sum()) for one in taps]
    return found


def runs(first: int, count: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs (first, count) into which cuts divide some positions."""
    for cut in cuts:
        if first < cut < first + count:
            yield first, cut - first
            first, count = cut, first + count - cut
    yield first, count


def _passes_over(arch: MarsArch, source: MapType) -> bool:
    """Tell whether padding is zero and such a zero skipped."""
    return arch.zero_skipping and not source.zero_point


def _axes(term: ConvTerm, source: MapType) -> tuple[_Axis, _Axis]:
    return (
        (term.kernel[0], term.stride[0], term.dilation[0], term.padding[0], source.height),
        (term.kernel[1], term.stride[1], term.dilation[1], term.padding[1], source.width),
    )


@functools.lru_cache(maxsize=8192)
def _met(axis: _Axis, first: int, count: int) -> tuple[bool, ...]:
    """Tell for each tap of an axis whether any of some pixels meets the map with it."""
    kernel, stride, dilation, padding, size = axis
    offset = first * stride - padding
    return tuple(inside(count, stride, offset + tap * dilation, size) > 0 for tap in range(kernel))


@functools.lru_cache(maxsize=8192)
def _skipped(rows: tuple[bool, ...], columns: tuple[bool, ...]) -> int:
    met = 0
    for row, in_row in enumerate(rows):
        for column, in_column in enumerate(columns):
            if in_row and in_column:
                met |= 1 << (row * len(columns) + column) % isa.TAPS_PER_SEGMENT
    taps = min(len(rows) * len(columns), isa.TAPS_PER_SEGMENT)
    return (1 << taps) - 1 & ~met


@functools.lru_cache(maxsize=1024)
def _cuts(
    vertical: _Axis, horizontal: _Axis, size: tuple[int, int], pooling: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows = [
        _skipped(_met(vertical, y * pooling[0], pooling[0]), (True,) * horizontal[0])
        for y in range(size[0])
    ]
    columns = [
        _skipped((True,) * vertical[0], _met(horizontal, x * pooling[1], pooling[1]))
        for x in range(size[1])
    ]
    return _changes(rows), _changes(columns)


def _changes(masks: Sequence[int]) -> tuple[int, ...]:
    return tuple(at for at in range(1, len(masks)) if masks[at] != masks[at - 1])
