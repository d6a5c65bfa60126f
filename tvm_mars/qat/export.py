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

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from tvm_mars.qat import Quantization, calibrate, export, prepare
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    >>> network = prepare(model, Quantization(activation_bits=4), (3, 8, 8))
    >>> calibrate(network, torch.rand(64, 3, 8, 8))
    >>> print(export(network.eval(), "net.onnx"))
    x0: 3x8x8 u8 = input float32 clip 0..1 * 255 / 1 + 0 in 0..255
    conv0: 32x8x8 u4 = conv(x0, 3x3 w8 stride (1, 1)); eq5 >>15 u4
    return conv0 as float32 (code - 0) * 0.0625
    """
    graph = to_graph(network, input_shape)
    write_atomically(path, to_onnx(graph).SerializeToString())
    return graph
