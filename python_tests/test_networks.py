"""Synthetic networks have the paper's group-sets and stay alive through their depth."""

from __future__ import annotations

import numpy as np
import pytest

from python_tests.random_graphs import group_sets, random_inputs
from tvm_mars.graph import Conv, evaluate, evaluate_values
from tvm_mars.networks import (
    TABLE_IV,
    mobilenet_v1,
    mobilenet_v2,
    resnet18,
    resnet20,
    resnet50,
    vgg16,
)
from tvm_mars.onnx_export import check_exact

WHOLE = dict(zip(TABLE_IV, (137, 144, 250, 442, 157, 101, 120), strict=True))


def counted(graph):
    """Give VGG16's twelve 3x3 layers with 64 or more inputs, with channels and pixels."""
    for layer in graph.layers:
        if isinstance(layer, Conv) and layer.requant and layer.terms[0].weight.shape[1] >= 64:
            channels, given = layer.terms[0].weight.shape[:2]
            kind = graph.types[layer.name]
            yield layer, (given, channels), kind.height * kind.width


def test_vgg16_has_table_ivs_group_sets():
    layers = list(counted(vgg16()))
    assert len(layers) == 12
    for layer, shape, _ in layers:
        blocks = np.count_nonzero(group_sets(layer.terms[0]), axis=(1, 2))
        assert blocks.sum() == WHOLE[shape]
        assert blocks.max() - blocks.min() <= 1


@pytest.mark.parametrize(
    ("bits", "accesses", "closed", "whole"), [(8, 2, 148_101, 150_288), (4, 1, 74_051, 75_144)]
)
def test_forward_check_of_compute_cycles(bits, accesses, closed, whole):
    """HARDWARE's cycles: at fractional counts, and with whole group-sets over four cores."""
    fractional = shared = 0.0
    for layer, shape, pixels in counted(vgg16(activation_bits=bits)):
        term = layer.terms[0]
        fractional += TABLE_IV[shape] * term.weight.size / 256 / 4 * pixels * accesses
        shared += -(-np.count_nonzero(group_sets(term)) // 4) * pixels * accesses
    assert round(fractional) == closed
    assert shared == whole


@pytest.mark.parametrize(
    ("graph", "macs"),
    [
        (vgg16(), 313.2e6),
        (vgg16(weight_bits=4, activation_bits=4), 313.2e6),
        (resnet18(), 555.4e6),
        (resnet18(size=224, classes=1000), 1814e6),
        (resnet50(0.05), 4089e6),
        (resnet20(), 40.8e6),
        (mobilenet_v1(), 175.6e6),
        (mobilenet_v1(size=224, classes=1000), 568.7e6),
        (mobilenet_v2(), 88.0e6),
        (mobilenet_v2(size=224, classes=1000), 300.8e6),
    ],
    ids=[
        "vgg16",
        "vgg16-w4a4",
        "resnet18",
        "resnet18-224",
        "resnet50",
        "resnet20",
        "mobilenet",
        "mobilenet-224",
        "mobilenet-v2",
        "mobilenet-v2-224",
    ],
)
def test_networks_have_their_size_and_export_exactly(graph, macs):
    assert graph.macs() == pytest.approx(macs, rel=0.002)
    check_exact(graph)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_density_is_met_in_every_layer(density):
    for layer in resnet20(density).layers[1:-2]:
        sets = group_sets(layer.terms[0])
        assert np.count_nonzero(sets) == round(density * sets.size)


@pytest.mark.parametrize(("weight_bits", "bits"), [(8, 8), (8, 4), (4, 8), (4, 4)])
def test_codes_stay_spread_to_the_last_layer(weight_bits, bits):
    graph = resnet20(weight_bits=weight_bits, activation_bits=bits)
    entry = graph.inputs[0]
    codes = entry.quantize.apply(np.random.default_rng(0).random((1, 3, 32, 32), np.float32))
    values = evaluate_values(graph, {"x0": codes})
    for layer in graph.layers[:-2]:
        codes = values[layer.name]
        top = 2**bits - 1
        assert 0.05 < np.mean(codes == 0) < 0.3, layer.name
        assert 0.01 < np.mean(codes == top) < 0.15, layer.name
        assert codes.std(axis=(0, 2, 3)).mean() > 0.2 * top, layer.name


def test_seeds_tell_networks_apart():
    assert resnet20(seed=1) == resnet20(seed=1)
    assert resnet20(seed=1) != resnet20(seed=2)
    graph = resnet20()
    assert evaluate(graph, random_inputs(graph, 0, images=1))[0].shape == (1, 10)
