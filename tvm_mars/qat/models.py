"""Networks for 32x32 images, as plain PyTorch modules: what the zoo's recipes train.

Nothing here knows of quantization; any module that ``torch.fx`` traces can take their place.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from mars_runtime.errors import OptionError

__all__ = ["MODELS", "build_model", "plain", "resnet18", "resnet20", "vgg16"]


def _conv_norm(given: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(given, channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """Basic residual block; a 1x1 projection where the map changes its shape."""

    def __init__(self, given: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(given, channels, 3, stride)
        self.conv2, self.bn2 = _conv_norm(channels, channels, 3)
        same = stride == 1 and given == channels
        shortcut = [] if same else _conv_norm(given, channels, 1, stride)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Give ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _resnet(stages: Sequence[tuple[int, int]], classes: int) -> nn.Module:
    given = stages[0][0]
    parts: list[nn.Module] = [*_conv_norm(3, given, 3), nn.ReLU()]
    for i, (channels, blocks) in enumerate(stages):
        for j in range(blocks):
            parts.append(Block(given, channels, 2 if i and not j else 1))
            given = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes)]
    return nn.Sequential(*parts, *head)


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 of He et al. for CIFAR, with projections (0.27 M weights)."""
    return _resnet([(16, 3), (32, 3), (64, 3)], classes)


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 with a 3x3 stem (11 M weights)."""
    return _resnet([(64, 2), (128, 2), (256, 2), (512, 2)], classes)


def vgg16(classes: int = 10) -> nn.Module:
    """VGG16 with batch normalization and one dense layer (15 M weights)."""
    parts: list[nn.Module] = []
    given = 3
    for channels, count in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        for _ in range(count):
            parts += [*_conv_norm(given, channels, 3), nn.ReLU()]
            given = channels
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(given, classes))


def plain(classes: int = 10, *, given: int = 3, width: int = 16) -> nn.Module:
    """Six convolutions of ``width`` to ``4 * width`` channels: a quick network for trials."""
    parts: list[nn.Module] = []
    for i, channels in enumerate([width, width, 2 * width, 2 * width, 4 * width, 4 * width]):
        parts += [*_conv_norm(given, channels, 3, 2 if i in (2, 4) else 1), nn.ReLU()]
        given = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "plain": plain,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "vgg16": vgg16,
}


def build_model(name: str, classes: int) -> nn.Module:
    """Build a network by its name in :data:`MODELS`, or by ``package.module:function``.

    Raises
    ------
    OptionError
        If there is no such network.
    """
    if name in MODELS:
        return MODELS[name](classes)
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, MODELS, 1)
        known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(MODELS)}"
        raise OptionError("no such network", where=f"model {name!r}", hint=known)
    try:
        model: nn.Module = getattr(importlib.import_module(module), function)(classes)
    except (ImportError, AttributeError) as error:
        raise OptionError(str(error), where=f"model {name!r}") from None
    return model
