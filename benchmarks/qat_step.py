"""What a step of quantization-aware training costs over the float32 step of the same network.

Steps of all variants are taken in turn in one process, each by a network and an optimizer of its
own; what is measured is CPU time, which other load on the machine disturbs least. The figures are
medians over the rounds, of the step and of its ratio to the float32 step of the same round.

    python benchmarks/qat_step.py [--model resnet20] [--batch N] [--rounds 9] [--threads N]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tvm_mars.qat import Pruner, PruningPlan, Quantization, calibrate, prepare
from tvm_mars.qat.functions import convolve
from tvm_mars.qat.models import build_model
from tvm_mars.qat.recipe import Training

CLASSES, SHAPE = 10, (3, 32, 32)
ASKED = 1.5
Step = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="resnet20 and vgg16 if none is given")
    parser.add_argument("--batch", type=int, default=Training().batch, help="the recipes' 128")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(
        f"PyTorch {torch.__version__}, CPython {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s), batch {arguments.batch}, channels last, "
        f"{arguments.rounds} rounds"
    )
    for model in arguments.model or ("resnet20", "vgg16"):
        measure(model, arguments.batch, arguments.rounds)


def measure(model: str, batch: int, rounds: int) -> None:
    """Measure one network."""
    torch.manual_seed(0)
    images, labels = torch.rand(batch, *SHAPE), torch.randint(CLASSES, (batch,))
    variants: dict[str, Step] = {
        "float32": step(build_model(model, CLASSES), images, labels),
        "w8a4": step(quantized(model, images), images, labels),
        "w8a4, frozen statistics": step(quantized(model, images, frozen=True), images, labels),
        "w8a4, group lasso": step(quantized(model, images), images, labels, lasso=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, variant in variants.items():
            begun = time.process_time()
            variant()
            if round_:  # the first one warms up
                times[name].append(time.process_time() - begun)
    second = second_convolution(quantized(model, images), images, rounds)
    print(f"\n{model}: {'CPU time':>29} {'over float32 (quartiles)':>28}")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["float32"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        asked = f"   asked: at most {ASKED}" if name == "w8a4" else ""
        median = statistics.median(taken) * 1e3
        print(f"  {name:<25} {median:>8.0f} ms {middle:>8.2f} ({low:.2f} .. {high:.2f}){asked}")
    share = second / statistics.median(times["float32"])
    print(
        f"  of that, conv(x, W^) for the statistics: {second * 1e3:.0f} ms, {share:.2f} of float32"
    )


def quantized(model: str, images: torch.Tensor, *, frozen: bool = False) -> nn.Module:
    """Prepare a network with maps in their ranges."""
    network = prepare(build_model(model, CLASSES), Quantization(activation_bits=4), SHAPE)
    calibrate(network, images[:16])
    network.train().freeze_statistics(frozen)
    return network


def step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, lasso: bool = False
) -> Step:
    """Give a training step, as the trainer takes it."""
    model = model.to(memory_format=torch.channels_last).train()
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    pruner = Pruner(model, PruningPlan(0.5, begin=0.5, end=1.0)) if lasso else None

    def take() -> None:
        loss = functional.cross_entropy(model(images), labels)
        if pruner:
            pruner.before_step(0.25)
            loss = loss + pruner.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if pruner:
            pruner.after_step(0.01)

    return take


def second_convolution(network: Any, images: torch.Tensor, rounds: int) -> float:
    """Give the time of all ``conv(x, W^)`` and their statistics in one forward pass."""
    network = network.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    taken = []
    with torch.no_grad():
        values = network.evaluate_values(images)
        terms = [
            (term, values[source], term.normalized())
            for layer in network.sums()
            for term, source in zip(layer.terms, layer.inputs, strict=False)
            if term.normalizes()
        ]
        for _ in range(rounds + 1):
            begun = time.process_time()
            for term, x, normalized in terms:
                term.statistics(convolve(x, normalized, None, term.geometry))
            taken.append(time.process_time() - begun)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
