"""A small residual network for scikit-learn's handwritten digits.

1,797 grey images of 8x8 pixels, ten classes; every pixel is doubled each way. The network has two
residual blocks, the first with a stride and a projection, and most group-sets of its larger layers
are zero. ``train_digits.py`` trains it and writes ``digits.npz`` and ``digits.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mars_runtime.quantize import Dequantize, Quantize

from ..graph import Conv, ConvTerm, Graph, Input, MapType, Output, Pool, Requant, Residual

__all__ = [
    "digits_graph",
    "digits_images",
    "digits_record",
    "digits_split",
    "load_digits",
    "training_split",
]

Array: TypeAlias = npt.NDArray[Any]
Samples: TypeAlias = tuple[Array, Array]

SIZE = 16
HELD_OUT, SPLIT_SEED = 0.2, 2022


def load_digits() -> Graph:
    """Load the trained network.

    Returns
    -------
    Graph
        Native (eq. 5 to 8). It takes float32 images ``[N, 1, 16, 16]`` in 0..1 as
        :func:`digits_split` gives them, and returns ten logits.
    """
    with (resources.files(__package__) / "digits.npz").open("rb") as file:
        return digits_graph(dict(np.load(file, allow_pickle=False)))


def digits_record() -> dict[str, Any]:
    """Tell how the network was trained, and its accuracies."""
    text = (resources.files(__package__) / "digits.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def digits_images(pixels: Array) -> Array:
    """Bring images of 8x8 pixels 0..16 to the network's input ``[N, 1, 16, 16]`` in 0..1."""
    images = (np.asarray(pixels).reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    return images.repeat(2, axis=2).repeat(2, axis=3)


def digits_split() -> Samples:
    """Give the held-out images and labels, which training never saw (needs scikit-learn)."""
    return _split()[1]


def training_split() -> Samples:
    """Give all other images and labels."""
    return _split()[0]


def _split() -> tuple[Samples, Samples]:
    from sklearn.datasets import load_digits as load_images
    from sklearn.model_selection import train_test_split

    pixels, labels = load_images(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        digits_images(pixels),
        labels,
        test_size=HELD_OUT,
        random_state=SPLIT_SEED,
        stratify=labels,
    )
    return (train_x, train_y), (test_x, test_y)


def digits_graph(codes: Mapping[str, Array]) -> Graph:
    """Build the network from its codes.

    Parameters
    ----------
    codes : mapping of str to array
        ``weight_bits``, ``activation_bits``; for each layer its bias such as ``conv0.bias`` and its
        weights such as ``conv0.weight``, the projection's being ``conv2.shortcut``.
    """
    weight_bits, bits = int(codes["weight_bits"]), int(codes["activation_bits"])
    grid = bits + weight_bits - 1

    def term(source: str, name: str, stride: int = 1) -> ConvTerm:
        weight = codes[name]
        pad = 0 if name == "conv8.weight" else weight.shape[2] // 2
        strides, padding = (stride, stride), (pad, pad, pad, pad)
        return ConvTerm(source, weight, weight_bits, strides, padding)

    def conv(name: str, *terms: ConvTerm, residual: str | None = None) -> Conv:
        added = Residual(residual, grid - bits) if residual else None
        return Conv(name, terms, codes[f"{name}.bias"], Requant.eq5(bits, grid), added)

    top = 2**bits - 1
    image = MapType(1, SIZE, SIZE, bits)
    quantize = Quantize(high=top, factor=float(top), clip=(0.0, 1.0))
    average = Requant.eq5(bits, bits)
    layers = (
        conv("conv0", term("x0", "conv0.weight")),
        conv("conv1", term("conv0", "conv1.weight", 2)),
        conv("conv2", term("conv1", "conv2.weight"), term("conv0", "conv2.shortcut", 2)),
        conv("conv3", term("conv2", "conv3.weight")),
        conv("conv4", term("conv3", "conv4.weight"), residual="conv2"),
        Pool("maxpool5", "max", "conv4", (2, 2), (2, 2)),
        conv("conv6", term("maxpool5", "conv6.weight")),
        Pool("avgpool7", "avg", "conv6", (4, 4), (4, 4), requant=average),
        Conv("conv8", (term("avgpool7", "conv8.weight"),), codes["conv8.bias"]),
    )
    logits = Output("conv8", (10,), Dequantize(scale=(2.0**-grid,)))
    return Graph((Input("x0", image, image.shape, quantize),), layers, (logits,))
