"""Equal codes in every engine, counted over a set of images, at every layer boundary.

An engine gives the codes of every layer's map; the first of those compared is what the others are
held to. Here are ONNX Runtime on the exported file and MARS executing its program;
:mod:`tvm_mars.qat.verify` adds PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import PRESETS, MarsArch, run
from mars_runtime.maps import RAW_BITS
from mars_runtime.quantize import Dequantize

from .compiler import NamedGraph, build
from .datasets import Dataset
from .graph import Graph, Output, evaluate
from .onnx_export import to_onnx

__all__ = [
    "Engine",
    "Verification",
    "compare",
    "mars_engine",
    "onnxruntime_engine",
    "reference_engine",
    "watched",
]

Array: TypeAlias = npt.NDArray[Any]
Engine: TypeAlias = Callable[[Array], Mapping[str, Array]]
"""Real images ``[N, C, H, W]`` to the codes (of raw results: the accumulators) of all values."""


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
    seconds : mapping of str to float
        For each engine, what it took.
    """

    images: int
    codes: int
    differing: Mapping[str, Mapping[str, int]]
    right: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def agree(self) -> bool:
        """Whether no engine gave another code."""
        return not any(self.differing.values())

    def accuracy(self, engine: str) -> float:
        """Share of images that an engine classifies rightly."""
        return self.right[engine] / self.images

    def __str__(self) -> str:
        lines = [f"{self.images} images, {self.codes} codes at every layer boundary"]
        for engine, values in self.differing.items():
            worst = ", ".join(f"{name} {count}" for name, count in values.items()) or "none"
            lines.append(
                f"{engine:<22} accuracy {self.accuracy(engine):.2%}; differing codes: {worst}"
            )
        return "\n".join(lines)


def compare(
    engines: Mapping[str, Engine],
    images: Dataset,
    result: str,
    *,
    batch: int = 100,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare engines with the first of them, value by value.

    Parameters
    ----------
    result : str
        The value whose largest channel is the class.
    batch : int
        Images at a time.
    progress : callable
        Told how many images are done.
    """
    differing: dict[str, dict[str, int]] = {name: {} for name in engines}
    right = dict.fromkeys(engines, 0)
    seconds = dict.fromkeys(engines, 0.0)
    codes = 0
    for first in range(0, len(images), batch):
        labels = images.labels[first : first + batch]
        pixels = images.images(first, first + batch)
        expected: Mapping[str, Array] | None = None
        for name, engine in engines.items():
            begun = time.perf_counter()
            values = engine(pixels)
            seconds[name] += time.perf_counter() - begun
            right[name] += int((values[result].reshape(len(labels), -1).argmax(1) == labels).sum())
            if expected is None:
                expected = values
                codes += sum(array.size for array in values.values())
                continue
            for value, count in _differing(expected, values):
                differing[name][value] = differing[name].get(value, 0) + count
        if progress:
            progress(first + len(labels))
    return Verification(len(images), codes, differing, right, seconds)


def _differing(expected: Mapping[str, Array], given: Mapping[str, Array]) -> Iterator[Any]:
    for name, codes in expected.items():
        count = int((codes.ravel() != given[name].ravel()).sum())
        if count:
            yield name, count


def watched(graph: Graph) -> Graph:
    """Give a graph with every layer's map as an output."""
    leaving = {out.value: out for out in graph.outputs}
    outputs = []
    for layer in graph.layers:
        kind = graph.types[layer.name]
        if kind.bits == RAW_BITS:
            outputs.append(leaving[layer.name])
        else:
            outputs.append(Output(layer.name, kind.shape, Dequantize(scale=(2.0**-kind.bits,))))
    return attrs.evolve(graph, outputs=tuple(outputs))


def scales(graph: Graph) -> dict[str, float]:
    """Give, of a watched graph, what a step of each value stands for."""
    return {out.value: out.dequantize.scale[0] for out in graph.outputs}


def _codes(steps: Mapping[str, float], results: Iterator[Array]) -> dict[str, Array]:
    """Turn real results, in order, into codes."""
    return {
        name: np.asarray(result, np.float64) / scale
        for (name, scale), result in zip(steps.items(), results, strict=True)
    }


def reference_engine(graph: Graph) -> Engine:
    """Give the integer reference (slow: int64 in NumPy)."""
    full = watched(graph)
    return lambda x: _codes(scales(full), iter(evaluate(full, {"x0": x})))


def onnxruntime_engine(graph: Graph) -> Engine:
    """Give ONNX Runtime on the CPU, on the exported file."""
    import onnxruntime

    full = watched(graph)
    session = onnxruntime.InferenceSession(
        to_onnx(full).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda x: _codes(scales(full), iter(session.run(None, {"x0": x})))


def mars_engine(graph: Graph, arch: MarsArch | None = None, engine: str = "machine") -> Engine:
    """Give MARS, executing the program that writes every map out as well.

    Parameters
    ----------
    engine : str
        See :func:`mars_runtime.run`: ``machine`` executes every instruction, ``layers`` is faster.
    """
    full = watched(graph)
    program = build([NamedGraph.of(full)], arch or PRESETS["mars"])
    return lambda x: _codes(scales(full), iter(run(program, {"x0": x}, engine=engine).values()))
