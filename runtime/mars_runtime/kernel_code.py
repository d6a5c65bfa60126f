"""Kernels of the exact engine as LLVM IR, by shape.

A kernel does one layer's share: it is made for the places of the pixels that it holds in registers
and for its requantization, not for a network's weights, so that networks of equal shapes share it.
It gets a step, a record of pointers and numbers (:data:`FIELDS`), and the number of its thread.

All arithmetic is on integers, or on floating point numbers that hold every product exactly; what
rounds then is a single addition, half to even.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import attrs

__all__ = [
    "FIELDS",
    "PARAMETER_BYTES",
    "VARIANTS",
    "AddKernel",
    "ConvKernel",
    "EntryKernel",
    "Kernel",
    "PoolKernel",
    "Requantization",
    "Run",
    "module_text",
]

#: 64-bit words of a step, in order.
FIELDS = (
    "kernel",  # its address
    "work",  # per thread: first block, last, first tile, last
    "source0",
    "source1",
    "source2",
    "source3",
    "residual",
    "out",
    "starts",  # int32 [block][run] + 1: numbers of the first vectors
    "offsets",  # int32: where each vector's inputs lie, from the tile's first pixel
    "weights",  # 64 bytes each
    "parameters",
    "tiles",  # int32 [tile][source..., residual, out]: byte offsets
    "source_block",  # bytes from block to block, but of convolutions
    "residual_block",
    "out_block",
    "zero",
    "low",
    "high",
    "residual_shift",
    "row",  # pools: bytes from position to position
    "column",
    "source_zero",
    "multiplier",
    "shift",
    "multiplier0",
    "multiplier1",
    "given",  # entries: where the address of the values lies, source0 being relative to it
    "refused",  # entries: where a word is set if one of the values has no code
)
_FIELD = {name: number for number, name in enumerate(FIELDS)}

#: Parameters of a kernel block: bias, float32 scale, then each of 8 bytes: float64 scale or integer
#: multiplier, shift, what is added before it, the mask of the bit that breaks ties.
PARAMETER_BYTES = 64 + 64 + 4 * 128


@attrs.frozen
class Variant:
    """How four u8 x s8 products are added to each of sixteen sums.

    Parameters
    ----------
    pixels : int
        Pixels whose sums are held in registers.
    offset : int
        What is taken from the codes, for an instruction of signed numbers; ``offset`` times the
        sum of the weights is part of the bias.
    """

    pixels: int
    offset: int = 0


#: By name, best first.
VARIANTS = {
    "avx512-vnni": Variant(16),
    "avx-vnni": Variant(6),
    "avx2": Variant(6),
    "neon-dotprod": Variant(6, offset=128),
    "portable": Variant(4),
}

Requantization: TypeAlias = Literal["float32", "float64", "int64", "raw"]


Run: TypeAlias = tuple[int | None, ...]


@attrs.frozen
class ConvKernel:
    """A convolution of the pixels of one tile with the group-sets of each block.

    Parameters
    ----------
    variant : str
        One of :data:`VARIANTS`.
    sources : tuples of runs
        For each source its runs of vectors. A run has for every pixel the byte offset from the
        tile's first, or None if nothing but zeros meets its vectors there.
    shifts : tuple of int
        For each source how far the sum is shifted left behind it.
    residual : tuple of int or None
        Byte offsets of the residual's pixels.
    window : int
        Pixels, one after the other, of which the largest is written.
    out : tuple of int
        Byte offsets of the windows' results.
    requantization : str
        In what numbers accumulators are scaled.
    monotone : bool
        Whether the larger accumulator gives the larger code.
    zero_point, clamped : bool
        Whether a zero point is added; whether codes keep to other limits than those of a byte.
    split : int
        Vectors that are summed side by side, for tiles of few pixels.
    diagonal : bool
        Whether a vector's four weights of an output meet its own channel in four adjacent pixels,
        as in depthwise layers, instead of four channels of one pixel.
    """

    variant: str
    sources: tuple[tuple[Run, ...], ...]
    shifts: tuple[int, ...]
    residual: tuple[int, ...] | None
    window: int
    out: tuple[int, ...]
    requantization: Requantization
    monotone: bool
    zero_point: bool
    clamped: bool
    split: int
    diagonal: bool

    def text(self, name: str) -> str:
        """Give the kernel's LLVM IR."""
        return _conv(self, name)


@attrs.frozen
class PoolKernel:
    """A pooling pass; a tile is a pixel: offsets, rows and columns inside the map, divisor.

    Parameters
    ----------
    average : bool
        Or the largest code.
    division : str
        In what numbers averages are divided.
    """

    average: bool
    division: Literal["float64", "int64"]

    def text(self, name: str) -> str:
        """Give the kernel's LLVM IR."""
        return _pool(self, name)


@attrs.frozen
class AddKernel:
    """An addition of ``operands`` maps; a tile is a pixel."""

    operands: int

    def text(self, name: str) -> str:
        """Give the kernel's LLVM IR."""
        return _add(self, name)


@attrs.frozen
class EntryKernel:
    """Codes of what the caller gives, operation by operation as :class:`.Quantize` has them.

    Parameters
    ----------
    dtype : str
        Of the given values.
    channels : int
        How many channels of each block there are.
    plane : int
        Bytes of a channel.
    columns : int
        Pixels of a tile, side by side: a power of two, 16 at most.
    clipped, multiplied, divided, zero_point : bool
        Which operations change a value.
    """

    dtype: str
    channels: int
    plane: int
    columns: int
    clipped: bool
    multiplied: bool
    divided: bool
    zero_point: bool

    def text(self, name: str) -> str:
        """Give the kernel's LLVM IR."""
        return _entry(self, name)


Kernel: TypeAlias = ConvKernel | PoolKernel | AddKernel | EntryKernel

#: Numbers of an entry, in order: float32, each 16 times.
ENTRY_PARAMETERS = ("clip_low", "clip_high", "factor", "scale", "zero", "low", "high")


# -- LLVM IR ---------------------------------------------------------------------------------------

_I8 = "<64 x i8>"
_I16 = "<32 x i16>"
_I32 = "<16 x i32>"
_I64 = "<16 x i64>"
_F64 = "<16 x double>"


def _shape(vector: str) -> tuple[str, str]:
    """Give a vector type's count and the type of its elements."""
    count, _, type = vector.strip("<>").partition(" x ")
    return count, type


class _Code:
    """Lines of a function, with names for values."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"%v{self.count}"

    def set(self, expression: str) -> str:
        name = self.name()
        self.lines.append(f"  {name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        self.lines.append(f"  {statement}")

    def label(self, label: str) -> None:
        self.lines.append(f"{label}:")

    def at(self, base: str, offset: str | int, size: int = 1) -> str:
        scaled = offset if size == 1 else self.set(f"mul i64 {offset}, {size}")
        return self.set(f"getelementptr i8, ptr {base}, i64 {scaled}")

    def load(self, type: str, pointer: str, align: int) -> str:
        return self.set(f"load {type}, ptr {pointer}, align {align}")

    def field(self, field: str, type: str = "i64") -> str:
        return self.load(type, self.at("%step", 8 * _FIELD[field]), 8)

    def number(self, pointer: str) -> str:
        """Load an int32 as int64."""
        return self.set(f"sext i32 {self.load('i32', pointer, 4)} to i64")

    def splat(self, value: str, vector: str) -> str:
        count, type = _shape(vector)
        one = self.set(f"insertelement {vector} poison, {type} {value}, i64 0")
        return self.set(
            f"shufflevector {vector} {one}, {vector} poison, <{count} x i32> zeroinitializer"
        )

    def constant(self, field: str, vector: str) -> str:
        """Give a number of the step in every place of a vector."""
        value, (_, type) = self.field(field), _shape(vector)
        if type != "i64":
            value = self.set(f"trunc i64 {value} to {type}")
        return self.splat(value, vector)

    def binary(self, operation: str, type: str, a: str, b: str) -> str:
        return self.set(f"{operation} {type} {a}, {b}")

    def call(self, function: str, type: str, *arguments: str) -> str:
        given = ", ".join(f"{type} {argument}" for argument in arguments)
        return self.set(f"call {type} @llvm.{function}({given})")

    @contextlib.contextmanager
    def loop(self, label: str, first: str, stop: str, carried: str = "") -> Iterator[str]:
        """Count from first to stop.

        ``carried`` is a vector of sixteen int32 that goes around: its name is ``held(label)``, and
        in the body :meth:`carry` says what it becomes.
        """
        before, head, body, last, after = (f"{label}.{part}" for part in ("b", "h", "i", "l", "a"))
        index, following = f"%{label}", f"%{label}.n"
        self.do(f"br label %{before}")
        self.label(before)
        self.do(f"br label %{head}")
        self.label(head)
        self.do(f"{index} = phi i64 [ {first}, %{before} ], [ {following}, %{last} ]")
        if carried:
            held = f"phi {_I32} [ {carried}, %{before} ], [ {self.held(label)}.n, %{last} ]"
            self.do(f"{self.held(label)} = {held}")
        more = self.set(f"icmp slt i64 {index}, {stop}")
        self.do(f"br i1 {more}, label %{body}, label %{after}")
        self.label(body)
        yield index
        self.do(f"br label %{last}")
        self.label(last)
        self.do(f"{following} = add i64 {index}, 1")
        self.do(f"br label %{head}")
        self.label(after)

    def held(self, label: str) -> str:
        """Name what a loop carries; behind it, what it ended with."""
        return f"%{label}.held"

    def carry(self, label: str, value: str) -> None:
        """Let a loop carry a value on."""
        self.do(f"{self.held(label)}.n = bitcast {_I32} {value} to {_I32}")

    def work(self) -> list[str]:
        """Give this thread's blocks and tiles."""
        table = self.at(self.field("work", "ptr"), "%thread", 32)
        return [self.load("i64", self.at(table, 8 * i), 8) for i in range(4)]

    def function(self, name: str) -> str:
        body = "\n".join(self.lines)
        return f"define void @{name}(ptr %step, i64 %thread) #0 {{\n{body}\n  ret void\n}}\n"


def _parts(code: _Code, value: str, type: str, count: int, whole: int) -> list[str]:
    """Cut a vector of ``whole`` elements into pieces of ``count``."""
    vector = f"<{whole} x {type}>"
    found = []
    for first in range(0, whole, count):
        lanes = ", ".join(f"i32 {first + i}" for i in range(count))
        found.append(
            code.set(f"shufflevector {vector} {value}, {vector} poison, <{count} x i32> <{lanes}>")
        )
    return found


def _joined(code: _Code, parts: Sequence[str]) -> str:
    """Join two or four pieces of sixteen int32."""
    while len(parts) > 1:
        half = 16 // len(parts)
        lanes = ", ".join(f"i32 {i}" for i in range(2 * half))
        parts = [
            code.set(
                f"shufflevector <{half} x i32> {low}, <{half} x i32> {high}, "
                f"<{2 * half} x i32> <{lanes}>"
            )
            for low, high in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


class _Dot:
    """Adds products of inputs and a vector's 16 x 4 weights to sixteen sums."""

    def __init__(self, code: _Code, kernel: ConvKernel, pointer: str) -> None:
        self.code, self.variant, self.diagonal = code, kernel.variant, kernel.diagonal
        self.weights = code.load(_I32, pointer, 64)
        if self.variant in ("avx2", "portable"):
            self.pairs = self._signed_pairs(self.weights)

    def add(self, acc: str, pointer: str) -> str:
        """Add the products with the inputs at ``pointer``."""
        code = self.code
        inputs = self._inputs(pointer)
        if self.variant == "avx512-vnni":
            return code.call("x86.avx512.vpdpbusd.512", _I32, acc, inputs, self.weights)
        if self.variant == "avx-vnni":
            return self._by_parts(8, acc, inputs, "x86.avx512.vpdpbusd.256", "<8 x i32>")
        if self.variant == "neon-dotprod":
            # Codes less 128: their highest bit turned over.
            signed = code.binary("xor", _I32, inputs, f"splat (i32 {0x80808080 - 2**32})")
            return self._by_parts(4, acc, signed, "aarch64.neon.sdot.v4i32.v16i8", "<16 x i8>")
        odd = code.binary("lshr", _I32, inputs, "splat (i32 8)")
        for part, weights in zip((inputs, odd), self.pairs, strict=True):
            codes = code.binary("and", _I32, part, f"splat (i32 {0x00FF00FF})")
            pairs = code.set(f"bitcast {_I32} {codes} to <32 x i16>")
            acc = code.binary("add", _I32, acc, self._multiplied(pairs, weights))
        return acc

    def _inputs(self, pointer: str) -> str:
        """Give the four inputs of each output."""
        code = self.code
        if not self.diagonal:
            return code.splat(code.load("i32", pointer, 4), _I32)
        pixels = code.load("<64 x i8>", pointer, 16)
        lanes = ", ".join(f"i32 {16 * pixel + i}" for i in range(16) for pixel in range(4))
        mixed = code.set(
            f"shufflevector <64 x i8> {pixels}, <64 x i8> poison, <64 x i32> <{lanes}>"
        )
        return code.set(f"bitcast <64 x i8> {mixed} to {_I32}")

    def _by_parts(self, size: int, acc: str, inputs: str, function: str, operand: str) -> str:
        """Call an instruction of ``size`` sums."""
        code, sums = self.code, f"<{size} x i32>"
        found = []
        for total, *pair in zip(
            *(_parts(code, value, "i32", size, 16) for value in (acc, inputs, self.weights)),
            strict=True,
        ):
            if operand != sums:
                pair = [code.set(f"bitcast {sums} {one} to {operand}") for one in pair]
            given = ", ".join(f"{operand} {one}" for one in pair)
            found.append(code.set(f"call {sums} @llvm.{function}({sums} {total}, {given})"))
        return _joined(code, found)

    def _signed_pairs(self, weights: str) -> list[str]:
        """Give bytes 0 and 2, and bytes 1 and 3, as pairs of int16."""
        code, eight = self.code, "splat (i16 8)"
        pairs = code.set(f"bitcast {_I32} {weights} to <32 x i16>")
        even = code.binary("shl", "<32 x i16>", pairs, eight)
        return [code.binary("ashr", "<32 x i16>", part, eight) for part in (even, pairs)]

    def _multiplied(self, inputs: str, weights: str) -> str:
        """Give the sums of products of pairs."""
        code = self.code
        if self.variant == "avx2":
            parts = [
                code.set(f"call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {a}, <16 x i16> {b})")
                for a, b in zip(
                    *(_parts(code, value, "i16", 16, 32) for value in (inputs, weights)),
                    strict=True,
                )
            ]
            return _joined(code, parts)
        # 255 * -128 fits an int16; the sum of two does not.
        product = code.binary("mul", "<32 x i16>", inputs, weights)
        both = code.set(f"bitcast <32 x i16> {product} to {_I32}")
        sixteen = "splat (i32 16)"
        low = code.binary("ashr", _I32, code.binary("shl", _I32, both, sixteen), sixteen)
        return code.binary("add", _I32, low, code.binary("ashr", _I32, both, sixteen))


class _Requantizer:
    """Turns accumulators into codes, with what a block's parameters and the step say."""

    def __init__(self, code: _Code, kernel: ConvKernel) -> None:
        self.code, self.kernel = code, kernel
        self.packs = kernel.variant == "avx512-vnni"
        shorts, bytes = (_I16, _I8) if self.packs else (_I32, _I32)
        if kernel.zero_point:
            self.zero = code.constant("zero", shorts)
        if kernel.clamped:
            self.low, self.high = code.constant("low", bytes), code.constant("high", bytes)

    def block(self, parameters: str) -> None:
        code, kind = self.code, self.kernel.requantization
        if kind == "float32":
            self.scale = code.load("<16 x float>", code.at(parameters, 64), 64)
        elif kind == "float64":
            self.scale = code.load("<16 x double>", code.at(parameters, 128), 64)
        elif kind == "int64":
            self.multiplier, self.shift, self.addend, self.odd = (
                code.load(_I64, code.at(parameters, 128 * i), 64) for i in (1, 2, 3, 4)
            )

    def scaled(self, acc: str) -> str:
        """Scale and round an accumulator; what lies far outside a byte may be cut."""
        code, kind = self.code, self.kernel.requantization
        if kind == "raw":
            return acc
        if kind == "int64":
            wide = code.set(f"sext {_I32} {acc} to {_I64}")
            product = code.binary("mul", _I64, wide, self.multiplier)
            found = _rounded(code, product, self.shift, self.addend, self.odd)
            return _clamped64(code, found, f"splat (i64 {_FAR[0]})", f"splat (i64 {_FAR[1]})")
        type, suffix = {
            "float32": ("<16 x float>", "v16f32"),
            "float64": ("<16 x double>", "v16f64"),
        }[kind]
        real = code.set(f"sitofp {_I32} {acc} to {type}")
        real = code.binary("fmul", type, real, self.scale)
        if kind == "float32":
            return code.set(f"call {_I32} @llvm.lrint.v16i32.{suffix}({type} {real})")
        # lrint of these becomes scalar instructions on Arm.
        return code.set(f"fptosi {type} {code.call(f'rint.{suffix}', type, real)} to {_I32}")

    def store(self, values: Sequence[str], to: str, places: Sequence[int]) -> None:
        """Store what was scaled as codes; vectors of 16 for each place."""
        code, kernel = self.code, self.kernel
        if kernel.requantization == "raw":
            for value, place in zip(values, places, strict=True):
                code.do(f"store {_I32} {value}, ptr {code.at(to, place)}, align 64")
            return
        together = 4 if self.packs else 1
        for first in range(0, len(places), together):
            few = values[first : first + together]
            codes = self._packed(few) if self.packs else self._narrowed(few[0])
            _store_bytes(code, codes, 16 * together, to, places[first : first + together])

    def _narrowed(self, value: str) -> str:
        """Give the bytes of one vector."""
        code, kernel = self.code, self.kernel
        if kernel.zero_point:
            value = code.binary("add", _I32, value, self.zero)
        limits = (self.low, self.high) if kernel.clamped else ("zeroinitializer", "splat (i32 255)")
        for function, limit in zip(("smax", "smin"), limits, strict=True):
            value = code.call(f"{function}.v16i32", _I32, value, limit)
        return code.set(f"trunc {_I32} {value} to <16 x i8>")

    def _packed(self, values: Sequence[str]) -> str:
        """Give the bytes of up to four vectors: packed with saturation, then put in order."""
        code, kernel = self.code, self.kernel
        pack = "call <32 x i16> @llvm.x86.avx512.packssdw.512"
        four = [*values, *[values[-1]] * (4 - len(values))]
        pairs = [
            code.set(f"{pack}({_I32} {a}, {_I32} {b})")
            for a, b in zip(four[::2], four[1::2], strict=True)
        ]
        if kernel.zero_point:
            pairs = [code.call("sadd.sat.v32i16", _I16, pair, self.zero) for pair in pairs]
        pack = "call <64 x i8> @llvm.x86.avx512.packuswb.512"
        codes = code.set(f"{pack}({_I16} {pairs[0]}, {_I16} {pairs[1]})")
        if kernel.clamped:
            codes = code.call("umax.v64i8", _I8, codes, self.low)
            codes = code.call("umin.v64i8", _I8, codes, self.high)
        # A quarter of the register holds four channels of each vector.
        words = code.set(f"bitcast {_I8} {codes} to {_I32}")
        lanes = ", ".join(f"i32 {4 * part + vector}" for vector in range(4) for part in range(4))
        words = code.set(f"shufflevector {_I32} {words}, {_I32} poison, <16 x i32> <{lanes}>")
        return code.set(f"bitcast {_I32} {words} to {_I8}")


# Beyond every code, zero point added or not.
_FAR = (-(2**15), 2**15 - 1)


def _store_bytes(code: _Code, codes: str, size: int, to: str, places: Sequence[int]) -> None:
    """Store 16 bytes at each place, together where places follow each other."""
    first = 0
    while first < len(places):
        stop = first + 1
        while stop < len(places) and places[stop] == places[stop - 1] + 16:
            stop += 1
        part, count = codes, 16 * (stop - first)
        if count < size:
            lanes = ", ".join(f"i32 {16 * first + i}" for i in range(count))
            part = code.set(
                f"shufflevector <{size} x i8> {codes}, <{size} x i8> poison, "
                f"<{count} x i32> <{lanes}>"
            )
        code.do(f"store <{count} x i8> {part}, ptr {code.at(to, places[first])}, align 16")
        first = stop


def _within(code: _Code, value: str, type: str, low: str, high: str) -> str:
    """Clamp real numbers; NaN becomes a limit."""
    bits = f"<{_shape(type)[0]} x i1>"
    for order, limit in (("ogt", low), ("olt", high)):
        keep = code.set(f"fcmp {order} {type} {value}, {limit}")
        value = code.set(f"select {bits} {keep}, {type} {value}, {type} {limit}")
    return value


def _rounded(code: _Code, value: str, shift: str, addend: str, odd: str) -> str:
    """Shift int64 right and round half to even."""
    bit = code.binary("and", _I64, code.binary("ashr", _I64, value, shift), odd)
    raised = code.binary("add", _I64, code.binary("add", _I64, value, addend), bit)
    return code.binary("ashr", _I64, raised, shift)


def _clamped64(code: _Code, value: str, low: str, high: str) -> str:
    """Clamp int64, to int32."""
    found = code.call("smax.v16i64", _I64, value, low)
    found = code.call("smin.v16i64", _I64, found, high)
    return code.set(f"trunc {_I64} {found} to {_I32}")


def _conv(kernel: ConvKernel, name: str) -> str:
    code = _Code()
    code.label("entry")
    count, all_runs = len(kernel.sources), sum(map(len, kernel.sources))
    pixels = kernel.window * len(kernel.out)
    first_block, last_block, first_tile, last_tile = code.work()
    sources = [code.field(f"source{i}", "ptr") for i in range(count)]
    pointers = ("starts", "offsets", "weights", "parameters", "tiles", "out")
    starts, offsets, weights, parameters, tiles, out = (code.field(n, "ptr") for n in pointers)
    out_block = code.field("out_block")
    requantizer = _Requantizer(code, kernel)
    if kernel.residual is not None:
        residual, residual_block = code.field("residual", "ptr"), code.field("residual_block")
        residual_shift = code.constant("residual_shift", _I32)
    with code.loop("block", first_block, last_block) as block:
        own = code.at(parameters, block, PARAMETER_BYTES)
        bias = code.load(_I32, own, 64)
        requantizer.block(own)
        to = code.at(out, code.set(f"mul i64 {block}, {out_block}"))
        if kernel.residual is not None:
            add = code.at(residual, code.set(f"mul i64 {block}, {residual_block}"))
        ends = code.at(starts, block, 4 * all_runs)
        limits = [code.number(code.at(ends, 4 * i)) for i in range(all_runs + 1)]
        with code.loop("tile", first_tile, last_tile) as tile:
            entry = code.at(tiles, tile, 4 * (count + 2))
            shifted = any(kernel.shifts)
            sums = ["zeroinitializer" if shifted else bias] * pixels
            sums += ["zeroinitializer"] * (pixels * (kernel.split - 1))
            number = 0
            for i, (source, runs) in enumerate(zip(sources, kernel.sources, strict=True)):
                base = code.at(source, code.number(code.at(entry, 4 * i)))
                for run in runs:
                    vectors = (offsets, weights, limits[number], limits[number + 1])
                    sums = _vectors(code, kernel, f"vector{number}", base, run, vectors, sums)
                    number += 1
                if kernel.shifts[i]:
                    by = f"splat (i32 {kernel.shifts[i]})"
                    sums = [code.binary("shl", _I32, acc, by) for acc in sums]
            sums = [
                functools.reduce(lambda a, b: code.binary("add", _I32, a, b), sums[i::pixels])
                for i in range(pixels)
            ]
            if shifted:
                sums = [code.binary("add", _I32, acc, bias) for acc in sums]
            if kernel.residual is not None:
                at = code.at(add, code.number(code.at(entry, 4 * count)))
                for i, place in enumerate(kernel.residual):
                    codes = code.load("<16 x i8>", code.at(at, place), 16)
                    wide = code.set(f"zext <16 x i8> {codes} to {_I32}")
                    wide = code.binary("shl", _I32, wide, residual_shift)
                    sums[i] = code.binary("add", _I32, sums[i], wide)
            if not kernel.monotone:
                sums = [requantizer.scaled(acc) for acc in sums]
            best = [
                functools.reduce(
                    lambda a, b: code.call("smax.v16i32", _I32, a, b), sums[i : i + kernel.window]
                )
                for i in range(0, pixels, kernel.window)
            ]
            if kernel.monotone:
                best = [requantizer.scaled(acc) for acc in best]
            at = code.at(to, code.number(code.at(entry, 4 * count + 4)))
            requantizer.store(best, at, kernel.out)
    return code.function(name)


def _vectors(
    code: _Code,
    kernel: ConvKernel,
    label: str,
    base: str,
    run: Run,
    vectors: tuple[str, str, str, str],
    sums: Sequence[str],
) -> list[str]:
    """Loop over the vectors of a block's run; ``split`` sums of every pixel lie side by side."""
    offsets, weights, first, stop = vectors
    before, head, body, after = (f"{label}.{part}" for part in ("b", "h", "i", "a"))
    places = [place for place in run if place is not None]
    own = [i for i in range(len(sums)) if run[i % len(run)] is not None]
    code.do(f"br label %{before}")
    code.label(before)
    code.do(f"br label %{head}")
    code.label(head)
    index, following = f"%{label}", f"%{label}.n"
    code.do(f"{index} = phi i64 [ {first}, %{before} ], [ {following}, %{body} ]")
    held = [f"%{label}.s{i}" for i in range(len(own))]
    phis = len(code.lines)  # written when the names of what they carry are known
    more = code.set(f"icmp slt i64 {index}, {stop}")
    code.do(f"br i1 {more}, label %{body}, label %{after}")
    code.label(body)
    given: list[str] = []
    for part in range(kernel.split):
        vector = code.set(f"add i64 {index}, {part}")
        pixel = code.at(base, code.number(code.at(offsets, vector, 4)))
        dot = _Dot(code, kernel, code.at(weights, vector, 64))
        for i, place in enumerate(places):
            number = part * len(places) + i
            given.append(dot.add(held[number], code.at(pixel, place)))
    code.do(f"{following} = add i64 {index}, {kernel.split}")
    code.do(f"br label %{head}")
    code.label(after)
    code.lines[phis:phis] = [
        f"  {acc} = phi {_I32} [ {start}, %{before} ], [ {end}, %{body} ]"
        for acc, start, end in zip(held, [sums[i] for i in own], given, strict=True)
    ]
    found = list(sums)
    for i, acc in zip(own, held, strict=True):
        found[i] = acc
    return found


def _pool(kernel: PoolKernel, name: str) -> str:
    code = _Code()
    code.label("entry")
    first_block, last_block, first_tile, last_tile = code.work()
    source, tiles, out = (code.field(n, "ptr") for n in ("source0", "tiles", "out"))
    source_block, out_block = code.field("source_block"), code.field("out_block")
    row, column = code.field("row"), code.field("column")
    source_zero = code.field("source_zero")
    divide = (_RealQuotient if kernel.division == "float64" else _IntegerQuotient)(code)
    with code.loop("block", first_block, last_block) as block:
        inputs = code.at(source, code.set(f"mul i64 {block}, {source_block}"))
        to = code.at(out, code.set(f"mul i64 {block}, {out_block}"))
        with code.loop("tile", first_tile, last_tile) as tile:
            entry = code.at(tiles, tile, 4 * 5)
            at, end, rows, columns, divisor = (code.number(code.at(entry, 4 * i)) for i in range(5))
            with code.loop("y", "0", rows, "zeroinitializer") as y:
                line = code.at(
                    inputs, code.binary("add", "i64", at, code.set(f"mul i64 {y}, {row}"))
                )
                with code.loop("x", "0", columns, code.held("y")) as x:
                    pixel = code.at(line, code.set(f"mul i64 {x}, {column}"))
                    codes = code.load("<16 x i8>", pixel, 16)
                    wide = code.set(f"zext <16 x i8> {codes} to {_I32}")
                    held = code.held("x")
                    found = (
                        code.binary("add", _I32, held, wide)
                        if kernel.average
                        else code.call("smax.v16i32", _I32, held, wide)
                    )
                    code.carry("x", found)
                code.carry("y", code.held("x"))
            found = code.held("y")
            if kernel.average:
                less = code.binary("mul", "i64", rows, columns)
                less = code.binary("mul", "i64", less, source_zero)
                less = code.splat(code.set(f"trunc i64 {less} to i32"), _I32)
                found = code.binary("sub", _I32, found, less)
                found = divide.codes(found, divisor)
            narrow = code.set(f"trunc {_I32} {found} to <16 x i8>")
            code.do(f"store <16 x i8> {narrow}, ptr {code.at(to, end)}, align 16")
    return code.function(name)


class _IntegerQuotient:
    """Codes of sums: multiplied, divided, rounded half to even, clamped."""

    def __init__(self, code: _Code) -> None:
        self.code = code
        self.zero, self.low, self.high = (code.constant(n, _I64) for n in ("zero", "low", "high"))
        self.multiplier, self.shift = code.constant("multiplier", _I64), code.field("shift")

    def codes(self, total: str, divisor: str) -> str:
        code = self.code
        wide = code.set(f"sext {_I32} {total} to {_I64}")
        product = code.binary("mul", _I64, wide, self.multiplier)
        by = code.splat(code.binary("shl", "i64", divisor, self.shift), _I64)
        steps = code.binary("add", _I64, _divided(code, product, by), self.zero)
        return _clamped64(code, steps, self.low, self.high)


class _RealQuotient:
    """As integers give them, in float64 that holds the products and comes to no false tie."""

    def __init__(self, code: _Code) -> None:
        self.code = code
        self.zero, low, high = (code.constant(n, _I32) for n in ("zero", "low", "high"))
        self.limits = [
            code.set(f"sitofp {_I32} {code.binary('sub', _I32, limit, self.zero)} to {_F64}")
            for limit in (low, high)
        ]
        self.multiplier = code.set(f"sitofp {_I64} {code.constant('multiplier', _I64)} to {_F64}")
        self.shift = code.field("shift")

    def codes(self, total: str, divisor: str) -> str:
        code = self.code
        real = code.set(f"sitofp {_I32} {total} to {_F64}")
        real = code.binary("fmul", _F64, real, self.multiplier)
        by = code.set(f"sitofp i64 {code.binary('shl', 'i64', divisor, self.shift)} to double")
        real = code.binary("fdiv", _F64, real, code.splat(by, _F64))
        real = _within(code, real, _F64, *self.limits)
        steps = code.set(f"fptosi {_F64} {code.call('rint.v16f64', _F64, real)} to {_I32}")
        return code.binary("add", _I32, steps, self.zero)


def _divided(code: _Code, value: str, divisor: str) -> str:
    """Divide int64 by positive ones and round half to even."""
    quotient = code.binary("sdiv", _I64, value, divisor)
    rest = code.binary("sub", _I64, value, code.binary("mul", _I64, quotient, divisor))
    negative = code.set(f"icmp slt {_I64} {rest}, zeroinitializer")
    less = code.set(f"sext <16 x i1> {negative} to {_I64}")
    quotient = code.binary("add", _I64, quotient, less)
    rest = code.binary("add", _I64, rest, code.binary("and", _I64, less, divisor))
    other = code.binary("sub", _I64, divisor, rest)
    above = code.set(f"icmp sgt {_I64} {rest}, {other}")
    tie = code.set(f"icmp eq {_I64} {rest}, {other}")
    odd = code.set(f"trunc {_I64} {quotient} to <16 x i1>")
    up = code.binary("or", "<16 x i1>", above, code.binary("and", "<16 x i1>", tie, odd))
    return code.binary("add", _I64, quotient, code.set(f"zext <16 x i1> {up} to {_I64}"))


def _add(kernel: AddKernel, name: str) -> str:
    code = _Code()
    code.label("entry")
    first_block, last_block, first_tile, last_tile = code.work()
    sources = [code.field(f"source{i}", "ptr") for i in range(kernel.operands)]
    factors = [code.constant(f"multiplier{i}", _I64) for i in range(kernel.operands)]
    tiles, out = code.field("tiles", "ptr"), code.field("out", "ptr")
    # Maps differ in size: each source has its own step from block to block.
    blocks = [code.field(n) for n in ("source_block", "residual_block")[: kernel.operands]]
    out_block = code.field("out_block")
    zero, low, high = (code.constant(n, _I64) for n in ("zero", "low", "high"))
    own = code.field("parameters", "ptr")
    bias, multiplier, shift, addend, odd = (
        code.load(_I64, code.at(own, 128 * i), 64) for i in range(5)
    )
    with code.loop("block", first_block, last_block) as block:
        inputs = [
            code.at(source, code.set(f"mul i64 {block}, {step}"))
            for source, step in zip(sources, blocks, strict=True)
        ]
        to = code.at(out, code.set(f"mul i64 {block}, {out_block}"))
        with code.loop("tile", first_tile, last_tile) as tile:
            entry = code.at(tiles, tile, 4 * (kernel.operands + 1))
            total = bias  # what the zero points take away
            for i, factor in enumerate(factors):
                pixel = code.at(inputs[i], code.number(code.at(entry, 4 * i)))
                codes = code.load("<16 x i8>", pixel, 16)
                wide = code.set(f"zext <16 x i8> {codes} to {_I64}")
                product = code.binary("mul", _I64, wide, factor)
                total = code.binary("add", _I64, total, product)
            total = code.binary("mul", _I64, total, multiplier)
            steps = _rounded(code, total, shift, addend, odd)
            found = _clamped64(code, code.binary("add", _I64, steps, zero), low, high)
            end = code.number(code.at(entry, 4 * kernel.operands))
            narrow = code.set(f"trunc {_I32} {found} to <16 x i8>")
            code.do(f"store <16 x i8> {narrow}, ptr {code.at(to, end)}, align 16")
    return code.function(name)


def _entry(kernel: EntryKernel, name: str) -> str:
    code = _Code()
    code.label("entry")
    count = kernel.columns
    numbers, bits = f"<{count} x i32>", f"<{count} x i1>"
    first_block, last_block, first_tile, last_tile = code.work()
    given, refused, tiles, out = (
        code.field(n, "ptr") for n in ("given", "refused", "tiles", "out")
    )
    source = code.at(code.load("ptr", given, 8), code.field("source0"))
    source_block, out_block = code.field("source_block"), code.field("out_block")
    values = (
        _IntegerValues(code, kernel) if kernel.dtype != "float32" else _RealValues(code, kernel)
    )
    with code.loop("block", first_block, last_block) as block:
        inputs = code.at(source, code.set(f"mul i64 {block}, {source_block}"))
        to = code.at(out, code.set(f"mul i64 {block}, {out_block}"))
        with code.loop("tile", first_tile, last_tile) as tile:
            entry = code.at(tiles, tile, 4 * 2)
            at, end = (code.number(code.at(entry, 4 * i)) for i in range(2))
            pixels = code.at(inputs, at)
            quads = ["zeroinitializer"] * 4  # of each pixel four channels
            strange = "zeroinitializer"
            for channel in range(kernel.channels):
                codes, wrong = values.codes(code.at(pixels, channel * kernel.plane))
                strange = code.binary("or", bits, strange, wrong)
                quad, byte = divmod(channel, 4)
                if byte:
                    codes = code.binary("shl", numbers, codes, f"splat (i32 {8 * byte})")
                    codes = code.binary("or", numbers, quads[quad], codes)
                quads[quad] = codes
            _store_pixels(code, quads, count, code.at(to, end))
            any = code.set(f"call i1 @llvm.vector.reduce.or.v{count}i1({bits} {strange})")
            held = code.load("i64", refused, 8)
            held = code.binary("or", "i64", held, code.set(f"zext i1 {any} to i64"))
            code.do(f"store i64 {held}, ptr {refused}, align 8")
    return code.function(name)


class _IntegerValues:
    """Codes of integers, and which of them lie outside the limits."""

    def __init__(self, code: _Code, kernel: EntryKernel) -> None:
        self.code, self.kernel = code, kernel
        self.type = f"<{kernel.columns} x i32>"
        self.low, self.high = code.constant("low", self.type), code.constant("high", self.type)

    def codes(self, pointer: str) -> tuple[str, str]:
        code, type, bytes = self.code, self.type, f"<{self.kernel.columns} x i8>"
        extend = "sext" if self.kernel.dtype == "int8" else "zext"
        value = code.set(f"{extend} {bytes} {code.load(bytes, pointer, 1)} to {type}")
        below = code.set(f"icmp slt {type} {value}, {self.low}")
        above = code.set(f"icmp sgt {type} {value}, {self.high}")
        wrong = code.binary("or", f"<{self.kernel.columns} x i1>", below, above)
        return code.binary("sub", type, value, self.low), wrong


class _RealValues:
    """Codes of float32, and which of them are NaN."""

    def __init__(self, code: _Code, kernel: EntryKernel) -> None:
        self.code, self.kernel = code, kernel
        self.type = f"<{kernel.columns} x float>"
        own = code.field("parameters", "ptr")
        self.numbers = {
            name: code.load(self.type, code.at(own, 64 * row), 64)
            for row, name in enumerate(ENTRY_PARAMETERS)
        }

    def codes(self, pointer: str) -> tuple[str, str]:
        code, kernel, type = self.code, self.kernel, self.type
        value = code.load(type, pointer, 1)  # NumPy's arrays need not be aligned
        wrong = code.set(f"fcmp uno {type} {value}, zeroinitializer")
        if kernel.clipped:
            value = self._within(value, "clip_low", "clip_high")
        if kernel.multiplied:
            value = code.binary("fmul", type, value, self.numbers["factor"])
        if kernel.divided:
            value = code.binary("fdiv", type, value, self.numbers["scale"])
        value = code.set(f"call {type} @llvm.rint.v{kernel.columns}f32({type} {value})")
        if kernel.zero_point:
            value = code.binary("fadd", type, value, self.numbers["zero"])
        value = self._within(value, "low", "high")
        value = code.binary("fsub", type, value, self.numbers["low"])
        return code.set(f"fptosi {type} {value} to <{kernel.columns} x i32>"), wrong

    def _within(self, value: str, low: str, high: str) -> str:
        return _within(self.code, value, self.type, self.numbers[low], self.numbers[high])


def _store_pixels(code: _Code, quads: Sequence[str], count: int, to: str) -> None:
    """Store 16 channels of adjacent pixels from words of four channels each."""
    type = f"<{count} x i32>"
    for first in range(0, count, 4):
        pixels = range(first, min(first + 4, count))
        words = f"<{4 * len(pixels)} x i32>"
        halves = [
            code.set(
                f"shufflevector {type} {a}, {type} {b}, {words} "
                f"<{', '.join(f'i32 {lane}' for p in pixels for lane in (p, count + p) * 2)}>"
            )
            for a, b in (quads[:2], quads[2:])
        ]
        lanes = [4 * i + part for i in range(len(pixels)) for part in range(4)]
        order = ", ".join(f"i32 {i + (len(lanes) if i % 4 > 1 else 0)}" for i in lanes)
        whole = code.set(
            f"shufflevector {words} {halves[0]}, {words} {halves[1]}, {words} <{order}>"
        )
        code.do(f"store {words} {whole}, ptr {code.at(to, 16 * first)}, align 16")


# Executes steps in order. Threads meet behind each step: a counter, and who yields the processor,
# after about a microsecond, to a thread that may have none.
_RUNNER = """
define void @run(ptr %steps, i64 %count, i64 %thread, i64 %threads, ptr %meeting) #0 {
entry:
  %yield.at = getelementptr i64, ptr %meeting, i64 8
  %alone = icmp sle i64 %threads, 1
  br label %next
next:
  %n = phi i64 [ 0, %entry ], [ %n.n, %done ]
  %more = icmp slt i64 %n, %count
  br i1 %more, label %step, label %end
step:
  %at = mul i64 %n, STEP_BYTES
  %record = getelementptr i8, ptr %steps, i64 %at
  %kernel = load ptr, ptr %record, align 8
  call void %kernel(ptr %record, i64 %thread)
  %n.n = add i64 %n, 1
  br i1 %alone, label %done, label %meet
meet:
  %arrived = atomicrmw add ptr %meeting, i64 1 seq_cst
  %goal = mul i64 %n.n, %threads
  br label %spin
spin:
  %turn = phi i64 [ 0, %meet ], [ %turn.n, %again ]
  %seen = load atomic i64, ptr %meeting acquire, align 8
  %all = icmp sge i64 %seen, %goal
  br i1 %all, label %done, label %wait
wait:
  %turn.n = add i64 %turn, 1
  PAUSE
  %long = icmp sgt i64 %turn, 20
  %yield = load ptr, ptr %yield.at, align 8
  %can = icmp ne ptr %yield, null
  %gives = and i1 %long, %can
  br i1 %gives, label %give, label %again
give:
  %ignored = call i32 %yield()
  br label %again
again:
  br label %spin
done:
  br label %next
end:
  ret void
}
""".replace("STEP_BYTES", str(8 * len(FIELDS)))

_DECLARATIONS = """
declare <16 x i32> @llvm.smax.v16i32(<16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.smin.v16i32(<16 x i32>, <16 x i32>)
declare <16 x i64> @llvm.smax.v16i64(<16 x i64>, <16 x i64>)
declare <16 x i64> @llvm.smin.v16i64(<16 x i64>, <16 x i64>)
declare <16 x i32> @llvm.lrint.v16i32.v16f32(<16 x float>)
declare <16 x double> @llvm.rint.v16f64(<16 x double>)
declare <32 x i16> @llvm.sadd.sat.v32i16(<32 x i16>, <32 x i16>)
declare <64 x i8> @llvm.umax.v64i8(<64 x i8>, <64 x i8>)
declare <64 x i8> @llvm.umin.v64i8(<64 x i8>, <64 x i8>)
"""
_X86_DECLARATIONS = """
declare void @llvm.x86.sse2.pause()
declare <32 x i16> @llvm.x86.avx512.packssdw.512(<16 x i32>, <16 x i32>)
declare <64 x i8> @llvm.x86.avx512.packuswb.512(<32 x i16>, <32 x i16>)
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
"""
_ARM_DECLARATIONS = """
declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
"""


def module_text(kernels: Iterable[Kernel], triple: str) -> str:
    """Give the LLVM IR of a module: ``run``, and ``kernel<i>`` for each kernel."""
    x86 = triple.startswith(("x86_64", "i686", "amd64"))
    arm = triple.startswith(("aarch64", "arm64"))
    runner = _RUNNER.replace("PAUSE", "call void @llvm.x86.sse2.pause()" if x86 else "")
    own = _X86_DECLARATIONS if x86 else _ARM_DECLARATIONS if arm else ""
    sizes = "\n".join(
        f"declare <{n} x float> @llvm.rint.v{n}f32(<{n} x float>)\n"
        f"declare i1 @llvm.vector.reduce.or.v{n}i1(<{n} x i1>)"
        for n in (1, 2, 4, 8, 16)
    )
    parts = [f'target triple = "{triple}"', _DECLARATIONS, sizes, own, runner]
    parts += [kernel.text(f"kernel{number}") for number, kernel in enumerate(kernels)]
    return "\n".join([*parts, "attributes #0 = { nounwind }"])
