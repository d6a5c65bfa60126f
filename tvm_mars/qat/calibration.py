"""Fitting a trained network into 0..1 before it is trained on: ranges, then statistics.

Each map's range (see :mod:`tvm_mars.ptq.ranges`, which chooses it) goes into gamma and beta of the
layer that gives it; the next normalization undoes it. A result that leaves unquantized is
multiplied by its range again, a power of two.

Where a map's range is large, eq. 7 as printed leaves its weights few codes, or none: of 4 bits, all
of those behind a residual of ResNet-20. So its 4-bit weights also take a power of two.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..ptq.fold import Freedom
from ..ptq.ranges import Array, Kernels, RangedMap, choose_ranges, result_range, sample_stride
from ..validators import require_one_of
from .functions import normalize_weight, per_kernel
from .layers import Addition, Average, Drop, Entry, Layer, Maximum, Sum, Term
from .network import MarsNetwork

__all__ = ["SCALINGS", "WeightScaling", "calibrate"]

WeightScaling: TypeAlias = Literal["fitted", "paper"]
_SCARCE = 4  # bits of weights that have no codes to spare
SCALINGS = get_args(WeightScaling)


@torch.no_grad()
def calibrate(
    network: MarsNetwork, images: Tensor, *, weight_scaling: WeightScaling = "fitted"
) -> None:
    """Fit the maps of a network into 0..1, and take the statistics of its normalizations.

    Each range is the one with the least squared error of quantization, of maps and of weights.

    Parameters
    ----------
    images : Tensor ``[N, C, H, W]``
        Some hundred, in 0..1.
    weight_scaling : str
        ``fitted``: a power of two for each convolution of 4-bit weights, by which its codes of eq.
        8 are multiplied, so that they reach the largest code whatever their map's range.
        ``paper``: none.

    Raises
    ------
    OptionError
        If there is no such scaling.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from tvm_mars.qat import Quantization, calibrate, prepare
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    >>> network = prepare(model, Quantization(activation_bits=4), (3, 8, 8))
    >>> calibrate(network, torch.rand(64, 3, 8, 8))
    """
    if network.method == "float":
        return
    require_one_of("weight_scaling", weight_scaling, SCALINGS)
    fitted = weight_scaling == "fitted"
    ranges = _ranges(network, images, fitted)
    for layer in network.sums():
        given = [ranges[name] for name in layer.inputs]
        for term, before in zip(layer.terms, given, strict=False):
            _rescale(term, before, ranges[layer.name])
        if layer.bits is None:
            layer.result_scale *= ranges[layer.name]
    if fitted:
        _fit_weights(network)
    _take_statistics(network, images)
    # They are those of quantized weights, which are scaled by them.
    if fitted and _fit_weights(network):
        _take_statistics(network, images)


def _ranges(network: MarsNetwork, images: Tensor, fitted: bool) -> dict[str, float]:
    """Give each value's constant."""
    samples, squares = _real_samples(network, images)
    maps = [
        RangedMap(
            layer.name,
            getattr(layer, "bits", None) or 0,
            samples[layer.name].numpy() if isinstance(layer, Sum | Addition) else None,
            tuple(_kernels(layer, fitted)),
            _tied_inputs(layer),
            fixed=isinstance(layer, Entry),
        )
        for layer in network.layers
        if not (isinstance(layer, Sum) and layer.bits is None)
    ]
    ranges = choose_ranges(maps, squares)
    for layer in network.sums():
        if layer.bits is None:
            ranges[layer.name] = result_range(_peaks(layer, ranges))
    return ranges


def _kernels(layer: Layer, fitted: bool) -> Iterator[Kernels]:
    """Give what a layer's terms quantize, as if no map were divided."""
    if not isinstance(layer, Sum):
        return
    for term, source in zip(layer.terms, layer.inputs, strict=False):
        if term.method != "mars":
            continue
        scale, _ = term.scale()
        normalized = term.normalized().cpu().numpy()
        freedom = _freedom(layer, term) if fitted else None
        yield Kernels(source, normalized, scale.cpu().numpy(), term.bits, _gamma(term), freedom)


def _gamma(term: Term) -> Array | None:
    return None if term.norm is None else term.affine()[0].cpu().numpy()


def _fit_weights(network: MarsNetwork) -> bool:
    """Let the weights of each term that may reach their largest code; whether any changed."""
    changed = False
    for layer in network.sums():
        for term in layer.terms:
            freedom = _freedom(layer, term)
            if freedom is not None:
                normalized, (scale, _) = term.normalized(), term.scale()
                scaled = (normalized * per_kernel(scale, normalized)).cpu().numpy()
                exponent = freedom.exponent(scaled, term.bits, _gamma(term))
                changed |= exponent != int(term.exponent)
                term.exponent.fill_(exponent)
    return changed


def _freedom(layer: Sum, term: Term) -> Freedom | None:
    """What a term's weights may be divided by; a result's range is a power of two itself.

    Weights of eight bits keep eq. 7: they have codes to spare, and so room to grow in training.
    """
    if term.method != "mars" or layer.bits is None or term.bits > _SCARCE:
        return None
    return Freedom.of(term.input_bits, term.bits, layer.bits)


def _peaks(layer: Sum, ranges: Mapping[str, float]) -> list[float]:
    """Give the largest scaled weight of each term without a normalization."""
    return [
        float(term.affine()[0].abs().max()) * ranges[name]
        for term, name in zip(layer.terms, layer.inputs, strict=False)
        if term.gamma is not None
    ]


def _real_samples(
    network: MarsNetwork, images: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Values of the network before any quantization, and their mean squares: a copy in float."""
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
        stride = sample_stride(value.numel(), value[0].numel())
        found[name] = value.flatten()[::stride].float().cpu()
    return found, {name: float(value.square().mean()) for name, value in values.items()}


def _make_real(term: Term) -> None:
    """Let a term compute ``plain`` on the weights that it would quantize."""
    group = term.group if term.method == "mars" else len(term.weight)
    normalized = normalize_weight(term.masked_weight(), group)
    if term.gamma is not None:
        normalized = normalized * per_kernel(term.gamma, normalized)
    term.weight.copy_(normalized)
    term.mask.fill_(1)


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


def _tied_inputs(layer: Layer) -> tuple[str, ...]:
    if isinstance(layer, Sum):
        return () if layer.residual is None else (layer.residual,)
    if isinstance(layer, Maximum | Average | Drop | Addition):
        return layer.inputs
    return ()
