"""Quantization of float Relax modules: a function and the pass ``mars.QuantizeForMars``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm

from ..quantization import Calibration, quantized_onnx, read_options
from .api import import_model
from .floats import read_floats
from .nodes import sizes

__all__ = ["QuantizeForMars", "quantize", "quantize_to_onnx"]


def quantize(
    source: Any,
    params: Mapping[str, Any] | None = None,
    *,
    calibration: Calibration | None = None,
    **options: Any,
) -> tvm.IRModule:
    """Quantize a float network for MARS, without training it.

    Batch norm is folded into 4 or 8-bit weights by the paper's eq. 6 to 8, maps are stored by
    eq. 5, each divided by the range that fits it best on the calibration images.

    Parameters
    ----------
    source : tvm.IRModule, path, onnx.ModelProto or torch.export.ExportedProgram
        A float network in evaluation mode, NCHW: convolutions and dense products with constant
        weights, batch norms, ReLUs, pools, additions.
    params : mapping of str to array, optional
        Parameters of ``main`` that become constants.
    calibration : mapping of str to array, or iterable of such mappings
        Some hundred typical images ``[N, ...]`` by input name.
    **options
        Fields of :class:`tvm_mars.ptq.Options`: ``weight_bits``, ``activation_bits``, ...

    Returns
    -------
    tvm.IRModule
        The quantized network, its inputs and outputs named as before; its ``main`` computes exactly
        what MARS does, and :func:`tvm_mars.partition_for_mars` offloads all of it.

    Raises
    ------
    UnsupportedError
        If an operator has no quantized form, with its name and the remedy.
    InputError
        If the calibration is missing or does not fit, or a weight is NaN.
    CapacityError
        If a layer's sums could leave the integers that float32 holds.
    OptionError
        If an option is unknown or bad.

    Examples
    --------
    >>> import numpy as np
    >>> import tvm_mars
    >>> from onnx import TensorProto, helper, numpy_helper
    >>> weight = np.random.default_rng(0).normal(size=(16, 3, 3, 3)).astype(np.float32)
    >>> graph = helper.make_graph(
    ...     [
    ...         helper.make_node("Conv", ["image", "weight"], ["sum"], pads=[1, 1, 1, 1]),
    ...         helper.make_node("Relu", ["sum"], ["map"]),
    ...     ],
    ...     "float",
    ...     [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
    ...     [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", 16, 8, 8])],
    ...     [numpy_helper.from_array(weight, "weight")],
    ... )
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    >>> images = np.random.default_rng(1).random((64, 3, 8, 8), dtype=np.float32)
    >>> mod = tvm_mars.quantize(model, calibration={"image": images}, activation_bits=4)
    >>> tvm_mars.compile(mod).report.summary
    '1 of 1 operators on MARS'
    """
    return import_model(quantize_to_onnx(source, params, calibration=calibration, **options))


def quantize_to_onnx(
    source: Any,
    params: Mapping[str, Any] | None = None,
    *,
    calibration: Calibration | None = None,
    **options: Any,
) -> Any:
    """Quantize a float network as :func:`quantize` does, and give it as ``onnx.ModelProto``."""
    read = read_options(options)
    network, main = read_floats(import_model(source), params)
    return quantized_onnx(network, calibration, read, [sizes(var)[0] for var in main.params])


@tvm.transform.module_pass(opt_level=0, name="mars.QuantizeForMars")
class QuantizeForMars:
    """Quantize the float network of a module, as a pass.

    Parameters
    ----------
    calibration, **options
        As :func:`quantize` takes them.
    """

    def __init__(self, calibration: Calibration, **options: Any) -> None:
        self.calibration, self.options = calibration, options
        read_options(options)  # a wrong one is said here, not within TVM

    def transform_module(
        self, mod: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Quantize."""
        return quantize(mod, calibration=self.calibration, **self.options)
