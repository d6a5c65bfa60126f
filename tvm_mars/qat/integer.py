"""From a network in training to integers: the graph, and a PyTorch module that evaluates it."""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mars_runtime.errors import UnsupportedError
from mars_runtime.quantize import Dequantize, Quantize

from .. import graph as ir
from ..graph import EXACT
from .layers import Addition, Average, Drop, Entry, Layer, Maximum, Sum
from .network import MarsNetwork

__all__ = ["IntegerNetwork", "layer_names", "to_graph"]


def to_graph(network: MarsNetwork, input_shape: tuple[int, ...] | None = None) -> ir.Graph:
    """Give the integer graph that a network computes in evaluation mode.

    Parameters
    ----------
    input_shape : tuple of int
        Channels, height, width; if None, those that the network has seen.

    Raises
    ------
    UnsupportedError
        If the network is not quantized by eq. 5 to 8, or its input's shape is not known.
    GraphError
        If an accumulator may leave int32.
    """
    if network.method != "mars":
        raise UnsupportedError(
            f"method {network.method!r} has no integer form", where="network", hint="use 'mars'"
        )
    shape = input_shape or network.input_shape
    if shape is None:
        raise UnsupportedError("input shape unknown", where="network", hint="give input_shape")
    lowering = _Lowering(shape)
    for layer in network.layers:
        lowering.layer(layer)
    outputs = [lowering.output(name, flat, network) for name, flat in network.outputs]
    return ir.Graph(lowering.inputs, lowering.layers, outputs)


def layer_names(network: MarsNetwork) -> dict[str, str]:
    """For each value of a network, the name of the same codes in its graph."""
    lowering = _Lowering(network.input_shape or (1, 1, 1))
    count = 0
    for layer in network.layers:
        if isinstance(layer, Drop):
            lowering.names[layer.name] = lowering.names[layer.inputs[0]]
        elif isinstance(layer, Entry):
            lowering.names[layer.name] = layer.name
        else:
            lowering.names[layer.name] = f"{_KINDS[type(layer)]}{count}"
            count += 1
    return lowering.names


_KINDS: dict[type, str] = {Sum: "conv", Maximum: "maxpool", Average: "avgpool", Addition: "add"}


class _Lowering:
    """Graph layers in the making; ``names`` maps a network's values to the graph's."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = (shape[0], shape[1], shape[2])
        self.inputs: list[ir.Input] = []
        self.layers: list[ir.Layer] = []
        self.types: dict[str, ir.MapType] = {}
        self.names: dict[str, str] = {}

    def layer(self, layer: Layer) -> None:
        """Append a layer."""
        if isinstance(layer, Entry):
            self.entry(layer)
        elif isinstance(layer, Drop):
            self.names[layer.name] = self.names[layer.inputs[0]]
        elif isinstance(layer, Sum):
            self.append(layer, self.sum(layer))
        elif isinstance(layer, Maximum):
            self.append(layer, self.maximum(layer))
        elif isinstance(layer, Average):
            self.append(layer, self.average(layer))
        elif isinstance(layer, Addition):
            self.append(layer, self.addition(layer))

    def name(self, kind: str) -> str:
        """Name of the next layer."""
        return f"{kind}{len(self.layers)}"

    def append(self, layer: Layer, made: ir.Layer) -> None:
        """Append a made layer and note its type."""
        self.layers.append(made)
        self.names[layer.name] = made.name
        self.types[made.name] = ir._result_type(made, self.types)

    def entry(self, layer: Entry) -> None:
        """Append an input."""
        name, top = f"x{len(self.inputs)}", 2**layer.bits - 1
        kind = ir.MapType(*self.shape, layer.bits)
        quantize = Quantize(high=top, factor=float(top), clip=(0.0, 1.0))
        self.inputs.append(ir.Input(name, kind, self.shape, quantize))
        self.names[layer.name], self.types[name] = name, kind

    def sum(self, layer: Sum) -> ir.Conv:
        """Make a convolution."""
        weights, bias = layer.codes()
        terms = []
        for term, source, weight in zip(layer.terms, layer.inputs, weights, strict=False):
            read = self.names[source]
            kind, codes = self.types[read], weight.numpy()
            shift = layer.grid - term.grid
            if term.geometry is None:
                codes = codes.reshape(len(codes), *kind.shape)
                terms.append(ir.ConvTerm(read, codes, term.bits, shift=shift))
                continue
            how = term.geometry
            terms.append(
                ir.ConvTerm(
                    read,
                    codes,
                    term.bits,
                    how.stride,
                    (*how.padding, *how.padding),
                    how.dilation,
                    how.groups,
                    shift,
                )
            )
        requant = None if layer.bits is None else ir.Requant.eq5(layer.bits, layer.grid)
        residual = None
        if layer.residual is not None:
            read = self.names[layer.residual]
            residual = ir.Residual(read, layer.grid - self.types[read].bits)
        return ir.Conv(self.name("conv"), terms, bias.numpy(), requant, residual)

    def maximum(self, layer: Maximum) -> ir.Pool:
        """Make a max pool."""
        source, padding = self.names[layer.inputs[0]], (*layer.padding, *layer.padding)
        return ir.Pool(self.name("maxpool"), "max", source, layer.kernel, layer.stride, padding)

    def average(self, layer: Average) -> ir.Pool:
        """Make an average pool."""
        source = self.names[layer.inputs[0]]
        kind = self.types[source]
        kernel = layer.kernel or (kind.height, kind.width)
        return ir.Pool(
            self.name("avgpool"),
            "avg",
            source,
            kernel,
            layer.stride or kernel,
            (*layer.padding, *layer.padding),
            layer.count_include_pad,
            ir.Requant.eq5(layer.bits, kind.bits),
        )

    def addition(self, layer: Addition) -> ir.Add:
        """Make an addition."""
        sources = [self.names[name] for name in layer.inputs]
        grid = max(self.types[source].bits for source in sources)
        operands = [ir.Operand(s, 1 << (grid - self.types[s].bits)) for s in sources]
        return ir.Add(self.name("add"), operands, ir.Requant.eq5(layer.bits, grid))

    def output(self, name: str, flat: bool, network: MarsNetwork) -> ir.Output:
        """Let a value leave as real numbers."""
        value = self.names[name]
        kind = self.types[value]
        made = next(layer for layer in network.layers if layer.name == name)
        scale = 2.0**-kind.bits
        if isinstance(made, Sum) and made.bits is None:
            scale = float(made.result_scale) * 2.0**-made.grid
        dense = isinstance(made, Sum) and made.terms[0].geometry is None
        shape = (kind.channels * kind.height * kind.width,) if flat or dense else kind.shape
        return ir.Output(value, shape, Dequantize(scale=(scale,)))


class IntegerNetwork(nn.Module):
    """A network of integer codes: what :func:`to_graph` gives, as a PyTorch module.

    Every layer computes on integers in a float type that holds all its sums: float32 below
    ``2**24``, float64 otherwise.

    Attributes
    ----------
    graph : Graph
    """

    def __init__(self, network: MarsNetwork) -> None:
        super().__init__()
        self.graph = to_graph(network)
        for layer in self.graph.layers:
            if not isinstance(layer, ir.Conv):
                continue
            self.register_buffer(f"{layer.name}_bias", torch.from_numpy(layer.bias.copy()))
            for i, term in enumerate(layer.terms):
                codes = torch.from_numpy(term.weight.copy())
                self.register_buffer(f"{layer.name}_weight{i}", codes)

    def forward(self, *images: Tensor) -> Any:
        """Give the outputs as real numbers."""
        values = self.evaluate_codes(*images)
        leaving = [
            (values[out.value] * out.dequantize.scale[0]).float().reshape(-1, *out.shape)
            for out in self.graph.outputs
        ]
        return leaving[0] if len(leaving) == 1 else tuple(leaving)

    @torch.no_grad()
    def evaluate_codes(self, *images: Tensor) -> dict[str, Tensor]:
        """Give the codes of every value, by the graph's names."""
        values: dict[str, Tensor] = {}
        for entry, image in zip(self.graph.inputs, images, strict=True):
            top = 2**entry.type.bits - 1
            values[entry.name] = (image.float().clamp(0, 1) * top).round()
        for layer in self.graph.layers:
            values[layer.name] = self._evaluate(layer, [values[name] for name in layer.inputs])
        return values

    def _evaluate(self, layer: ir.Layer, given: Sequence[Tensor]) -> Tensor:
        if isinstance(layer, ir.Conv):
            total = self._accumulate(layer, given)
            return total if layer.requant is None else _requantize(total, layer.requant)
        if isinstance(layer, ir.Add):
            parts = [x * o.multiplier for x, o in zip(given, layer.operands, strict=True)]
            return _requantize(sum(parts[1:], parts[0]), layer.requant)
        padding = layer.padding[:2]
        if layer.requant is None:
            return functional.max_pool2d(given[0], layer.kernel, layer.stride, padding)
        mean = functional.avg_pool2d(
            given[0].double(),
            layer.kernel,
            layer.stride,
            padding,
            count_include_pad=layer.count_include_pad,
        )
        return _requantize(mean, layer.requant)

    def _accumulate(self, layer: ir.Conv, given: Sequence[Tensor]) -> Tensor:
        exact = ir.worst_accumulator(layer, self.graph.types) < EXACT
        kind = torch.float32 if exact else torch.float64
        total: Tensor = getattr(self, f"{layer.name}_bias").to(kind)[:, None, None]
        for i, term in enumerate(layer.terms):
            weight = getattr(self, f"{layer.name}_weight{i}").to(kind)
            part = functional.conv2d(
                given[i].to(kind),
                weight,
                None,
                term.stride,
                term.padding[:2],
                term.dilation,
                term.groups,
            )
            total = total + part * 2**term.shift
        if layer.residual:
            total = total + given[-1] * 2**layer.residual.shift
        return total


def _requantize(total: Tensor, requant: ir.Requant) -> Tensor:
    """Eq. 5 on accumulators; float64 holds the product of both, and quotients by powers of two."""
    shift, top = int(requant.shift[0]), int(requant.multiplier[0])
    code = total.double().clamp(0, 2**shift).mul(top).div(2**shift).round()
    return code.float()
