"""Where an ONNX model holds the codes of a graph's layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from mars_runtime.maps import RAW_BITS

from ..graph import Graph

__all__ = ["Quantized", "layer_tensors"]

# Operators between a layer's and what quantizes its result.
_WITHIN = (
    "Add",
    "BatchNormalization",
    "Clip",
    "Div",
    "Flatten",
    "Identity",
    "Mul",
    "Relu",
    "Reshape",
    "Squeeze",
    "Sub",
)


@attrs.frozen
class Quantized:
    """A tensor that a QuantizeLinear gives, and the code in it that stands for zero."""

    tensor: str
    zero_point: int


def layer_tensors(
    model: Any, graph: Graph, operators: Mapping[str, Sequence[str]]
) -> dict[str, Quantized]:
    """Find for each layer the tensor of its codes: what quantizes the result of its operators.

    Parameters
    ----------
    model : onnx.GraphProto
        The model.
    operators : mapping of str to sequence of str
        For each layer of the graph the names of the nodes that it comes from.

    Returns
    -------
    dict of str to Quantized
        Layers whose result is quantized in several ways, or not at all, are left out.
    """
    readers: dict[str, list[Any]] = defaultdict(list)
    named: dict[str, Any] = {}
    order: dict[str, int] = {}
    for place, node in enumerate(model.node):
        name = node.name or node.output[0]
        named[name], order[name] = node, place
        for tensor in dict.fromkeys(node.input):
            readers[tensor].append(node)
    constants = _constants(model)
    every = {name for names in operators.values() for name in names}
    found: dict[str, Quantized] = {}
    for layer in graph.layers:
        known = [name for name in operators.get(layer.name, ()) if name in named]
        if not known or graph.types[layer.name].bits == RAW_BITS:
            continue
        last = named[max(known, key=lambda name: order[name])]
        quantizers = _quantizers(last, readers, every)
        if len(quantizers) == 1:
            (node,) = quantizers
            zero = constants.get(node.input[2]) if len(node.input) > 2 else 0
            if zero is not None:
                found[layer.name] = Quantized(node.output[0], zero)
    return found


def _quantizers(start: Any, readers: Mapping[str, Sequence[Any]], stops: set[str]) -> list[Any]:
    """Follow a node's result to the QuantizeLinear nodes that read it, through no other layer."""
    pending, found, seen = list(start.output), [], set()
    while pending:
        tensor = pending.pop()
        for node in readers.get(tensor, ()):
            name = node.name or node.output[0]
            if name in seen or (name in stops and node is not start):
                continue
            seen.add(name)
            if node.op_type == "QuantizeLinear":
                found.append(node)
            elif node.op_type in _WITHIN:
                pending += node.output
    return found


def _constants(model: Any) -> dict[str, int]:
    """Give the scalar integer constants of a model."""
    from onnx import numpy_helper

    tensors = {entry.name: entry for entry in model.initializer}
    for node in model.node:
        if node.op_type == "Constant":
            tensors.update(
                (node.output[0], entry.t) for entry in node.attribute if entry.name == "value"
            )
    found = {}
    for name, tensor in tensors.items():
        array = numpy_helper.to_array(tensor)
        if array.size == 1 and array.dtype.kind in "iu":
            found[name] = int(array.reshape(-1)[0])
    return found
