"""What the machine reports: time, stalls by cause, and counts, layer by layer."""

from __future__ import annotations

import attrs

from .arch import MarsArch

__all__ = ["STALLS", "Counters", "Event", "LayerTime", "Timeline"]

# Why a core's compute unit waits, or takes longer than its macros.
STALLS: dict[str, str] = {
    "weights": "waits for weights, index codes or parameters to be loaded",
    "maps": "waits for feature maps to travel to or from off-chip memory",
    "cores": "idle while others compute: no kernel block for it, or it needs theirs",
    "issue": "waits for the controller to issue, or sets registers",
    "ports": "a bank port is busier than the macros",
    "latency": "pipeline drain of macros and APW",
}


@attrs.define
class Counters:
    """What happened, summed over cores. Bits are bits; the rest are events."""

    group_sets: int = attrs.field(default=0, metadata={"doc": "group-set times output pixel"})
    passed_over: int = attrs.field(
        default=0,
        metadata={"doc": "the same of group-sets that met padding alone, passed over [A]"},
    )
    macro_accesses: int = attrs.field(default=0, metadata={"doc": "accesses of single macros"})
    map_reads: int = attrs.field(default=0, metadata={"doc": "port reads of the banks by cores"})
    map_writes: int = attrs.field(default=0, metadata={"doc": "port writes of the banks by cores"})
    bank_bits: int = attrs.field(default=0, metadata={"doc": "bits through the banks, with DMA"})
    core_sram_bits: int = attrs.field(
        default=0, metadata={"doc": "bits into and out of weight, index and parameter SRAMs"}
    )
    macro_write_bits: int = attrs.field(default=0, metadata={"doc": "macro cells written, bits"})
    fetched_bits: int = attrs.field(
        default=0, metadata={"doc": "off-chip bits of weights, index codes, parameters"}
    )
    instruction_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of the code"})
    map_in_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of maps, inward"})
    map_out_bits: int = attrs.field(default=0, metadata={"doc": "off-chip bits of maps, outward"})
    partial_bits: int = attrs.field(
        default=0, metadata={"doc": "off-chip bits of partial sums, both ways"}
    )
    array_fills: int = attrs.field(default=0, metadata={"doc": "arrays opened for writing"})

    def add(self, other: Counters) -> None:
        """Add another's counts."""
        for field in attrs.fields(Counters):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def offchip_bits(self) -> int:
        """All bits through the off-chip port."""
        return (
            self.fetched_bits
            + self.instruction_bits
            + self.map_in_bits
            + self.map_out_bits
            + self.partial_bits
        )

    def macs(self, arch: MarsArch) -> int:
        """Multiply-accumulates that the macros executed."""
        return self.group_sets * arch.group_set_weights


@attrs.define
class LayerTime:
    """Time and counts of one layer.

    ``cycles`` is the time from the end of the layer before to the end of this one;
    ``macro_cycles`` and ``stalls`` (by cause, see :data:`STALLS`) are sums over cores, and together
    they are ``cores * cycles``: of a region, and of each layer where no core runs ahead.
    """

    name: str
    kind: str
    start: int = 0
    cycles: int = 0
    macro_cycles: int = 0
    stalls: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(STALLS, 0))
    counters: Counters = attrs.field(factory=Counters)


@attrs.frozen
class Event:
    """An instruction's time on a lane such as ``core 0 compute`` or ``dma``."""

    lane: str
    name: str
    layer: int
    index: int
    start: int
    end: int


@attrs.frozen
class Timeline:
    """A region's time on the machine, for one image."""

    cycles: int
    layers: tuple[LayerTime, ...]
    events: tuple[Event, ...] = ()
