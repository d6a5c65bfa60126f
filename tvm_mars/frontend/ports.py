"""What a compiled model takes and leaves, whatever the IR: its inputs, and its library."""

from __future__ import annotations

import difflib
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, UnsupportedError

__all__ = [
    "InputSpec",
    "checked",
    "in_order",
    "read_arrays",
    "require_known",
    "require_linker",
    "written_beside",
]


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
    require_known([entry.name for entry in specs], inputs)
    return [checked(entry, inputs) for entry in specs]


def require_known(names: Sequence[str], inputs: Iterable[str]) -> None:
    """Check that all inputs that are given are a model's.

    Raises
    ------
    InputError
        If one is not.
    """
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 3, 0.0)
        hint = f"did you mean {near[0]}?" if near else "the model takes none"
        raise InputError("no such input", where=f"input {unknown[0]}", hint=hint)


def checked(entry: InputSpec, inputs: Mapping[str, npt.ArrayLike]) -> npt.NDArray[Any]:
    """Give one input's array.

    Raises
    ------
    InputError
        If it is missing, or of another shape or dtype.
    """
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


def read_arrays(path: str) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of an ``.npz`` file by their names.

    Raises
    ------
    InputError
        If it is no such file, or holds pickled objects.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError("is not an .npz file", where=path, hint="write it by numpy.savez")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except InputError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile):
        # numpy's own message proposes to unpickle.
        raise InputError(
            "is not an .npz file of plain arrays", where=path, hint="write it by numpy.savez"
        ) from None


def require_linker(compiler: str | None, library: Path) -> None:
    """Check that TVM has found a C++ compiler, with which it links libraries.

    Raises
    ------
    UnsupportedError
        If it has not.
    """
    if compiler is None:
        raise UnsupportedError(
            "TVM links libraries with a C++ compiler, and none is found",
            where=os.fspath(library),
            hint="install g++ or clang++, or name one in the environment variable CXX",
        )


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
