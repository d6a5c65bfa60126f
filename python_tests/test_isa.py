"""The instruction set: every word round-trips or is refused by name."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from mars_runtime import isa
from mars_runtime.errors import InstructionError, ProgramError

FIELDS = [
    pytest.param(spec, field, id=f"{spec.__name__}.{field.name}")
    for spec in isa.INSTRUCTIONS
    for field in attrs.fields(spec)
]


def bounds(field: attrs.Attribute) -> tuple[int, int]:
    return field.metadata["low"], field.metadata["high"]


def round_trip(instruction: isa.Instruction) -> None:
    data = isa.encode(instruction)
    assert len(data) == isa.INSTRUCTION_BYTES
    assert isa.decode(data) == instruction
    (line,) = isa.disassemble([instruction])
    assert isa.assemble(line) == (instruction,)


@pytest.mark.parametrize(("spec", "field"), FIELDS)
def test_field_round_trips_at_its_bounds_through_binary_and_text(spec, field):
    low, high = bounds(field)
    for value in {low, low + 1, (low + high) // 2, high - 1, high}:
        round_trip(spec(**{field.name: value}))


@pytest.mark.parametrize("spec", isa.INSTRUCTIONS, ids=lambda spec: spec.__name__)
@pytest.mark.parametrize("end", [0, 1])
def test_all_fields_at_their_bounds_together(spec, end):
    round_trip(spec(**{field.name: bounds(field)[end] for field in attrs.fields(spec)}))


@pytest.mark.parametrize(("spec", "field"), FIELDS)
def test_value_out_of_bounds_is_refused_by_name(spec, field):
    low, high = bounds(field)
    for value in (low - 1, high + 1, 1 << 80, -(1 << 80), 1.5, "1", None):
        with pytest.raises(InstructionError, match=rf"{spec.__name__.upper()}\.{field.name}"):
            isa.encode(spec(**{field.name: value}))


@pytest.mark.parametrize(("spec", "field"), FIELDS)
def test_encoding_puts_fields_in_order_of_declaration(spec, field):
    """Each field's bits stand exactly where the widths before it say, and nowhere else."""
    at = isa.OPCODE_BITS
    for other in attrs.fields(spec):
        if other.name == field.name:
            break
        at += other.metadata["width"]
    width = field.metadata["width"]
    low, high = bounds(field)
    images = {}
    for value in (low, high):
        images[value] = int.from_bytes(isa.encode(spec(**{field.name: value})), "little")
        assert images[value] >> at & (1 << width) - 1 == value % (1 << width)
    assert images[low] ^ images[high] == (low ^ high) % (1 << width) << at


@pytest.mark.parametrize("spec", isa.INSTRUCTIONS, ids=lambda spec: spec.__name__)
def test_every_unused_bit_is_refused(spec):
    used = isa.OPCODE_BITS + sum(field.metadata["width"] for field in attrs.fields(spec))
    good = int.from_bytes(isa.encode(spec()), "little")
    assert used <= 8 * isa.INSTRUCTION_BYTES
    for bit in range(used, 8 * isa.INSTRUCTION_BYTES):
        with pytest.raises(InstructionError, match=rf"{spec.__name__.upper()}.*unused bits"):
            isa.decode((good | 1 << bit).to_bytes(isa.INSTRUCTION_BYTES, "little"))


@pytest.mark.parametrize(("spec", "field"), FIELDS)
def test_field_without_a_meaning_is_refused_when_decoded(spec, field):
    """An enumeration of three in two bits, a stride of zero, a token number above the last."""
    low, high = bounds(field)
    width = field.metadata["width"]
    at = isa.OPCODE_BITS
    for other in attrs.fields(spec):
        if other.name == field.name:
            break
        at += other.metadata["width"]
    mask = ((1 << width) - 1) << at
    good = int.from_bytes(isa.encode(spec()), "little") & ~mask
    span = range(1 << width) if width <= 8 else (0, 1, (1 << width) - 1)
    for bits in span:
        data = (good | bits << at).to_bytes(isa.INSTRUCTION_BYTES, "little")
        value = bits - (1 << width) if low < 0 and bits >> width - 1 else bits
        if low <= value <= high:
            assert getattr(isa.decode(data), field.name) == value
        else:
            with pytest.raises(InstructionError, match=rf"{spec.__name__.upper()}\.{field.name}"):
                isa.decode(data)


def test_unknown_opcodes_are_refused():
    known = {spec.opcode for spec in isa.INSTRUCTIONS}
    assert len(known) == len(isa.INSTRUCTIONS) and 0 not in known
    for opcode in set(range(256)) - known:
        with pytest.raises(InstructionError, match=f"opcode {opcode}"):
            isa.decode(bytes([opcode]).ljust(isa.INSTRUCTION_BYTES, b"\0"))


def test_cut_stream_is_refused_naming_the_instruction():
    data = isa.encode_all([isa.Sync(), isa.Halt()])
    assert isa.decode_all(data) == (isa.Sync(), isa.Halt())
    for length in range(len(data)):
        if length % isa.INSTRUCTION_BYTES:
            with pytest.raises(InstructionError, match=f"instruction {length // 40}"):
                isa.decode_all(data[:length])


# -- words of the index SRAM -----------------------------------------------------------------------


def test_all_65536_index_codes_round_trip_as_the_paper_lays_them_out():
    """Fig. 6: bit 15 first, 14:9 count, 8:5 tap, 4:0 input-channel block."""
    for word in range(1 << 16):
        code = isa.unpack_word(isa.IndexCode, word)
        assert (code.first, code.count, code.tap, code.block) == (
            word >> 15,
            word >> 9 & 63,
            word >> 5 & 15,
            word & 31,
        )
        assert isa.pack_word(code) == word


def test_words_out_of_range_are_refused_by_name():
    for kind, bits in ((isa.IndexCode, 16), (isa.Segment, 32)):
        for word in (1 << bits, -1, 1 << 70):
            with pytest.raises(InstructionError, match=kind.__name__):
                isa.unpack_word(kind, word)
        for field in attrs.fields(kind):
            for value in (-1, field.metadata["high"] + 1, 0.5, None):
                with pytest.raises(InstructionError, match=rf"{kind.__name__}\.{field.name}"):
                    isa.pack_word(kind(**{field.name: value}))


def test_segments_fill_32_bits_and_round_trip():
    fields = attrs.fields(isa.Segment)
    assert sum(field.metadata["width"] for field in fields) == 32
    for field in fields:
        for value in (0, 1, field.metadata["high"]):
            word = isa.Segment(**{field.name: value})
            assert isa.unpack_word(isa.Segment, isa.pack_word(word)) == word
    top = isa.Segment(**{field.name: field.metadata["high"] for field in fields})
    assert isa.pack_word(top) == 2**32 - 1


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CONVV", "line 1: no instruction 'CONVV'.*CONV"),
        ("HALT\nFILL core=1 core=1", "line 2: 'core=1'.*twice"),
        ("FETCH memory=weigth", "line 1: memory: 'weigth' is not one of weight, index, parameter"),
        ("FETCH sauce=1", "'sauce=1' is not a field"),
        ("FETCH source", "'source' is not a field"),
        ("FETCH source=x1", "'x1' is not a number"),
        ("FETCH core=16", r"core.*16 is not within 0\.\.15"),
        ("SYNC wait=64", r"0\.\.63"),
        ("SYNC wait=-1", r"0\.\.63"),
        ("SYNC wait=1,,2", "'1,,2' is not a number"),
        ("SYNC signal=64", r"signal.*65 is not within 0\.\.64"),
    ],
)
def test_bad_assembly_is_refused_naming_line_and_field(text, message):
    with pytest.raises(InstructionError, match=message):
        isa.assemble(text)


def test_assembly_takes_comments_blank_lines_and_any_base():
    text = "\n# nothing\nfetch core=0x2 length=0b100 source=0o10 # c=3\n\n  HALT  "
    assert isa.assemble(text) == (isa.Fetch(core=2, length=4, source=8), isa.Halt())


def test_token_zero_can_be_signalled_and_waited_for():
    (line,) = isa.disassemble([isa.Sync(signal=1, wait=0b1001)])
    assert line == "SYNC signal=0 wait=0,3"


def test_instruction_errors_are_program_errors():
    assert issubclass(InstructionError, ProgramError)


# -- the manual ------------------------------------------------------------------------------------


def test_manual_names_every_instruction_and_field_with_width_and_values():
    sections = isa.reference_manual().split("\n## ")
    for spec in isa.INSTRUCTIONS:
        (section,) = [text for text in sections if text.startswith(f"{spec.__name__.upper()}\n")]
        assert f"Opcode {spec.opcode}, unit {spec.unit}." in section
        for field in attrs.fields(spec)[2:]:
            data = field.metadata
            values = " / ".join(data["names"]) or f"{data['low']} .. {data['high']}"
            assert f"| `{field.name}` | {data['width']} | {values} | {data['doc']} |" in section
    for heading in ("## Common fields", "### Index code", "### Load descriptor segment"):
        assert isa.reference_manual().count(f"\n{heading}\n") == 1
    assert ":data:" not in isa.reference_manual() and ":class:" not in isa.reference_manual()


def test_manual_in_docs_is_the_generated_one():
    path = Path(__file__).parents[1] / "docs" / "isa.md"
    assert path.read_text(encoding="utf-8") == isa.reference_manual(), "run `make docs`"
