"""The machine's time for instructions that were never encoded: what a search measures with.

A compiler that tries thousands of schedules has the instructions and the loads as values. The
stopwatch hands them to the machine's own handlers, so that start times, durations and counts are
those of the executed program; what it leaves out is the encoding, the image and the walk through
the index SRAMs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import isa
from .arch import MarsArch
from .machine import Machine
from .memory import Core
from .program import LayerInfo, Region
from .timeline import Timeline
from .timing import DecodedLoad

__all__ = ["Issued", "Stopwatch"]


class Issued(NamedTuple):
    """An instruction in program order with its tokens; for CONV with what each core holds."""

    instruction: isa.Instruction
    wait: int
    signal: int
    layer: int
    loads: Mapping[int, DecodedLoad] | None = None


class Stopwatch(Machine):
    """A chip without data that times one stream.

    Parameters
    ----------
    arch : MarsArch
        The chip.
    layers : sequence of LayerInfo
        What the stream's layer numbers mean.
    image_bytes, offchip_words : int
        Sizes of the off-chip memory, as :class:`Region` has them.
    """

    reads_codes = False

    def __init__(
        self, arch: MarsArch, layers: Sequence[LayerInfo], image_bytes: int, offchip_words: int
    ) -> None:
        super().__init__(Region((), (), tuple(layers), b"", b"", image_bytes, offchip_words), arch)
        self.loads: Mapping[int, DecodedLoad] = {}

    def time(self, stream: Sequence[Issued]) -> Timeline:
        """Give the timeline of a stream that ends in HALT.

        Raises
        ------
        MachineError
            If an instruction does what the hardware cannot.
        """
        self.length = len(stream)
        for self.index, issued in enumerate(stream):
            while issued.layer > self.layer_number:
                self._end_layer()
            if issued.loads is not None:
                self.loads = issued.loads
            self._step(issued.instruction, issued.wait, issued.signal)
        self._end_layer()
        return Timeline(self.now, tuple(self.layers))

    def _load_of(self, core: Core, conv: isa.Conv) -> DecodedLoad:
        return self.loads[core.number]
