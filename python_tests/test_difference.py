"""`mars diff` finds injected faults where they are, and the operands that lead to either code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from mars_runtime import PRESETS, InputError
from mars_runtime.watch import watch
from python_tests.float_networks import float_network, images, quantize_static
from tvm_mars import difference, networks
from tvm_mars.cli import mars
from tvm_mars.compiler import NamedGraph, build, build_region
from tvm_mars.difference import (
    Comparison,
    Difference,
    Layers,
    Machine,
    OnnxRuntime,
    Reference,
    compare_engines,
)
from tvm_mars.graph import Conv, Graph, evaluate_layer, evaluate_values
from tvm_mars.onnx_export import to_onnx
from tvm_mars.report.difference_text import print_comparison

MARS = PRESETS["mars"]
COUNT = 3


def inputs_of(graph: Graph, seed: int = 0) -> dict[str, Any]:
    shape = (COUNT, *graph.inputs[0].shape)
    return {"x0": np.random.default_rng(seed).random(shape, np.float32)}


def compared(graph: Graph, other: Any, given: Mapping[str, Any] | None = None) -> Comparison:
    engines = {"reference": Reference([graph]), "other": other}
    return compare_engines(engines, [NamedGraph.of(graph)], given or inputs_of(graph))


def with_weight(graph: Graph, name: str, at: tuple[int, ...], value: int) -> Graph:
    """A graph with one weight of a layer's first term changed."""
    layers = []
    for layer in graph.layers:
        if layer.name == name:
            assert isinstance(layer, Conv)
            weight = layer.terms[0].weight.copy()
            weight[at] = value
            terms = (attrs.evolve(layer.terms[0], weight=weight), *layer.terms[1:])
            layer = attrs.evolve(layer, terms=terms)
        layers.append(layer)
    return attrs.evolve(graph, layers=layers)


def machine_of(graph: Graph) -> Machine:
    return Machine(build([NamedGraph.of(graph)], MARS), [graph])


def first_difference(a: Any, b: Any) -> tuple[int, int, int, int]:
    """Image, row, column, channel: pixel by pixel, without a sort."""
    images, channels, height, width = a.shape
    for image in range(images):
        for row in range(height):
            for column in range(width):
                for channel in range(channels):
                    if a[image, channel, row, column] != b[image, channel, row, column]:
                        return image, row, column, channel
    raise AssertionError("equal")


def place(found: Difference) -> tuple[int, int, int, int]:
    return found.image, found.row, found.column, found.channel


# -- the watched machine ---------------------------------------------------------------------------


@pytest.mark.parametrize("bank_bits", [2**19, 2**16])
def test_the_machine_shows_the_maps_it_writes(bank_bits: int) -> None:
    """Of whole maps in a bank, and of those that leave it tile by tile."""
    arch = attrs.evolve(MARS, bank_bits=bank_bits)
    graph = networks.vgg16(0.05, activation_bits=4)
    region = build_region(NamedGraph.of(graph), arch)
    codes = graph.inputs[0].quantize.apply(inputs_of(graph)["x0"])
    maps = watch(region, arch, graph.types, [codes])
    expected = evaluate_values(graph, {"x0": codes})
    fused = {layer.name.split("+")[0] for layer in region.layers if "+" in layer.name}
    assert set(maps) == set(expected) - fused - {"x0"}
    for name, codes in maps.items():
        assert np.array_equal(codes, expected[name]), name


# -- nothing to find -------------------------------------------------------------------------------


def test_equal_engines_do_not_differ() -> None:
    graph = networks.resnet20(0.2)
    found = compared(graph, machine_of(graph))
    assert not found.differences
    sizes = [int(np.prod(graph.types[layer.name].shape)) for layer in graph.layers]
    assert found.compared == {"other": COUNT * sum(sizes)}
    assert found.unseen == {"other": ()}


def test_the_exact_engine_is_watched_too() -> None:
    graph = networks.vgg16(0.05, activation_bits=4)
    assert not compared(graph, Layers([graph], MARS)).differences
    faulty = with_weight(graph, "conv3", (7, 1, 1, 1), 90)
    found = compared(graph, Layers([faulty], MARS)).differences["other"]
    assert (found.layer, found.channel) == ("conv3", 7)


def test_what_is_pooled_in_the_write_is_not_shown() -> None:
    graph = networks.vgg16(0.05)
    found = compared(graph, machine_of(graph))
    assert not found.differences
    assert found.unseen["other"] == ("conv1", "conv4", "conv8", "conv12", "conv16")


def test_wrong_calls_are_refused() -> None:
    graph = networks.resnet20(0.2)
    with pytest.raises(InputError, match="fewer than two"):
        compare_engines({"reference": Reference([graph])}, [NamedGraph.of(graph)], {})
    with pytest.raises(InputError, match="expected"):
        compared(graph, Reference([graph]), {"x0": np.zeros((1, 3, 32, 31), np.float32)})


# -- a weight of the program -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "at"), [("conv7", (5, 3, 0, 2)), ("conv14", (60, 17, 1, 1))])
def test_a_wrong_weight_of_the_program_is_found(name: str, at: tuple[int, ...]) -> None:
    graph = networks.resnet20(0.4)
    layer = next(one for one in graph.layers if one.name == name)
    assert isinstance(layer, Conv)
    right = int(layer.terms[0].weight[at])
    wrong = -100 if right > 0 else 100
    faulty = with_weight(graph, name, at, wrong)
    found = compared(graph, machine_of(faulty)).differences["other"]
    given = {"x0": graph.inputs[0].quantize.apply(inputs_of(graph)["x0"])}
    values, others = evaluate_values(graph, given), evaluate_values(faulty, given)
    assert found.layer == name
    assert found.channel == at[0]  # the only kernel that is wrong
    assert place(found) == first_difference(values[name], others[name])
    assert found.differing == int((values[name] != others[name]).sum())
    image, row, column, channel = place(found)
    assert found.codes == {
        "reference": values[name][image, channel, row, column],
        "other": others[name][image, channel, row, column],
    }
    # The operands: what they sum to, and what the wrong weight makes of it.
    (operands,) = found.operands
    assert operands.code == found.codes["reference"]
    window = operands.windows[0]
    assert window.weights is not None
    assert window.weights[at[1:]] == right
    sums = [one.total for one in operands.windows]
    total = operands.accumulator
    assert total == operands.bias + sum(sums)
    wrong_total = total + (int(window.codes[at[1:]]) * (wrong - right) << window.shift)
    for engine, acc in (("reference", total), ("other", wrong_total)):
        low, high = operands.reaching[engine]
        assert low <= acc <= high
        for edge in (low, high):
            assert exact_code(edge, operands) == found.codes[engine]
        if low > -(2**31):
            assert exact_code(low - 1, operands) != found.codes[engine]


def exact_code(acc: int, operands: difference.Operands) -> int:
    """Requantize by rationals."""
    exact = Fraction(acc * operands.divisor[0], operands.divisor[1])
    return int(min(max(round(exact) + operands.zero_point, operands.low), operands.high))


def test_a_fault_behind_a_pool_in_the_write_shows_both() -> None:
    graph = networks.vgg16(0.3)
    faulty = with_weight(graph, "conv1", (9, 2, 1, 1), 120)
    found = compared(graph, machine_of(faulty)).differences["other"]
    assert found.layer == "maxpool2"
    assert found.channel == 9
    pool, conv = found.operands
    assert (pool.layer, conv.layer) == ("maxpool2", "conv1")
    assert pool.windows[0].codes.shape == (1, 2, 2)
    assert pool.windows[0].codes.max() == pool.code == conv.code == found.codes["reference"]


# -- a wrong rounding ------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class HalvesDown(Reference):
    """The reference, but from one layer on it rounds halves down. (Eq. 5's are 7.5 and 127.5.)"""

    since: str = ""

    def maps(self, region: int, given: Any) -> Any:
        graph = self.graphs[region]
        values = {e.name: e.quantize.apply(given[e.name]).astype(np.int64) for e in graph.inputs}
        wrong = False
        for layer in graph.layers:
            wrong |= layer.name == self.since
            values[layer.name] = evaluate_layer(layer, graph.types, values)
            if wrong and isinstance(layer, Conv) and layer.requant is not None:
                acc = difference.accumulate(layer, graph.types, values)
                two = 2 * acc * layer.requant.multiplier[0]
                step = 2 << int(layer.requant.shift[0])
                down = -(((step >> 1) - two) // step)
                values[layer.name] = np.clip(down, 0, layer.requant.high)
        return values


def test_a_wrong_rounding_is_found_at_a_tie() -> None:
    graph = networks.resnet20(0.4, activation_bits=4, weight_bits=4)
    found = compared(graph, HalvesDown([graph], "conv5")).differences["other"]
    assert found.layer == "conv5"
    (operands,) = found.operands
    assert operands.tie
    assert (
        Fraction(operands.accumulator * operands.divisor[0], operands.divisor[1]).denominator == 2
    )
    assert found.codes["other"] == found.codes["reference"] - 1
    assert found.codes["reference"] % 2 == 0
    given = {"x0": graph.inputs[0].quantize.apply(inputs_of(graph)["x0"])}
    right = evaluate_values(graph, given)["conv5"]
    wrong = HalvesDown([graph], "conv5").maps(0, inputs_of(graph))["conv5"]
    assert place(found) == first_difference(right, wrong)


def test_an_average_pool_shows_its_sum() -> None:
    graph = networks.resnet20(0.3)

    class Off(Reference):
        def maps(self, region: int, given: Any) -> Any:
            values = dict(super().maps(region, given))
            values["avgpool19"] = values["avgpool19"] + (values["avgpool19"] == 7)
            values["avgpool19"][2, 11, 0, 0] ^= 1
            return values

    found = compared(graph, Off([graph])).differences["other"]
    assert found.layer == "avgpool19"
    (operands,) = found.operands
    assert operands.windows[0].codes.size == 64
    assert operands.windows[0].total == operands.accumulator
    assert exact_code(operands.accumulator, operands) == operands.code


# -- ONNX Runtime ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> Graph:
    return networks.resnet20(0.2)


@pytest.fixture(scope="module")
def folder(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its images, and a program with a wrong weight."""
    pytest.importorskip("tvm")
    pytest.importorskip("onnxruntime")
    made = tmp_path_factory.mktemp("diff")
    onnx.save(to_onnx(graph), made / "net.onnx")
    np.savez(made / "x.npz", **inputs_of(graph))
    at = tuple(np.argwhere(conv(graph, "conv3").terms[0].weight > 0)[0])
    (piece,) = partition_of(made / "net.onnx").pieces
    wrong = attrs.evolve(piece.graph, graph=with_weight(piece.graph.graph, "conv3", at, -128))
    build([wrong], MARS).save(made / "wrong.mars")
    return made


def partition_of(source: Path) -> Any:
    from tvm_mars.frontend import adapter
    from tvm_mars.options import CompileOptions

    ir = adapter()
    shape = {"x0": (1, 3, 32, 32)} if ir.IR == "Relay" else {}
    return ir.partition_of(ir.import_model(source, shape), CompileOptions())


def conv(graph: Graph, name: str) -> Conv:
    layer = next(one for one in graph.layers if one.name == name)
    assert isinstance(layer, Conv)
    return layer


def call(*args: object) -> Any:
    return CliRunner().invoke(mars, [str(arg) for arg in args])


def test_command_finds_no_difference(graph: Graph, folder: Path) -> None:
    result = call("diff", folder / "net.onnx", "--inputs", folder / "x.npz")
    assert result.exit_code == 0, result.stderr
    total = COUNT * sum(int(np.prod(graph.types[layer.name].shape)) for layer in graph.layers)
    assert result.stdout.splitlines() == [
        f"reference, {name}: no difference in {total:,} codes of {COUNT} images"
        for name in ("onnxruntime", "machine", "layers")
    ]


def test_command_finds_the_wrong_weight(graph: Graph, folder: Path) -> None:
    at = tuple(int(i) for i in np.argwhere(conv(graph, "conv3").terms[0].weight > 0)[0])
    args = ("diff", folder / "net.onnx", "-i", folder / "x.npz", "--program", folder / "wrong.mars")
    result = call(*args, "--engines", "onnxruntime,machine")
    assert result.exit_code == 1
    text = result.stdout
    assert "onnxruntime, machine: conv3 (conv3_term0) is the first layer that differs" in text
    assert f"channel {at[0]}: onnxruntime " in text
    assert "onnxruntime gives what these integers give" in text
    assert "machine's code results from sums" in text
    assert max(map(len, text.splitlines())) <= 80
    data = json.loads(call(*args, "--json").stdout)
    found = data["differences"]["machine"]
    assert (found["layer"], found["operators"]) == ("conv3", ["conv3_term0"])
    weights = np.asarray(found["operands"][0]["windows"][0]["weights"])
    assert np.array_equal(weights, conv(graph, "conv3").terms[0].weight[at[0]])
    assert "onnxruntime" not in data["differences"]


def test_command_ends_as_diff_does(folder: Path, tmp_path: Path) -> None:
    missing = call("diff", "no.onnx", "-i", folder / "x.npz")
    assert (missing.exit_code, missing.stderr) == (2, "error: no.onnx: no such file\n")
    np.savez(tmp_path / "y.npz", y=np.zeros((1, 3, 32, 32), np.float32))
    unknown = call("diff", folder / "net.onnx", "-i", tmp_path / "y.npz")
    assert unknown.exit_code == 2
    assert "did you mean x0?" in unknown.stderr
    engines = call("diff", folder / "net.onnx", "-i", folder / "x.npz", "--engines", "tvm,machine")
    assert engines.exit_code == 2
    assert "no engine 'tvm'" in engines.stderr
    other = build([NamedGraph.of(networks.vgg16(0.05))], MARS)
    other.save(tmp_path / "other.mars")
    foreign = call(
        "diff", folder / "net.onnx", "-i", folder / "x.npz", "--program", tmp_path / "other.mars"
    )
    assert foreign.exit_code == 2
    assert "of another network" in foreign.stderr


def test_a_fault_of_the_model_is_found_in_onnx_runtime(graph: Graph, folder: Path) -> None:
    """The bias of one channel of one convolution of the file, made larger."""
    partition = partition_of(folder / "net.onnx")
    model = onnx.load(folder / "net.onnx")
    for entry in model.graph.initializer:
        if entry.name == "conv6_bias_codes":
            bias = onnx.numpy_helper.to_array(entry).copy()
            bias[4] += 2**10
            entry.CopyFrom(onnx.numpy_helper.from_array(bias, entry.name))
            break
    else:
        raise AssertionError([entry.name for entry in model.graph.initializer][:20])
    named = [piece.graph for piece in partition.pieces]
    operators = [piece.operators for piece in partition.pieces]
    inputs = inputs_of(graph)
    engines = {
        "reference": Reference([graph]),
        "onnxruntime": OnnxRuntime(model, named, operators, inputs),
    }
    found = compare_engines(engines, named, inputs, operators=operators)
    one = found.differences["onnxruntime"]
    assert (one.layer, one.channel, one.operators) == ("conv6", 4, ("conv6_term0", "conv6_sum1"))
    (operands,) = one.operands
    low, high = operands.reaching["onnxruntime"]
    assert low <= operands.accumulator + 2**10 <= high


@pytest.mark.parametrize("signed", [False, True])
def test_a_network_quantized_elsewhere_strays_by_one(signed: bool, tmp_path: Path) -> None:
    """Each layer is seen in ONNX Runtime; the first to differ does so by one code."""
    pytest.importorskip("tvm")
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import QuantType

    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    model = quantize_static(
        float_network("residual"), tmp_path, activation_type=kind, weight_type=QuantType.QInt8
    )
    onnx.save(model, tmp_path / "net.onnx")
    name = model.graph.input[0].name
    np.savez(tmp_path / "x.npz", **{name: images(4, 0)})
    result = call("diff", tmp_path / "net.onnx", "-i", tmp_path / "x.npz", "--json")
    assert result.exit_code in (0, 1), result.stderr
    data = json.loads(result.stdout)
    assert "machine" not in data["differences"]
    assert len(data["unseen"]["onnxruntime"]) <= 1, data["unseen"]
    assert data["compared"]["onnxruntime"] > 0.9 * data["compared"]["machine"] > 10**4
    for one in data["differences"].values():
        assert abs(one["codes"]["reference"] - one["codes"]["onnxruntime"]) == 1
        # A tie within float32, or a multiplier that is cut: the sum is right at the border.
        low, high = one["operands"][0]["reaching"]["onnxruntime"]
        total = one["operands"][0]["accumulator"]
        assert min(abs(low - total), abs(high - total)) <= 2


def test_text_of_every_kind_of_layer(tmp_path: Path) -> None:
    """Additions and pools, and 80 columns."""
    import io

    graph = networks.mobilenet_v2(0.3)

    class Off(Reference):
        layer = ""

        def maps(self, region: int, given: Any) -> Any:
            values = dict(super().maps(region, given))
            values[self.layer] = values[self.layer] ^ 1
            return values

    kinds = set()
    for layer in graph.layers:
        if layer.kind + str(isinstance(layer, Conv) and layer.residual is not None) in kinds:
            continue
        kinds.add(layer.kind + str(isinstance(layer, Conv) and layer.residual is not None))
        Off.layer = layer.name
        file = io.StringIO()
        print_comparison(compared(graph, Off([graph])), file)
        text = file.getvalue()
        assert f"The integers of {layer.name}, a {layer.kind}:" in text
        assert max(map(len, text.splitlines())) <= 80
    assert {"convTrue", "convFalse", "avgpoolFalse"} <= kinds
