"""Compression for CIM in PyTorch: quantization-aware training and group-set pruning.

Three lines turn a module into a network in training, and that into integers::

    quantize_(model, MarsQATConfig(step="prepare"), filter_fn=whole_model)
    ...                                     # train it as any module
    export(model, "net.onnx")               # or step="convert", for integers in PyTorch

:func:`prepare`, :func:`convert` do the same without torchao's in-place style. :class:`Pruner`
removes group-sets while any loop trains; :class:`Trainer` is a loop. Needs ``tvm-mars[train]``.
"""

from .calibration import calibrate
from .config import MarsQATConfig, convert, prepare, whole_model
from .export import export
from .integer import IntegerNetwork, to_graph
from .network import MarsNetwork
from .pruning import Pruner, PruningPlan
from .recipe import Recipe, load_recipe
from .training import Trainer

__all__ = [
    "IntegerNetwork",
    "MarsNetwork",
    "MarsQATConfig",
    "Pruner",
    "PruningPlan",
    "Recipe",
    "Trainer",
    "calibrate",
    "convert",
    "export",
    "load_recipe",
    "prepare",
    "to_graph",
    "whole_model",
]
