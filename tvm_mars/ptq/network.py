"""A float network as MARS can hold it: convolutions, normalizations, ReLUs, pools, additions.

An importer's operators become a :class:`FloatNetwork` (see :mod:`tvm_mars.frontend.floats`), which
:func:`tvm_mars.ptq.quantize_network` turns into an integer graph. Its layers are those of
:mod:`tvm_mars.graph` before they had integers: a :class:`Sum` is what one requantization ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError

from .. import graph as ir

__all__ = [
    "Addition",
    "FloatInput",
    "FloatLayer",
    "FloatNetwork",
    "FloatOutput",
    "FloatPool",
    "Norm",
    "Sum",
    "Term",
]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, int, int]


def _numbers(value: npt.ArrayLike) -> Array:
    array = np.array(value, np.float32, order="C")
    array.flags.writeable = False
    return array


def _finite(holder: Any, attribute: attrs.Attribute[Any], value: Array | None) -> None:
    if value is not None and not np.isfinite(value).all():
        raise InputError(
            f"its {attribute.name} holds {np.count_nonzero(~np.isfinite(value))} values that are "
            "NaN or infinite",
            where=getattr(holder, "name", "batch norm"),
            hint="the float network is broken: train it again or take another checkpoint",
        )


def _array_field(**more: Any) -> Any:
    return attrs.field(converter=_numbers, validator=_finite, repr=False, **more)


@attrs.frozen(eq=False)
class Norm:
    """A batch normalization in inference: ``gamma * (y - mean) / sqrt(variance + epsilon) + beta``.

    Parameters
    ----------
    name : str
        The operator, for messages.
    gamma, beta, mean, variance : float32 arrays ``[O]``
    """

    name: str
    gamma: Array = _array_field()
    beta: Array = _array_field()
    mean: Array = _array_field()
    variance: Array = _array_field()
    epsilon: float = 1e-5


@attrs.frozen(eq=False)
class Term:
    """A convolution or dense product with what scales it.

    Parameters
    ----------
    name : str
        The operator that it comes from.
    input : str
        The map that it reads.
    weight : float32 array
        ``[O, C / groups, KH, KW]``, or ``[O, I]`` of a dense product, which takes its input flat.
    bias : float32 array ``[O]``
    norm : Norm or None
        The batch normalization behind it.
    stride, dilation : (int, int)
    padding : (int, int, int, int)
        Top, left, bottom, right.
    """

    name: str
    input: str
    weight: Array = _array_field()
    bias: Array = _array_field()
    norm: Norm | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def dense(self) -> bool:
        """Whether it takes its input flat."""
        return self.weight.ndim == 2

    def affine(self) -> tuple[Array, Array]:
        """What multiplies the plain product, and what is added then, one per kernel (float64)."""
        bias = self.bias.astype(np.float64)
        if self.norm is None:
            return np.ones_like(bias), bias
        norm = self.norm
        scale = norm.gamma / np.sqrt(norm.variance.astype(np.float64) + norm.epsilon)
        return scale, norm.beta + scale * (bias - norm.mean)


@attrs.frozen(eq=False)
class Sum:
    """Terms and perhaps a map, added, then a ReLU.

    Parameters
    ----------
    residual : str or None
        The map that is added.
    relu : bool
        False of a network's result, which leaves as it is.
    ceiling : float
        Where the ReLU ends: 6 of a ReLU6.
    """

    name: str
    terms: tuple[Term, ...] = attrs.field(converter=tuple[Term, ...])
    residual: str | None = None
    relu: bool = True
    ceiling: float = np.inf

    kind = "conv"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The maps that it reads, the residual last."""
        names = tuple(term.input for term in self.terms)
        return names + ((self.residual,) if self.residual else ())

    @property
    def tied(self) -> tuple[str, ...]:
        """The maps among them that share the result's range."""
        return (self.residual,) if self.residual else ()


@attrs.frozen(eq=False)
class FloatPool:
    """Max or average pooling."""

    name: str
    mode: Literal["max", "avg"]
    input: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = False

    @property
    def kind(self) -> str:
        """``maxpool`` or ``avgpool``."""
        return f"{self.mode}pool"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The map that it reads."""
        return (self.input,)

    @property
    def tied(self) -> tuple[str, ...]:
        """It shares its result's range."""
        return self.inputs


@attrs.frozen(eq=False)
class Addition:
    """The sum of two maps, neither of which is negative."""

    name: str
    inputs: tuple[str, str]

    kind = "add"

    @property
    def tied(self) -> tuple[str, ...]:
        """They share the result's range."""
        return self.inputs


FloatLayer: TypeAlias = Sum | FloatPool | Addition


@attrs.frozen(eq=False)
class FloatInput:
    """A map that enters: the caller's name, and its shape per image, ``(C, H, W)`` or ``(C,)``."""

    name: str
    shape: tuple[int, ...]


@attrs.frozen(eq=False)
class FloatOutput:
    """A map that leaves: the caller's name, and the shape per image in which it does."""

    name: str
    value: str
    shape: tuple[int, ...]


@attrs.frozen(eq=False)
class FloatNetwork:
    """Layers in topological order, each reading named maps.

    Attributes
    ----------
    shapes : mapping of str to (int, int, int)
        Channels, rows, columns of each map.
    """

    inputs: tuple[FloatInput, ...] = attrs.field(converter=tuple[FloatInput, ...])
    layers: tuple[FloatLayer, ...] = attrs.field(converter=tuple[FloatLayer, ...])
    outputs: tuple[FloatOutput, ...] = attrs.field(converter=tuple[FloatOutput, ...])
    shapes: Mapping[str, Shape] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        shapes: dict[str, Shape] = {
            entry.name: (*entry.shape, 1, 1)[:3]  # type: ignore[misc]
            for entry in self.inputs
        }
        for layer in self.layers:
            shapes[layer.name] = layer_shape(layer, shapes)
        object.__setattr__(self, "shapes", shapes)

    def terms(self) -> Iterator[Term]:
        """Give all convolutions and dense products."""
        for layer in self.layers:
            if isinstance(layer, Sum):
                yield from layer.terms

    def last_readers(self) -> dict[str, list[str]]:
        """For each layer, the maps that nothing reads after it."""
        last = {name: name for name in self.shapes}
        for layer in self.layers:
            last.update(dict.fromkeys(layer.inputs, layer.name))
        dead: dict[str, list[str]] = {layer.name: [] for layer in self.layers}
        for name, layer_name in last.items():
            if layer_name in dead and name not in {out.value for out in self.outputs}:
                dead[layer_name].append(name)
        return dead


def layer_shape(layer: FloatLayer, shapes: Mapping[str, Shape]) -> Shape:
    """Give the shape of a layer's map."""
    if isinstance(layer, Addition):
        return shapes[layer.inputs[0]]
    if isinstance(layer, FloatPool):
        source = ir.MapType(*shapes[layer.input], 8)
        height, width = ir._window_shape(source, layer.kernel, layer.stride, layer.padding)
        return (source.channels, height, width)
    term = layer.terms[0]
    if term.dense:
        return (len(term.weight), 1, 1)
    source = ir.MapType(*shapes[term.input], 8)
    kernel = (term.weight.shape[2], term.weight.shape[3])
    height, width = ir._window_shape(source, kernel, term.stride, term.padding, term.dilation)
    return (len(term.weight), height, width)
