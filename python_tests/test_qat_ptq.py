"""Quantization after training with TVM's importer and NumPy gives the codes that PyTorch gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from torch import nn  # noqa: E402

import tvm_mars  # noqa: E402
from tvm_mars.frontend.relax.api import import_model  # noqa: E402
from tvm_mars.frontend.relax.floats import read_floats  # noqa: E402
from tvm_mars.graph import Conv, Graph  # noqa: E402
from tvm_mars.ptq import Options, quantize_network  # noqa: E402
from tvm_mars.qat import Quantization, calibrate, prepare, to_graph  # noqa: E402
from tvm_mars.qat.models import Block  # noqa: E402

SHAPE = (3, 16, 16)


def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32, 32, 1), Block(32, 48, 2), nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 40, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    for _ in range(20):
        net.train()(torch.rand(32, *SHAPE))
    return net.eval()


def weights_of(graph: Graph) -> list[np.ndarray]:
    return [
        term.weight.astype(np.int64)
        for layer in graph.layers
        if isinstance(layer, Conv)
        for term in layer.terms
    ]


def biases_of(graph: Graph) -> list[np.ndarray]:
    return [layer.bias.astype(np.int64) for layer in graph.layers if isinstance(layer, Conv)]


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (8, 4), (4, 4)])
def test_both_ways_give_the_same_codes(weight_bits: int, activation_bits: int) -> None:
    """From the same module and images: traced by torch.fx, and exported into Relax."""
    net, images = model(), torch.rand(96, *SHAPE)
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    trained = prepare(net, Quantization(**widths), SHAPE)
    calibrate(trained, images, weight_scaling="paper")
    theirs = to_graph(trained.eval())
    network, _ = read_floats(import_model(torch.export.export(net, (images,))))
    calibration = {network.inputs[0].name: images.numpy()}
    ours = quantize_network(network, calibration, Options(method="paper", **widths)).graph
    assert str(ours) == str(theirs)
    for one, other in zip(weights_of(ours), weights_of(theirs), strict=True):
        # Sums are rounded in another order, which may tell where a weight lies near a half.
        assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-3
    for one, other in zip(biases_of(ours), biases_of(theirs), strict=True):
        assert np.abs(one - other).max() <= 1


def test_an_exported_program_is_quantized_and_offloaded() -> None:
    net, images = model(), torch.rand(64, *SHAPE)
    program = torch.export.export(net, (images[:8],))
    (name,) = tvm_mars.compile(program).input_names
    mod = tvm_mars.quantize(program, calibration={name: images.numpy()})
    compiled = tvm_mars.compile(mod)
    assert not compiled.report.rejected and not compiled.report.host_operators
    (found,) = compiled.run({name: images[:8].numpy()}).values()
    with torch.no_grad():
        wanted = net(images[:8]).numpy()
    assert np.sqrt(np.square(found - wanted).mean()) < 0.1 * wanted.std()
