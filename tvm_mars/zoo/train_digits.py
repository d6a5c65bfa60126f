"""Train the digits network: quantization-aware (eq. 5 to 8), pruned by whole group-sets.

Run as ``python -m tvm_mars.zoo.train_digits``; needs torch and scikit-learn. The same recipe
without pruning gives the dense twin. Held-out images are read once, after training has ended.

Source: Sie et al., TCAD 2022, eq. 1 to 8; the pruning schedule (group-sets of the smallest norm go
first, along a cubic ramp, and stay zero) is ours.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mars_runtime.quantize import Dequantize, Quantize
from tvm_mars.graph import (
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate,
)
from tvm_mars.zoo.collect import verified
from tvm_mars.zoo.digits import SIZE, digits_dataset
from tvm_mars.zoo.entries import FOLDER, Record, write

log = logging.getLogger("tvm_mars.zoo")

BLOCK = 16  # kernels, and input channels, of a group-set
VALIDATION = 0.15  # of the training images


@attrs.frozen
class Recipe:
    """Everything that training depends on."""

    seed: int = 0
    epochs: int = 60
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    group_lasso: float = 2e-5  # lambda_g of eq. 1
    sparsity: float = 0.8  # share of group-sets that end as zeros, in the layers that are pruned
    prune_from: float = 0.15  # of all epochs
    prune_until: float = 0.6
    freeze_from: float = 0.75  # from here on the moving averages are used, and kept
    weight_bits: int = 8
    activation_bits: int = 8


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """Give the value of ``exact`` and the gradient of ``smooth``."""
    return smooth + (exact - smooth).detach()


def quantize_activation(a: Tensor, bits: int) -> Tensor:
    """Eq. 5."""
    clamped = a.clamp(0, 1)
    codes = torch.round(clamped * (2**bits - 1))
    return straight_through(codes / 2**bits, clamped)


class MarsConv(nn.Module):
    """A convolution with eq. 6 to 8 for its weights, and the additive part of BN as its bias.

    Without ``norm`` (the classifier) gamma alone scales the weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        given: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        pruned: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.recipe, self.stride, self.pruned, self.norm = recipe, stride, pruned, norm
        self.pad = kernel // 2
        shape = (channels, given, kernel, kernel)
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(shape)))
        self.gamma = nn.Parameter(torch.full((channels,), 0.35 if norm else 0.5))
        self.beta = nn.Parameter(torch.full((channels,), 0.3 if norm else 0.0))
        self.mask: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mask", torch.ones(shape))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.frozen = False

    def normalized_weight(self) -> Tensor:
        """Eq. 6: tanh over its largest magnitude, per 16 kernels; tanh(0) keeps zeros zero."""
        bounded = torch.tanh(self.weight * self.mask)
        blocks = bounded.split(BLOCK)
        return torch.cat([b / b.detach().abs().max().clamp_min(1e-6) for b in blocks])

    def statistics(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of conv(x, W^): the batch's in training, else the moving averages."""
        if not self.norm:
            return self.mean, self.variance
        if self.frozen or not self.training:
            return self.mean, self.variance
        y = functional.conv2d(x, weight, stride=self.stride, padding=self.pad)
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.variance.lerp_(variance, 0.1)
        return mean, variance

    def quantized(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give weights on their grid (eq. 7 and 8) and the bias."""
        weight = self.normalized_weight()
        mean, variance = self.statistics(x, weight) if x is not None else (self.mean, self.variance)
        scale = self.gamma / torch.sqrt(variance + 1e-5)
        scaled = (scale[:, None, None, None] * weight).clamp(-1, 1)
        half = 2 ** (self.recipe.weight_bits - 1)
        codes = torch.round(scaled * (half - 1))
        return straight_through(codes / half, scaled), self.beta - scale * mean

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the convolution without bias, and the bias."""
        weight, bias = self.quantized(x)
        return functional.conv2d(x, weight, stride=self.stride, padding=self.pad), bias

    def group_sets(self) -> Tensor:
        """Norm of each group-set of W^ (eq. 4 at alpha = N = 16): ``[O / 16, C / 16, taps]``."""
        channels, given, height, width = self.weight.shape
        blocks = self.normalized_weight().view(
            channels // BLOCK, BLOCK, given // BLOCK, BLOCK, height * width
        )
        return torch.sqrt(blocks.square().sum((1, 3)) + 1e-12)

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Zero the given share of group-sets, the smallest first."""
        norms = self.group_sets()
        keep = torch.ones(norms.numel())
        keep[norms.flatten().argsort()[: round(share * norms.numel())]] = 0
        keep = keep.view_as(norms)
        channels, given, height, width = self.weight.shape
        full = keep.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        self.mask.copy_(full.view(channels, given, height, width))


class Digits(nn.Module):
    """The network of :func:`digits_graph`, fake-quantized."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.conv0 = MarsConv(recipe, 1, 32, 3)
        self.conv1 = MarsConv(recipe, 32, 64, 3, 2, pruned=True)
        self.conv2 = MarsConv(recipe, 64, 64, 3, pruned=True)
        self.shortcut = MarsConv(recipe, 32, 64, 1, 2)
        self.conv3 = MarsConv(recipe, 64, 64, 3, pruned=True)
        self.conv4 = MarsConv(recipe, 64, 64, 3, pruned=True)
        self.conv6 = MarsConv(recipe, 64, 128, 3, pruned=True)
        self.conv8 = MarsConv(recipe, 128, 10, 1, norm=False)

    def convs(self) -> list[MarsConv]:
        """Give all convolutions."""
        return [module for module in self.modules() if isinstance(module, MarsConv)]

    def biased(self, *parts: tuple[Tensor, Tensor]) -> Tensor:
        """Add convolutions and the sum of their biases, which is rounded once to the grid."""
        steps = 2.0 ** (self.recipe.activation_bits + self.recipe.weight_bits - 1)
        bias = torch.stack([part[1] for part in parts]).sum(0)
        bias = straight_through(torch.round(bias * steps) / steps, bias)
        return torch.stack([part[0] for part in parts]).sum(0) + bias[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Give logits."""

        def act(a: Tensor) -> Tensor:
            return quantize_activation(a, self.recipe.activation_bits)

        stem = act(self.biased(self.conv0(act(x))))
        first = act(self.biased(self.conv1(stem)))
        start = act(self.biased(self.conv2(first), self.shortcut(stem)))
        second = act(self.biased(self.conv3(start)))
        end = act(self.biased(self.conv4(second)) + start)
        deep = act(self.biased(self.conv6(functional.max_pool2d(end, 2))))
        pooled = act(functional.avg_pool2d(deep, 4))
        return self.biased(self.conv8(pooled)).flatten(1)

    @torch.no_grad()
    def codes(self) -> dict[str, np.ndarray]:
        """Give the integer codes that ``digits_graph`` takes."""
        recipe = self.recipe
        half = 2 ** (recipe.weight_bits - 1)
        grid = recipe.activation_bits + recipe.weight_bits - 1
        found = {
            "weight_bits": np.array(recipe.weight_bits),
            "activation_bits": np.array(recipe.activation_bits),
        }
        biases: dict[str, Tensor] = {}
        for name, module in self.named_children():
            assert isinstance(module, MarsConv)
            weight, bias = module.quantized()
            layer, key = ("conv2", "shortcut") if name == "shortcut" else (name, "weight")
            found[f"{layer}.{key}"] = (weight * half).round().numpy().astype(np.int8)
            biases[layer] = biases[layer] + bias if layer in biases else bias
        for layer, bias in biases.items():
            found[f"{layer}.bias"] = torch.round(bias * 2**grid).numpy().astype(np.int32)
        return found


def digits_graph(codes: Mapping[str, np.ndarray]) -> Graph:
    """Build the network from its codes.

    Parameters
    ----------
    codes : mapping of str to array
        ``weight_bits``, ``activation_bits``; for each layer its bias such as ``conv0.bias`` and its
        weights such as ``conv0.weight``, the projection's being ``conv2.shortcut``.
    """
    weight_bits, bits = int(codes["weight_bits"]), int(codes["activation_bits"])
    grid = bits + weight_bits - 1

    def term(source: str, name: str, stride: int = 1) -> ConvTerm:
        weight = codes[name]
        pad = 0 if name == "conv8.weight" else weight.shape[2] // 2
        strides, padding = (stride, stride), (pad, pad, pad, pad)
        return ConvTerm(source, weight, weight_bits, strides, padding)

    def conv(name: str, *terms: ConvTerm, residual: str | None = None) -> Conv:
        added = Residual(residual, grid - bits) if residual else None
        return Conv(name, terms, codes[f"{name}.bias"], Requant.eq5(bits, grid), added)

    top = 2**bits - 1
    image = MapType(1, SIZE, SIZE, bits)
    quantize = Quantize(high=top, factor=float(top), clip=(0.0, 1.0))
    average = Requant.eq5(bits, bits)
    layers = (
        conv("conv0", term("x0", "conv0.weight")),
        conv("conv1", term("conv0", "conv1.weight", 2)),
        conv("conv2", term("conv1", "conv2.weight"), term("conv0", "conv2.shortcut", 2)),
        conv("conv3", term("conv2", "conv3.weight")),
        conv("conv4", term("conv3", "conv4.weight"), residual="conv2"),
        Pool("maxpool5", "max", "conv4", (2, 2), (2, 2)),
        conv("conv6", term("maxpool5", "conv6.weight")),
        Pool("avgpool7", "avg", "conv6", (4, 4), (4, 4), requant=average),
        Conv("conv8", (term("avgpool7", "conv8.weight"),), codes["conv8.bias"]),
    )
    logits = Output("conv8", (10,), Dequantize(scale=(2.0**-grid,)))
    return Graph((Input("x0", image, image.shape, quantize),), layers, (logits,))


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch by up to two pixels each way."""
    padded = functional.pad(images, (2, 2, 2, 2))
    row, column = torch.randint(0, 5, (2,), generator=generator).tolist()
    return padded[:, :, row : row + images.shape[2], column : column + images.shape[3]]


def train(recipe: Recipe, images: Tensor, labels: Tensor) -> Digits:
    """Train a network; a sparsity of 0 trains the dense twin."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Digits(recipe)
    pruned = [conv for conv in model.convs() if conv.pruned]
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for epoch in range(recipe.epochs):
        progress = epoch / recipe.epochs
        span = recipe.prune_until - recipe.prune_from
        ramp = min(max((progress - recipe.prune_from) / span, 0.0), 1.0)
        for conv in pruned:
            conv.prune(recipe.sparsity * (1 - (1 - ramp) ** 3))
        for conv in model.convs():
            conv.frozen = progress >= recipe.freeze_from
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(recipe.batch):
            logits = model(augmented(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            if recipe.sparsity:
                lasso = torch.stack([conv.group_sets().sum() for conv in pruned]).sum()
                loss = loss + recipe.group_lasso / 2 * lasso
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        schedule.step()
        log.info("epoch %d: loss %.3f, sparsity %.2f", epoch, total, recipe.sparsity * ramp)
    model.eval()
    return model


@torch.no_grad()
def accuracy(model: Digits, images: Tensor, labels: Tensor) -> float:
    """Give the share of images that a fake-quantized network classifies rightly."""
    return float((model(images).argmax(1) == labels).double().mean())


def run(recipe: Recipe, folder: Path) -> Record:
    """Train the network and its dense twin, check the codes, write network and record."""
    training, held_out = digits_dataset()
    images, labels = torch.from_numpy(training.images()), torch.from_numpy(training.labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held = round(VALIDATION * len(images))
    fit = order[held:]
    model = train(recipe, images[fit], labels[fit])
    dense = attrs.evolve(recipe, sparsity=0.0)
    twin = train(dense, images[fit], labels[fit])
    inputs, targets = torch.from_numpy(held_out.images()), torch.from_numpy(held_out.labels)
    with torch.no_grad():
        logits = model(inputs).numpy()
    graph = digits_graph(model.codes())
    if not np.array_equal(logits, evaluate(graph, {"x0": inputs.numpy()})[0]):
        raise RuntimeError("the exported network's logits differ from the trained one's")
    record = Record(
        title="Two residual blocks for 8x8 digits, doubled to 16x16",
        data="scikit-learn's load_digits (UCI, optical recognition of handwritten digits)",
        accuracy=accuracy(model, inputs, targets),
        dense_title=f"dense, w{recipe.weight_bits}a{recipe.activation_bits}",
        dense_accuracy=accuracy(twin, inputs, targets),
        recipes=(attrs.asdict(recipe),),
        dense_recipe=attrs.asdict(dense),
        history=(),
        dense_history=(),
        images={"train": len(fit), "test": len(targets)},
        verified=verified(graph, held_out),
        versions={"torch": torch.__version__.split("+")[0], "numpy": np.__version__},
    )
    write("digits", graph, record, folder)
    return record


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder")
    for field in attrs.fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.pop("output")
    record = run(Recipe(**options), folder)
    log.info("accuracy %.4f, dense twin %.4f", record.accuracy, record.dense_accuracy)


if __name__ == "__main__":
    main()
