"""Energy from counts: every pJ is a counter times a field of the architecture."""

from __future__ import annotations

import attrs

from .arch import MarsArch
from .timeline import Counters

__all__ = ["Energy", "energy_of"]


@attrs.frozen
class Energy:
    """Energy in picojoule, by where it goes.

    Only ``macros`` rests on a figure of the paper's (which other sources put 4x apart); the others
    are assumed from published SRAM and DRAM energies, see ``mars arch``.
    """

    macros: float
    macro_writes: float
    banks: float
    core_srams: float
    offchip: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.macros + self.macro_writes + self.banks + self.core_srams + self.offchip

    @property
    def assumed_share(self) -> float:
        """Share of the total that rests on assumed figures alone."""
        return 1 - self.macros / self.total if self.total else 0.0


def energy_of(counters: Counters, arch: MarsArch) -> Energy:
    """Give the energy of what was counted."""
    return Energy(
        counters.macro_accesses * arch.macro_access_pj,
        counters.macro_write_bits * arch.macro_write_pj_per_bit,
        counters.bank_bits * arch.bank_pj_per_bit,
        counters.core_sram_bits * arch.core_sram_pj_per_bit,
        counters.offchip_bits * arch.offchip_pj_per_bit,
    )
