"""The program file: one checked container for all that a network needs on MARS.

Layout, little endian::

    0   8  magic "MARSPROG"
    8   4  version
    12  4  zero
    16  8  bytes of the payload
    24 32  SHA-256 of the payload
    56  8  zero
    64     payload: 8 bytes length of the index, the index (JSON), then per region its
           instructions and its off-chip image, back to back

Nothing is unpickled; every size is compared with the file's before memory is taken.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import struct
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import cattrs
import numpy as np

from . import isa
from .arch import MarsArch
from .errors import MarsError, ProgramError
from .maps import RAW_BITS, WORD_BYTES, MapType
from .quantize import Dequantize, Quantize

__all__ = [
    "ChannelOrder",
    "HostReason",
    "InputPort",
    "LayerInfo",
    "OutputPort",
    "Program",
    "Region",
    "load_cached",
]

MAGIC = b"MARSPROG"
VERSION = 1
_HEADER = struct.Struct("<8sIIQ32sQ")
_INDEX = struct.Struct("<Q")


@attrs.frozen
class InputPort:
    """A map that enters a region.

    ``name`` is the model's name of the value, ``address`` the first off-chip word of the map,
    ``shape`` what the caller passes per image.
    """

    name: str
    type: MapType
    shape: tuple[int, ...]
    address: int
    quantize: Quantize


@attrs.frozen
class OutputPort:
    """A map that leaves a region, as :class:`InputPort`."""

    name: str
    type: MapType
    shape: tuple[int, ...]
    address: int
    dequantize: Dequantize


@attrs.frozen
class LayerInfo:
    """A layer of a region: its instructions ``start .. stop`` and its size.

    ``macs`` are those of the dense layer; ``group_sets`` of ``dense_group_sets`` are stored.
    """

    name: str
    kind: str
    start: int
    stop: int
    macs: int
    group_sets: int
    dense_group_sets: int


@attrs.frozen
class ChannelOrder:
    """A layer of the network whose map has its channels in another order than the model.

    ``channels`` says which of the model's channels is at each place.
    """

    layer: str
    channels: tuple[int, ...]


@attrs.frozen
class Region:
    """One offloaded piece of a network: instructions and the off-chip memory that they work on.

    Off-chip memory holds ``image`` (index codes, descriptors, parameters, packed weights), then
    maps, up to ``offchip_words``. ``image`` may end before ``image_bytes`` in memory only: a
    program without weights has a timeline but cannot run.

    ``network`` describes the layers' shapes as JSON, for the compiler's own reports; ``orders`` are
    of the maps whose channels the compiler has reordered, none of which enters or leaves.
    """

    inputs: tuple[InputPort, ...]
    outputs: tuple[OutputPort, ...]
    layers: tuple[LayerInfo, ...]
    code: bytes = attrs.field(repr=lambda code: f"{len(code)} bytes")
    image: bytes = attrs.field(repr=lambda image: f"{len(image)} bytes")
    image_bytes: int
    offchip_words: int
    network: str = attrs.field(default="", repr=False)
    orders: tuple[ChannelOrder, ...] = attrs.field(default=(), repr=False)

    @functools.cached_property
    def instructions(self) -> tuple[isa.Instruction, ...]:
        """The decoded instructions."""
        return isa.decode_all(self.code)


@attrs.frozen
class HostReason:
    """Why an operator of a kind that MARS takes is left to the CPU all the same."""

    operator: str
    reason: str


@attrs.frozen
class Program:
    """A compiled network.

    Regions run in order; a port's name connects it to the model's inputs and outputs and to the
    ports of other regions. ``host_operators`` are left to the CPU: with any, the program alone is
    not the whole model; ``host_reasons`` say why, of those that MARS might have taken.
    """

    arch: MarsArch
    regions: tuple[Region, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    host_operators: tuple[str, ...] = ()
    host_reasons: tuple[HostReason, ...] = ()

    def to_bytes(self) -> bytes:
        """Give the program file; equal programs give equal bytes."""
        index = json.dumps(_unstructure(self), sort_keys=True, separators=(",", ":")).encode()
        parts = [_INDEX.pack(len(index)), index]
        for region in self.regions:
            if len(region.image) != region.image_bytes:
                raise ProgramError("has no weights, only a timeline", where="program")
            parts += [region.code, region.image]
        payload = b"".join(parts)
        digest = hashlib.sha256(payload).digest()
        return _HEADER.pack(MAGIC, VERSION, 0, len(payload), digest, 0) + payload

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, where: str = "program") -> Program:
        """Read and verify a program file.

        Raises
        ------
        ProgramError
            If the bytes are not a program, are damaged, or do not make sense.
        """
        payload = _checked_payload(memoryview(data).cast("B"), where)
        try:
            program = _structure(payload, where)
            for i, region in enumerate(program.regions):
                _verify(region, program.arch, f"{where}, region {i}")
        except ProgramError:
            raise
        except MarsError as error:
            raise ProgramError(str(error), where=where) from None
        return program

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program file atomically."""
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read and verify a program file.

        Raises
        ------
        ProgramError
            If the file cannot be read or is not a good program.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ProgramError(f"cannot be read: {error.strerror}", where=str(path)) from None
        return cls.from_bytes(data, str(path))


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- reading ---------------------------------------------------------------------------------------


def _checked_payload(data: memoryview, where: str) -> memoryview:
    if len(data) < _HEADER.size:
        raise ProgramError(
            f"{len(data)} bytes are fewer than a header's {_HEADER.size}", where=where
        )
    magic, version, reserved, length, digest, padding = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProgramError(
            "is not a MARS program (wrong magic)",
            where=where,
            hint="mars compile --program writes one",
        )
    if version != VERSION:
        raise ProgramError(
            f"has format version {version}, this runtime reads {VERSION}",
            where=where,
            hint="compile the network again",
        )
    payload = data[_HEADER.size :]
    if reserved or padding or length != len(payload):
        raise ProgramError(
            f"declares {length} bytes and holds {len(payload)}: truncated or damaged",
            where=where,
            hint="copy or compile it again",
        )
    if hashlib.sha256(payload).digest() != digest:
        raise ProgramError(
            "is damaged (checksum differs)", where=where, hint="copy or compile it again"
        )
    return payload


def _unstructure(program: Program) -> dict[str, Any]:
    index: dict[str, Any] = cattrs.unstructure(attrs.evolve(program, regions=()))
    if not program.host_reasons:  # so that a program without any keeps the bytes that it had
        del index["host_reasons"]
    index["regions"] = [_unstructure_region(region) for region in program.regions]
    return index


def _unstructure_region(region: Region) -> dict[str, Any]:
    entry: dict[str, Any] = cattrs.unstructure(attrs.evolve(region, code=b"", image=b""))
    if not region.orders:  # so that a program without any keeps the bytes that it had
        del entry["orders"]
    return {**entry, "code": len(region.code), "image": len(region.image)}


@functools.cache
def _converter() -> cattrs.Converter:
    # Checked against the declared types, field by field: JSON 1.5 is no int, "x" is no tuple.
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, functools.partial(_exactly, kind))
    converter.register_structure_hook(float, lambda value, _: float(_exactly((int, float), value)))
    converter.register_structure_hook(
        MarsArch, lambda value, _: MarsArch.from_dict(_exactly(dict, value))
    )
    converter.register_structure_hook(bytes, lambda value, _: _exactly(bytes, value))
    return converter


def _exactly(kind: Any, value: Any, _: object = None) -> Any:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{value!r} is not {kind}")
    return value


def _structure(payload: memoryview, where: str) -> Program:
    try:
        (length,) = _INDEX.unpack_from(payload)
        index = json.loads(bytes(payload[_INDEX.size : _INDEX.size + length]))
        at = _INDEX.size + length
        for region in index["regions"]:
            for part in ("code", "image"):
                size = _exactly(int, region[part])
                if not 0 <= size <= len(payload) - at:
                    raise ProgramError(f"declares {size} bytes of {part}", where=where)
                region[part] = bytes(payload[at : at + size])
                at += size
        if at != len(payload):
            raise ProgramError(f"has {len(payload) - at} bytes too many", where=where)
        program: Program = _converter().structure(index, Program)
        return program
    except MarsError:
        raise
    except (
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        cattrs.BaseValidationError,
    ) as error:
        raise ProgramError(f"its index does not make sense: {error}", where=where) from None


def _verify(region: Region, arch: MarsArch, where: str) -> None:
    """Refuse a region whose sizes contradict each other, before anything is allocated for it."""
    image_words = -(-region.image_bytes // WORD_BYTES)
    limit = arch.offchip_bytes // WORD_BYTES
    if len(region.image) != region.image_bytes or not image_words <= region.offchip_words <= limit:
        raise ProgramError(
            f"needs {region.offchip_words * WORD_BYTES} bytes off-chip with an image of "
            f"{region.image_bytes}, has {arch.offchip_bytes}",
            where=where,
        )
    if not region.inputs or not region.outputs:
        raise ProgramError("has no input or no output", where=where)
    ports: tuple[InputPort | OutputPort, ...] = (*region.inputs, *region.outputs)
    for port in ports:
        kind = port.type
        sizes_match = _volume(port.shape) == kind.channels * kind.height * kind.width
        if (
            min(kind.shape) < 1
            or kind.bits not in (4, 8, RAW_BITS)
            or min(port.shape, default=1) < 1
            or not sizes_match
            or not image_words <= port.address <= region.offchip_words - kind.words
        ):
            raise ProgramError(
                f"port {port.name!r} of {kind} at {port.address} is not good", where=where
            )
        if kind.bits == RAW_BITS and isinstance(port, InputPort):
            raise ProgramError(f"port {port.name!r} enters accumulators", where=where)
    for out in region.outputs:
        if len(out.dequantize.scale) not in (1, out.type.channels):
            raise ProgramError(
                f"port {out.name!r} has {len(out.dequantize.scale)} scales", where=where
            )
        if out.dequantize.dtype not in ("float32", "uint8", "int8", "int32"):
            raise ProgramError(f"port {out.name!r} gives {out.dequantize.dtype}", where=where)
        steps = (out.dequantize.zero_point, out.dequantize.low)
        _verify_numbers(out, out.dequantize.scale, steps, where)
    for entry in region.inputs:
        if entry.quantize.dtype not in ("float32", "uint8", "int8"):
            raise ProgramError(f"port {entry.name!r} takes {entry.quantize.dtype}", where=where)
        if not 0 <= entry.quantize.high - entry.quantize.low < 2**entry.type.bits:
            raise ProgramError(
                f"port {entry.name!r} has codes {entry.quantize.low}..{entry.quantize.high}",
                where=where,
            )
        scales = (entry.quantize.scale, entry.quantize.factor)
        _verify_numbers(entry, scales, (entry.quantize.zero_point, entry.quantize.low), where)
        clip = entry.quantize.clip or (0, 0)
        if not np.float32(entry.quantize.scale) or not clip[0] <= clip[1]:
            raise ProgramError(f"port {entry.name!r} quantizes by {entry.quantize}", where=where)
    for order in region.orders:
        if sorted(order.channels) != list(range(len(order.channels))):
            raise ProgramError(f"order of {order.layer!r} is not one of its channels", where=where)
    at = 0
    for layer in region.layers:
        if layer.start != at or layer.stop < at:
            raise ProgramError(f"layer {layer.name!r} does not follow its predecessor", where=where)
        at = layer.stop
    instructions = region.instructions
    if at > len(instructions) or not instructions or not isinstance(instructions[-1], isa.Halt):
        raise ProgramError("does not end in HALT", where=where)


def _verify_numbers(
    port: InputPort | OutputPort, reals: Iterable[float], steps: Iterable[int], where: str
) -> None:
    """Refuse conversions that float32 and int32 cannot hold."""
    limit = float(np.finfo(np.float32).max)
    if not all(abs(real) <= limit for real in reals) or not all(abs(s) < 2**31 for s in steps):
        raise ProgramError(f"port {port.name!r} converts by {reals} and {steps}", where=where)


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


# -- cache -----------------------------------------------------------------------------------------

_CACHE_SIZE = 16
_cache: collections.OrderedDict[bytes, tuple[bytes, Program]] = collections.OrderedDict()
_cache_lock = threading.Lock()


def load_cached(data: bytes | memoryview) -> Program:
    """Read and verify a program, or give the one already read from equal bytes.

    Keyed by the digest in the file's header and compared in full, so that damaged bytes are never
    taken for the program that they once were; the last 16 programs are kept.

    Raises
    ------
    ProgramError
        As :meth:`Program.from_bytes`.
    """
    view = memoryview(data).cast("B")
    key = bytes(view[: _HEADER.size])
    with _cache_lock:
        found = _cache.get(key)
        if found is not None and found[0] == view:
            _cache.move_to_end(key)
            return found[1]
    content = bytes(view)
    program = Program.from_bytes(content)
    with _cache_lock:
        _cache[key] = (content, program)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return program
