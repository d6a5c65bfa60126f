"""The instruction set, declared once.

Each instruction is a frozen class: its docstring is its meaning, its fields carry their width. The
encoder, decoder, assembler, disassembler and ``docs/isa.md`` derive from these declarations, and
the machine executes the decoded values.

An instruction takes :data:`INSTRUCTION_BYTES` bytes, little endian: opcode (8 bits), then the
fields in the order of their declaration, the common ones first; the rest is zero.

**Units and tokens.** The controller issues instructions in program order to the queues of their
units, which run side by side: ``dma`` (one for the chip: off-chip memory to and from the SRAMs),
``load`` (one per core: the second hop, weight SRAM to macros), ``compute`` (one per core: SAS,
macros, accumulators, APW). A unit executes its queue in order. An instruction starts when its units
are free and every token in its ``wait`` mask has been signalled by the last instruction before it,
in program order, that names that token in ``signal``.

**Addresses.** Banks are addressed in 64-bit words (16 channels of 4 bits), off-chip maps in 64-bit
words, everything else in bytes. A map lies as ``[nibble plane][channel block][row][column]``, low
nibbles first; a 4-bit map has one plane; a map of accumulators has eight words per pixel and block.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import attrs

from .errors import InstructionError
from .rounding import MAX_SHIFT

__all__ = [
    "INSTRUCTIONS",
    "INSTRUCTION_BYTES",
    "TOKENS",
    "Add",
    "Apw",
    "Conv",
    "Fetch",
    "Fill",
    "Halt",
    "IndexCode",
    "Instruction",
    "Move",
    "Pool",
    "Prepare",
    "Residual",
    "Sas",
    "Segment",
    "Sync",
    "assemble",
    "decode",
    "decode_all",
    "disassemble",
    "encode",
    "encode_all",
    "field_limit",
    "reference_manual",
]

INSTRUCTION_BYTES = 40
TOKENS = 64
CONTEXTS_BITS = 2
OPCODE_BITS = 8

# Enumerated field values.
MEMORY_WEIGHT, MEMORY_INDEX, MEMORY_PARAMETER = 0, 1, 2
MODE_SHIFT, MODE_MULTIPLIER, MODE_RAW = 0, 1, 2
POOL_MAX, POOL_AVERAGE = 0, 1
PARTIAL_BANK, PARTIAL_OFFCHIP = 0, 1
MOVE_IN, MOVE_OUT = 0, 1

# Fields that several instructions share have one width.
_CORE, _MASK, _BANK, _BASE, _SIZE, _SRAM, _SHIFT = 4, 16, 1, 20, 13, 18, 5
_TAP = 4  # an index code's tap


def _bits(
    width: int,
    doc: str,
    *,
    default: int = 0,
    signed: bool = False,
    names: Sequence[str] = (),
    limit: int | None = None,
    least: int | None = None,
) -> Any:
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    if names:
        high = len(names) - 1
    high = high if limit is None else limit
    low = low if least is None else least
    metadata = {"width": width, "doc": doc, "low": low, "high": high, "names": tuple(names)}
    return attrs.field(default=default, metadata=metadata)


@attrs.frozen(kw_only=True)
class Instruction:
    """What every instruction has."""

    opcode: ClassVar[int]
    unit: ClassVar[str]

    signal: int = _bits(7, "token to signal at the end, plus one; 0 signals none", limit=TOKENS)
    wait: int = _bits(TOKENS, "mask of tokens to wait for")


@attrs.frozen(kw_only=True)
class Fetch(Instruction):
    """Copy bytes from off-chip memory into an SRAM of one core (the first hop)."""

    opcode = 1
    unit = "dma"

    core: int = _bits(_CORE, "core that receives")
    memory: int = _bits(2, "SRAM written", names=("weight", "index", "parameter"))
    source: int = _bits(32, "off-chip byte address")
    destination: int = _bits(_SRAM, "byte address in the SRAM")
    length: int = _bits(_SRAM, "bytes")


@attrs.frozen(kw_only=True)
class Prepare(Instruction):
    """Open the arrays of the masked cores for writing; this is the fixed cost of an array fill."""

    opcode = 2
    unit = "load"

    cores: int = _bits(_MASK, "mask of cores")


@attrs.frozen(kw_only=True)
class Fill(Instruction):
    """Write group-sets from a core's weight SRAM into its macros (the second hop).

    The array must be open; the next CONV on the core closes it.
    """

    opcode = 3
    unit = "load"

    core: int = _bits(_CORE, "core")
    source: int = _bits(_SRAM, "byte address in the weight SRAM")
    slot: int = _bits(8, "first macro slot, in group-sets")
    count: int = _bits(8, "group-sets")
    weight_bits: int = _bits(1, "width of a weight", names=("w4", "w8"))


@attrs.frozen(kw_only=True, cache_hash=True)
class Sas(Instruction):
    """Set an input context of the sparsity address search of the masked cores.

    Tap ``t`` of the kernel lies at row ``r = t // kernel_width``, column ``c = t % kernel_width``.
    Output pixel ``(y, x)`` of a tile meets it at input row ``y * stride_y + r * dilation_y +
    origin_y`` and the like column; outside the map it reads ``zero`` without a port access.

    Group-sets whose index code has a tap in ``skip`` are passed over [A]: no cycle, no macro
    access, no port access, nothing added. Each of their codes is read once, not for every pixel.

    The map's rows are a ring [A]: they lie from stored row ``row`` on, and behind the last stored
    row follows the first. So rows that two windows of a map share stay where they are.
    """

    opcode = 4
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    context: int = _bits(CONTEXTS_BITS, "context that is set")
    bank: int = _bits(_BANK, "bank of the map")
    base: int = _bits(_BASE, "first word of the map")
    block: int = _bits(_SIZE, "channel block that lies first")
    blocks: int = _bits(_SIZE, "channel blocks")
    height: int = _bits(_SIZE, "rows")
    width: int = _bits(_SIZE, "columns")
    wide: int = _bits(1, "code width", names=("a4", "a8"))
    zero: int = _bits(8, "code of zero")
    shift: int = _bits(_SHIFT, "left shift of this context's products, which aligns grids")
    stride_y: int = _bits(6, "vertical stride", default=1, least=1)
    stride_x: int = _bits(6, "horizontal stride", default=1, least=1)
    dilation_y: int = _bits(6, "vertical dilation", default=1, least=1)
    dilation_x: int = _bits(6, "horizontal dilation", default=1, least=1)
    origin_y: int = _bits(14, "input row of output row 0, tap row 0", signed=True)
    origin_x: int = _bits(14, "input column of output column 0, tap column 0", signed=True)
    kernel_width: int = _bits(_SIZE, "columns of the kernel", default=1, least=1)
    skip: int = _bits(1 << _TAP, "mask of taps within the sub-kernel that are passed over")
    row: int = _bits(_SIZE, "stored row that is the map's row 0; less than the rows")


@attrs.frozen(kw_only=True, cache_hash=True)
class Apw(Instruction):
    """Set the activation-pooling-write unit of the masked cores; no residual until RESIDUAL.

    ``shift``: ``code = round_half_even(clamp(acc, 0, 2**shift) * (2**bits - 1) / 2**shift)``.
    ``multiplier``: ``code = clamp(round_half_even(acc * m / 2**s) + zero, low, high)`` with ``m``
    and ``s`` of the channel from the parameter SRAM. ``raw``: the accumulators are written. The
    output map has eight words per pixel and block in ``raw``. Of each window of ``pool_height`` x
    ``pool_width`` pixels the largest code is written.
    """

    opcode = 5
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    mode: int = _bits(2, "requantization", names=("shift", "multiplier", "raw"))
    shift: int = _bits(6, "right shift", limit=MAX_SHIFT)
    wide: int = _bits(1, "width of the written codes", names=("a4", "a8"))
    zero: int = _bits(8, "zero point of the written codes")
    low: int = _bits(8, "smallest code")
    high: int = _bits(8, "largest code")
    pool_height: int = _bits(6, "rows of the max-pool window", default=1, least=1)
    pool_width: int = _bits(6, "columns of the max-pool window", default=1, least=1)
    bank: int = _bits(_BANK, "bank of the output map")
    base: int = _bits(_BASE, "first word of the output map")
    block: int = _bits(_SIZE, "channel block that lies first")
    blocks: int = _bits(_SIZE, "channel blocks of the output map")
    height: int = _bits(_SIZE, "rows of the output map")
    width: int = _bits(_SIZE, "columns of the output map")


@attrs.frozen(kw_only=True, cache_hash=True)
class Residual(Instruction):
    """Let the APW of the masked cores add a map's codes, shifted left, to the accumulators."""

    opcode = 6
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    bank: int = _bits(_BANK, "bank of the residual")
    base: int = _bits(_BASE, "first word of the residual")
    blocks: int = _bits(_SIZE, "channel blocks of the residual")
    height: int = _bits(_SIZE, "rows of the residual")
    width: int = _bits(_SIZE, "columns of the residual")
    wide: int = _bits(1, "code width", names=("a4", "a8"))
    shift: int = _bits(_SHIFT, "left shift")
    y: int = _bits(_SIZE, "row that meets the tile's first row")
    x: int = _bits(_SIZE, "column that meets the tile's first column")


@attrs.frozen(kw_only=True)
class Conv(Instruction):
    """Convolve a tile with the loaded group-sets of each masked core.

    Each core walks its load descriptor (segments, see :class:`Segment`). Successive segments of the
    same output block are one visit: the accumulators start from the bias, or from the stored
    partial sum; every group-set is multiplied and added; the result goes through the APW, or is
    stored as a partial sum. Tile sizes are those of the written map, after the APW's pool.

    The partial sums of core k lie at ``partial_base + 8 * pixels * k`` words.
    """

    opcode = 7
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    descriptor: int = _bits(_SRAM, "byte address of the first segment in the index SRAM")
    codes: int = _bits(_SRAM, "byte address of the first index code in the index SRAM")
    parameters: int = _bits(_SRAM, "byte address of the first block's parameters")
    slot: int = _bits(8, "macro slot of the first group-set")
    y: int = _bits(_SIZE, "first row written")
    x: int = _bits(_SIZE, "first column written")
    height: int = _bits(_SIZE, "rows written")
    width: int = _bits(_SIZE, "columns written")
    partial: int = _bits(1, "where partial sums lie", names=("bank", "offchip"))
    partial_bank: int = _bits(_BANK, "bank of the partial sums")
    partial_base: int = _bits(30, "first word of the partial sums")


@attrs.frozen(kw_only=True)
class Pool(Instruction):
    """Pool a tile of context 0 in the APW; blocks are dealt to the masked cores in turn.

    ``max``: the largest code of the window inside the map. ``average``: the codes less the
    context's zero are summed; ``code = clamp(round_half_even(sum * multiplier / (count *
    2**shift)) + zero, low, high)`` with the APW's shift, zero and clamp; ``count`` is the number of
    codes inside the map, or the whole window with ``count_padding``.
    """

    opcode = 8
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    mode: int = _bits(1, "what is computed", names=("max", "average"))
    count_padding: int = _bits(1, "whether padding counts")
    kernel_height: int = _bits(_SIZE, "rows of the window", default=1, least=1)
    kernel_width: int = _bits(_SIZE, "columns of the window", default=1, least=1)
    multiplier: int = _bits(32, "multiplier of the sum", signed=True)
    block: int = _bits(_SIZE, "first channel block")
    blocks: int = _bits(_SIZE, "number of channel blocks")
    y: int = _bits(_SIZE, "first row written")
    x: int = _bits(_SIZE, "first column written")
    height: int = _bits(_SIZE, "rows written")
    width: int = _bits(_SIZE, "columns written")


@attrs.frozen(kw_only=True)
class Add(Instruction):
    """Add a tile of context 0 (and of context 1) in the APW; blocks are dealt out as for POOL.

    ``code = clamp(round_half_even(((a - zero_a) * multiplier_a + (b - zero_b) * multiplier_b) *
    multiplier / 2**shift) + zero, low, high)`` with the APW's shift, zero and clamp.
    """

    opcode = 9
    unit = "compute"

    cores: int = _bits(_MASK, "mask of cores")
    operands: int = _bits(1, "maps that are read", names=("one", "two"))
    multiplier_a: int = _bits(32, "multiplier of context 0", signed=True)
    multiplier_b: int = _bits(32, "multiplier of context 1", signed=True)
    multiplier: int = _bits(32, "multiplier of the sum", signed=True)
    block: int = _bits(_SIZE, "first channel block")
    blocks: int = _bits(_SIZE, "number of channel blocks")
    y: int = _bits(_SIZE, "first row written")
    x: int = _bits(_SIZE, "first column written")
    height: int = _bits(_SIZE, "rows written")
    width: int = _bits(_SIZE, "columns written")


@attrs.frozen(kw_only=True)
class Move(Instruction):
    """Copy rows of words between off-chip memory and a bank."""

    opcode = 10
    unit = "dma"

    direction: int = _bits(1, "which way", names=("in", "out"))
    bank: int = _bits(_BANK, "bank")
    base: int = _bits(_BASE, "first word in the bank")
    pitch: int = _bits(17, "words from row to row in the bank")
    plane: int = _bits(_BASE, "words from plane to plane in the bank")
    address: int = _bits(28, "first word off-chip")
    offchip_pitch: int = _bits(17, "words from row to row off-chip")
    offchip_plane: int = _bits(28, "words from plane to plane off-chip")
    words: int = _bits(17, "words of a row")
    rows: int = _bits(_SIZE, "rows of a plane")
    planes: int = _bits(14, "planes (channel blocks times nibble planes)")


@attrs.frozen(kw_only=True)
class Sync(Instruction):
    """Wait for tokens in the controller and signal another: joins tokens when they run out."""

    opcode = 11
    unit = "controller"


@attrs.frozen(kw_only=True)
class Halt(Instruction):
    """End the program when every unit is idle."""

    opcode = 12
    unit = "controller"


INSTRUCTIONS: tuple[type[Instruction], ...] = (
    Fetch,
    Prepare,
    Fill,
    Sas,
    Apw,
    Residual,
    Conv,
    Pool,
    Add,
    Move,
    Sync,
    Halt,
)
_BY_OPCODE = {spec.opcode: spec for spec in INSTRUCTIONS}
_BY_NAME = {spec.__name__.upper(): spec for spec in INSTRUCTIONS}


# -- words of the index SRAM -----------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class IndexCode:
    """The index code of a group-set (16 bits, the paper's Fig. 6), most significant field first.

    The kernel of ``first`` and ``count`` is a segment: the group-sets of one output block within
    one load that share an input context and the segment's bases.
    """

    first: int = _bits(1, "first group-set of its kernel")
    count: int = _bits(6, "non-zero group-sets of the kernel in this load; 0 means 64")
    tap: int = _bits(_TAP, "tap within the sub-kernel, row-major")
    block: int = _bits(5, "input-channel block within the segment's 32")


@attrs.frozen(kw_only=True)
class Segment:
    """One 32-bit word of a load descriptor, most significant field first.

    The descriptor says what an index code cannot: which output block the codes belong to, which 16
    taps and 32 input blocks they count from, whether the block's sum is continued.
    """

    out_block: int = _bits(12, "output-channel block")
    block_base: int = _bits(7, "input-channel blocks before this segment's, in units of 32")
    tap_base: int = _bits(7, "taps before this segment's, in units of 16")
    context: int = _bits(CONTEXTS_BITS, "input context")
    empty: int = _bits(1, "the segment has no group-set and no code")
    first: int = _bits(1, "the block's sum starts here from its bias, else from a partial sum")
    last: int = _bits(1, "the block's sum ends here, else it is stored as a partial sum")
    end: int = _bits(1, "last segment of the load")


CODE_BYTES = 2
SEGMENT_BYTES = 4
TAPS_PER_SEGMENT = 1 << _TAP
BLOCKS_PER_SEGMENT = 32
GROUP_SETS_PER_SEGMENT = 64

Word = TypeVar("Word", IndexCode, Segment)


def pack_word(word: IndexCode | Segment) -> int:
    """Give the bits of an index code or segment.

    Raises
    ------
    InstructionError
        If a field is out of its bounds.
    """
    bits = 0
    for field in attrs.fields(type(word)):
        value = _checked(type(word).__name__, field, getattr(word, field.name))
        bits = bits << field.metadata["width"] | value
    return bits


def unpack_word(kind: type[Word], bits: int) -> Word:
    """Give the index code or segment of some bits."""
    values = {}
    fields = attrs.fields(kind)
    total = sum(field.metadata["width"] for field in fields)
    if not 0 <= bits < 1 << total:
        raise InstructionError(f"{bits:#x} does not fit {total} bits", where=kind.__name__)
    for field in reversed(fields):
        width = field.metadata["width"]
        values[field.name] = bits & ((1 << width) - 1)
        bits >>= width
    return kind(**values)


# -- binary ----------------------------------------------------------------------------------------


def _checked(where: str, field: attrs.Attribute[Any], value: object) -> int:
    low, high = field.metadata["low"], field.metadata["high"]
    if not isinstance(value, int) or not low <= value <= high:
        raise InstructionError(
            f"{value!r} is not within {low}..{high}", where=f"{where}.{field.name}"
        )
    return value


def field_limit(spec: type, name: str) -> int:
    """Largest value of a field of an instruction, index code or segment."""
    return int(getattr(attrs.fields(spec), name).metadata["high"])


def encode(instruction: Instruction) -> bytes:
    """Encode one instruction.

    Raises
    ------
    InstructionError
        If a field is out of its bounds.
    """
    spec = type(instruction)
    bits, at = spec.opcode, OPCODE_BITS
    for field in attrs.fields(spec):
        value = _checked(spec.__name__.upper(), field, getattr(instruction, field.name))
        width = field.metadata["width"]
        bits |= (value & ((1 << width) - 1)) << at
        at += width
    return bits.to_bytes(INSTRUCTION_BYTES, "little")


def decode(data: bytes, where: str = "instruction") -> Instruction:
    """Decode one instruction.

    Raises
    ------
    InstructionError
        If the opcode is unknown, a field has no meaning, or unused bits are set.
    """
    if len(data) != INSTRUCTION_BYTES:
        raise InstructionError(f"{len(data)} bytes, expected {INSTRUCTION_BYTES}", where=where)
    bits = int.from_bytes(data, "little")
    spec = _BY_OPCODE.get(bits & ((1 << OPCODE_BITS) - 1))
    if spec is None:
        raise InstructionError(f"unknown opcode {data[0]}", where=where)
    bits >>= OPCODE_BITS
    values = {}
    for field in attrs.fields(spec):
        width, low = field.metadata["width"], field.metadata["low"]
        value = bits & ((1 << width) - 1)
        if low < 0 and value >= 1 << (width - 1):
            value -= 1 << width
        values[field.name] = _checked(f"{where}: {spec.__name__.upper()}", field, value)
        bits >>= width
    if bits:
        raise InstructionError("unused bits are set", where=f"{where}: {spec.__name__.upper()}")
    return spec(**values)


def encode_all(instructions: Iterable[Instruction]) -> bytes:
    """Encode a stream."""
    return b"".join(map(encode, instructions))


def decode_all(data: bytes) -> tuple[Instruction, ...]:
    """Decode a stream.

    Raises
    ------
    InstructionError
        If an instruction cannot be decoded or the last is cut short.
    """
    return tuple(
        decode(data[at : at + INSTRUCTION_BYTES], f"instruction {at // INSTRUCTION_BYTES}")
        for at in range(0, len(data), INSTRUCTION_BYTES)
    )


# -- text ------------------------------------------------------------------------------------------


def _field_text(field: attrs.Attribute[Any], value: int) -> str:
    names = field.metadata["names"]
    if names:
        return str(names[value])
    if field.name == "wait":
        return ",".join(str(token) for token in range(TOKENS) if value >> token & 1)
    if field.name == "signal":
        return str(value - 1)
    if field.name in ("cores", "skip"):
        return bin(value)
    return str(value)


def disassemble(instructions: Iterable[Instruction]) -> Iterator[str]:
    """Give a line of assembly for each instruction; fields at their default are left out."""
    for instruction in instructions:
        spec = type(instruction)
        parts = [spec.__name__.upper()]
        for field in (*attrs.fields(spec)[2:], *attrs.fields(spec)[:2]):
            value = getattr(instruction, field.name)
            if value != field.default:
                parts.append(f"{field.name}={_field_text(field, value)}")
        yield " ".join(parts)


def _parse_field(where: str, field: attrs.Attribute[Any], text: str) -> int:
    names = field.metadata["names"]
    if names:
        if text not in names:
            raise InstructionError(
                f"{text!r} is not one of {', '.join(names)}", where=f"{where}: {field.name}"
            )
        return int(names.index(text))
    is_wait = field.name == "wait"
    try:
        numbers = [int(part, 0) for part in text.split(",")] if is_wait else [int(text, 0)]
    except ValueError:
        raise InstructionError(
            f"{text!r} is not a number", where=f"{where}: {field.name}"
        ) from None
    if not is_wait:
        return _checked(where, field, numbers[0] + (field.name == "signal"))
    if not all(0 <= token < TOKENS for token in numbers):
        raise InstructionError(
            f"{text} is not within 0..{TOKENS - 1}", where=f"{where}: {field.name}"
        )
    return sum(1 << token for token in set(numbers))


def assemble(text: str) -> tuple[Instruction, ...]:
    """Parse assembly: ``NAME field=value ...``, one instruction a line, ``#`` starts a comment.

    Raises
    ------
    InstructionError
        Naming the line, the field and the remedy.

    Examples
    --------
    >>> assemble("PREPARE cores=0b11 signal=0  # open two arrays")
    (Prepare(signal=1, wait=0, cores=3),)
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"line {number}"
        spec = _BY_NAME.get(words[0].upper())
        if spec is None:
            near = difflib.get_close_matches(words[0].upper(), _BY_NAME, 1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(_BY_NAME)}"
            raise InstructionError(f"no instruction {words[0]!r}", where=where, hint=hint)
        fields = {field.name: field for field in attrs.fields(spec)}
        values = {}
        for word in words[1:]:
            match = re.fullmatch(r"(\w+)=(\S+)", word)
            name = match[1] if match else word
            if match is None or name not in fields or name in values:
                raise InstructionError(
                    f"{word!r} is not a field=value of {words[0]} or stands twice",
                    where=where,
                    hint=f"fields: {', '.join(fields)}",
                )
            values[name] = _parse_field(where, fields[name], match[2])
        found.append(spec(**values))
    return tuple(found)


def _field_rows(kind: type, fields: Sequence[attrs.Attribute[Any]]) -> Iterator[str]:
    yield "| field | bits | values | meaning |"
    yield "| --- | --- | --- | --- |"
    for field in fields:
        data = field.metadata
        values = " / ".join(data["names"]) or f"{data['low']} .. {data['high']}"
        yield f"| `{field.name}` | {data['width']} | {values} | {data['doc']} |"


def _doc(kind: type) -> str:
    return re.sub(r":class:`(\w+)`", r"`\1`", re.sub(r"\n +", "\n", kind.__doc__ or ""))


def reference_manual() -> str:
    """Give ``docs/isa.md``."""
    overview = re.sub(r":data:`(\w+)`", str(INSTRUCTION_BYTES), __doc__ or "").replace("``", "`")
    lines = [
        "<!-- generated by `make docs` from runtime/mars_runtime/isa.py; do not edit -->",
        "# Instruction set",
        "",
        overview.split("\n\n", 1)[1].strip(),
        "",
        "## Common fields",
        "",
        *_field_rows(Instruction, attrs.fields(Instruction)),
    ]
    for spec in INSTRUCTIONS:
        own = attrs.fields(spec)[len(attrs.fields(Instruction)) :]
        lines += ["", f"## {spec.__name__.upper()}", ""]
        lines += [f"Opcode {spec.opcode}, unit {spec.unit}.", ""]
        lines += [_doc(spec).replace("``", "`").strip()]
        if own:
            lines += ["", *_field_rows(spec, own)]
    lines += ["", "## Words of the index SRAM"]
    for kind, name in ((IndexCode, "Index code"), (Segment, "Load descriptor segment")):
        lines += ["", f"### {name}", "", _doc(kind).replace("``", "`").strip(), ""]
        lines += _field_rows(kind, attrs.fields(kind))
    return "\n".join(lines) + "\n"
