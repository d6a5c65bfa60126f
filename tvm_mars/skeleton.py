"""A graph's structure as JSON: shapes, widths and geometry, without weights.

A program carries it, so that reports and the dense baseline can be made from the program alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, get_origin

import cattrs
import numpy as np

from mars_runtime.errors import ProgramError

from .graph import Graph

__all__ = ["graph_converter", "graph_from_json", "graph_to_json"]


def graph_converter(to_json: Callable[[Any], Any], from_json: Callable[[Any], Any]) -> Any:
    """Give a converter between graphs and JSON values, its arrays by the given functions."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook_func(_is_array, to_json)
    converter.register_structure_hook_func(_is_array, lambda value, _: from_json(value))
    return converter


@functools.cache
def _converter() -> Any:
    return graph_converter(_array_to_json, _array_from_json)


def _is_array(kind: Any) -> bool:
    return (get_origin(kind) or kind) is np.ndarray


def _array_to_json(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    # A single value tells a native requantization; arrays of weights and scales are dropped.
    return {"shape": list(array.shape), "fill": int(array.flat[0]) if array.size == 1 else 0}


def _array_from_json(value: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.full(value["shape"], value["fill"], np.int64)


def graph_to_json(graph: Graph) -> str:
    """Give a graph's structure as JSON; equal graphs give equal text."""
    return json.dumps(_converter().unstructure(graph), sort_keys=True, separators=(",", ":"))


def graph_from_json(text: str) -> Graph:
    """Give a graph of that structure whose weights are zero.

    Raises
    ------
    ProgramError
        If the text does not describe a graph.
    """
    try:
        graph: Graph = _converter().structure(json.loads(text), Graph)
    except (ValueError, TypeError, KeyError, cattrs.BaseValidationError) as error:
        raise ProgramError(
            f"its network description cannot be read: {error}",
            where="program",
            hint="compile the network again",
        ) from None
    return graph
