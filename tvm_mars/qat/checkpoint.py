"""Checkpoints: written whole or not at all, read without unpickling."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from mars_runtime.errors import InputError
from mars_runtime.program import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; a crash leaves the file before or after."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises
    ------
    InputError
        If the file is missing, torn, or holds more than tensors and plain values.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"is no checkpoint: {text}", where=str(path)) from None
    return state
