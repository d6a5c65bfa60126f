"""A network in training, and the same network in integers."""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from .layers import Entry, Layer, Method, Sum, Term

__all__ = ["MarsNetwork"]

Shape: TypeAlias = tuple[int, ...]


class MarsNetwork(nn.Module):
    """Layers in topological order, each reading named values.

    Made by :func:`tvm_mars.qat.prepare`. In training it is differentiable, its batch normalizations
    folded by the batch's statistics; in evaluation mode it computes what MARS does, exactly where
    :func:`tvm_mars.onnx_export.check_exact` holds.

    Parameters
    ----------
    layers : sequence of Layer
    outputs : sequence of (str, bool)
        The values that leave, and whether as ``[N, C * H * W]``; one leaves alone, several as a
        tuple.
    input_shape : tuple of int or None
        Channels, height, width of an image; noted at the first image if None.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        outputs: Sequence[tuple[str, bool]],
        method: Method,
        input_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.outputs, self.method, self.input_shape = tuple(outputs), method, input_shape
        self._dead_after = _last_readers(layers, [name for name, _ in outputs])

    def forward(self, *images: Tensor) -> Any:
        """Give the outputs."""
        if self.input_shape is None:
            self.input_shape = tuple(images[0].shape[1:])
        values = self._evaluate(images, keep=False)
        leaving = [values[name].flatten(1) if flat else values[name] for name, flat in self.outputs]
        return leaving[0] if len(leaving) == 1 else tuple(leaving)

    def evaluate_values(self, *images: Tensor) -> dict[str, Tensor]:
        """Give every value by its name."""
        return self._evaluate(images, keep=True)

    def _evaluate(self, images: Sequence[Tensor], keep: bool) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        entries = iter(images)
        for layer, dead in zip(self.layers, self._dead_after, strict=True):
            entry = isinstance(layer, Entry)
            given = [next(entries)] if entry else [values[name] for name in layer.inputs]
            values[layer.name] = layer(*given)
            if not keep:
                for name in dead:
                    del values[name]
        return values

    def terms(self) -> list[Term]:
        """Give all convolutions and dense layers."""
        return [module for module in self.modules() if isinstance(module, Term)]

    def sums(self) -> list[Sum]:
        """Give the layers that hold them."""
        return [layer for layer in self.layers if isinstance(layer, Sum)]

    def freeze_statistics(self, frozen: bool = True) -> None:
        """Keep the moving averages of the normalizations as they are, and fold by them."""
        for term in self.terms():
            term.freeze(frozen)


def _last_readers(layers: Sequence[Layer], outputs: Sequence[str]) -> list[list[str]]:
    """For each layer, the values that nothing reads after it."""
    last = {layer.name: i for i, layer in enumerate(layers)}
    for i, layer in enumerate(layers):
        last.update(dict.fromkeys(layer.inputs, i))
    dead: list[list[str]] = [[] for _ in layers]
    for name, i in last.items():
        if name not in outputs:
            dead[i].append(name)
    return dead
