"""What compression has done to a network: group-sets, bits and cycles by layer.

Counted on the integer graph, so a group-set whose weights all round to zero counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from mars_runtime import isa
from mars_runtime.arch import MarsArch

from ..graph import Conv, Graph
from ..pack import pack_conv

__all__ = ["Compression", "LayerCompression", "compression"]

INDEX_BITS = 8 * isa.CODE_BYTES
FLOAT_BITS = 32


@attrs.frozen(kw_only=True)
class LayerCompression:
    """One layer.

    Parameters
    ----------
    dense_group_sets, group_sets : int
        All of them, and those that are not zero.
    weight_bits : int
        Width of a weight.
    cycles : float
        Core cycles per image in which macros compute at all pixels, shared evenly among the cores.
        A schedule takes fewer only where it passes over taps that meet padding alone.
    """

    name: str
    shape: tuple[int, ...]
    dense_group_sets: int
    group_sets: int
    weight_bits: int
    cycles: float
    dense_cycles: float

    @property
    def zero_share(self) -> float:
        """Share of group-sets that are zero."""
        return 1 - self.group_sets / self.dense_group_sets

    def stored_bits(self, arch: MarsArch) -> int:
        """Bits of weights."""
        return self.group_sets * arch.group_set_weights * self.weight_bits

    @property
    def index_bits(self) -> int:
        """Bits of index codes."""
        return self.group_sets * INDEX_BITS


@attrs.frozen
class Compression:
    """All layers that hold weights."""

    layers: Sequence[LayerCompression]
    arch: MarsArch

    @property
    def zero_share(self) -> float:
        """Share of group-sets that are zero, over all layers."""
        dense = sum(layer.dense_group_sets for layer in self.layers)
        return 1 - sum(layer.group_sets for layer in self.layers) / dense

    @property
    def cycles(self) -> float:
        """Core cycles of all layers."""
        return sum(layer.cycles for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bits of the dense network's float32 weights over those of weights and index codes."""
        weights = self.arch.group_set_weights
        dense = sum(layer.dense_group_sets * weights * FLOAT_BITS for layer in self.layers)
        stored = sum(layer.stored_bits(self.arch) + layer.index_bits for layer in self.layers)
        return dense / max(stored, 1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{'layer':<7} {'weights':>12} {'bits':>4} {'group-sets':>11} {'zero':>6} "
            f"{'weight Kb':>9} {'index Kb':>8} {'cycles':>9} {'/dense':>6}"
        )
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            count = f"{layer.group_sets}/{layer.dense_group_sets}"
            yield (
                f"{layer.name:<7} {shape:>12} {layer.weight_bits:>4} {count:>11} "
                f"{layer.zero_share:>6.1%} {layer.stored_bits(self.arch) / 1024:>9.2f} "
                f"{layer.index_bits / 1024:>8.2f} {layer.cycles:>9.0f} "
                f"{layer.cycles / layer.dense_cycles:>6.1%}"
            )
        dense = sum(layer.dense_cycles for layer in self.layers)
        yield (
            f"all: {self.zero_share:.2%} of group-sets zero, {self.ratio:.1f} times smaller than "
            f"float32,\n{self.cycles:.0f} cycles of computing ({self.cycles / dense:.2%} of dense)"
        )


def compression(graph: Graph, arch: MarsArch | None = None) -> Compression:
    """Count group-sets, bits and cycles of a network.

    Parameters
    ----------
    arch : MarsArch
        The machine; its default is the paper's.
    """
    arch = arch or MarsArch()
    rows = [_layer(layer, graph, arch) for layer in graph.layers if isinstance(layer, Conv)]
    return Compression(rows, arch)


def _layer(layer: Conv, graph: Graph, arch: MarsArch) -> LayerCompression:
    packed = pack_conv(layer, graph.types, arch)
    accesses = [arch.accesses(graph.types[term.input].bits) for term in layer.terms]
    out = graph.types[layer.name]
    visits = sum(accesses[term] for block in packed.blocks for term in block.terms)
    per_core = out.height * out.width / arch.cores
    largest = max(layer.terms, key=lambda term: term.weight.size)
    return LayerCompression(
        name=layer.name,
        shape=largest.weight.shape,
        dense_group_sets=packed.dense_group_sets,
        group_sets=packed.group_sets,
        weight_bits=packed.weight_bits,
        cycles=visits * per_core,
        dense_cycles=packed.dense_group_sets * max(accesses) * per_core,
    )
