"""What the paper's tables say, and what its text says of figures 10 to 12.

Source: Sie et al., "MARS: Multi-macro Architecture SRAM CIM-Based Accelerator with Co-designed
Compressed Neural Networks", IEEE TCAD 2022, arXiv 2010.12861. Accuracies and shares are in percent;
Kb and Mb are 2**10 and 2**20 bits. Of its figures only the statements in the text are known here.
"""

from __future__ import annotations

import attrs

__all__ = [
    "COUNTED_OPERATIONS",
    "STATEMENTS",
    "TABLE_I",
    "TABLE_II",
    "TABLE_III",
    "TABLE_IV",
    "DenseRow",
    "LayerRow",
    "SparseRow",
    "SpeedRow",
    "Statement",
    "Workload",
]


@attrs.frozen
class Workload:
    """A network on a data set, quantized to some widths (32: float32)."""

    network: str
    data: str
    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        return f"{self.network}, {self.data}, {self.weight_bits}/{self.activation_bits}"


@attrs.frozen
class SparseRow:
    """A row of Table II: accuracy dense and sparse, and the share of zero group-sets."""

    workload: Workload
    dense: float
    sparse: float
    sparsity: float


@attrs.frozen
class DenseRow:
    """A row of Table III: accuracy of DoReFa without batch norm, and of the paper's folding."""

    workload: Workload
    dorefa: float
    mars: float


@attrs.frozen
class SpeedRow:
    """A column of Table I: images a second, 10**9 operations a second, and those per watt.

    Operations are those of :data:`COUNTED_OPERATIONS`, dense-equivalent; the power is the macros'.
    """

    workload: Workload
    fps: float
    gops: float
    tops_per_watt: float


@attrs.frozen
class LayerRow:
    """A column of Table IV, VGG16 on CIFAR-10 at 8 bits: one 3x3 layer by its channels.

    Parameters
    ----------
    original_mb : float
        The dense layer, in Mb.
    zero : float
        Zero group-sets.
    index_kb, weight_kb, compression : float
        What is stored, and the original over it.
    misprints : tuple of str
        Fields that contradict the row's others, by the rule that reproduces all the rest.
    """

    inputs: int
    outputs: int
    original_mb: float
    zero: float
    index_kb: float
    weight_kb: float
    compression: float
    misprints: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Share of group-sets that are not zero, of 1."""
        return round(1 - self.zero / 100, 6)


@attrs.frozen
class Statement:
    """A figure that the text states, and what it is."""

    artefact: str
    what: str
    value: float
    unit: str


_WIDTHS = ((32, 32), (8, 8), (8, 4), (4, 4))
_II = {
    ("VGG16", "CIFAR-10"): [
        (92.83, 92.71, 97),
        (92.26, 92.53, 96),
        (92.60, 92.32, 95),
        (91.80, 92.44, 95),
    ],
    ("ResNet18", "CIFAR-10"): [
        (93.10, 92.84, 95),
        (94.04, 92.80, 95),
        (93.30, 92.74, 95),
        (93.30, 92.60, 94),
    ],
    ("VGG16", "CIFAR-100"): [
        (69.53, 68.71, 93),
        (70.52, 71.62, 91),
        (70.08, 70.62, 91),
        (71.04, 70.82, 88),
    ],
    ("ResNet18", "CIFAR-100"): [
        (71.22, 69.30, 92),
        (72.99, 71.24, 85),
        (71.32, 71.84, 85),
        (71.09, 70.82, 85),
    ],
}
_III = {
    ("VGG16", "CIFAR-10"): [(92.98, 93.14), (92.86, 92.74), (92.68, 92.82)],
    ("VGG16", "CIFAR-100"): [(69.76, 71.88), (70.96, 70.81), (69.19, 70.91)],
    ("ResNet18", "CIFAR-10"): [(93.14, 93.89), (93.42, 93.83), (93.20, 93.18)],
    ("ResNet18", "CIFAR-100"): [(71.57, 72.99), (71.15, 71.49), (69.97, 70.83)],
}

#: Pruned networks beside dense ones.
TABLE_II = tuple(
    SparseRow(Workload(*where, *widths), *row)
    for where, rows in _II.items()
    for widths, row in zip(_WIDTHS, rows, strict=True)
)
#: Dense networks, by how batch norm is treated.
TABLE_III = tuple(
    DenseRow(Workload(*where, *widths), *row)
    for where, rows in _III.items()
    for widths, row in zip(_WIDTHS[1:], rows, strict=True)
)

_I = {
    ("VGG16", "CIFAR-10"): [(714, 445, 52.3), (540, 336, 29.7)],
    ("VGG16", "CIFAR-100"): [(483, 301, 49.8), (377, 235, 23.8)],
    ("ResNet18", "CIFAR-10"): [(711, 778, 88.2), (403, 441, 37.6)],
    ("ResNet18", "CIFAR-100"): [(403, 441, 60.6), (339, 371, 38.0)],
}

#: Speed and efficiency. ResNet18's 403 and 441 stand in two columns, perhaps by mistake.
TABLE_I = tuple(
    SpeedRow(Workload(*where, *widths), *row)
    for where, rows in _I.items()
    for widths, row in zip(((8, 4), (8, 8)), rows, strict=True)
)
#: Operations behind every GOPS of Table I, in 10**6: 3x3 convolutions with 64 or more inputs.
COUNTED_OPERATIONS = {"VGG16": 622.854, "ResNet18": 1094.713}
#: What is stored of VGG16's layers.
TABLE_IV = (
    LayerRow(64, 64, 0.28, 5, 2.14, 273.60, 1.04),
    LayerRow(64, 128, 0.56, 50, 2.25, 288.00, 1.98),
    LayerRow(128, 128, 1.13, 56.6, 3.91, 488.97, 2.29, ("weight_kb",)),
    LayerRow(128, 256, 2.25, 61.6, 6.91, 884.74, 2.58),
    LayerRow(256, 256, 4.50, 93.2, 2.46, 313.34, 14.59, ("index_kb",)),
    LayerRow(256, 512, 9.00, 97.8, 1.58, 202.75, 45.10),
    LayerRow(512, 512, 18.00, 98.7, 1.87, 239.62, 73.33, ("compression",)),
)
#: What the text says of the figures, and of the best efficiencies.
STATEMENTS = (
    Statement("table1", "best average of a network", 88, "TOPS/W"),
    Statement("table1", "peak", 694, "TOPS/W"),
    Statement("fig10", "VGG16, CIFAR-10: at most", 13, "times the baseline's speed"),
    Statement("fig11", "VGG16: at most", 290, "times fewer feature-map accesses in a layer"),
    Statement("fig11", "ResNet18: at most", 440, "times fewer feature-map accesses in a layer"),
    Statement("fig12", "N = 16 against N = 1: about", 1, "points of sparsity less"),
    Statement("fig12", "N = 32 against N = 1: over", 2, "points of sparsity less"),
)
