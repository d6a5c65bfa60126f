"""Reading ONNX files, whatever the IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mars_runtime.errors import InputError

__all__ = ["read_onnx"]


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
