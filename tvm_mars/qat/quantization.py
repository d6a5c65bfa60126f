"""What is quantized and how, and the two steps: prepare, convert."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn

from mars_runtime.errors import OptionError

from ..validators import at_least_one, one_of
from .integer import IntegerNetwork
from .layers import Method
from .network import MarsNetwork
from .trace import Bits, trace_network

__all__ = ["Quantization", "convert", "prepare"]

WIDTHS = (4, 8)
METHODS = ("mars", "dorefa", "float")
_LAYER_KEYS = ("weight_bits", "activation_bits")


def _layer_widths(_: object, attribute: Any, layers: Mapping[str, Mapping[str, int]]) -> None:
    for pattern, entry in layers.items():
        for key, value in entry.items():
            where = f"{attribute.name}[{pattern!r}]"
            if key not in _LAYER_KEYS:
                raise OptionError(f"unknown key {key!r}", where=where, hint=f"one of {_LAYER_KEYS}")
            if value not in WIDTHS:
                raise OptionError(f"{key} = {value!r}", where=where, hint=f"one of {WIDTHS}")


_width = one_of(*WIDTHS)
_optional_width = one_of(None, *WIDTHS)


@attrs.frozen(kw_only=True, slots=False)
class Quantization:
    """How a network is quantized.

    Parameters
    ----------
    method : str
        ``mars`` (eq. 5 to 8), ``dorefa`` (its baseline; the normalization stays apart, so it is not
        converted), ``float`` (nothing is quantized: for dense and pruned networks in float32).
    weight_bits, activation_bits, input_bits : int
        4 or 8.
    first_weight_bits, last_weight_bits : int or None
        Of the layers that read the input and give the output; None: as the others.
    layers : mapping
        Other widths by a pattern of module names, the first that matches counts:
        ``{"layer1.*": {"weight_bits": 4}}``. A map has the width of the layer that gives it; of a
        sum, its first convolution's.
    group : int
        Kernels that share the largest magnitude of eq. 6.
    input_shape : tuple of int or None
        Channels, height, width; if None, those of the first image.
    """

    method: Method = attrs.field(default="mars", validator=one_of(*METHODS))
    weight_bits: int = attrs.field(default=8, validator=_width)
    activation_bits: int = attrs.field(default=8, validator=_width)
    input_bits: int = attrs.field(default=8, validator=_width)
    first_weight_bits: int | None = attrs.field(default=None, validator=_optional_width)
    last_weight_bits: int | None = attrs.field(default=None, validator=_optional_width)
    layers: dict[str, dict[str, int]] = attrs.field(factory=dict, validator=_layer_widths)
    group: int = attrs.field(default=16, validator=at_least_one)
    input_shape: tuple[int, ...] | None = attrs.field(
        default=None, converter=attrs.converters.optional(tuple[int, ...])
    )

    def bits(self, name: str, first: bool, last: bool) -> Bits:
        """Give the widths of a layer by its name and whether it is at an edge of the network."""
        weight = self.weight_bits
        if first and self.first_weight_bits is not None:
            weight = self.first_weight_bits
        if last and self.last_weight_bits is not None:
            weight = self.last_weight_bits
        for pattern, entry in self.layers.items():
            if fnmatch.fnmatchcase(name, pattern):
                activation = entry.get("activation_bits", self.activation_bits)
                return Bits(entry.get("weight_bits", weight), activation)
        return Bits(weight, self.activation_bits)


def prepare(
    model: nn.Module, how: Quantization, input_shape: tuple[int, ...] | None = None
) -> MarsNetwork:
    """Make a network in training of a module, whose parameters are copied.

    Raises
    ------
    UnsupportedError
        Naming the first operation that MARS does not take.

    Examples
    --------
    >>> from torch import nn
    >>> from tvm_mars.qat import Quantization, prepare
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    >>> network = prepare(model, Quantization(weight_bits=8, activation_bits=4), (3, 8, 8))
    >>> type(network).__name__
    'MarsNetwork'
    """
    network = trace_network(
        model,
        method=how.method,
        bits=how.bits,
        input_bits=how.input_bits,
        group=how.group,
        input_shape=input_shape or how.input_shape,
    )
    network.train(model.training)
    return network


def convert(network: MarsNetwork) -> IntegerNetwork:
    """Make the network of integers that MARS runs, exact in every layer.

    Raises
    ------
    UnsupportedError
        If the network is not quantized by eq. 5 to 8.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from tvm_mars.qat import Quantization, calibrate, convert, prepare
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    >>> network = prepare(model, Quantization(activation_bits=4), (3, 8, 8))
    >>> images = torch.rand(64, 3, 8, 8)
    >>> calibrate(network, images)
    >>> torch.equal(convert(network.eval())(images), network(images))
    True
    """
    return IntegerNetwork(network)
