"""Trained networks, as integer codes, with a record of how each was trained."""

from ..graph import Graph
from .digits import digits_dataset, digits_images, digits_split
from .entries import Record, load, names, record, size

__all__ = [
    "Record",
    "digits_dataset",
    "digits_images",
    "digits_split",
    "load",
    "load_digits",
    "names",
    "record",
    "size",
]


def load_digits() -> Graph:
    """Load ``digits``, from images as :func:`digits_split` gives them to ten logits."""
    return load("digits")
