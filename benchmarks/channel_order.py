"""What ``channel_order="packed"`` gains, by what was pruned: group-sets, cycles, and its own time.

Networks of VGG16's and ResNet-20's shape, 8 bits, with random weights: all channels of like
importance, or of importance drawn log-normally for each kernel and each input. The smallest parts
of each layer but the first and last are zeroed. Then networks with zero group-sets whose channels
were shuffled, and those of the zoo as they are. Cycles are simulated, with the default schedule.

Run: ``python benchmarks/channel_order.py``, some minutes. Instead of those, with ``--run
runs/resnet20-dense --data cifar-10-binary.tar.gz`` a dense network that ``mars train`` has trained
(needs PyTorch), quantized and pruned as the random ones are; with ``--model net.onnx`` a quantized
one as it is.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from mars_runtime import PRESETS, simulate
from tvm_mars import networks, zoo
from tvm_mars.channel_order import permutable, reordered
from tvm_mars.compiler import NamedGraph, build_region, pack, with_channel_order
from tvm_mars.graph import Conv, ConvTerm, Graph

Array = npt.NDArray[Any]

MARS = PRESETS["mars"]
IMAGES = 256  # to calibrate with

#: What is zeroed together: kernels, inputs, and whether all taps.
PARTS: Mapping[str, tuple[int, int, bool]] = {
    "weights": (1, 1, False),
    "1 kernel x 1 input, all taps": (1, 1, True),
    "1 kernel x 16 inputs": (1, 16, False),
    "16 kernels x 1 input (N = 1)": (16, 1, False),
    "16 x 16: group-sets": (16, 16, False),
}
CHANNELS = "channels"  # kernels, with what reads them


def pruned(graph: Graph, part: str, share: float, spread: float = 0.0, seed: int = 0) -> Graph:
    """Zero the smallest parts of each layer but the first and last.

    Parameters
    ----------
    spread : float
        Deviation of the logarithm of a kernel's and an input's importance, by which the parts are
        weighed; 0: by their weights alone.
    """
    rng = np.random.default_rng(seed)
    if part == CHANNELS:
        return without_channels(graph, share, rng)
    first, *_, last = (layer.name for layer in graph.layers if isinstance(layer, Conv))
    layers = [
        attrs.evolve(layer, terms=[_pruned(term, part, share, spread, rng) for term in layer.terms])
        if isinstance(layer, Conv) and layer.name not in (first, last)
        else layer
        for layer in graph.layers
    ]
    return attrs.evolve(graph, layers=layers)


def _pruned(
    term: ConvTerm, part: str, share: float, spread: float, rng: np.random.Generator
) -> ConvTerm:
    kernels, inputs, all_taps = PARTS[part]
    weight = term.weight.astype(np.float64)
    size = weight.shape
    kept = weight * np.exp(spread * rng.standard_normal((size[0], 1, 1, 1)))
    kept = kept * np.exp(spread * rng.standard_normal((1, size[1], 1, 1)))
    # Equal codes are common: which of them go is drawn.
    energy = (kept**2 + 1e-6 * rng.random(size)).sum(axis=(2, 3), keepdims=True)
    energy = energy if all_taps else kept**2 + 1e-6 * rng.random(size)
    for axis, width in ((0, kernels), (1, inputs)):
        starts = np.arange(0, size[axis], width)
        widths = np.diff([*starts, size[axis]])
        energy = np.repeat(np.add.reduceat(energy, starts, axis=axis), widths, axis=axis)
    return attrs.evolve(term, weight=term.weight * (energy > np.quantile(energy, share)))


def without_channels(graph: Graph, share: float, rng: np.random.Generator) -> Graph:
    """Zero a share of the channels of each class of maps: kernels, and the weights that read them.

    Which go is drawn, as pruning by another criterion than their place does.
    """
    gone: dict[str, Array] = {}
    for values in permutable(graph):
        count = graph.types[values[0]].channels
        gone.update(dict.fromkeys(values, rng.permutation(count) < share * count))
    layers = []
    for layer in graph.layers:
        if isinstance(layer, Conv):
            terms = []
            for term in layer.terms:
                weight = term.weight.copy()
                weight[gone.get(layer.name, np.zeros(len(weight), bool))] = 0
                if term.groups == 1 and term.input in gone:
                    weight[:, gone[term.input]] = 0
                terms.append(attrs.evolve(term, weight=weight))
            layer = attrs.evolve(layer, terms=terms)
        layers.append(layer)
    return attrs.evolve(graph, layers=layers)


def shuffled(graph: Graph) -> Graph:
    """Give the channels of every map that may be reordered a random order."""
    rng = np.random.default_rng(0)
    orders: dict[str, Array] = {}
    for values in permutable(graph):
        order = rng.permutation(graph.types[values[0]].channels)
        orders.update(dict.fromkeys(values, order))
    return reordered(graph, orders)


# -- networks --------------------------------------------------------------------------------------


def synthetic() -> Iterator[tuple[str, Graph]]:
    """Yield networks of random weights, and what was done to them."""
    for name, make in (("ResNet-20", networks.resnet20), ("VGG16", networks.vgg16)):
        dense = make(1.0)
        yield f"{name}, dense", dense
        for part, share, spread in (
            (CHANNELS, 0.5, 0.0),
            ("weights", 0.95, 0.0),
            ("weights", 0.95, 1.0),
            ("1 kernel x 1 input, all taps", 0.9, 1.0),
            ("1 kernel x 16 inputs", 0.75, 0.0),
            ("1 kernel x 16 inputs", 0.95, 0.0),
            ("16 kernels x 1 input (N = 1)", 0.75, 0.0),
            ("16 kernels x 1 input (N = 1)", 0.95, 0.0),
            ("16 kernels x 1 input (N = 1)", 0.95, 1.0),
        ):
            uneven = ", uneven" if spread else ""
            yield f"{name}, {part} {share:.0%}{uneven}", pruned(dense, part, share, spread)
    for name, graph in (("ResNet-20 at 30 %", networks.resnet20(0.3)), ("VGG16", networks.vgg16())):
        yield f"{name}, Table IV" if name == "VGG16" else name, graph
        yield f"{name}, shuffled", shuffled(graph)
    for name in zoo.names():
        yield f"zoo {name}", zoo.load(name)
    yield "zoo vgg16-w8a4, shuffled", shuffled(zoo.load("vgg16-w8a4"))


def trained(run: Path, data: str) -> Iterator[tuple[str, Graph]]:
    """Yield a dense network that was trained, quantized, and pruned by the norm of its codes."""
    import torch

    from tvm_mars.qat import Quantization, calibrate, load_data, prepare, to_graph
    from tvm_mars.qat.training import load_run

    model = load_run(run)
    images = load_data(data)[0]
    network = prepare(model, Quantization(weight_bits=8, activation_bits=8), images.shape)
    pixels = images.pixels[:IMAGES].to(torch.float32) / 255
    calibrate(network, pixels)
    dense = to_graph(network.eval(), images.shape)
    yield f"{run.name}", dense
    for part in PARTS:
        for share in (0.75, 0.95):
            graph = pruned(dense, part, share)
            yield f"{run.name}, {part} {share:.0%}", graph
    yield f"{run.name}, 16 x 16 75 %, shuffled", shuffled(pruned(dense, [*PARTS][-1], 0.75))


def imported(path: Path) -> Iterator[tuple[str, Graph]]:
    """Yield the regions of a quantized model."""
    from tvm_mars.frontend import adapter
    from tvm_mars.options import CompileOptions

    ir = adapter()
    for piece in ir.partition_of(ir.import_model(path), CompileOptions()).pieces:
        yield f"{path.parent.name}/{path.name}", piece.graph.graph


# -- measuring -------------------------------------------------------------------------------------


def row(name: str, graph: Graph) -> list[str]:
    """Measure one network."""
    named = NamedGraph.of(graph)
    begun = time.process_time()
    found = with_channel_order(named, MARS, "packed")
    searched = time.process_time() - begun
    (dense, given), (_, after) = (_group_sets(one.graph) for one in (named, found))
    before, cycles = (_cycles(one) for one in (named, found))
    return [
        name,
        f"{dense:,}",
        f"{given:,}",
        f"{after:,}",
        f"{1 - after / given:.1%}",
        f"{before:,}",
        f"{cycles:,}",
        f"{before / cycles:.2f}",
        f"{searched:.1f}",
    ]


def _group_sets(graph: Graph) -> tuple[int, int]:
    layers = pack(graph, MARS).values()
    return sum(one.dense_group_sets for one in layers), sum(one.group_sets for one in layers)


def _cycles(named: NamedGraph) -> int:
    return simulate(build_region(named, MARS, with_weights=False), MARS).cycles


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="folder of a dense run of mars train"
    )
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="quantized ONNX model"
    )
    parser.add_argument("--data", help="CIFAR-10: binary archive, or .npz")
    options = parser.parse_args()
    if options.run and not options.data:
        parser.error("--run needs --data, images to calibrate with")
    console = Console(width=140)
    console.print(
        f"Python {platform.python_version()}, numpy {np.__version__}; simulated cycles on mars, "
        "default schedule; seconds of CPU for the search"
    )
    table = Table(box=None)
    heads = ("dense", "given", "packed", "fewer", "cycles", "packed", "x", "s")
    table.add_column("network, what is zero", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    given = [trained(run, options.data) for run in options.run]
    given += [imported(model) for model in options.model]
    for name, graph in itertools.chain(*(given or [synthetic()])):
        table.add_row(*row(name, graph))
    console.print(table)


if __name__ == "__main__":
    main()
