"""The layers of a network in training: :class:`tvm_mars.graph.Conv` and its like, with gradients.

A :class:`Sum` adds convolutions, a bias and perhaps a map, and quantizes the total once. Each
convolution is a :class:`Term`: latent weights, the mask of its group-sets, and what scales it,
a batch normalization or (without one) a gamma and a bias of its own.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .functions import (
    FoldedConv,
    Geometry,
    batch_statistics,
    convolve,
    dorefa_activation,
    dorefa_weight,
    follow_statistics,
    group_peak,
    normalize_weight,
    quantize_activation,
    quantize_weight,
    round_bias,
)

__all__ = ["Addition", "Average", "Drop", "Entry", "Layer", "Maximum", "Method", "Sum", "Term"]

Method: TypeAlias = Literal["mars", "dorefa", "float"]

BLOCK = 16  # kernels, and input channels, of a group-set
_CLAMPED = 1 / 8  # of the kernels may be, before all take coarser codes
_NEAR_ONE = 0.95  # latent weights start at atanh of the given ones, which has a pole at 1


class Layer(nn.Module):
    """A layer of a network: its name, the values that it reads, and (if known) its map's shape."""

    shape: tuple[int, ...] | None = None

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        super().__init__()
        self.name, self.inputs = name, tuple(inputs)

    def extra_repr(self) -> str:
        """Show the name and the inputs."""
        return f"{self.name} <- {', '.join(self.inputs)}"


class Term(nn.Module):
    """One convolution, or dense matrix, of a :class:`Sum`.

    Parameters
    ----------
    name : str
        The module of the user's network that it comes from.
    weight, bias : Tensor
        Its parameters.
    geometry : Geometry or None
        None for a dense layer.
    norm : batch normalization or None
    bits, input_bits : int
        Of the weights, and of the codes that they meet.
    group : int
        Kernels that share the largest magnitude of eq. 6.
    taps : int
        Pixels of the map that a dense layer takes flat.

    Attributes
    ----------
    exponent : Tensor
        An integer: the weights are codes of eq. 8 times ``2**exponent``. The sums then lie on
        another power of two, which the shift of the requantization takes up. While the statistics
        follow the batch, it grows with the weights, up to 0.

    Notes
    -----
    gamma and beta count in units of the given network; ``spans`` holds the two constants by which
    they are divided so that maps fit into 0..1. Were the quotients the parameters, a step of
    gradient descent would change them by the square of the span as much as in the given network.
    """

    norm: nn.Module | None
    gamma: nn.Parameter | None
    bias: nn.Parameter | None
    mask: Tensor
    spans: Tensor
    kept_peak: Tensor
    exponent: Tensor

    def __init__(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        norm: nn.Module | None,
        *,
        method: Method,
        bits: int,
        group: int,
        input_bits: int,
        taps: int = 1,
    ) -> None:
        super().__init__()
        self.name, self.geometry, self.taps = name, geometry, taps
        self.method, self.bits, self.group = method, bits, group
        self.input_bits = input_bits
        self.block = (BLOCK, BLOCK)
        weight, channels = weight.detach(), len(weight)
        self.norm, self.gamma = copy.deepcopy(norm), None
        # In front of a batch normalization a bias only moves the mean.
        start = weight.new_zeros(channels) if bias is None else bias.detach().clone()
        self.bias = nn.Parameter(start) if norm is None else None
        peak = weight.new_ones(channels)
        if method != "float":
            weight = weight.clamp(-_NEAR_ONE, _NEAR_ONE)
            peak = group_peak(weight, group if method == "mars" else channels)
            weight = torch.atanh(weight)
        if norm is not None:
            _rescale_statistics(self.norm, start, peak)
        elif method == "mars":
            self.gamma = nn.Parameter(peak.clone())
        self.weight = nn.Parameter(weight.clone())
        mask = torch.ones(self.group_set_shape(), dtype=torch.bool, device=weight.device)
        self.register_buffer("mask", mask)
        self.register_buffer("spans", weight.new_ones(2))
        # What stands for the largest magnitude of eq. 6 while no batch's statistics cancel it.
        self.register_buffer("kept_peak", peak if self.gamma is not None else peak * 0)
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int32))
        self.frozen = False

    def extra_repr(self) -> str:
        """Show what it is."""
        shape = "x".join(map(str, self.weight.shape))
        return f"{self.name} {shape} {self.method} w{self.bits}"

    # -- group-sets --

    def set_block(self, kernels: int, channels: int) -> None:
        """Set the size of what is pruned together (alpha and N of eq. 4), and prune nothing."""
        self.block = (kernels, channels)
        self.mask = self.mask.new_ones(self.group_set_shape())

    def group_set_shape(self) -> tuple[int, int, int]:
        """Kernel blocks, channel blocks, taps."""
        channels, given, taps = self._as_taps(self.weight).shape
        return (-(-channels // self.block[0]), -(-given // self.block[1]), taps)

    def _as_taps(self, weight: Tensor) -> Tensor:
        """View weights as ``[O, C, taps]``."""
        taps = self.taps if self.geometry is None else weight[0, 0].numel()
        return weight.reshape(len(weight), -1, taps)

    def group_set_norms(self, weight: Tensor | None = None) -> Tensor:
        """Norm of each group-set of the (masked) weights (eq. 4): ``[O / alpha, C / N, taps]``."""
        full = self._as_taps(self.masked_weight() if weight is None else weight)
        channels, given, taps = full.shape
        rows, columns, _ = self.group_set_shape()
        pad = (0, 0, 0, columns * self.block[1] - given, 0, rows * self.block[0] - channels)
        blocks = functional.pad(full.square(), pad)
        blocks = blocks.view(rows, self.block[0], columns, self.block[1], taps).sum((1, 3))
        # The root's gradient at 0 is infinite: there, 0 is wanted.
        safe = torch.where(blocks > 0, blocks, torch.ones_like(blocks))
        return torch.where(blocks > 0, safe.sqrt(), torch.zeros_like(blocks))

    def spread(self, values: Tensor) -> Tensor:
        """Repeat a value per group-set over its weights."""
        channels, given, _ = self._as_taps(self.weight).shape
        rows = values.repeat_interleave(self.block[0], 0)[:channels]
        return rows.repeat_interleave(self.block[1], 1)[:, :given].reshape(self.weight.shape)

    def masked_weight(self) -> Tensor:
        """Latent weights, zero in pruned group-sets."""
        mask = self.weight_mask()
        return self.weight if mask is None else self.weight * mask

    def weight_mask(self) -> Tensor | None:
        """1 or 0 for each weight, None where nothing is pruned; made anew when the mask changes."""
        state = (self.mask.data_ptr(), self.mask._version, self.weight.stride())
        if self._spread is None or self._spread[0] != state:
            whole = bool(self.mask.all())
            spread = None if whole else torch.empty_like(self.weight).copy_(self.spread(self.mask))
            self._spread = (state, spread)
        return self._spread[1]

    _spread: tuple[tuple[Any, ...], Tensor | None] | None = None

    # -- weights --

    def normalized(self) -> Tensor:
        """``W^`` of eq. 6."""
        peak = self.kept_peak if bool(self.kept_peak.any()) else None
        return normalize_weight(self.masked_weight(), self.group, peak)

    @torch.no_grad()
    def freeze(self, frozen: bool) -> None:
        """Keep the moving averages, or follow the batch again.

        While they follow it, the denominator of eq. 6 cancels. Kept statistics would turn each step
        of the largest weight into a new scale of 16 kernels, so the denominator is kept with them,
        and always without a normalization. That is eq. 6 with a gamma that takes up the difference.
        """
        if self.norm is not None and frozen and not bool(self.kept_peak.any()):
            self.kept_peak.copy_(group_peak(torch.tanh(self.masked_weight()), self.group))
        elif self.norm is not None and self.frozen and not frozen:
            self.kept_peak.zero_()
        self.frozen = frozen

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gamma and beta of this layer's maps in 0..1."""
        gamma, beta = (
            (self.gamma, self.bias) if self.norm is None else (self.norm.weight, self.norm.bias)
        )
        return gamma / self.spans[0], beta / self.spans[1]

    def scale(self) -> tuple[Tensor, Tensor]:
        """What multiplies ``W^`` in eq. 7, and the unrounded bias, by the moving averages."""
        gamma, beta = self.affine()
        if self.norm is None:
            return gamma, beta
        scale = gamma * torch.rsqrt(self.norm.running_var + self.norm.eps)
        return scale, beta - scale * self.norm.running_mean

    def fold(self, normalized: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized weights and the unrounded bias, by the moving averages."""
        scale, bias = self.scale()
        return self.quantized(normalized, scale), bias

    def quantized(self, normalized: Tensor, scale: Tensor) -> Tensor:
        """``W-`` of eq. 8."""
        return quantize_weight(normalized, scale, self.bits, self.unit)

    @torch.no_grad()
    def make_room(self, normalized: Tensor, scale: Tensor) -> None:
        """Double the unit if eq. 7 clamps many kernels to less than half of what they hold.

        Their scales grow as group-sets are pruned, whose share of the deviation is gone.
        """
        if int(self.exponent) < 0:
            peaks = scale.abs() * normalized.abs().flatten(1).amax(1)
            if float((peaks > 2 * self.unit).float().mean()) > _CLAMPED:
                self.exponent += 1

    @property
    def unit(self) -> float:
        """What the codes of eq. 8 are multiplied by."""
        return float(2.0 ** int(self.exponent))

    @property
    def grid(self) -> int:
        """The sums are multiples of ``2**-grid``."""
        return self.input_bits + self.bits - 1 - int(self.exponent)

    def normalizes(self) -> bool:
        """Whether the batch's own statistics are taken."""
        return self.norm is not None and self.norm.training and not self.frozen

    def statistics(self, y: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Mean and variance of ``conv(x, W^)``, noted in the moving averages; whether of all ranks.

        A SyncBatchNorm takes them over all ranks; any other norm over this one.
        """
        norm = self.norm
        assert norm is not None
        together = isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized()
        mean, variance = batch_statistics(y, together)
        count = y.numel() // y.shape[1] * (dist.get_world_size() if together else 1)
        follow_statistics(norm, mean, variance, count)
        return mean, variance, together

    def plain(self, x: Tensor) -> Tensor:
        """Convolution and normalization of the methods that fold nothing."""
        weight = self.masked_weight()
        if self.method == "dorefa":
            mask = self.weight_mask()
            weight = dorefa_weight(weight, self.bits)
            weight = weight if mask is None else weight * mask
        y = convolve(x, weight, None, self.geometry)
        if self.norm is not None:
            return self.norm(y) / self.spans[1]
        assert self.bias is not None
        bias = (self.bias / self.spans[1]).view(-1, *[1] * (y.ndim - 2))
        return y / self.spans[0] + bias


def _rescale_statistics(norm: nn.Module, bias: Tensor, peak: Tensor) -> None:
    """Let moving averages of ``conv(x, W) + bias`` be those of ``conv(x, W / peak)``."""
    norm.running_mean.sub_(bias).div_(peak)
    # eps stays what it is, and counts against the rescaled variance.
    variance = (norm.running_var + norm.eps) / peak.square() - norm.eps
    norm.running_var.copy_(variance.clamp_min(0))


class Sum(Layer):
    """Convolutions, bias and residual into the same accumulators, then one quantizer.

    Parameters
    ----------
    terms : Term
        One for each input; a residual is the last input.
    bits : int or None
        Width of the resulting codes; None where the accumulators themselves leave.
    residual_grid : int
        A residual lies on multiples of ``2**-residual_grid``.

    Attributes
    ----------
    result_scale : Tensor
        A power of two by which accumulators that leave are multiplied.
    """

    result_scale: Tensor

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        terms: Sequence[Term],
        *,
        method: Method,
        bits: int | None,
        residual_grid: int = 0,
    ) -> None:
        super().__init__(name, inputs)
        self.terms = nn.ModuleList(terms)
        self.method, self.bits, self._residual_grid = method, bits, residual_grid
        self.register_buffer("result_scale", torch.ones(()))

    @property
    def grid(self) -> int:
        """The accumulators lie on multiples of ``2**-grid``."""
        finest: int = max(term.grid for term in self.terms)
        return max(finest, self._residual_grid)

    @property
    def residual(self) -> str | None:
        """The map that is added, if any."""
        return self.inputs[-1] if len(self.inputs) > len(self.terms) else None

    def forward(self, *values: Tensor) -> Tensor:
        """Give the quantized sum."""
        total = self.accumulate(*values)
        if self.bits is None:
            return total * self.result_scale
        if self.method == "float":
            return functional.relu(total)
        if self.method == "dorefa":
            return dorefa_activation(total, self.bits)
        return quantize_activation(total, self.bits)

    def accumulate(self, *values: Tensor) -> Tensor:
        """Give the sum before it is quantized."""
        pairs = list(zip(self.terms, values, strict=False))
        if self.method == "mars":
            total = self._folded(pairs)
        else:
            total = sum_of([term.plain(x) for term, x in pairs])
        return total if self.residual is None else total + values[-1]

    def _folded(self, pairs: Sequence[tuple[Term, Tensor]]) -> Tensor:
        # All biases are rounded as one, so they come before the convolutions.
        folded = [_fold(term, x) for term, x in pairs]
        bias = round_bias(sum_of([part.bias for part in folded]), 2.0**self.grid)
        parts = [part.convolution(bias if i == 0 else None) for i, part in enumerate(folded)]
        return sum_of(parts)

    @torch.no_grad()
    def codes(self) -> tuple[list[Tensor], Tensor]:
        """Weight codes of each term (int8) and bias codes (int32), by the moving averages."""
        folded = [term.fold(term.normalized()) for term in self.terms]
        bias = round_bias(sum_of([bias for _, bias in folded]), 2.0**self.grid)
        weights = [
            (weight * (2 ** (term.bits - 1) / term.unit)).to(torch.int8)
            for term, (weight, _) in zip(self.terms, folded, strict=True)
        ]
        return weights, (bias.double() * 2.0**self.grid).to(torch.int32)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Add tensors in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _Plain:
    """A term whose statistics are constants: one convolution, ordinary gradients."""

    def __init__(self, term: Term, x: Tensor) -> None:
        self.term, self.x = term, x
        self.weight, self.bias = term.fold(term.normalized())

    def convolution(self, bias: Tensor | None) -> Tensor:
        return convolve(self.x, self.weight, bias, self.term.geometry)


class _Normalized:
    """A term folded by the statistics of its batch."""

    def __init__(self, term: Term, x: Tensor) -> None:
        assert term.norm is not None
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if mixed else x.dtype
        self.term, self.x = term, x.to(kind)
        self.normalized = term.normalized()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self.y = convolve(self.x, self.normalized.to(kind), None, term.geometry)
            self.mean, variance, self.together = term.statistics(self.y)
            self.inverse = torch.rsqrt(variance + term.norm.eps)
        self.gamma, beta = term.affine()
        scale = self.gamma.detach() * self.inverse
        term.make_room(self.normalized.detach(), scale)
        self.weight = term.quantized(self.normalized.detach(), scale).to(kind)
        self.bias = beta - scale * self.mean

    def convolution(self, bias: Tensor | None) -> Tensor:
        with torch.autocast(self.x.device.type, enabled=False):
            return FoldedConv.apply(
                self.x,
                self.normalized,
                self.gamma,
                bias,
                self.y,
                self.mean,
                self.inverse,
                self.weight,
                self.term.unit,
                self.term.geometry,
                self.together,
            )


def _fold(term: Term, x: Tensor) -> _Plain | _Normalized:
    return _Normalized(term, x) if term.normalizes() else _Plain(term, x)


class Entry(Layer):
    """The quantizer of an input: eq. 5 on real numbers in 0..1."""

    def __init__(self, name: str, *, method: Method, bits: int) -> None:
        super().__init__(name, ())
        self.method, self.bits = method, bits

    def forward(self, x: Tensor) -> Tensor:
        """Give the quantized input."""
        if self.method == "float":
            return x
        quantize = dorefa_activation if self.method == "dorefa" else quantize_activation
        return quantize(x, self.bits)


class Addition(Layer):
    """The sum of two maps, quantized."""

    def __init__(self, name: str, inputs: Sequence[str], *, method: Method, bits: int) -> None:
        super().__init__(name, inputs)
        self.method, self.bits = method, bits

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Give the quantized sum."""
        if self.method == "float":
            return left + right
        quantize = dorefa_activation if self.method == "dorefa" else quantize_activation
        return quantize(left + right, self.bits)


class Maximum(Layer):
    """A max pool: codes pass."""

    def __init__(
        self,
        name: str,
        source: str,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> None:
        super().__init__(name, (source,))
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Give the maxima."""
        return functional.max_pool2d(x, self.kernel, self.stride, self.padding)


class Average(Layer):
    """An average pool, quantized; without ``kernel``, of the whole map."""

    def __init__(
        self,
        name: str,
        source: str,
        kernel: tuple[int, int] | None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int] = (0, 0),
        count_include_pad: bool = True,
        *,
        method: Method,
        bits: int,
    ) -> None:
        super().__init__(name, (source,))
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.count_include_pad = count_include_pad
        self.method, self.bits = method, bits

    def forward(self, x: Tensor) -> Tensor:
        """Give the quantized averages."""
        # The quotient is no dyadic number: float64 keeps it on the right side of every tie.
        exact = x if self.training or self.method == "float" else x.double()
        kernel = self.kernel or (x.shape[2], x.shape[3])
        average = functional.avg_pool2d(
            exact, kernel, self.stride, self.padding, count_include_pad=self.count_include_pad
        )
        if self.method == "float":
            return average
        quantize = dorefa_activation if self.method == "dorefa" else quantize_activation
        return quantize(average, self.bits).to(x.dtype)


class Drop(Layer):
    """Dropout, in training only."""

    def __init__(self, name: str, source: str, share: float) -> None:
        super().__init__(name, (source,))
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share of the values."""
        return functional.dropout(x, self.share, self.training)
