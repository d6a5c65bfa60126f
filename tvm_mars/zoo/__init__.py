"""Trained networks, as integer codes, with a record of how each was trained."""

from .digits import digits_images, digits_record, digits_split, load_digits

__all__ = ["digits_images", "digits_record", "digits_split", "load_digits"]
