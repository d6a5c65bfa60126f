"""The architecture description: every number documented and bounded."""

from __future__ import annotations

import math

import attrs
import pytest

from mars_runtime import PRESETS, MarsArch, isa, load_arch
from mars_runtime.errors import ArchError

NUMBERS = [field for field in attrs.fields(MarsArch) if "low" in field.metadata]


def test_presets_are_the_papers_machine():
    """HARDWARE.md: 4 cores x 2 macros x 8 partitions x 64 groups x 16 weights, 2 x 512 Kbit."""
    mars = PRESETS["mars"]
    assert (mars.group_sets_per_core, mars.group_set_weights, mars.macs_per_cycle) == (
        64,
        256,
        1024,
    )
    assert mars.partitions_per_macro * mars.weight_groups_per_partition * mars.weight_group == 8192
    assert mars.bank_words * 64 == 512 * 1024 and mars.banks == 2
    assert (mars.accesses(4), mars.accesses(8)) == (1, 2)
    assert (mars.macro_write_bits, mars.array_fill_cycles) == (32, 1400)
    assert mars.offchip_bits_per_cycle == 128 and mars.overlap == "none" and mars.zero_skipping
    assert mars.weight_sram_bits == 256 * 1024 and mars.index_sram_bits == 4 * 1024
    other = PRESETS["mars-80b"]
    assert (other.offchip_bits_per_cycle, other.macro_write_bits) == (80, 80)
    assert other.array_fill_cycles == 0
    dense = PRESETS["mars-dense"]
    assert attrs.evolve(dense, name="mars", zero_skipping=True) == mars and not dense.zero_skipping


def test_every_field_has_unit_source_and_meaning():
    for info in MarsArch.describe():
        assert info.doc.endswith(".")
        if info.name != "name":
            assert info.source.startswith(("[A]", "[P]")), info.name
    assumed = {info.name for info in MarsArch.describe() if info.assumed}
    assert {"weight_sram_bits", "offchip_bits_per_cycle", "overlap", "accesses_8bit"} <= assumed
    assert not {"cores", "bank_bits", "core_clock_mhz", "weight_group"} & assumed


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_outside_their_bounds_are_refused_by_name(field):
    low, high = field.metadata["low"], field.metadata["high"]
    for value in (low - 1, high + 1, math.nan, math.inf, "many", None, True, [4], 10**30):
        with pytest.raises(ArchError, match=rf"architecture field {field.name}"):
            load_arch("mars", {field.name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coers": 4}, "coers.*did you mean cores"),
        ({"cores": 8}, "shunter needs 800 MHz"),
        ({"macros_per_core": 4}, "32 output channels"),
        ({"overlap": "both"}, "none, prefetch, full"),
        ({"zero_skipping": "yes"}, "true or false"),
        ({"name": ""}, "name"),
    ],
)
def test_contradictions_and_unknown_fields_are_refused(changes, message):
    with pytest.raises(ArchError, match=message):
        load_arch("mars", changes)


def test_srams_are_within_what_instructions_address():
    """The largest memory that a description may ask for is addressable to its last cell."""
    bounds = {field.name: field.metadata["high"] for field in NUMBERS}
    for name in ("weight_sram_bits", "index_sram_bits", "parameter_sram_bits"):
        assert bounds[name] // 8 - 1 <= isa.field_limit(isa.Fetch, "destination")
    assert bounds["bank_bits"] // 64 - 1 <= isa.field_limit(isa.Sas, "base")
    assert bounds["cores"] - 1 <= isa.field_limit(isa.Fill, "core")
    assert bounds["offchip_bytes"] // 8 - 1 <= isa.field_limit(isa.Move, "address")
    assert bounds["weight_groups_per_partition"] * 2 - 1 <= isa.field_limit(isa.Fill, "slot")


def test_files_and_text_give_fields_of_their_type(tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text('base = "mars-80b"\nmacro_write_bits = 64\n', encoding="utf-8")
    arch = load_arch(path, {"overlap": "full", "zero_skipping": "false", "bank_bits": "0x10000"})
    assert arch.name == "wide with overlap=full, zero_skipping=false, bank_bits=0x10000"
    assert (arch.macro_write_bits, arch.offchip_bits_per_cycle) == (64, 80)
    assert load_arch(path, {"name": "narrow", "cores": 2}).name == "narrow"
    assert load_arch("mars", {"cores": 4}) == PRESETS["mars"]  # nothing changes
    assert (arch.overlap, arch.zero_skipping, arch.bank_bits) == ("full", False, 65536)
    assert MarsArch.from_dict(arch.to_dict()) == arch
    for content, message in (("cores = ", "cannot be read"), ('base = "venus"', "not a preset")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ArchError, match=message):
            load_arch(path)
    with pytest.raises(ArchError, match="did you mean mars-dense"):
        load_arch("mars-dens")
