"""What a compiled model takes and leaves, whatever the IR: its inputs, and its library."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError

__all__ = ["InputSpec", "in_order", "written_beside"]


@attrs.frozen
class InputSpec:
    """A model input; None in ``shape`` is a size that each call chooses."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def in_order(
    specs: Sequence[InputSpec], inputs: Mapping[str, npt.ArrayLike]
) -> list[npt.NDArray[Any]]:
    """Check arrays by names against a model's inputs, and give them in the inputs' order.

    Raises
    ------
    InputError
        If an array is missing or unknown, or of another shape or dtype.
    """
    names = [entry.name for entry in specs]
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 3, 0.0)
        raise InputError(
            "no such input", where=f"input {unknown[0]}", hint=f"did you mean {near[0]}?"
        )
    return [_checked(entry, inputs) for entry in specs]


def _checked(entry: InputSpec, inputs: Mapping[str, npt.ArrayLike]) -> npt.NDArray[Any]:
    where = f"input {entry.name}"
    if entry.name not in inputs:
        raise InputError(f"missing; given are {sorted(inputs)}", where=where)
    array = np.asarray(inputs[entry.name])
    same = len(array.shape) == len(entry.shape) and all(
        want in (None, have) for want, have in zip(entry.shape, array.shape, strict=True)
    )
    if not same:
        wanted = ", ".join("N" if size is None else str(size) for size in entry.shape)
        raise InputError(f"shape {array.shape}, expected ({wanted})", where=where)
    if str(array.dtype) != entry.dtype:
        raise InputError(
            f"dtype {array.dtype}, expected {entry.dtype}",
            where=where,
            hint=f"convert it with .astype('{entry.dtype}')",
        )
    return array


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside, whose file then takes the target's place."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
            built = Path(made) / target.name
            yield built
            built.replace(target)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, os.fspath(target)) from None
