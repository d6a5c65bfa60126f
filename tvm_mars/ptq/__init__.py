"""Quantization after training, without PyTorch: float networks to integer graphs."""

from __future__ import annotations

from .network import (
    Addition,
    FloatInput,
    FloatLayer,
    FloatNetwork,
    FloatOutput,
    FloatPool,
    Norm,
    Sum,
    Term,
)
from .quantize import Options, Quantized, quantize_network

__all__ = [
    "Addition",
    "FloatInput",
    "FloatLayer",
    "FloatNetwork",
    "FloatOutput",
    "FloatPool",
    "Norm",
    "Options",
    "Quantized",
    "Sum",
    "Term",
    "quantize_network",
]
