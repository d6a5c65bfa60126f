"""Reading ONNX files, whatever the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mars_runtime.errors import InputError

__all__ = ["input_shapes", "read_onnx"]


def read_onnx(path: Path) -> Any:
    """Read an ONNX file.

    Raises
    ------
    InputError
        If it cannot be read or is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except DecodeError as error:
        raise InputError(f"is no ONNX model: {error}", where=str(path)) from None
    if not model.graph.node:  # as an empty file reads
        raise InputError("is no ONNX model: it holds no operator", where=str(path))
    return model


def input_shapes(
    graph: Any, given: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int | None, ...]]:
    """Give the shape of every input, None for a size that stays open.

    Parameters
    ----------
    graph : onnx.GraphProto
        What the model says.
    given : mapping of str to sequence of int
        Shapes of inputs that it leaves open.

    Raises
    ------
    InputError
        If ``given`` names no input, or does not fit what the model says.
    """
    constants = {entry.name for entry in graph.initializer}
    inputs = {entry.name: entry for entry in graph.input if entry.name not in constants}
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise InputError(f"no such input; there are {sorted(inputs)}", where=f"input {unknown[0]}")
    found: dict[str, tuple[int | None, ...]] = {}
    for name, entry in inputs.items():
        sizes = [dim.dim_value or None for dim in entry.type.tensor_type.shape.dim]
        shape = [int(size) for size in given[name]] if name in given else sizes
        fits = len(shape) == len(sizes) and all(
            new is None or (new > 0 and size in (None, new))
            for size, new in zip(sizes, shape, strict=True)
        )
        if not fits:
            known = ", ".join(str(size or "N") for size in sizes)
            raise InputError(
                f"shape {tuple(shape)}, the model has ({known})", where=f"input {name}"
            )
        found[name] = tuple(shape)
    return found
