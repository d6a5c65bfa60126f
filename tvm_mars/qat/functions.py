"""Equations 5 to 8 as differentiable functions.

Rounding and clamping have straight-through gradients: of a rounding the identity, of a clamp zero
outside its range.

:class:`FoldedConv` is the convolution with batch normalization folded into its weights. What it
computes is ``conv(x, W-)``, ``W-`` from eq. 7 and 8 with the statistics of ``conv(x, W^)``, so two
convolutions; its gradient is that of an ordinary batch normalization behind ``conv``, which takes
one convolution backward each to the input and to the weights. Through the input it goes by the
quantized weights, as they are what the deployed network has. So a step takes four convolutions
where one without quantization takes three.

The second convolution forward is done without where its result is known: in evaluation mode, once
the statistics are frozen, and without a normalization. While they follow the batch it is needed:
the variance of ``conv(x, W^)`` asks for the covariance of all inputs of a kernel, which costs more
than the convolution itself wherever a kernel has more inputs than the layer has kernels (as many
operations in a square 1x1 layer, nine times as many in a square 3x3 one), and neither from
``conv(x, W-) / gamma`` nor from part of the batch does it come out the same.

Source: Sie et al., TCAD 2022, eq. 5 to 8. DoReFa-Net: Zhou et al., arXiv 1606.06160.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = [
    "FoldedConv",
    "Geometry",
    "batch_statistics",
    "convolve",
    "dorefa_activation",
    "dorefa_weight",
    "follow_statistics",
    "normalize_weight",
    "quantize_activation",
    "quantize_weight",
    "round_bias",
]

aten = torch.ops.aten


@attrs.frozen
class Geometry:
    """How a kernel moves; None of a dense layer, which takes its input flat."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry | None) -> Tensor:
    """Convolve, or multiply the flattened input with a matrix."""
    if how is None:
        return functional.linear(x.flatten(1), weight, bias)
    return functional.conv2d(x, weight, bias, how.stride, how.padding, how.dilation, how.groups)


# -- activations -----------------------------------------------------------------------------------


class _Levels(torch.autograd.Function):
    """``round(clamp(a, 0, 1) * top) * step``; the gradient of the clamp alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, top: int, step: float) -> Tensor:
        ctx.save_for_backward(a)
        return functional.hardtanh(a, 0.0, 1.0).mul_(top).round_().mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (a,) = ctx.saved_tensors
        return aten.hardtanh_backward(gradient, a, 0.0, 1.0), None, None


def quantize_activation(a: Tensor, bits: int) -> Tensor:
    """Eq. 5: codes over ``2**bits``."""
    return _Levels.apply(a, 2**bits - 1, 2.0**-bits)


def dorefa_activation(a: Tensor, bits: int) -> Tensor:
    """DoReFa: codes over ``2**bits - 1``."""
    return _Levels.apply(a, 2**bits - 1, 1 / (2**bits - 1))


# -- weights ---------------------------------------------------------------------------------------


def normalize_weight(weight: Tensor, group: int, peak: Tensor | None = None) -> Tensor:
    """Eq. 6: tanh over its largest magnitude in each ``group`` of kernels; a zero stays zero.

    Parameters
    ----------
    peak : Tensor ``[O]``
        Another denominator for each kernel.
    """
    bounded = torch.tanh(weight)
    return bounded / per_kernel(group_peak(bounded, group) if peak is None else peak, weight)


def per_kernel(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value per kernel so that it multiplies weights."""
    return values.view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def group_peak(weight: Tensor, group: int) -> Tensor:
    """Largest magnitude in each group of kernels, one per kernel; 1 where all are zero."""
    peak = weight.abs().amax(_kernel_axes(weight))
    blocks = functional.pad(peak, (0, -len(peak) % group)).view(-1, group).amax(1)
    blocks = torch.where(blocks > 0, blocks, torch.ones_like(blocks))
    return blocks.repeat_interleave(group)[: len(peak)]


def _kernel_axes(weight: Tensor) -> list[int]:
    return list(range(1, weight.ndim))


def _pass_unclamped(gradient: Tensor, normalized: Tensor, scale: Tensor, unit: float) -> Tensor:
    """Zero the gradient where eq. 7 clamps, which few kernels come to."""
    if not bool((scale.abs() * normalized.abs().amax(_kernel_axes(normalized)) > unit).any()):
        return gradient
    return gradient * ((normalized * per_kernel(scale, normalized)).abs() <= unit)


class _WeightCodes(torch.autograd.Function):
    """Eq. 7 and 8; the rounding's gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, scale: Tensor, bits: int, unit: float) -> Tensor:
        ctx.save_for_backward(normalized, scale)
        ctx.unit = unit
        half = 2 ** (bits - 1)
        scaled = normalized * per_kernel(scale / unit, normalized)
        return scaled.clamp_(-1, 1).mul_(half - 1).round_().mul_(unit / half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normalized, scale = ctx.saved_tensors
        gradient = _pass_unclamped(gradient, normalized, scale, ctx.unit)
        to_scale = (gradient * normalized).sum(_kernel_axes(normalized))
        return gradient * per_kernel(scale, gradient), to_scale, None, None


def quantize_weight(normalized: Tensor, scale: Tensor, bits: int, unit: float = 1.0) -> Tensor:
    """Eq. 7 and 8: ``round(clamp(scale * W^, -1, 1) * (2**(bits-1) - 1)) / 2**(bits-1)``.

    Parameters
    ----------
    scale : Tensor ``[O]``
        ``gamma / sqrt(var + eps)``.
    unit : float
        A power of two by which the scaled weights are divided before, and multiplied after: they
        are clamped to ``-unit..unit``.
    """
    return _WeightCodes.apply(normalized, scale, bits, unit)


def round_bias(bias: Tensor, steps: float) -> Tensor:
    """Round half to even to multiples of ``1 / steps``, within int32; the gradient passes."""
    with torch.no_grad():
        # The largest float32 below 2**31: 2**31 - 1 itself would round up to 2**31.
        rounded = (bias * steps).round_().clamp_(-(2.0**31), 2.0**31 - 128).div_(steps)
    return bias + (rounded - bias).detach() if bias.requires_grad else rounded


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's weights in -1..1, with a straight-through rounding."""
    bounded = torch.tanh(weight)
    smooth = bounded / bounded.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    top = 2**bits - 1
    exact = torch.round((smooth.detach() / 2 + 0.5) * top) * (2 / top) - 1
    return smooth + (exact - smooth).detach()


# -- folded normalization --------------------------------------------------------------------------


def batch_statistics(y: Tensor, synchronized: bool) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel; over all ranks if ``synchronized``."""
    # Eight times as fast as var_mean; its own moving averages, of which it needs some, are unused.
    kind = torch.promote_types(y.dtype, torch.float32)
    unused = torch.zeros(2, y.shape[1], dtype=kind, device=y.device)
    mean, variance = aten.batch_norm_update_stats(y, unused[0], unused[1], 1.0)
    if not synchronized:
        return mean, variance
    moments = torch.stack([mean, variance + mean.square()]) / dist.get_world_size()
    dist.all_reduce(moments)
    return moments[0], (moments[1] - moments[0].square()).clamp_min_(0)


@torch.no_grad()
def follow_statistics(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move a normalization's averages by the mean and (biased) variance of ``count`` numbers."""
    norm.num_batches_tracked += 1
    share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


def _others(y: Tensor) -> list[int]:
    return [0, *range(2, y.ndim)]


class FoldedConv(torch.autograd.Function):
    """``conv(x, quantized) + bias`` with the gradient of a batch normalization of ``y``.

    Arguments: the input; ``W^``; gamma; the bias; then, without gradients of their own, ``y`` =
    conv(x, W^), its mean and inverse deviation, the quantized ``W-``, its unit, the geometry, and
    whether the statistics are those of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        normalized: Tensor,
        gamma: Tensor,
        bias: Tensor | None,
        y: Tensor,
        mean: Tensor,
        inverse: Tensor,
        quantized: Tensor,
        unit: float,
        how: Geometry | None,
        synchronized: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, normalized, gamma, y, mean, inverse, quantized)
        ctx.unit, ctx.how, ctx.synchronized = unit, how, synchronized
        return convolve(x, quantized, None if bias is None else bias.to(x.dtype), how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        x, normalized, gamma, y, mean, inverse, quantized = ctx.saved_tensors
        centred, to_gamma, to_bias = _norm_backward(gradient, y, mean, inverse, ctx.synchronized)
        to_x, to_weight = _convolve_backward(centred.to(x.dtype), x, quantized, ctx)
        scale = gamma * inverse
        to_weight = _pass_unclamped(to_weight.to(normalized.dtype), normalized, scale, ctx.unit)
        to_weight = to_weight * per_kernel(scale, normalized)
        bias = to_bias if ctx.needs_input_grad[3] else None
        return (to_x, to_weight, to_gamma, bias, *[None] * 7)


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, ctx: Any
) -> tuple[Tensor | None, Tensor]:
    how: Geometry | None = ctx.how
    if how is None:
        return (gradient @ weight).view_as(x), gradient.T @ x.flatten(1)
    to_x, to_weight, _ = aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        how.stride,
        how.padding,
        how.dilation,
        False,
        [0, 0],
        how.groups,
        [ctx.needs_input_grad[0], True, False],
    )
    return to_x, to_weight


def _norm_backward(
    gradient: Tensor, y: Tensor, mean: Tensor, inverse: Tensor, synchronized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradient with its mean and its share along the normalized ``y`` removed.

    Also its sums with the normalized ``y`` and alone: the gradients of gamma and beta.
    """
    if not synchronized:
        # Its own weight undone: 1 / inverse in place of gamma.
        centred, to_gamma, to_beta = aten.native_batch_norm_backward(
            gradient, y, 1 / inverse, None, None, mean, inverse, True, 0.0, [True, True, True]
        )
        return centred, to_gamma, to_beta
    shape = (1, -1, *[1] * (y.ndim - 2))
    normal = (y - mean.view(shape)) * inverse.view(shape)
    to_gamma, to_beta = (gradient * normal).sum(_others(y)), gradient.sum(_others(y))
    means = torch.stack([to_gamma, to_beta]) / (y.numel() / y.shape[1] * dist.get_world_size())
    dist.all_reduce(means)
    centred = gradient - means[1].view(shape) - normal * means[0].view(shape)
    return centred, to_gamma, to_beta
