"""
Port a CNN from PyTorch
=======================

A network that nobody prepared for MARS: an ordinary ``nn.Module``, trained here on scikit-learn's
handwritten digits. It is quantized and pruned while it trains, exported, compiled through TVM,
checked code for code, profiled, and its schedule is tuned.

Needs PyTorch: ``pip install -c constraints.txt ".[train]"``.
"""

# %%
# The network
# -----------
#
# MARS takes convolutions with batch norm and ReLU, pools, linear layers and sums of maps. Anything
# that PyTorch's ``fx`` can trace is read as it stands; what MARS does not take is an error that
# names the operation. This one has a stem, a residual block with a projection, and a classifier.

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def conv(given: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(given, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
    )


class Digits(nn.Module):
    """A small residual network for grey images of 16x16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 32)
        self.first, self.second = conv(32, 64, stride=2), conv(64, 64)
        self.projection = conv(32, 64, kernel=1, stride=2)
        self.third = conv(64, 96, stride=2)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits."""
        x = functional.relu(self.stem(x))
        x = functional.relu(self.second(functional.relu(self.first(x))) + self.projection(x))
        x = functional.relu(self.third(x))
        return self.classifier(functional.adaptive_avg_pool2d(x, 1).flatten(1))


# %%
# The data: bytes of 0..255, which the network meets as real numbers in 0..1.

from tvm_mars.qat.data import Images
from tvm_mars.zoo import digits_dataset


def as_bytes(dataset) -> Images:
    """Give the digits' 17 shades as bytes."""
    pixels = np.rint(dataset.images() * 255).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(dataset.labels))


train, test = map(as_bytes, digits_dataset())
images, held_out = train.pixels / 255, test.pixels / 255
print(f"{len(train)} images to train with, {len(test)} held out")


# %%
# A training loop of one's own
# ----------------------------
#
# Nothing in tvm-mars asks for its own trainer; here is a plain loop. ``hook`` is where pruning will
# come in.


def fit(model: nn.Module, epochs: int, rate: float, pruner: "Pruner | None" = None) -> None:
    """Train with SGD and a rate that falls to zero."""
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        if step % (len(images) // 64) == 0:
            order = torch.randperm(len(images))
        some = order[step % (len(images) // 64) * 64 :][:64]
        loss = functional.cross_entropy(model(images[some]), train.labels[some])
        if pruner:
            pruner.before_step(step / steps)
            loss = loss + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if pruner:
            pruner.after_step(schedule.get_last_lr()[0])
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the held-out images that are classified rightly."""
    return float((model(held_out).argmax(1) == test.labels).float().mean())


torch.manual_seed(0)
dense = Digits()
fit(dense, epochs=6, rate=0.05)
print(f"float32, dense: {accuracy(dense):.2%}")

# %%
# Quantize
# --------
#
# :func:`tvm_mars.qat.prepare` copies the module into a network whose batch norms are folded into
# 8-bit weights as it trains (eq. 6 to 8 of the paper) and whose maps have 4 bits (eq. 5).
# :func:`tvm_mars.qat.calibrate` fits the maps into 0..1. Already now it is close to the float
# model.

from tvm_mars.qat import Pruner, PruningPlan, Quantization, calibrate, export, prepare

network = prepare(dense, Quantization(weight_bits=8, activation_bits=4), (1, 16, 16))
calibrate(network, images[:512])
network.eval()
print(f"w8a4, calibrated, not trained: {accuracy(network):.2%}")

# %%
# Prune while it trains
# ---------------------
#
# MARS skips a group-set, 16 kernels x 16 input channels at one tap, if all of its weights are zero.
# The plan removes 70 % of them by half of the training, least important first; what remains heals
# in the second half. Removed group-sets stay zero to the last bit of the compiled program.

pruner = Pruner(network, PruningPlan(0.7, begin=0.05, end=0.5, adaptive=True))
fit(network, epochs=8, rate=0.03, pruner=pruner)
print(f"w8a4, {pruner.share():.1%} of {pruner.total} group-sets zero: {accuracy(network):.2%}")

# %%
# Export
# ------
#
# The ONNX file holds codes and powers of two: every float operation in it is exact, so that any
# engine gives the codes that the network was trained with.

folder = Path(tempfile.mkdtemp())
export(network, folder / "digits.onnx")

# %%
# Compile
# -------
#
# Through TVM onto MARS. The report says what is on MARS and what on the CPU, and why.

import tvm_mars

model = tvm_mars.compile(folder / "digits.onnx")
print(model.report)

# %%
# Check
# -----
#
# Every code at every layer boundary, on every held-out image: PyTorch in training form, PyTorch in
# integers, ONNX Runtime, and the simulated MARS executing its instructions.

from tvm_mars.qat.verify import verify

checked = verify(network, test)
print(checked)
assert checked.agree

# %%
# And the model that TVM built gives the logits that PyTorch gives:

logits = model.run({"x0": held_out.numpy()})["y0"]
with torch.no_grad():
    assert np.array_equal(logits, network(held_out).numpy())

# %%
# Profile
# -------
#
# Cycles, stalls, accesses and energy come from executing the program on the timed machine, beside a
# dense baseline that stores and computes the zeros. Figures marked [A] rest on what the paper does
# not state.

import sys

from tvm_mars.report import profile_program
from tvm_mars.report.text import print_profile

print_profile(profile_program(model.program), sys.stdout)

# %%
# Tune
# ----
#
# The default schedule is one point of a space; every point gives the same codes. Here on a machine
# whose loads may overlap with compute, where there is most to gain.

from mars_runtime import PRESETS, simulate

arch = PRESETS["mars"].replace({"overlap": "full"})
untuned = tvm_mars.compile(folder / "digits.onnx", arch=arch)
records = tvm_mars.tune(
    folder / "digits.onnx", arch=arch, work_dir=folder / "tuned", max_trials_global=64, seed=0
)
with records:
    tuned = tvm_mars.compile(folder / "digits.onnx", arch=arch)

before, after = (simulate(built.program.regions[0], arch).cycles for built in (untuned, tuned))
print(f"{before:,} core cycles an image by default, {after:,} tuned: {before / after:.2f}x")
assert after <= before
assert np.array_equal(tuned.run({"x0": held_out.numpy()})["y0"], logits)

# %%
# To go on: ``model.export_library("digits.so")`` runs with TVM and ``mars_runtime`` alone,
# ``model.program.save("digits.mars")`` is what ``mars profile``, ``mars disasm`` and the simulator
# take. A network that is trained already is pruned by :func:`tvm_mars.qat.prune`; ``mars train``
# runs recipes with checkpoints, resume and distillation.
