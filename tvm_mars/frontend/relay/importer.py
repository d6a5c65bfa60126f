"""ONNX models as Relay's importer takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relay

from mars_runtime.errors import InputError, UnsupportedError

from ..onnx_file import input_shapes, read_onnx
from ..onnx_form import plain_form
from .regions import OUTPUT_NAMES

__all__ = ["import_model"]

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# TVM's importer converts operator by operator, and each refuses in its own way.
_IMPORTER_RAISES = (
    tvm.error.TVMError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


def import_model(source: Any, shape: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """Import a model into Relay; attributes keep its names.

    Parameters
    ----------
    source : path, onnx.ModelProto or tvm.IRModule
        A module is given back.
    shape : mapping of str to sequence of int, optional
        Shapes of inputs that the model leaves open, the batch most often.
    """
    if isinstance(source, tvm.IRModule):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = read_onnx(Path(source))
    if not type(source).__module__.startswith("onnx"):
        raise UnsupportedError(
            f"a {type(source).__name__}",
            where="model",
            hint="give an .onnx file, an onnx.ModelProto or an IRModule",
        )
    source = plain_form(source)
    shapes = _shapes(source.graph, shape or {})
    try:
        mod, params = relay.frontend.from_onnx(_plain(source), shapes, freeze_params=True)
    except _IMPORTER_RAISES as error:
        raise UnsupportedError(
            f"TVM's importer does not take it: {str(error).strip()}",
            where="model",
            hint="quantize in the Q/DQ format: QuantizeLinear and DequantizeLinear around the "
            "operators",
        ) from error
    outputs = [entry.name for entry in source.graph.output]
    mod["main"] = relay.build_module.bind_params_by_name(mod["main"], params)
    mod["main"] = mod["main"].with_attr(OUTPUT_NAMES, outputs)
    return relay.transform.InferType()(mod)


def _shapes(graph: Any, given: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Give the whole shape of every input."""
    found = {}
    for name, shape in input_shapes(graph, given).items():
        if None in shape:
            known = ", ".join(str(size or "N") for size in shape)
            raise InputError(
                f"shape ({known}) is not known when it is compiled",
                where=f"input {name}",
                hint=f"Relay compiles for one shape: give shape={{{name!r}: (...)}}, on a command "
                f'line --input-shapes "{name}:[...]"',
            )
        found[name] = [size for size in shape if size is not None]
    return found


def _plain(model: Any) -> Any:
    """Give a model without what Relay's importer misreads: short forms of the quantizers.

    It needs the zero point that ONNX lets one leave out, and takes a scale of one element in a
    vector for one per channel.
    """
    import onnx
    from onnx import numpy_helper

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    constants = {entry.name: entry for entry in graph.initializer}

    def scalar(name: str) -> str:
        entry = constants.get(name)
        if entry is None or list(entry.dims) != [1]:
            return name
        short = f"{name}.scalar"
        if short not in constants:
            value = numpy_helper.from_array(numpy_helper.to_array(entry).reshape(()), short)
            constants[short] = value
            graph.initializer.append(value)
        return short

    for node in graph.node:
        if node.op_type not in _QUANTIZERS:
            continue
        node.input[1] = scalar(node.input[1])
        if len(node.input) == 3 and node.input[2]:
            node.input[2] = scalar(node.input[2])
            continue
        scale, codes = constants.get(node.input[1]), constants.get(node.input[0])
        kind = numpy_helper.to_array(codes).dtype if codes is not None else np.dtype(np.uint8)
        dims = list(scale.dims) if scale is not None else []
        zero = f"{node.output[0]}.zero_point"
        graph.initializer.append(numpy_helper.from_array(np.zeros(dims, kind), zero))
        del node.input[2:]
        node.input.append(zero)
    return plain
