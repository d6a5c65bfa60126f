"""Every field of every instruction matters: altering it is an error, or changes results or time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import attrs
import pytest

from mars_runtime import PRESETS, Machine, MarsArch, isa
from mars_runtime.errors import MarsError
from mars_runtime.program import Region
from python_tests.random_graphs import random_inputs
from python_tests.small_networks import bordered_region, every_kind_of_layer

MARS = PRESETS["mars"]
IMAGES = 3  # so that the codes of every map meet both ends of their range
PARTS = 2

#: Machines on which the program has resident maps, staged tiles, partial sums in a bank, off-chip.
MACHINES: dict[str, MarsArch] = {
    "resident": attrs.evolve(MARS, overlap="full"),
    "staged": attrs.evolve(MARS, bank_bits=7 * 1024, array_fill_cycles=20, overlap="full"),
    "partial": attrs.evolve(
        MARS, weight_groups_per_partition=8, array_fill_cycles=3, overlap="prefetch", cores=2
    ),
    "partial off-chip": attrs.evolve(
        MARS,
        weight_groups_per_partition=10,
        bank_bits=18 * 1024,
        overlap="full",
        array_fill_cycles=2000,
        cores=2,
    ),
}

#: Where borders pass over the taps that only meet padding.
CUT = "border"
MACHINES[CUT] = MACHINES["resident"]

#: Fields whose alteration may leave results, time and counts as they are, and why.
EXPLAINED: dict[tuple[str, str], str] = {
    ("*", "signal"): "a token that nobody waits for, or whose waiter is ordered by its unit anyway",
    ("*", "wait"): "for what has ended already; or the unit's queue, a bank's ports or the array "
    "order it too (what a missing wait does is a test of its own below)",
    ("APW", "blocks"): "a map of one plane lies the same with more blocks behind it",
    ("APW", "low"): "no code of the batch lies at this end of the range",
    ("APW", "high"): "no code of the batch lies at this end of the range",
    ("CONV", "descriptor"): "another load's descriptor, still in the SRAM, is the same",
    ("CONV", "parameters"): "a visit that neither starts nor ends a sum uses no parameter",
    ("FETCH", "source"): "parameters of a visit that neither starts nor ends a sum are not used",
    ("CONV", "y"): "partial sums lie by tile, not by pixel of the map",
    ("CONV", "x"): "partial sums lie by tile, not by pixel of the map",
    ("MOVE", "pitch"): "one row has no next row",
    ("MOVE", "offchip_pitch"): "one row has no next row",
    ("MOVE", "plane"): "one plane has no next plane",
    ("MOVE", "offchip_plane"): "one plane has no next plane",
    ("SAS", "dilation_y"): "one tap row has no next",
    ("SAS", "dilation_x"): "one tap column has no next",
    ("SAS", "kernel_width"): "tap 0 is in row 0 of a kernel of any width",
    ("SAS", "stride_y"): "a tile of one row has no next",
    ("SAS", "stride_x"): "a tile of one column has no next",
    ("SAS", "zero"): "the tile meets no padding",
    ("SAS", "skip"): "the load has no group-set of that tap",
}


def mutants(instruction: isa.Instruction) -> Iterator[tuple[str, int, isa.Instruction]]:
    """Yield each field altered: one more (or less at the top), the top bit flipped, zero."""
    for field in attrs.fields(type(instruction)):
        value = getattr(instruction, field.name)
        width, low, high = (field.metadata[key] for key in ("width", "low", "high"))
        near = value + 1 if value < high else value - 1
        found = {near, value ^ 1 << width - 1, 0}
        for other in sorted(found - {value}):
            if low <= other <= high:  # what cannot be encoded is test_isa's
                yield field.name, other, attrs.evolve(instruction, **{field.name: other})


def with_sync(region: Region) -> Region:
    """Join a token by a SYNC, which codegen emits only where 64 are in use."""
    code = list(region.instructions)
    at = next(i for i, one in enumerate(code) if isinstance(one, isa.Conv) and one.wait)
    token = (code[at].wait & -code[at].wait).bit_length() - 1
    code.insert(at, isa.Sync(wait=1 << token, signal=64))
    code[at + 1] = attrs.evolve(code[at + 1], wait=code[at + 1].wait ^ 1 << token | 1 << 63)
    layers = [
        attrs.evolve(
            layer,
            start=layer.start + (layer.start > at),
            stop=layer.stop + (layer.stop > at),
        )
        for layer in region.layers
    ]
    return attrs.evolve(region, code=isa.encode_all(code), layers=tuple(layers))


class Subject:
    """A program with what it gives."""

    def __init__(self, name: str) -> None:
        graph = every_kind_of_layer()
        self.arch = MACHINES[name]
        region = bordered_region(graph, self.arch, "both" if name == CUT else "whole")
        self.region = with_sync(region)
        x = random_inputs(graph, 5, images=IMAGES)["x0"]
        self.codes = graph.inputs[0].quantize.apply(x)
        self.expected = self.observe(self.region)

    def observe(self, region: Region) -> object:
        """Give output codes, cycles, stalls and counters; or the error's type."""
        try:
            machine = Machine(region, self.arch, images=IMAGES)
            machine.write_input(0, self.codes)
            timeline = machine.run()
            return machine.read_output(0).tobytes(), timeline
        except MarsError as error:
            return type(error).__name__

    def replaced(self, index: int, instruction: isa.Instruction) -> Region:
        """Give the region with one instruction replaced."""
        size = isa.INSTRUCTION_BYTES
        code = bytearray(self.region.code)
        code[index * size : (index + 1) * size] = isa.encode(instruction)
        return attrs.evolve(self.region, code=bytes(code))


def chosen(region: Region) -> list[int]:
    """Give the first and last instruction of each kind in each layer: the others are alike."""
    ends: dict[tuple[int, type], list[int]] = {}
    for index, instruction in enumerate(region.instructions):
        layer = sum(index >= one.stop for one in region.layers)
        ends.setdefault((layer, type(instruction)), []).append(index)
    return sorted({index for found in ends.values() for index in (found[0], found[-1])})


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_altered_field_is_noticed(name, part):
    subject = Subject(name)
    assert not isinstance(subject.expected, str)
    survivors = Counter[tuple[str, str]]()
    places: dict[tuple[str, str], str] = {}
    tried = 0
    code = subject.region.instructions
    for index in chosen(subject.region)[part::PARTS]:
        for field, value, mutant in mutants(code[index]):
            tried += 1
            if subject.observe(subject.replaced(index, mutant)) == subject.expected:
                key = (type(mutant).__name__.upper(), field)
                survivors[key] += 1
                places.setdefault(key, f"{index}: {field}={value} in {code[index]}")
    unexplained = {
        key: places[key]
        for key in survivors
        if key not in EXPLAINED and ("*", key[1]) not in EXPLAINED
    }
    assert tried > 100
    assert not unexplained, "\n".join(f"{survivors[k]} {k} {v}" for k, v in unexplained.items())


@pytest.mark.parametrize("name", MACHINES)
def test_instructions_cannot_be_left_out(name):
    """Without any single one (tokens aside) the program is refused or differs."""
    subject = Subject(name)
    code = subject.region.instructions
    for index, instruction in enumerate(code):
        idle = isa.Sync(wait=instruction.wait, signal=instruction.signal)
        if isinstance(instruction, isa.Sync):
            continue
        assert subject.observe(subject.replaced(index, idle)) != subject.expected, f"{index}"


@pytest.mark.parametrize("name", MACHINES)
def test_missing_waits_never_give_wrong_codes(name):
    """Without its waits an instruction is refused, or its units keep the order themselves."""
    subject = Subject(name)
    codes, _ = subject.expected
    errors = Counter[str]()
    for index, instruction in enumerate(subject.region.instructions):
        if instruction.wait:
            bare = attrs.evolve(instruction, wait=0)
            found = subject.observe(subject.replaced(index, bare))
            if isinstance(found, str):
                errors[found] += 1
            else:
                assert found[0] == codes, f"{index}: {instruction}"
    assert errors["HazardError"] and set(errors) <= {"HazardError", "PoisonError"}, errors


def test_the_programs_hold_every_instruction():
    held = set()
    offchip = set()
    masks = rings = 0
    for name in MACHINES:
        code = Subject(name).region.instructions
        masks += sum(bool(one.skip) for one in code if isinstance(one, isa.Sas))
        rings += sum(bool(one.row) for one in code if isinstance(one, isa.Sas))
        held |= {type(one) for one in code}
        offchip |= {one.partial for one in code if isinstance(one, isa.Conv)}
    assert held == set(isa.INSTRUCTIONS) and masks > 2 and rings > 2
    assert offchip == {isa.PARTIAL_BANK, isa.PARTIAL_OFFCHIP}
