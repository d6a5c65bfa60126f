"""Training by several processes, each of which (a rank) takes its share of every batch.

What a step computes does not depend on how many there are, but for the rounding of float32 sums and
the draws of dropout: statistics and gradients are those of the whole batch, and every rank then
takes the same step, so that weights and masks stay the same to the last bit.
"""

# torch is not there when types are checked, so its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mars_runtime.errors import MarsError

from .functions import follow_statistics

__all__ = ["AllRanksNorm", "RankError", "Ranks", "joined", "synchronize_norms"]


class RankError(MarsError, RuntimeError):
    """Ranks that must be in the same state are not."""


@attrs.frozen
class Ranks:
    """Index of the process among those that train together, and their count."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Take them from ``torch.distributed``; without it a process trains alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.index == 0

    def part(self, batch: Tensor) -> Tensor:
        """Give this rank's share of a batch."""
        return batch[self.index :: self.count] if self.count > 1 else batch

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors be their mean over all ranks, in place and in one message."""
        tensors = list(tensors)
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set on some rank."""
        if self.count == 1:
            return flag
        total = torch.tensor([float(flag)], device=_device())
        dist.all_reduce(total)
        return bool(total > 0)

    def mean(self, value: Tensor) -> float:
        """Average a number over all ranks."""
        own = value.detach().double().clone()
        self.average([own])
        return float(own)

    def wait(self) -> None:
        """Wait until every rank has come here: the files of the first are written."""
        if self.count > 1:
            dist.barrier()

    @torch.no_grad()
    def check_same(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Compare with the first rank.

        Raises
        ------
        RankError
            Naming the first tensor that differs; on every rank.
        """
        if self.count == 1:
            return
        for name, tensor in tensors:
            own = tensor.detach().float().contiguous().view(torch.int32)  # NaN equals itself
            wanted = own.clone()
            dist.broadcast(wanted, 0)
            if self.any(not torch.equal(wanted, own)):
                raise RankError(
                    f"{name} is not the same on all {self.count} ranks",
                    hint="ranks must start from the same files, with the same versions of PyTorch",
                )


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` started, if it did; gives this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class AllRanksNorm(nn.SyncBatchNorm):
    """Batch normalization by the statistics of all ranks, on any device.

    That of PyTorch takes accelerators alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel."""
        from torch.distributed.nn import functional as collective  # not in every build of PyTorch

        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        others = [0, *range(2, x.ndim)]
        numbers = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        moments = torch.stack([numbers.mean(others), numbers.square().mean(others)])
        mean, square = collective.all_reduce(moments) / dist.get_world_size()
        variance = square - mean.square()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        follow_statistics(self, mean.detach(), variance.detach().clamp_min(0), count)
        scale = self.weight * torch.rsqrt(variance.clamp_min(0) + self.eps)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (numbers * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def synchronize_norms(model: nn.Module) -> None:
    """Let the batch normalizations of a model take the statistics of all ranks."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = AllRanksNorm  # its parameters and buffers are the same
            module.process_group = None
