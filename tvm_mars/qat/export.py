"""Export to ONNX, checked."""

from __future__ import annotations

from pathlib import Path

from mars_runtime.program import write_atomically

from ..graph import Graph
from ..onnx_export import to_onnx
from .integer import to_graph
from .network import MarsNetwork

__all__ = ["export"]


def export(
    network: MarsNetwork, path: str | Path, input_shape: tuple[int, ...] | None = None
) -> Graph:
    """Write a network in training as ONNX in Q/DQ form, every float operation exact.

    Parameters
    ----------
    input_shape : tuple of int
        Channels, height, width; if None, those that the network has seen.

    Returns
    -------
    Graph
        The same network in integers.

    Raises
    ------
    UnsupportedError
        If the network is not quantized by eq. 5 to 8.
    CapacityError
        If a layer's sums could leave the integers that float32 holds, naming the layer.
    """
    graph = to_graph(network, input_shape)
    write_atomically(path, to_onnx(graph).SerializeToString())
    return graph
