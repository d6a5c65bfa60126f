"""Compression for CIM in PyTorch: quantization-aware training and group-set pruning.

Three lines turn a module into a network in training, and that into integers::

    quantize_(model, MarsQATConfig(step="prepare"), filter_fn=whole_model)
    ...                                     # train it as any module
    export(model, "net.onnx")               # or step="convert", for integers in PyTorch

:func:`prepare` and :func:`convert` do the same without torchao, as values. :func:`prune` removes
group-sets of a trained network at once, :class:`Pruner` while any loop trains; :class:`Trainer` is
a loop. Needs ``tvm-mars[train]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..report import compression
from .calibration import calibrate
from .data import load_data
from .export import export
from .integer import IntegerNetwork, to_graph
from .network import MarsNetwork
from .pruning import Pruner, PruningPlan, prune
from .quantization import Quantization, convert, prepare
from .recipe import Recipe, load_recipe, recipe_names
from .training import Trainer

if TYPE_CHECKING:
    from .ao import MarsQATConfig, whole_model

__all__ = [
    "IntegerNetwork",
    "MarsNetwork",
    "MarsQATConfig",
    "Pruner",
    "PruningPlan",
    "Quantization",
    "Recipe",
    "Trainer",
    "calibrate",
    "compression",
    "convert",
    "export",
    "load_data",
    "load_recipe",
    "prepare",
    "prune",
    "recipe_names",
    "to_graph",
    "whole_model",
]


def __getattr__(name: str) -> Any:
    """Import torchao, which takes seconds, for those alone who use it."""
    if name not in ("MarsQATConfig", "whole_model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import ao

    return getattr(ao, name)
