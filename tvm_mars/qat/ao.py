"""torchao's way: ``quantize_`` with a registered configuration changes a model in place."""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from typing import Literal

import attrs
from torch import nn
from torchao.core.config import AOBaseConfig  # type: ignore  # untyped, or not installed
from torchao.quantization.transform_module import (  # type: ignore
    register_quantize_module_handler,
)

from mars_runtime.errors import UnsupportedError

from ..validators import one_of
from .network import MarsNetwork
from .quantization import Quantization, convert, prepare

__all__ = ["MarsQATConfig", "whole_model"]


@attrs.frozen(kw_only=True, slots=False)
class MarsQATConfig(Quantization, AOBaseConfig):
    """Quantization-aware training for MARS; the options are those of :class:`Quantization`.

    Parameters
    ----------
    step : str
        ``prepare`` makes a network in training of a module; ``convert`` makes integers of that.

    Examples
    --------
    >>> from torch import nn
    >>> from torchao import quantize_
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> quantize_(model, MarsQATConfig(weight_bits=4), filter_fn=whole_model)
    >>> type(model).__name__
    'MarsNetwork'
    """

    step: Literal["prepare", "convert"] = attrs.field(
        default="prepare", validator=one_of("prepare", "convert")
    )


def whole_model(_module: nn.Module, name: str) -> bool:
    """Match a model and none of its parts: the ``filter_fn`` that torchao's ``quantize_`` needs."""
    return name == ""


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
