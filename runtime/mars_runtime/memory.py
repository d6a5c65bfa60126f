"""The machine's memories: bytes, and when each cell was written and until when it is used.

All memories are poisoned at reset. Reading a cell that nothing wrote is a :class:`PoisonError`;
touching one that another unit still uses is a :class:`HazardError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import isa
from .arch import MarsArch
from .errors import HazardError, MemoryAccessError, PoisonError
from .maps import WORD_BYTES, WORD_CHANNELS
from .packing import group_set_bytes
from .timing import CoreConfig

__all__ = ["Cells", "ChipMemory", "Core", "Sram", "whole"]

Array = npt.NDArray[Any]


class Cells:
    """When each cell of a memory was written, and until when it is read."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        # One more than the cycle; 0 is poison, so that memory is taken as it is touched.
        self.ready = np.zeros(count, np.int64)
        self.busy = np.zeros(count, np.int64)

    def read(self, cells: Any, start: int, end: int, view: Callable[[Array], Array]) -> None:
        """Check a read of ``view(state)[cells]`` and mark it."""
        self.check_read(view(self.ready)[cells], start)
        busy = view(self.busy)
        busy[cells] = np.maximum(busy[cells], end)

    def check_read(self, ready: Array, start: int) -> None:
        """Refuse to read poison, or what is not there yet."""
        if ready.size and ready.min() <= 0:
            raise PoisonError(f"reads {self.name} where nothing was written")
        if ready.size and ready.max() - 1 > start:
            raise HazardError(
                f"reads {self.name} at cycle {start}, written until {ready.max() - 1}",
                hint="a wait token is missing",
            )

    def write(self, cells: Any, start: int, end: int, view: Callable[[Array], Array]) -> None:
        """Check a write of ``view(state)[cells]`` and mark it."""
        busy, ready = view(self.busy)[cells], view(self.ready)[cells]
        until = max(int(busy.max()), int(ready.max()) - 1) if busy.size else 0
        if until > start:
            raise HazardError(
                f"writes {self.name} at cycle {start}, in use until {until}",
                hint="a wait token is missing",
            )
        view(self.ready)[cells] = end + 1


class Sram:
    """Bytes with their cells; ``grain`` bytes are one cell."""

    def __init__(self, name: str, size: int, grain: int) -> None:
        self.name, self.size, self.grain = name, size, grain

    @functools.cached_property
    def data(self) -> Array:
        """The bytes."""
        return np.zeros(self.size, np.uint8)

    @functools.cached_property
    def cells(self) -> Cells:
        """When they were written and read."""
        return Cells(self.name, -(-self.size // self.grain))

    def check(self, address: int, length: int) -> None:
        """Refuse bytes that are not cells of this memory."""
        if address + length > self.size or address % self.grain or length % self.grain:
            raise MemoryAccessError(
                f"{self.name} of {self.size} bytes in cells of {self.grain} addressed at "
                f"{address}..{address + length - 1}"
            )

    def span(self, address: int, length: int) -> slice:
        """Give the cells of some bytes, or refuse them."""
        self.check(address, length)
        return slice(address // self.grain, (address + length) // self.grain)


def whole(state: Array) -> Array:
    """View all cells of a memory."""
    return state


class Core:
    """One core: its SRAMs, macros, registers, and how far its units are busy.

    Memory is taken when it is first touched, which a timeline never does.
    """

    def __init__(self, number: int, arch: MarsArch) -> None:
        self.number = number
        self.weight = Sram(
            f"core {number} weight SRAM", arch.weight_sram_bits // 8, group_set_bytes(4)
        )
        self.index = Sram(f"core {number} index SRAM", arch.index_sram_bits // 8, isa.CODE_BYTES)
        self.parameter = Sram(
            f"core {number} parameter SRAM", arch.parameter_sram_bits // 8, WORD_CHANNELS
        )
        self.srams = (self.weight, self.index, self.parameter)  # as FETCH numbers them
        self._slots = max(arch.slots(4), arch.slots(8))
        self.config = CoreConfig()
        self.open = False
        self.compute_free = self.load_free = self.fetch_free = 0

    @functools.cached_property
    def macros(self) -> npt.NDArray[np.int8]:
        """The weights in the macros, ``[slot, output 16, input 16]``."""
        return np.zeros((self._slots, WORD_CHANNELS, WORD_CHANNELS), np.int8)

    @functools.cached_property
    def slots(self) -> Cells:
        """When macro slots were written and read."""
        return Cells(f"core {self.number} macros", self._slots)


class ChipMemory:
    """The banks and the maps off-chip, for a batch of images.

    Off-chip words are addressed from the start of the image; maps begin at ``map_base``.
    """

    def __init__(self, arch: MarsArch, images: int, map_base: int, offchip_words: int) -> None:
        self.images = images
        self.map_base = map_base
        self.banks = [
            np.zeros((images, arch.bank_words, WORD_BYTES), np.uint8) for _ in range(arch.banks)
        ]
        self.bank_cells = [Cells(f"bank {b}", arch.bank_words) for b in range(arch.banks)]
        count = offchip_words - map_base
        self.maps = np.zeros((images, count, WORD_BYTES), np.uint8)
        self.map_cells = Cells("off-chip maps", count)
