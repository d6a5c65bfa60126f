"""A region's computation as whole layers on whole maps, and its bytes for the cache."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, TypeAlias, get_origin

import attrs
import cattrs
import numpy as np
import numpy.typing as npt

from . import isa
from .quantize import Quantize

__all__ = [
    "AddLayer",
    "ConvLayer",
    "Entry",
    "Layer",
    "Layers",
    "Map",
    "PoolLayer",
    "Source",
    "dump",
    "load",
]

Array: TypeAlias = npt.NDArray[Any]


@attrs.frozen
class Map:
    """A whole map: its size, its code width (32: accumulators)."""

    blocks: int
    height: int
    width: int
    bits: int


@attrs.frozen
class Entry:
    """A map that the caller gives: the model's name of it, and how its values become codes."""

    name: str
    map: int
    channels: int
    quantize: Quantize


@attrs.frozen
class Source:
    """How a layer reads a map.

    Output pixel ``(y, x)``, before the APW's pool, meets the map at ``(y * stride + origin)``, plus
    an offset per group-set or window position; outside the map lies ``zero``.
    """

    map: int
    stride: tuple[int, int]
    origin: tuple[int, int]
    zero: int
    shift: int = 0


@attrs.frozen(eq=False)
class ConvLayer:
    """A convolution with all that follows it in the APW.

    Parameters
    ----------
    apw : isa.Apw
        The requantization and the pool; nothing of the place.
    residual : tuple of int or None
        Map and left shift of what is added.
    group_sets : int array ``[n, 5]``
        Output block, source, row, column, input block; ordered by block and source.
    weights : int8 array ``[n, input / 4, output 16, input 4]``
    bias, multiplier, shift : int64 arrays ``[blocks, 16]``
        The latter two empty unless in multiplier mode.
    worst : int
        What no accumulator exceeds in magnitude.
    """

    out: int
    sources: tuple[Source, ...]
    apw: isa.Apw
    residual: tuple[int, int] | None
    group_sets: Array
    weights: Array
    bias: Array
    multiplier: Array
    shift: Array
    worst: int


@attrs.frozen
class PoolLayer:
    """A pooling pass over windows of ``kernel`` positions, ``dilation`` apart."""

    out: int
    source: Source
    apw: isa.Apw
    mode: int
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    count_padding: bool
    multiplier: int


@attrs.frozen
class AddLayer:
    """An addition of one or two maps, each with its multiplier."""

    out: int
    sources: tuple[Source, ...]
    multipliers: tuple[int, ...]
    apw: isa.Apw
    multiplier: int


Layer: TypeAlias = ConvLayer | PoolLayer | AddLayer


@attrs.frozen(eq=False)
class Layers:
    """A region's maps and layers in order; ``outputs`` are the ports' maps."""

    maps: tuple[Map, ...]
    layers: tuple[Layer, ...]
    inputs: tuple[Entry, ...]
    outputs: tuple[int, ...]


# A file of layers: the length of an index in JSON, the index, the arrays that it tells of.
_LENGTH = struct.Struct("<Q")


def _is_array(kind: Any) -> bool:
    return get_origin(kind) is np.ndarray


def dump(layers: Layers) -> bytes:
    """Give the bytes of layers."""
    arrays: list[bytes] = []

    def described(array: Array) -> list[Any]:
        at = sum(map(len, arrays))
        arrays.append(array.tobytes())
        return [array.dtype.str, array.shape, at]

    converter = cattrs.Converter()
    converter.register_unstructure_hook_func(_is_array, described)
    index = json.dumps(converter.unstructure(layers)).encode()
    return b"".join([_LENGTH.pack(len(index)), index, *arrays])


def load(content: bytes) -> Layers:
    """Read what :func:`dump` gave."""
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length

    def array(about: Any, _: object) -> Array:
        kind, shape, at = about
        count = math.prod(shape)
        return np.frombuffer(content, kind, count, start + at).reshape(shape)

    converter = cattrs.Converter()
    converter.register_structure_hook_func(_is_array, array)
    found: Layers = converter.structure(json.loads(content[_LENGTH.size : start]), Layers)
    return found
