"""Equal codes in every engine, PyTorch's beside ONNX Runtime and MARS.

A network's maps are compared at every layer boundary: PyTorch's network in training form (in
evaluation mode) and in integers, ONNX Runtime on the exported file, MARS executing the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mars_runtime import MarsArch

from ..datasets import Dataset
from ..graph import Graph
from ..verification import (
    Array,
    Engine,
    Verification,
    compare,
    mars_engine,
    onnxruntime_engine,
    scales,
    watched,
)
from .data import Images
from .integer import IntegerNetwork, layer_names, to_graph
from .network import MarsNetwork

__all__ = ["Verification", "verify"]


def verify(
    network: MarsNetwork,
    images: Images,
    *,
    arch: MarsArch | None = None,
    batch: int = 100,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare all engines with PyTorch's network in training form, at every layer boundary.

    Parameters
    ----------
    arch : MarsArch
        The machine; None: the paper's.
    batch : int
        Images at a time.
    progress : callable
        Told how many images are done.

    Raises
    ------
    CapacityError
        If a layer's sums could leave the integers that float32 holds.
    """
    network.eval()
    graph = to_graph(network, images.shape)
    engines = {
        "PyTorch, training form": _training_form(network, graph),
        "PyTorch, integers": _integers(network, graph),
        "ONNX Runtime": onnxruntime_engine(graph),
        "MARS": mars_engine(graph, arch),
    }
    dataset = Dataset(images.pixels.numpy(), images.labels.numpy())
    return compare(engines, dataset, graph.outputs[0].value, batch=batch, progress=progress)


def _training_form(network: MarsNetwork, graph: Graph) -> Engine:
    steps, ours = scales(watched(graph)), layer_names(network)

    def evaluate(x: Array) -> Mapping[str, Array]:
        with torch.no_grad():
            values = network.evaluate_values(torch.from_numpy(x))
        return {
            ours[name]: (value.double() / steps[ours[name]]).numpy()
            for name, value in values.items()
            if ours[name] in steps
        }

    return evaluate


def _integers(network: MarsNetwork, graph: Graph) -> Engine:
    integer, names = IntegerNetwork(network), list(scales(watched(graph)))

    def evaluate(x: Array) -> Mapping[str, Array]:
        values = integer.evaluate_codes(torch.from_numpy(x))
        return {name: values[name].double().numpy() for name in names}

    return evaluate
