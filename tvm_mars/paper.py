"""What the paper's tables II and III say of accuracy.

Source: Sie et al., "MARS: Multi-macro Architecture SRAM CIM-Based Accelerator with Co-designed
Compressed Neural Networks", IEEE TCAD 2022, arXiv 2010.12861. Accuracies and shares are in percent.
"""

from __future__ import annotations

import attrs

__all__ = ["TABLE_II", "TABLE_III", "DenseRow", "SparseRow", "Workload"]


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
