"""The trained networks are what their records say."""

from __future__ import annotations

from importlib import resources

import numpy as np
import onnxruntime
import pytest

from python_tests.random_graphs import features, group_sets
from tvm_mars.graph import evaluate
from tvm_mars.onnx_export import to_onnx
from tvm_mars.zoo import digits_record, digits_split, load_digits


@pytest.fixture(scope="module")
def held_out():
    images, labels = digits_split()
    return images, labels, evaluate(load_digits(), {"x0": images})[0]


def test_digits_has_its_recorded_accuracy(held_out):
    images, labels, logits = held_out
    record = digits_record()
    assert (images.shape, images.dtype) == ((360, 1, 16, 16), np.float32)
    assert record["images"]["held out"] == len(labels) == 360
    accuracy = float((logits.argmax(1) == labels).mean())
    assert accuracy == pytest.approx(record["accuracy"]["held out"], abs=1e-5)
    assert accuracy >= 0.97


def test_digits_is_onnx_runtimes_to_the_last_bit(held_out):
    images, _, logits = held_out
    session = onnxruntime.InferenceSession(to_onnx(load_digits()).SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"x0": images})[0], logits)


def test_digits_is_pruned_by_group_sets():
    graph = load_digits()
    shares = digits_record()["zero group-sets"]
    for layer in graph.layers:
        if layer.name in shares:
            sets = group_sets(layer.terms[0])
            zero = 1 - np.count_nonzero(sets) / sets.size
            assert zero == pytest.approx(shares[layer.name], abs=1e-4)
            assert zero >= 0.6
    assert {"residual", "projection", "strided", "maxpool", "avgpool"} <= features(graph)


def test_digits_is_small_and_unpickled():
    file = resources.files("tvm_mars.zoo") / "digits.npz"
    with file.open("rb") as stream:
        codes = np.load(stream, allow_pickle=False)
        assert {array.dtype.kind for array in codes.values()} == {"i"}
    assert len(file.read_bytes()) < 300_000
