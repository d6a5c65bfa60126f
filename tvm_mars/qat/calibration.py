"""Ranges: how a trained network fits into 0..1.

Eq. 5 stores 0..1, a trained network's maps reach further. Each map is therefore divided by a
constant, which goes into gamma and beta of the layer that gives it; the next normalization undoes
it. Maps that meet in an addition, or that a pool passes on, share their constant. A result that
leaves unquantized is multiplied by its constant again, a power of two.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .functions import normalize_weight, per_kernel, quantize_weight
from .layers import Addition, Average, Drop, Entry, Layer, Maximum, Sum, Term
from .network import MarsNetwork

__all__ = ["calibrate"]

CANDIDATES = 40  # ranges that are tried, evenly spaced up to the largest value
SAMPLES = 100_000
ROOM = 1.5  # for the growth of a last layer's weights


@torch.no_grad()
def calibrate(network: MarsNetwork, images: Tensor) -> None:
    """Fit the maps of a network into 0..1, and take the statistics of its normalizations.

    Each range is the one with the least squared error of quantization, of maps and of weights.

    Parameters
    ----------
    images : Tensor ``[N, C, H, W]``
        Some hundred, in 0..1.
    """
    if network.method == "float":
        return
    ranges = _ranges(network, images)
    for layer in network.sums():
        given = [ranges[name] for name in layer.inputs]
        for term, before in zip(layer.terms, given, strict=False):
            _rescale(term, before, ranges[layer.name])
        if layer.bits is None:
            layer.result_scale *= ranges[layer.name]
    _take_statistics(network, images)


def _ranges(network: MarsNetwork, images: Tensor) -> dict[str, float]:
    """Give each value's constant."""
    samples = _real_samples(network, images)
    chains = _Chains(network)
    ranges: dict[str, float] = {}
    for members in chains.groups():
        fixed = any(isinstance(layer, Entry) for layer in members)
        sums = [m for m in members if isinstance(m, Sum) and m.bits is not None]
        best = 1.0 if fixed or not sums else _best_range(sums, samples)
        ranges.update({layer.name: best for layer in members})
    for layer in network.sums():
        if layer.bits is None:
            ranges[layer.name] = _result_range(layer, [ranges[name] for name in layer.inputs])
    return ranges


def _result_range(layer: Sum, given: list[float]) -> float:
    """Give the power of two that brings the weights of a last layer below 1, with some room."""
    peaks = [
        float(term.affine()[0].abs().max()) * before
        for term, before in zip(layer.terms, given, strict=False)
        if term.gamma is not None
    ]
    return 2.0 ** math.ceil(math.log2(ROOM * max(peaks))) if peaks and max(peaks) > 0 else 1.0


def _real_samples(network: MarsNetwork, images: Tensor) -> dict[str, Tensor]:
    """Values of the network before any quantization: a copy of it, run in float."""
    real = copy.deepcopy(network).eval()
    for layer in real.layers:
        if isinstance(layer, Sum):
            for term in layer.terms:
                _make_real(term)
        if hasattr(layer, "method"):
            layer.method = "float"
    values = real.evaluate_values(images)
    found = {}
    for name, value in values.items():
        flat = value.flatten()
        stride = max(1, len(flat) // SAMPLES)
        found[name] = flat[::stride].float()
    return found


def _make_real(term: Term) -> None:
    """Let a term compute ``plain`` on the weights that it would quantize."""
    group = term.group if term.method == "mars" else len(term.weight)
    normalized = normalize_weight(term.masked_weight(), group)
    if term.gamma is not None:
        normalized = normalized * per_kernel(term.gamma, normalized)
    term.weight.copy_(normalized)
    term.mask.fill_(1)


def _best_range(layers: Sequence[Sum], samples: Mapping[str, Tensor]) -> float:
    """Give the constant with the least squared error, summed over the layers that share it."""
    largest = max(float(samples[layer.name].max()) for layer in layers)
    if largest <= 0:
        return 1.0
    spans = [largest * i / CANDIDATES for i in range(1, CANDIDATES + 1)]
    errors = [
        sum(
            _map_error(samples[layer.name], span, layer.bits) + _weight_error(layer, span)
            for layer in layers
        )
        for span in spans
    ]
    return spans[errors.index(min(errors))]


def _map_error(values: Tensor, span: float, bits: int | None) -> float:
    """Squared error of eq. 5 on a map over a constant."""
    assert bits is not None
    values, top = values.clamp_min(0), 2**bits - 1
    codes = (values / span).clamp(max=1).mul(top).round()
    return float((codes * (span / top) - values).square().mean())


def _weight_error(layer: Sum, span: float) -> float:
    """Squared error of a map from the rounding of its normalized weights.

    The larger the constant, the fewer codes the weights reach. Behind a normalization a channel's
    variance is the square of gamma; the relative error of its kernel makes that share of it noise,
    of which a ReLU passes half.
    """
    noise = 0.0
    for term in layer.terms:
        if term.norm is None or term.method != "mars":
            continue
        normalized = term.normalized()
        gamma, _ = term.affine()
        scale = gamma * torch.rsqrt(term.norm.running_var + term.norm.eps) / span
        wanted = (normalized * per_kernel(scale, normalized)).flatten(1)
        got = quantize_weight(normalized, scale, term.bits).flatten(1)
        got = got * (2 ** (term.bits - 1) / (2 ** (term.bits - 1) - 1))
        power = wanted.square().sum(1)
        share = (got - wanted).square().sum(1) / torch.where(power > 0, power, 1.0)
        noise += float((gamma.square() * share).mean()) / 2
    return noise


def _rescale(term: Term, before: float, after: float) -> None:
    term.spans[0] *= after / before if term.norm is None else after
    term.spans[1] *= after
    if term.norm is None:
        return
    term.norm.running_mean.div_(before)
    variance = (term.norm.running_var + term.norm.eps) / before**2 - term.norm.eps
    term.norm.running_var.copy_(variance.clamp_min(0))


@torch.no_grad()
def _take_statistics(network: MarsNetwork, images: Tensor) -> None:
    """Set the moving averages to the statistics of the given images, layer by layer."""
    norms = [term.norm for term in network.terms() if term.norm is not None]
    momenta = [norm.momentum for norm in norms]
    training = network.training
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(training)


class _Chains:
    """Layers whose values share a constant, as they are added or passed on."""

    def __init__(self, network: MarsNetwork) -> None:
        self.layers = {layer.name: layer for layer in network.layers}
        self.parent = {name: name for name in self.layers}
        for layer in network.layers:
            for name in _tied_inputs(layer):
                self.parent[self.root(name)] = self.root(layer.name)

    def root(self, name: str) -> str:
        """Give the representative of a layer's group."""
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def groups(self) -> list[list[Layer]]:
        """Give the groups."""
        found: dict[str, list[Layer]] = {}
        for name, layer in self.layers.items():
            found.setdefault(self.root(name), []).append(layer)
        return list(found.values())


def _tied_inputs(layer: Layer) -> tuple[str, ...]:
    if isinstance(layer, Sum):
        return () if layer.residual is None else (layer.residual,)
    if isinstance(layer, Maximum | Average | Drop | Addition):
        return layer.inputs
    return ()
