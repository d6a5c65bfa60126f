"""The maps of a program's layers, read from the machine's memories as each layer ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import isa
from .arch import MarsArch
from .machine import Machine
from .maps import MapType, unpack_map
from .program import LayerInfo, Region

__all__ = ["watch"]

Array = npt.NDArray[Any]


class _Watcher(Machine):
    """A machine that keeps a copy of each layer's map."""

    def __init__(
        self, region: Region, arch: MarsArch, images: int, types: Mapping[str, MapType]
    ) -> None:
        super().__init__(region, arch, images)
        self.types = types
        self.maps: dict[str, Array] = {}

    def _end_layer(self) -> None:
        if self.region.layers:
            self._keep(self.region.layers[self.layer_number])
        super()._end_layer()

    def _keep(self, layer: LayerInfo) -> None:
        name = layer.name.rpartition("+")[2]  # of a convolution and a pool, the pool's
        code = self.region.instructions[layer.start : layer.stop]
        apws = [one for one in code if isinstance(one, isa.Apw)]
        if name not in self.types or not apws:
            return
        kind = self.types[name]
        words = self._words(kind, apws[-1], code)
        if words is not None:
            self.maps[name] = unpack_map(words, kind)

    def _words(
        self, kind: MapType, apw: isa.Apw, code: Sequence[isa.Instruction]
    ) -> npt.NDArray[np.uint8] | None:
        """Give the words of a map: those of its bank, or off-chip where it was moved by tiles."""
        memory = self._data()
        whole = (kind.blocks, kind.height, kind.width)
        if (apw.blocks, apw.height, apw.width) == whole and not apw.block:
            first = apw.base
            found = memory.banks[apw.bank]
        else:
            left = [
                one.address
                for one in code
                if isinstance(one, isa.Move) and one.direction == isa.MOVE_OUT
            ]
            if not left:
                return None
            first, found = min(left) - self.image_words, memory.maps
        return np.array(found[:, first : first + kind.words])


def watch(
    region: Region, arch: MarsArch, types: Mapping[str, MapType], codes: Sequence[Array]
) -> dict[str, Array]:
    """Run a region and give the map that each of its layers writes.

    Parameters
    ----------
    types : mapping of str to MapType
        Of the maps that are looked for, by layer. The program's description of its network has
        them.
    codes : sequence of arrays
        For each input the stored codes ``[N, C, H, W]``.

    Returns
    -------
    dict of str to array
        Codes (uint8) or accumulators (int32) ``[N, C, H, W]`` by layer. A convolution's map is
        missing where it is pooled as it is written.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    """
    machine = _Watcher(region, arch, len(codes[0]), types)
    for port, array in enumerate(codes):
        machine.write_input(port, array)
    machine.run()
    return machine.maps
