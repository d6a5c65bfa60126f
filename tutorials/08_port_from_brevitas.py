"""
Port a network from Brevitas
============================

A network that was trained quantized in Brevitas, with four bits for weights and maps, comes to
MARS by Brevitas's own QCDQ export. What its layers must say so that all of it is taken, how zero
group-sets come about in its training, and what the logits of the two differ by.

Needs PyTorch and Brevitas: ``pip install -c constraints.txt ".[brevitas]"``.
"""

# %%
# The network
# -----------
#
# Three rules let MARS take all of it. Every map has a quantizer: one for the image, then those of
# the ReLUs. Maps that are added go through one and the same quantizer before, so that their scales
# agree: Brevitas, once it evaluates, adds no others. Quantizers return their scale with the values
# (``return_quant_tensor``), which the next layer needs. Batch norms may stand behind a
# convolution: they go into the scales of its weights.

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else may be installed beside it
    import brevitas.nn as qnn
    from brevitas.export import export_onnx_qcdq
    from brevitas.quant import (
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloat,
    )

BITS = 4
weights = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": BITS, "bias": False}


def relu() -> nn.Module:
    """ReLU to codes of four unsigned bits."""
    return qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=BITS, return_quant_tensor=True)


class Digits(nn.Module):
    """A small residual network for grey images of 16x16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.image = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, return_quant_tensor=True)
        self.stem = qnn.QuantConv2d(1, 32, 3, stride=2, padding=1, **weights)
        self.first = qnn.QuantConv2d(32, 32, 3, padding=1, **weights)
        self.second = qnn.QuantConv2d(32, 64, 3, stride=2, padding=1, **weights)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (32, 32, 64))
        self.relus = nn.ModuleList(relu() for _ in range(3))
        self.summand = qnn.QuantIdentity(
            act_quant=Int8ActPerTensorFloat, bit_width=8, return_quant_tensor=True
        )
        self.pool = nn.MaxPool2d(2)
        self.classifier = qnn.QuantLinear(64 * 4, 10, **weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits."""
        x = self.relus[0](self.norms[0](self.stem(self.image(x))))
        y = self.norms[1](self.first(x))
        x = self.relus[1](self.summand(y) + self.summand(x))
        x = self.pool(self.relus[2](self.norms[2](self.second(x))))
        return self.classifier(torch.flatten(x, 1))


# %%
# Train it
# --------
#
# On scikit-learn's handwritten digits, by any loop. Nothing here knows MARS.

from tvm_mars.zoo import digits_dataset

train, test = digits_dataset()
images, labels = torch.from_numpy(train.images()), torch.from_numpy(train.labels)


def fit(model: nn.Module, epochs: int, rate: float) -> None:
    """Train with Adam and a rate that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def scores(model: nn.Module) -> np.ndarray:
    """Give the logits of the held-out images, in Brevitas's float emulation."""
    return model(torch.from_numpy(test.images())).numpy()


def accuracy(logits: np.ndarray) -> float:
    """Share of the held-out images that are classified rightly."""
    return float((logits.argmax(1) == test.labels).mean())


torch.manual_seed(0)
model = Digits()
fit(model, epochs=6, rate=5e-3)
print(f"Brevitas, w4a4: {accuracy(scores(model)):.2%} of {len(test)} held-out images")

# %%
# Prune it
# --------
#
# MARS skips a group-set, 16 kernels x 16 input channels at one tap, if all of its weights are zero.
# PyTorch's own masks are enough: Brevitas quantizes the masked weight, and its quantizer of weights
# is symmetric, so that a zero stays a zero. Here the 60 % of smallest norm go from each layer but
# the first, then the rest is trained on.

from torch.nn.utils import prune


def mask(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Give 0 in the group-sets of smallest norm and 1 elsewhere, for a weight [O, I, 3, 3]."""
    kernels, inputs, *taps = weight.shape
    norms = weight.detach().view(kernels // 16, 16, inputs // 16, 16, *taps).norm(dim=(1, 3))
    kept = norms > norms.quantile(share)
    return kept.repeat_interleave(16, 0).repeat_interleave(16, 1).to(weight)


for layer in (model.first, model.second):
    prune.custom_from_mask(layer, "weight", mask(layer.weight, 0.6))
fit(model, epochs=4, rate=2e-3)
for layer in (model.first, model.second):
    prune.remove(layer, "weight")
theirs = scores(model)
print(f"Brevitas, pruned: {accuracy(theirs):.2%}")

# %%
# Export
# ------
#
# QCDQ is Q/DQ with a Clip between the two, which says how many of the eight bits are used: so it
# writes codes of four bits. Brevitas needs PyTorch's older exporter for it, which warns of its age.


def export_qcdq(model: nn.Module, path: Path) -> None:
    """Write a network by Brevitas, for batches of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx_qcdq(
            model,
            torch.from_numpy(test.images(0, 1)),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes={"image": {0: "N"}},
        )


folder = Path(tempfile.mkdtemp())
export_qcdq(model, folder / "digits.onnx")

# %%
# Compile
# -------
#
# All of it is on MARS, and the Clips are read as widths: the weights are codes of four bits.

import tvm_mars

compiled = tvm_mars.compile(folder / "digits.onnx")
print(compiled.report)
assert not compiled.report.rejected and not compiled.report.host_operators

# %%
# Compare
# -------
#
# Brevitas computes with real numbers that stand for codes; MARS computes with the codes, and
# multiplies by an integer and shifts where Brevitas divides by a scale. A layer that is given the
# same codes gives the same, but for a code that lies next to a rounding border, which may become
# its neighbour.

ours = compiled.run({"image": test.images()})["scores"]
print(f"on MARS: {accuracy(ours):.2%}; logits up to {np.abs(theirs).max():.1f}")
print(f"largest difference of a logit: {np.abs(ours - theirs).max():.3f}")
alike = float((ours.argmax(1) == theirs.argmax(1)).mean())
print(f"classified as Brevitas does: {alike:.1%}")
assert alike > 0.99

# %%
# Where the time goes
# -------------------

import sys

from tvm_mars.report import profile_program
from tvm_mars.report.text import print_profile

profile = profile_program(compiled.program)
print_profile(profile, sys.stdout)
assert profile.speedup > 1

# %%
# When a quantizer is missing
# ---------------------------
#
# A map that nothing quantizes is easy to overlook: Brevitas trains and exports such a network as
# well. It stays real there, and what reads it stays on the CPU. The report says where.

model.relus[2] = nn.ReLU()
export_qcdq(model, folder / "forgotten.onnx")
print(tvm_mars.compile(folder / "forgotten.onnx").report)
