"""Recipes: everything that a training run depends on, apart from the data's place.

A recipe is a small TOML file::

    name = "resnet20-w8a8"
    model = "resnet20"
    init = "resnet20-dense"        # another recipe, whose network this one starts from

    [training]
    epochs = 20
    learning_rate = 0.05

    [quantization]                 # absent: plain float32
    weight_bits = 8

    [pruning]                      # absent: dense
    sparsity = 0.9
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import attrs

from mars_runtime.errors import OptionError

from ..validators import at_least_one, one_of
from .calibration import SCALINGS, WeightScaling
from .data import Augmentation
from .pruning import PruningPlan
from .quantization import Quantization

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Distillation", "Recipe", "Training", "load_recipe", "recipe_names", "recipe_of"]

T = TypeVar("T")


@attrs.frozen
class Training:
    """How the weights are trained.

    Parameters
    ----------
    epochs, batch : int
        Passes over the training images, images per step (an incomplete batch is left out).
    learning_rate, momentum, weight_decay : float
        Of SGD with Nesterov's momentum. Normalization and biases do not decay.
    schedule : str
        ``cosine`` to zero; ``linear`` to zero; ``step``: divided by 10 every ``step_epochs``.
    warmup : float
        Epochs in which the learning rate rises linearly.
    ema : float
        Decay of the moving average of the weights that is evaluated and exported; 0: none.
    amp : str
        ``bf16`` computes convolutions in bfloat16, ``none`` in float32.
    gradient_clip : float
        Largest norm of all gradients; 0: none.
    freeze_statistics : float
        Share of the training after which the moving averages of the normalization are kept.
    evaluate_every : int
        Epochs between evaluations on the test images; the last epoch ends with one in any case.
    """

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = attrs.field(default="cosine", validator=one_of("cosine", "linear", "step"))
    step_epochs: int = 100
    warmup: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    amp: str = attrs.field(default="none", validator=one_of("none", "bf16"))
    channels_last: bool = True
    gradient_clip: float = 0.0
    freeze_statistics: float = 1.0
    evaluate_every: int = attrs.field(default=1, validator=at_least_one)


@attrs.frozen
class Distillation:
    """A teacher's logits beside the labels.

    Parameters
    ----------
    teacher : str
        Recipe whose trained network teaches.
    weight : float
        Share of the teacher's term in the loss.
    temperature : float
        By which both logits are divided.
    """

    teacher: str
    weight: float = 0.5
    temperature: float = 4.0


@attrs.frozen
class Recipe:
    """A training run.

    Parameters
    ----------
    name : str
        Also the folder of the run.
    model : str
        Network, see :func:`tvm_mars.qat.models.build_model`.
    init : str
        Recipe whose network is loaded before quantization; empty: random.
    seed : int
        Of initial weights, order of images, augmentation and dropout.
    quantization : Quantization
        None: the plain network, in float32.
    calibration : int
        Training images on which ranges and statistics are set before the first step; 0: none.
    weight_scaling : str
        ``fitted`` or ``paper``: see :func:`tvm_mars.qat.calibrate`.
    """

    name: str
    model: str
    init: str = ""
    seed: int = 0
    calibration: int = 1024
    weight_scaling: WeightScaling = attrs.field(default="fitted", validator=one_of(*SCALINGS))
    training: Training = attrs.field(factory=Training)
    augmentation: Augmentation = attrs.field(factory=Augmentation)
    quantization: Quantization | None = None
    pruning: PruningPlan | None = None
    distillation: Distillation | None = None


def recipe_names() -> list[str]:
    """Give the names of the recipes that come with the package."""
    folder = resources.files("tvm_mars.zoo") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str | Path, changes: Mapping[str, str] | None = None) -> Recipe:
    """Load a recipe by its file or by the name of one that comes with the package.

    Parameters
    ----------
    changes : mapping of str to str
        Fields to change, such as ``{"training.epochs": "2"}``; values in TOML's syntax, quotes of
        strings left out.

    Raises
    ------
    OptionError
        If there is none, or it holds an unknown key or a value of the wrong type.

    Examples
    --------
    >>> from tvm_mars.qat import load_recipe
    >>> load_recipe("plain-w8a8", {"training.epochs": "2"}).training.epochs
    2
    """
    path = Path(source)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot be read: {error.strerror}", where=str(path)) from None
    else:
        names = recipe_names()
        if str(source) not in names:
            near = difflib.get_close_matches(str(source), names, 1) or names
            raise OptionError(
                "no such recipe", where=str(source), hint=f"known are {', '.join(near)}"
            )
        text = (resources.files("tvm_mars.zoo") / "recipes" / f"{source}.toml").read_text("utf-8")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(str(error), where=str(source)) from None
    for key, value in (changes or {}).items():
        _change(table, key, value)
    return recipe_of(table, str(source))


def recipe_of(table: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of a table, as TOML or JSON give it."""
    return _structure(Recipe, table, where)


def _change(table: dict[str, Any], key: str, text: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise OptionError("is no section", where=key)
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _structure(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make an attrs value of a table: known keys only, each of its declared type."""
    kinds = typing.get_type_hints(cls)
    fields = attrs.fields_dict(cls)  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or list(fields)
            raise OptionError("unknown key", where=f"{where}: {key}", hint=f"{', '.join(near)}?")
        if value is not None:  # JSON's; TOML has none
            values[key] = _value(kinds[key], value, f"{where}: {key}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is attrs.NOTHING and name not in values
    ]
    if missing:
        raise OptionError(f"lacks {', '.join(missing)}", where=where)
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        kind = str
    base = typing.get_origin(kind) or kind
    if attrs.has(base) and isinstance(value, Mapping):
        return _structure(base, value, where)
    if base is float and type(value) is int:
        return float(value)
    if base is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not base:
        raise OptionError(f"{value!r} is no {base.__name__}", where=where)
    return value
