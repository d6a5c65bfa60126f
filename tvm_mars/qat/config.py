"""``MarsQATConfig``: what is quantized, and how; registered with torchao."""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torchao.core.config import AOBaseConfig  # type: ignore  # untyped, or not installed
from torchao.quantization.transform_module import (  # type: ignore
    register_quantize_module_handler,
)

from mars_runtime.errors import OptionError, UnsupportedError

from .calibration import calibrate
from .integer import IntegerNetwork
from .layers import Method
from .network import MarsNetwork
from .trace import Bits, trace_network

__all__ = ["MarsQATConfig", "calibrate", "convert", "prepare", "whole_model"]

WIDTHS = (4, 8)
_LAYER_KEYS = ("weight_bits", "activation_bits")


@dataclass(frozen=True)
class MarsQATConfig(AOBaseConfig):
    """Quantization-aware training for MARS.

    Parameters
    ----------
    step : str
        ``prepare`` makes a network in training of a module; ``convert`` makes integers of that.
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

    Examples
    --------
    >>> from torch import nn
    >>> from torchao import quantize_
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> quantize_(model, MarsQATConfig(weight_bits=4), filter_fn=whole_model)
    >>> type(model).__name__
    'MarsNetwork'
    """

    step: str = "prepare"
    method: Method = "mars"
    weight_bits: int = 8
    activation_bits: int = 8
    input_bits: int = 8
    first_weight_bits: int | None = None
    last_weight_bits: int | None = None
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    group: int = 16
    input_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require(self.step in ("prepare", "convert"), "step", self.step, "'prepare' or 'convert'")
        methods = ("mars", "dorefa", "float")
        _require(self.method in methods, "method", self.method, f"one of {methods}")
        _require(self.group >= 1, "group", self.group, "at least 1 kernel")
        widths = {
            name: getattr(self, name) for name in ("weight_bits", "activation_bits", "input_bits")
        }
        for name in ("first_weight_bits", "last_weight_bits"):
            if getattr(self, name) is not None:
                widths[name] = getattr(self, name)
        for pattern, entry in self.layers.items():
            for key, value in entry.items():
                _require(key in _LAYER_KEYS, f"layers[{pattern!r}]", key, f"one of {_LAYER_KEYS}")
                widths[f"layers[{pattern!r}].{key}"] = value
        for name, value in widths.items():
            _require(value in WIDTHS, name, value, "4 or 8")

    def bits(self, name: str, first: bool, last: bool) -> Bits:
        """Give the widths of a layer."""
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


def _require(good: bool, where: str, value: object, hint: str) -> None:
    if not good:
        raise OptionError(f"{value!r}", where=where, hint=hint)


def whole_model(_module: nn.Module, name: str) -> bool:
    """Match a model and none of its parts: the ``filter_fn`` that torchao's ``quantize_`` needs."""
    return name == ""


def prepare(
    model: nn.Module, config: MarsQATConfig, input_shape: tuple[int, ...] | None = None
) -> MarsNetwork:
    """Make a network in training of a module, whose parameters are copied.

    Raises
    ------
    UnsupportedError
        Naming the first operation that MARS does not take.
    """
    network = trace_network(
        model,
        method=config.method,
        bits=config.bits,
        input_bits=config.input_bits,
        group=config.group,
        input_shape=input_shape or config.input_shape,
    )
    network.train(model.training)
    return network


def convert(network: MarsNetwork) -> IntegerNetwork:
    """Make the network of integers that MARS runs, exact in every layer.

    Raises
    ------
    UnsupportedError
        If the network is not quantized by eq. 5 to 8.
    """
    return IntegerNetwork(network)


@register_quantize_module_handler(MarsQATConfig)
def _transform(module: nn.Module, config: MarsQATConfig) -> nn.Module:
    """Become another network in place: torchao keeps the object that the user holds."""
    if isinstance(module, nn.Linear):
        raise UnsupportedError(
            "was given alone",
            where=type(module).__name__,
            hint="say quantize_(model, config, filter_fn=whole_model): residual sums and "
            "normalizations are quantized across modules",
        )
    if config.step == "prepare":
        made: nn.Module = prepare(module, config)
    elif isinstance(module, MarsNetwork):
        made = convert(module)
    else:
        raise UnsupportedError(
            "is no network in training",
            where=type(module).__name__,
            hint="convert what step='prepare' has made",
        )
    module.__class__ = made.__class__
    module.__dict__ = made.__dict__
    return module
