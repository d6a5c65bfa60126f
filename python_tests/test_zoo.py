"""The trained networks are what their records say, and can be had without PyTorch or TVM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from mars_runtime.errors import InputError, OptionError
from python_tests.random_graphs import features, group_sets
from tvm_mars import zoo
from tvm_mars.datasets import Dataset, generated_images
from tvm_mars.graph import Conv, evaluate
from tvm_mars.graph_file import graph_from_bytes, graph_to_bytes
from tvm_mars.onnx_export import check_exact, to_onnx
from tvm_mars.report import compression
from tvm_mars.verification import compare, mars_engine, onnxruntime_engine, reference_engine
from tvm_mars.zoo.entries import FOLDER

NAMES = zoo.names()
CIFAR10 = sorted(set(NAMES) - {"digits"})


@pytest.fixture(scope="module")
def held_out():
    images, labels = zoo.digits_split()
    return images, labels, evaluate(zoo.load_digits(), {"x0": images})[0]


def test_digits_has_its_recorded_accuracy(held_out):
    images, labels, logits = held_out
    record = zoo.record("digits")
    assert (images.shape, images.dtype) == ((360, 1, 16, 16), np.float32)
    assert record.images["test"] == len(labels) == 360
    accuracy = float((logits.argmax(1) == labels).mean())
    assert accuracy == pytest.approx(record.accuracy, abs=1e-9)
    assert accuracy >= 0.97


def test_digits_is_onnx_runtimes_to_the_last_bit(held_out):
    images, _, logits = held_out
    session = onnxruntime.InferenceSession(to_onnx(zoo.load_digits()).SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"x0": images})[0], logits)


def test_digits_is_pruned_by_group_sets():
    graph = zoo.load_digits()
    pruned = [layer for layer in graph.layers if isinstance(layer, Conv)][1:-1]
    for layer in pruned:
        sets = group_sets(layer.terms[0])
        zero = 1 - np.count_nonzero(sets) / sets.size
        assert zero == pytest.approx(zoo.record("digits").recipe["sparsity"], abs=0.01)
    assert len(pruned) == 5
    assert {"residual", "projection", "strided", "maxpool", "avgpool"} <= features(graph)


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_small_and_unpickled(name):
    path = FOLDER / f"{name}.npz"
    with np.load(path, allow_pickle=False) as codes:
        assert {codes[key].dtype.kind for key in codes.files} <= {"i", "u"}
    assert path.stat().st_size == zoo.size(name) < 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_records_tell_of_whole_verified_runs(name):
    record = zoo.record(name)
    assert 0 < record.accuracy <= 1 and 0 < record.dense_accuracy <= 1
    verified = record.verified
    assert verified["images"] == record.images["test"]
    assert {"ONNX Runtime", "MARS"} <= set(verified["differing codes"])
    assert set(verified["differing codes"].values()) == {0}
    assert set(verified["accuracy"].values()) == {record.accuracy}


@pytest.mark.parametrize("name", CIFAR10)
def test_cifar10_entries_are_what_their_recipes_say(name):
    record, graph = zoo.record(name), zoo.load(name)
    assert name == record.recipe["name"] and record.images == {"train": 50_000, "test": 10_000}
    assert len(record.history) == record.epochs and len(record.dense_history) == record.dense_epochs
    assert record.history[-1]["test accuracy"] == record.accuracy
    assert record.dense_history[-1]["test accuracy"] == record.dense_accuracy
    assert record.verified["images"] == 10_000
    check_exact(graph)
    wanted = record.recipe["pruning"]["sparsity"]
    assert record.history[-1]["zero group-sets"] == pytest.approx(wanted, abs=1e-3)
    # Pruned are all layers but the first and the last; rounding may add zeros, never take one.
    layers = compression(graph).layers[1:-1]
    dense = sum(layer.dense_group_sets for layer in layers)
    zero = 1 - sum(layer.group_sets for layer in layers) / dense
    assert zero >= wanted - 1e-3


@pytest.mark.parametrize("name", CIFAR10)
def test_cifar10_entries_give_equal_codes_on_generated_images(name):
    graph = zoo.load(name)
    images = generated_images(2, graph.inputs[0].type.shape)
    engines = {
        "reference": reference_engine(graph),
        "ONNX Runtime": onnxruntime_engine(graph),
        "MARS": mars_engine(graph),
    }
    found = compare(engines, images, graph.outputs[0].value)
    assert found.agree and found.codes > 100_000


def test_a_network_that_differs_is_seen():
    graph = zoo.load_digits()
    images = zoo.digits_dataset()[1].first(4)
    other = zoo.load_digits()
    bias = other.layers[2].bias
    bias.flags.writeable = True
    bias[5] += 4096
    engines = {"ONNX Runtime": onnxruntime_engine(graph), "MARS": mars_engine(other)}
    found = compare(engines, images, graph.outputs[0].value, batch=3)
    assert not found.agree
    assert not found.differing["ONNX Runtime"]
    assert "conv2" in found.differing["MARS"] and "conv0" not in found.differing["MARS"]


def test_graph_files_give_the_same_graph_and_bytes():
    graph = zoo.load_digits()
    data = graph_to_bytes(graph)
    again = graph_from_bytes(data, "again")
    assert again == graph and graph_to_bytes(again) == data


@pytest.mark.parametrize("damage", ["empty", "cut", "no structure", "other weights", "pickle"])
def test_damaged_graph_files_are_refused(damage, tmp_path):
    data = graph_to_bytes(zoo.load_digits())
    path = tmp_path / "network.npz"
    with np.load(FOLDER / "digits.npz") as file:
        arrays = dict(file)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "no structure":
        np.savez(path, **{key: value for key, value in arrays.items() if key != "structure"})
    elif damage == "other weights":
        np.savez(path, **{**arrays, "array0": np.zeros((3, 3), np.int8)})
    else:
        np.savez(path, **{**arrays, "array0": np.array([{}], object)})
    with pytest.raises(InputError, match="holds no network"):
        graph_from_bytes(path.read_bytes(), "network.npz")


def test_unknown_names_are_errors_that_name_the_nearest():
    with pytest.raises(OptionError, match="known: digits"):
        zoo.load("digit")


_EXPORT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tvm", "torchao"):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Refuse())
from tvm_mars.cli import main
sys.exit(main(["zoo", "export", sys.argv[1], "-o", sys.argv[2]]))
"""


@pytest.mark.parametrize("name", NAMES)
def test_export_needs_neither_torch_nor_tvm(name, tmp_path):
    path = tmp_path / "net.onnx"
    command = [sys.executable, "-c", _EXPORT, name, str(path)]
    subprocess.run(command, check=True, env=os.environ)
    assert onnx.load(path) == to_onnx(zoo.load(name))


# -- the command -----------------------------------------------------------------------------------


def mars(*arguments):
    command = [sys.executable, "-c", "import sys; from tvm_mars.cli import main; sys.exit(main())"]
    return subprocess.run(
        [*command, "zoo", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_lists_and_describes():
    listed = mars("list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in NAMES)
    assert max(map(len, listed.stdout.splitlines())) <= 80
    rows = json.loads(mars("list", "--json").stdout)
    assert [row["name"] for row in rows] == NAMES
    told = mars("info", "digits")
    assert "99.17%" in told.stdout and "conv6" in told.stdout


def test_the_command_evaluates():
    result = mars("eval", "digits", "--images", "40", "--json")
    found = json.loads(result.stdout)
    assert result.returncode == 0 and found["images"] == 40
    assert found["differing"] == {"ONNX Runtime": {}, "MARS": {}}
    assert found["right"]["MARS"] == found["right"]["ONNX Runtime"] >= 38


def test_the_command_evaluates_given_images(tmp_path):
    images, labels = zoo.digits_dataset()[1].first(8), np.zeros(8, np.uint8)
    path = tmp_path / "images.npz"
    pixels = images.pixels
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    assert "8 images" in mars("eval", "digits", "--data", str(path)).stdout
    wrong = generated_images(4, (3, 8, 8)).pixels
    np.savez(path, x_train=wrong, y_train=labels[:4], x_test=wrong, y_test=labels[:4])
    refused = mars("eval", "digits", "--data", str(path))
    assert refused.returncode == 1 and "(3, 8, 8)" in refused.stderr


@pytest.mark.parametrize("name", CIFAR10[:1])
def test_cifar10_networks_need_images(name):
    refused = mars("eval", name)
    assert refused.returncode == 2 and "--data" in refused.stderr


def test_generated_images_differ_and_repeat():
    images = generated_images(3, (3, 32, 32))
    assert isinstance(images, Dataset) and images.pixels.shape == (3, 3, 32, 32)
    assert images.pixels.std() > 30
    assert not np.array_equal(images.pixels[0], images.pixels[1])
    np.testing.assert_array_equal(images.pixels, generated_images(3, (3, 32, 32)).pixels)
