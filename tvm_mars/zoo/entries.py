"""The trained networks: integer codes with a record of how each was trained.

An entry is two files: ``<name>.npz``, the integer graph (:mod:`tvm_mars.graph_file`), and
``<name>.json``, its :class:`Record`. Reading them needs neither PyTorch nor TVM.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mars_runtime.errors import OptionError
from mars_runtime.program import write_atomically

from ..graph import Graph
from ..graph_file import graph_from_bytes, graph_to_bytes

__all__ = ["FOLDER", "Record", "load", "names", "record", "size", "write"]

FOLDER = Path(__file__).parent / "networks"


@attrs.frozen(kw_only=True)
class Record:
    """How a network was trained, and what it reached.

    Parameters
    ----------
    title, data : str
        The network and what it was trained on.
    dense_title : str
        What its dense twin, trained by the same means, is.
    accuracy, dense_accuracy : float
        Shares of the test images that the network and its twin classify rightly.
    recipes : sequence of mappings
        Everything that the training depended on (seed, epochs, schedules), stage by stage.
    dense_recipe : mapping
        The same of the twin's.
    history, dense_history : sequence of mappings
        Loss, learning rate, share of zero group-sets and test accuracy by epoch; of several stages
        one behind the other.
    images : mapping of str to int
        How many there are to train and to test.
    verified : mapping
        What was compared at every layer boundary, and how many codes differed, by engine.
    versions : mapping of str to str
        Of the packages that trained it.
    """

    title: str
    data: str
    dense_title: str
    accuracy: float
    dense_accuracy: float
    recipes: Sequence[Mapping[str, Any]]
    dense_recipe: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    dense_history: Sequence[Mapping[str, Any]]
    images: Mapping[str, int]
    verified: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def epochs(self) -> int:
        """Passes over the training images, in all stages."""
        return sum(int(_training(recipe)["epochs"]) for recipe in self.recipes)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe of the last stage."""
        return self.recipes[-1]

    @property
    def dense_epochs(self) -> int:
        """Those of the dense twin."""
        return int(_training(self.dense_recipe)["epochs"])

    def to_json(self) -> str:
        """Give the record as the text of its file."""
        return json.dumps(attrs.asdict(self), indent=1) + "\n"


def _training(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    training: Mapping[str, Any] = recipe.get("training", recipe)
    return training


def names() -> list[str]:
    """Give the names of the networks."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Graph:
    """Load a trained network.

    Raises
    ------
    OptionError
        If there is none of that name.

    Examples
    --------
    >>> from tvm_mars import zoo
    >>> print(zoo.load("digits").inputs[0].shape)
    (1, 16, 16)
    """
    _check(name)
    return graph_from_bytes((FOLDER / f"{name}.npz").read_bytes(), f"zoo network {name}")


def record(name: str) -> Record:
    """Tell how a network was trained.

    Raises
    ------
    OptionError
        If there is none of that name.
    """
    _check(name)
    return Record(**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def size(name: str) -> int:
    """Bytes of a network's file."""
    _check(name)
    return (FOLDER / f"{name}.npz").stat().st_size


def write(name: str, graph: Graph, about: Record, folder: str | Path = FOLDER) -> None:
    """Write an entry."""
    write_atomically(Path(folder) / f"{name}.npz", graph_to_bytes(graph))
    write_atomically(Path(folder) / f"{name}.json", about.to_json().encode())


def _check(name: str) -> None:
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1) or known
        raise OptionError(
            "no such network", where=f"zoo network {name!r}", hint=f"known: {', '.join(near)}"
        )
