"""Scikit-learn's handwritten digits, as the network ``digits`` takes them.

1,797 grey images of 8x8 pixels, ten classes; every pixel is doubled each way.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..datasets import Dataset

__all__ = ["SIZE", "digits_dataset", "digits_images", "digits_split"]

Array: TypeAlias = npt.NDArray[Any]

SIZE = 16
INK = 16  # the code of a black pixel
HELD_OUT, SPLIT_SEED = 0.2, 2022


def digits_images(pixels: Array) -> Array:
    """Bring images of 8x8 pixels 0..16 to the network's input ``[N, 1, 16, 16]`` in 0..1."""
    return Dataset(_doubled(pixels), np.zeros(len(pixels), np.int64), INK).images()


def digits_split() -> tuple[Array, Array]:
    """Give the held-out images and labels, which training never saw (needs scikit-learn)."""
    held_out = digits_dataset()[1]
    return held_out.images(), held_out.labels


def digits_dataset() -> tuple[Dataset, Dataset]:
    """Give the images for training and those that are held out (needs scikit-learn)."""
    from sklearn.datasets import load_digits as load_images
    from sklearn.model_selection import train_test_split

    pixels, labels = load_images(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        _doubled(pixels), labels, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    return Dataset(train_x, train_y, INK), Dataset(test_x, test_y, INK)


def _doubled(pixels: Array) -> npt.NDArray[np.uint8]:
    images = np.asarray(pixels).reshape(-1, 1, 8, 8).astype(np.uint8)
    return images.repeat(2, axis=2).repeat(2, axis=3)
