"""Graphs as files: the structure as JSON beside the arrays, in one deflated ``.npz``.

Weights are stored as integer codes; group-sets of zeros cost next to nothing. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import cattrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError

from .graph import Graph, GraphError
from .skeleton import graph_converter

__all__ = ["graph_from_bytes", "graph_to_bytes"]

_STRUCTURE = "structure"


def graph_to_bytes(graph: Graph) -> bytes:
    """Give a graph as the contents of a file that :func:`graph_from_bytes` reads."""
    arrays: dict[str, npt.NDArray[Any]] = {}

    def keep(array: npt.NDArray[Any]) -> str:
        name = f"array{len(arrays)}"
        arrays[name] = array
        return name

    structure = json.dumps(graph_converter(keep, _unused).unstructure(graph), sort_keys=True)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        **{_STRUCTURE: np.frombuffer(structure.encode(), np.uint8), **arrays},  # type: ignore[arg-type]
    )
    return buffer.getvalue()


def graph_from_bytes(data: bytes, where: str) -> Graph:
    """Read a graph.

    Raises
    ------
    InputError
        If the contents are damaged or describe no graph.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays: Mapping[str, npt.NDArray[Any]] = {name: file[name] for name in file.files}
        structure = json.loads(arrays[_STRUCTURE].tobytes())
        graph: Graph = graph_converter(_unused, arrays.__getitem__).structure(structure, Graph)
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        GraphError,
        cattrs.BaseValidationError,
    ) as error:
        raise InputError(f"holds no network: {error}", where=where) from None
    return graph


def _unused(_: Any) -> Any:
    raise AssertionError("a graph is either read or written")
