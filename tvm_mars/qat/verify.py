"""Equal codes in every engine, counted over a set of images.

A network's maps are compared at every layer boundary: PyTorch's network in training form (in
evaluation mode) and in integers, ONNX Runtime on the exported file, MARS executing the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch

from mars_runtime import PRESETS, MarsArch, run
from mars_runtime.maps import RAW_BITS
from mars_runtime.quantize import Dequantize

from ..compiler import NamedGraph, build
from ..graph import Graph, Output
from ..onnx_export import to_onnx
from .data import Images, batch_of
from .integer import IntegerNetwork, layer_names, to_graph
from .network import MarsNetwork

__all__ = ["Verification", "verify"]

Array = npt.NDArray[Any]
Engine = Callable[[Array], Mapping[str, Array]]
"""Real images to the codes (or, of raw results, the accumulators) of every value."""


@attrs.frozen
class Verification:
    """What was compared.

    Parameters
    ----------
    images : int
    codes : int
        Codes that each engine gave.
    differing : mapping
        For each engine, differing codes by value; empty if there are none.
    right : mapping of str to int
        For each engine, images whose largest result is their label's.
    """

    images: int
    codes: int
    differing: Mapping[str, Mapping[str, int]]
    right: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"{self.images} images, {self.codes} codes at every layer boundary"]
        for engine, values in self.differing.items():
            worst = ", ".join(f"{name} {count}" for name, count in values.items()) or "none"
            accuracy = self.right[engine] / self.images
            lines.append(f"{engine:<22} accuracy {accuracy:.2%}; differing codes: {worst}")
        return "\n".join(lines)


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
    engines = _engines(network, graph, arch or PRESETS["mars"])
    result = graph.outputs[0].value
    differing: dict[str, dict[str, int]] = {name: {} for name in engines}
    right = dict.fromkeys(engines, 0)
    codes = 0
    for chosen in torch.arange(len(images)).split(batch):
        pixels, labels = batch_of(images, chosen)
        expected: Mapping[str, Array] | None = None
        for name, engine in engines.items():
            values = engine(pixels.numpy())
            logits = values[result].reshape(len(chosen), -1)
            right[name] += int((logits.argmax(1) == labels.numpy()).sum())
            if expected is None:
                expected = values
                codes += sum(array.size for array in values.values())
                continue
            for value, count in _differing(expected, values):
                differing[name][value] = differing[name].get(value, 0) + count
        if progress:
            progress(int(chosen[-1]) + 1)
    return Verification(len(images), codes, differing, right)


def _differing(expected: Mapping[str, Array], given: Mapping[str, Array]) -> Iterator[Any]:
    for name, codes in expected.items():
        count = int((codes.ravel() != given[name].ravel()).sum())
        if count:
            yield name, count


def _engines(network: MarsNetwork, graph: Graph, arch: MarsArch) -> dict[str, Engine]:
    import onnxruntime

    watched = _watched(graph)
    names = [out.value for out in watched.outputs]
    scales = {out.value: out.dequantize.scale[0] for out in watched.outputs}
    integer = IntegerNetwork(network)
    session = onnxruntime.InferenceSession(
        to_onnx(watched).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    program = build([NamedGraph.of(watched)], arch)
    ours = layer_names(network)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch may be missing
    def training_form(x: Array) -> Mapping[str, Array]:
        values = network.evaluate_values(torch.from_numpy(x))
        return {
            ours[name]: (value.double() / scales[ours[name]]).numpy()
            for name, value in values.items()
            if ours[name] in scales
        }

    def integers(x: Array) -> Mapping[str, Array]:
        values = integer.evaluate_codes(torch.from_numpy(x))
        return {name: values[name].double().numpy() for name in names}

    def real(results: Iterator[Array]) -> Mapping[str, Array]:
        return {
            name: np.asarray(result, np.float64) / scales[name]
            for name, result in zip(names, results, strict=True)
        }

    return {
        "PyTorch, training form": training_form,
        "PyTorch, integers": integers,
        "ONNX Runtime": lambda x: real(iter(session.run(None, {"x0": x}))),
        "MARS": lambda x: real(iter(run(program, {"x0": x}).values())),
    }


def _watched(graph: Graph) -> Graph:
    """Give the graph with every layer's map as an output."""
    leaving = {out.value: out for out in graph.outputs}
    outputs = []
    for layer in graph.layers:
        kind = graph.types[layer.name]
        if kind.bits == RAW_BITS:
            outputs.append(leaving[layer.name])
        else:
            outputs.append(Output(layer.name, kind.shape, Dequantize(scale=(2.0**-kind.bits,))))
    return attrs.evolve(graph, outputs=tuple(outputs))
