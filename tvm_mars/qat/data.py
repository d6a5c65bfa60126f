"""Labelled images for training, and their augmentation, as tensors."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from ..datasets import load_dataset

__all__ = ["Augmentation", "Images", "augment", "batch_of", "load_data"]


@attrs.frozen(eq=False)
class Images:
    """Images ``[N, C, H, W]`` of uint8 and labels ``[N]`` of int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return (channels, height, width)

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def to(self, device: torch.device) -> Images:
        """Move them to a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int) -> Images:
        """Give the first images."""
        return Images(self.pixels[:count], self.labels[:count])


def load_data(path: str | Path) -> tuple[Images, Images]:
    """Load the training and the test images, from what :mod:`tvm_mars.datasets` reads.

    Raises
    ------
    InputError
        If the path holds no known format, or arrays of an unexpected type or size.
    """
    train, test = (
        Images(torch.from_numpy(part.pixels), torch.from_numpy(part.labels))
        for part in load_dataset(path)
    )
    return train, test


# -- augmentation ----------------------------------------------------------------------------------


@attrs.frozen
class Augmentation:
    """What is done to training images.

    Parameters
    ----------
    shift : int
        Largest shift each way, in pixels; what enters is black.
    flip : bool
        Mirror half of the images left to right.
    cutout : int
        Side of a square that is made grey, 0 for none.
    """

    shift: int = 4
    flip: bool = True
    cutout: int = 0


def batch_of(images: Images, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Give the chosen images as float32 in 0..1 (code / 255), and their labels."""
    return images.pixels[chosen].float().div_(255), images.labels[chosen]


def augment(batch: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Shift, mirror and cut each image of a batch ``[N, C, H, W]`` on its own.

    The generator is the CPU's, so that any device gets the same images.
    """
    count, _, height, width = batch.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 1), generator=generator).to(batch.device)

    every_row = torch.arange(height, device=batch.device)[None]
    every_column = torch.arange(width, device=batch.device)[None]
    rows, columns = every_row, every_column
    if how.flip:
        columns = torch.where(draw(0, 2) == 1, width - 1 - columns, columns)
    if how.shift:
        batch = functional.pad(batch, [how.shift] * 4)
        rows = rows + draw(0, 2 * how.shift + 1)
        columns = columns + draw(0, 2 * how.shift + 1)
    if how.shift or how.flip:
        picked = torch.arange(count, device=batch.device)[:, None, None]
        rows, columns = rows.expand(count, -1), columns.expand(count, -1)
        # Advanced indices around the channel axis put it last: [N, H, W, C].
        batch = batch[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if how.cutout:
        far_down = (every_row - draw(0, height)).abs() * 2 >= how.cutout
        far_right = (every_column - draw(0, width)).abs() * 2 >= how.cutout
        kept = far_down[:, None, :, None] | far_right[:, None, None, :]
        batch = torch.where(kept, batch, 0.5)
    return batch
