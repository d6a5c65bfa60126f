"""Orders of channels: the same codes, no more group-sets, and what was shuffled is found again."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from mars_runtime import PRESETS, Program, run, simulate
from mars_runtime.errors import OptionError, ProgramError
from mars_runtime.program import ChannelOrder
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.hostile import VALUES
from python_tests.random_graphs import features, random_graph, random_inputs
from python_tests.small_networks import (
    every_kind_of_layer,
    open_program,
    seal_program,
    small_program,
)
from tvm_mars import networks
from tvm_mars.channel_order import Orders, found_orders, permutable, reordered
from tvm_mars.compiler import NamedGraph, build, build_region, pack, with_channel_order
from tvm_mars.difference import Machine, Reference, compare_engines
from tvm_mars.graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    Input,
    Layer,
    MapType,
    Operand,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate,
)
from tvm_mars.options import CompileOptions
from tvm_mars.report import profile_program
from tvm_mars.report.text import print_profile

MARS = PRESETS["mars"]
EQ5 = Requant.eq5(8, 11)


def shuffled(graph: Graph, seed: int = 0) -> Graph:
    """A graph whose maps have random orders of channels, as far as they may."""
    rng = np.random.default_rng(seed)
    orders: dict[str, Any] = {}
    for values in permutable(graph):
        order = rng.permutation(graph.types[values[0]].channels)
        orders.update(dict.fromkeys(values, order))
    return reordered(graph, orders)


def packed(graph: Graph, arch: Any = MARS) -> NamedGraph:
    return with_channel_order(NamedGraph.of(graph), arch, "packed")


def stored(graph: Graph) -> int:
    return sum(layer.group_sets for layer in pack(graph, MARS).values())


def cycles(graph: Graph) -> int:
    region = build_region(NamedGraph.of(graph), MARS, with_weights=False)
    return simulate(region, MARS).cycles


def network(layers: Sequence[Layer], channels: int, outputs: Sequence[str], size: int = 6) -> Graph:
    kind = MapType(channels, size, size, 8)
    entry = Input("x0", kind, kind.shape, Quantize("uint8"))
    whole = Graph([entry], layers, [Output("x0", kind.shape, Dequantize("uint8"))])
    leaving = [Output(name, whole.types[name].shape, Dequantize("uint8")) for name in outputs]
    return attrs.evolve(whole, outputs=leaving)


def conv(name: str, source: str, weight: Any, **more: Any) -> Conv:
    pad = weight.shape[2] // 2
    more.setdefault("groups", 1)
    term = ConvTerm(source, weight, padding=(pad, pad, pad, pad), groups=more.pop("groups"))
    return Conv(name, [term], np.arange(len(weight)), EQ5, **more)


def weights(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).integers(-3, 4, shape)


# -- the same codes --------------------------------------------------------------------------------


def test_every_order_gives_the_same_codes(first_seed: int) -> None:
    """By the reference and on the machine: a random order, and the one that is found for that."""
    seen: set[str] = set()
    moved = 0
    for seed in range(first_seed, first_seed + 60):
        graph = random_graph(seed)
        if not permutable(graph):
            continue
        inputs = random_inputs(graph, seed)
        expected = evaluate(graph, inputs)
        other = shuffled(graph, seed)
        found = packed(other)
        assert stored(found.graph) <= stored(other)
        assert cycles(found.graph) <= cycles(other)
        for one in (other, found.graph):
            for result, codes in zip(evaluate(one, inputs), expected, strict=True):
                np.testing.assert_array_equal(result, codes, str(seed))
            program = build([NamedGraph.of(one)], MARS)
            results = run(program, inputs, engine="machine").values()
            for result, codes in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, codes, str(seed))
        moved += bool(found.orders)
        seen |= features(graph)
    wanted = {"depthwise", "residual", "projection", "maxpool", "avgpool", "flattened"}
    wanted |= {"per-channel", "odd-channels", "multi-input", "multi-output", "zero-point", "add"}
    assert wanted <= seen
    assert moved >= 10


def test_orders_are_of_the_models_channels() -> None:
    graph = shuffled(networks.resnet20(0.3))
    found = packed(graph)
    orders = {one.layer: np.array(one.channels) for one in found.orders}
    assert orders
    assert reordered(graph, orders) == found.graph
    layer, before = found.graph.layers[9], graph.layers[9]
    assert isinstance(layer, Conv) and isinstance(before, Conv)
    np.testing.assert_array_equal(layer.bias, before.bias[orders["conv9"]])


# -- what is tied ----------------------------------------------------------------------------------

FIRST = conv("conv0", "x0", weights(24, 8, 1, 1))
LAST = weights(10, 24, 1, 1)

TIED: dict[str, tuple[Sequence[Layer], Sequence[str], set[tuple[str, ...]]]] = {
    "chain": ([FIRST, conv("conv1", "conv0", LAST)], ["conv1"], {("conv0",)}),
    "residual": (
        [
            FIRST,
            conv("conv1", "conv0", weights(24, 24, 3, 3), residual=Residual("conv0", 1)),
            conv("conv2", "conv1", LAST),
        ],
        ["conv2"],
        {("conv0", "conv1")},
    ),
    "projection": (
        [
            FIRST,
            conv("conv1", "conv0", weights(32, 24, 1, 1)),
            Conv(
                "conv2",
                [
                    ConvTerm("conv1", weights(24, 32, 1, 1)),
                    ConvTerm("conv0", weights(24, 24, 1, 1)),
                ],
                np.arange(24),
                EQ5,
            ),
            conv("conv3", "conv2", LAST),
        ],
        ["conv3"],
        {("conv0",), ("conv1",), ("conv2",)},
    ),
    "max pool": (
        [FIRST, Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)), conv("conv2", "maxpool1", LAST)],
        ["conv2"],
        {("conv0", "maxpool1")},
    ),
    "average pool": (
        [
            FIRST,
            Pool("avgpool1", "avg", "conv0", (6, 6), (1, 1), requant=Requant.eq5(8, 8)),
            conv("conv2", "avgpool1", LAST),
        ],
        ["conv2"],
        {("conv0", "avgpool1")},
    ),
    "addition": (
        [
            FIRST,
            conv("conv1", "x0", weights(24, 8, 1, 1, seed=1)),
            Add("add2", [Operand("conv0", 3), Operand("conv1", -2)], Requant.eq5(8, 9)),
            conv("conv3", "add2", LAST),
        ],
        ["conv3"],
        {("conv0", "conv1", "add2")},
    ),
    "dense after flatten": (
        [FIRST, Conv("conv1", [ConvTerm("conv0", weights(10, 24, 6, 6))], np.arange(10), EQ5)],
        ["conv1"],
        {("conv0",)},
    ),
    "depthwise": (
        [
            FIRST,
            conv("conv1", "conv0", weights(24, 1, 3, 3), groups=24),
            conv("conv2", "conv1", LAST),
        ],
        ["conv2"],
        {("conv0", "conv1")},
    ),
    "depthwise, two kernels a channel": (
        [
            FIRST,
            conv("conv1", "conv0", weights(48, 1, 3, 3), groups=24),
            conv("conv2", "conv1", weights(10, 48, 1, 1)),
        ],
        ["conv2"],
        set(),
    ),
    "grouped": (
        [
            FIRST,
            conv("conv1", "conv0", weights(24, 12, 3, 3), groups=2),
            conv("conv2", "conv1", weights(24, 24, 1, 1)),
            conv("conv3", "conv2", LAST),
        ],
        ["conv3"],
        {("conv2",)},
    ),
    "several readers": (
        [
            FIRST,
            conv("conv1", "conv0", weights(24, 24, 3, 3)),
            conv("conv2", "conv0", weights(24, 24, 1, 1), residual=Residual("conv1", 2)),
            conv("conv3", "conv2", LAST),
        ],
        ["conv3"],
        {("conv0",), ("conv1", "conv2")},
    ),
    "an output that is read": (
        [FIRST, conv("conv1", "conv0", weights(24, 24, 3, 3)), conv("conv2", "conv1", LAST)],
        ["conv2", "conv0"],
        {("conv1",)},
    ),
    "added to the input": (
        [
            conv("conv0", "x0", weights(8, 8, 3, 3), residual=Residual("x0", 1)),
            conv("conv1", "conv0", weights(10, 8, 1, 1)),
        ],
        ["conv1"],
        set(),
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_maps_that_are_tied_have_one_order(case: str) -> None:
    layers, outputs, expected = TIED[case]
    graph = network(layers, 8, outputs)
    assert set(permutable(graph)) == expected
    inputs = random_inputs(graph, 1)
    other = shuffled(graph, 5)
    assert (other != graph) == bool(expected)
    for result, codes in zip(evaluate(other, inputs), evaluate(graph, inputs), strict=True):
        np.testing.assert_array_equal(result, codes)


@pytest.mark.parametrize("case", ["residual", "depthwise", "average pool", "addition"])
def test_maps_in_different_orders_give_other_codes(case: str) -> None:
    """What the classes are for: each tied map, permuted alone, changes the result."""
    layers, outputs, ((*values,),) = TIED[case]
    graph = network(layers, 8, outputs)
    inputs = random_inputs(graph, 1)
    for name in values:
        alone = reordered(graph, {name: np.arange(24)[::-1]})
        same = [
            np.array_equal(a, b)
            for a, b in zip(evaluate(alone, inputs), evaluate(graph, inputs), strict=True)
        ]
        assert not all(same)


# -- fewer group-sets ------------------------------------------------------------------------------


def test_zero_kernels_are_gathered_by_hand() -> None:
    """Every second of 64 channels is written by zeros and read by zeros: half the blocks go."""
    first, second = weights(64, 16, 3, 3), weights(16, 64, 3, 3)
    first[first == 0] = second[second == 0] = 1
    first[::2] = 0
    second[:, ::2] = 0
    graph = network([conv("conv0", "x0", first), conv("conv1", "conv0", second)], 16, ["conv1"])
    assert stored(graph) == 4 * 9 + 4 * 9
    found = packed(graph)
    assert stored(found.graph) == 2 * 9 + 2 * 9
    (order,) = found.orders
    assert order.layer == "conv0"
    parities = [{channel % 2 for channel in order.channels[at : at + 16]} for at in (0, 16, 32, 48)]
    assert sorted(map(min, parities)) == sorted(map(max, parities)) == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "resnet18", "mobilenet_v1", "mobilenet_v2"])
def test_shuffled_networks_are_found_back(name: str) -> None:
    make = getattr(networks, name)
    graph = make() if name == "vgg16" else make(0.1)
    other = shuffled(graph)
    found = packed(other).graph
    assert stored(other) > 1.5 * stored(graph)
    assert stored(found) <= 1.02 * stored(graph)
    assert cycles(found) <= 1.02 * cycles(graph)


def sparse(seed: int, outputs: int, channels: int) -> Graph:
    """One class between two layers, whose kernels and inputs are of very different density."""
    rng = np.random.default_rng(seed)
    first, second = weights(outputs, channels, 3, 3), weights(48, outputs, 1, 1)
    share = rng.random(outputs) ** 3
    for weight, axis in ((first, 0), (second, 1)):
        shape = [1, 1, 1, 1]
        shape[axis] = outputs
        weight[rng.random(weight.shape) > 0.2 * share.reshape(shape)] = 0
    layers = [conv("conv0", "x0", first), conv("conv1", "conv0", second)]
    return network(layers, channels, ["conv1"])


def test_no_exchange_of_two_channels_stores_less() -> None:
    """Of what is found, over all exchanges, counted by the packing of the whole graph."""
    gained = 0
    for seed in range(4):
        graph = sparse(seed, 40, 32)
        for orders in found_orders(graph, MARS):
            best = _cost(reordered(graph, orders))
            gained += best < _cost(graph)
            for one in range(40):
                for other in range(one):
                    order = np.array(orders["conv0"])
                    order[[one, other]] = order[[other, one]]
                    assert _cost(reordered(graph, {"conv0": order})) >= best
    assert gained >= 3


def _cost(graph: Graph) -> int:
    """Core cycles of all cores: two accesses for each pixel, and 64 cycles of filling."""
    return stored(graph) * (6 * 6 * 2 + 64)


def test_fewer_group_sets_on_a_busier_core_are_not_taken() -> None:
    """64 kernels for four cores: 12 of each block read eight input blocks, four one other each.

    Gathered, the odd ones are a block of 16 group-sets: 40 instead of 48, but a busier core.
    """
    first = np.zeros((64, 384, 1, 1), np.int64)
    odd = np.flatnonzero(np.arange(64) % 16 >= 12)
    first[:, :128] = 1
    first[odd, :128] = 0
    for number, kernel in enumerate(odd):
        first[kernel, 128 + 16 * number] = 1
    second = np.ones((16, 64, 1, 1), np.int64)
    layers = [conv("conv0", "x0", first), conv("conv1", "conv0", second)]
    graph = network(layers, 384, ["conv1"], size=16)
    gathered = np.concatenate([np.setdiff1d(np.arange(64), odd), odd])
    trap = reordered(graph, {"conv0": gathered})
    assert stored(graph) == 48 + 4 and stored(trap) == 40 + 4
    assert cycles(trap) > 1.1 * cycles(graph)
    assert cycles(packed(graph).graph) <= cycles(graph)


def test_nothing_to_gain_gives_the_graph_itself() -> None:
    named = NamedGraph.of(networks.resnet20(0.3))
    assert with_channel_order(named, MARS, "packed") is named
    assert with_channel_order(named, MARS, "given") is named
    given, asked = (build([named], MARS, channel_order=order) for order in ("given", "packed"))
    assert given.to_bytes() == asked.to_bytes()
    graph = shuffled(networks.resnet20(0.3))
    assert found_orders(graph, PRESETS["mars-dense"]) == ()
    assert found_orders(network([FIRST], 8, ["conv0"]), MARS) == ()
    assert packed(graph) == packed(graph) != NamedGraph.of(graph)


# -- programs --------------------------------------------------------------------------------------


def test_programs_carry_their_orders() -> None:
    graph = shuffled(networks.resnet20(0.3))
    program = build([NamedGraph.of(graph)], MARS, channel_order="packed")
    (region,) = program.regions
    assert {one.layer for one in region.orders} <= {layer.name for layer in graph.layers}
    assert Program.from_bytes(program.to_bytes()) == program
    assert b"orders" not in small_program().to_bytes()
    inputs = random_inputs(graph, 0, images=1)
    for engine in ("machine", "layers"):
        (result,) = run(program, inputs, engine=engine).values()
        np.testing.assert_array_equal(result, evaluate(graph, inputs)[0])


@pytest.mark.parametrize("channels", [(0, 0), (1, 2), (-1, 0)])
def test_an_order_that_is_none_is_refused(channels: tuple[int, ...]) -> None:
    program = small_program()
    region = attrs.evolve(program.regions[0], orders=(ChannelOrder("conv0", channels),))
    data = attrs.evolve(program, regions=(region,)).to_bytes()
    with pytest.raises(ProgramError, match="order of 'conv0' is not one of its channels"):
        Program.from_bytes(data)


@pytest.mark.parametrize(("key", "size"), [("layer", 300), ("channels", 300), ("orders", 300)])
def test_hostile_orders_end_in_a_typed_error(key: str, size: int) -> None:
    program = build([NamedGraph.of(shuffled(networks.resnet20(0.3)))], MARS, channel_order="packed")
    index, rest = open_program(program.to_bytes())
    orders = index["regions"][0]["orders"]
    rng = np.random.default_rng(size)
    refusals = 0
    for number in range(size):
        value = VALUES[int(rng.integers(len(VALUES)))]
        changed: Any = [dict(one, channels=list(one["channels"])) for one in orders]
        place = int(rng.integers(len(orders)))
        if key == "orders":
            changed = value if number % 2 else [*changed, value]
        elif key == "channels" and number % 2:
            changed[place][key][int(rng.integers(8))] = value
        else:
            changed[place][key] = value
        index["regions"][0]["orders"] = changed
        try:
            Program.from_bytes(seal_program(index, rest))
        except ProgramError:
            refusals += 1
    assert refusals > size // 2


# -- comparing with the model ----------------------------------------------------------------------


def test_maps_are_compared_in_the_models_order() -> None:
    graph = shuffled(networks.resnet20(0.3))
    given = random_inputs(graph, 0)
    named = NamedGraph.of(graph)
    program = build([named], MARS, channel_order="packed")
    assert program.regions[0].orders

    def against(made: Program) -> Any:
        engines = {"reference": Reference([graph]), "machine": Machine(made, [graph])}
        return compare_engines(engines, [named], given)

    found = against(program)
    assert not found.differences and found.unseen["machine"] == ()
    # Without the orders, the same maps are those of other channels.
    bare = attrs.evolve(program, regions=(attrs.evolve(program.regions[0], orders=()),))
    assert against(bare).differences
    order = ChannelOrder("conv1", (1, 0))
    short = attrs.evolve(program, regions=(attrs.evolve(program.regions[0], orders=(order,)),))
    with pytest.raises(ProgramError, match="order of 'conv1' does not fit"):
        against(short)


def test_a_wrong_weight_of_a_reordered_program_is_found_at_the_models_channel() -> None:
    graph = shuffled(networks.resnet20(0.3))
    layer = next(one for one in graph.layers if one.name == "conv9")
    assert isinstance(layer, Conv)
    kernel, source, row, column = map(int, np.argwhere(layer.terms[0].weight > 0)[-7])
    weight = layer.terms[0].weight.copy()
    weight[kernel, source, row, column] = -128
    wrong = attrs.evolve(layer, terms=[attrs.evolve(layer.terms[0], weight=weight)])
    faulty = attrs.evolve(
        graph, layers=[wrong if one.name == "conv9" else one for one in graph.layers]
    )
    program = build([NamedGraph.of(faulty)], MARS, channel_order="packed")
    places = {one.layer: one.channels.index(kernel) for one in program.regions[0].orders}
    assert places["conv9"] != kernel
    engines = {"reference": Reference([graph]), "machine": Machine(program, [graph])}
    given = random_inputs(graph, 0)
    found = compare_engines(engines, [NamedGraph.of(graph)], given).differences["machine"]
    assert (found.layer, found.channel) == ("conv9", kernel)


# -- reports ---------------------------------------------------------------------------------------


def test_profiles_say_that_channels_are_reordered() -> None:
    graph = shuffled(networks.resnet20(0.3))
    for order in ("given", "packed"):
        program = build([NamedGraph.of(graph)], MARS, channel_order=order)
        profile = profile_program(program)
        assert profile.to_dict()["reordered"] == len(program.regions[0].orders)
        file = io.StringIO()
        print_profile(profile, file)
        said = f"channels of {profile.reordered} maps are in another order than the model's"
        assert (said in file.getvalue()) == (order == "packed")


def test_pages_say_that_channels_are_reordered() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("vl_convert")
    from tvm_mars.report.page import report_page

    graph = shuffled(networks.resnet20(0.3))
    for order in ("given", "packed"):
        program = build([NamedGraph.of(graph)], MARS, channel_order=order)
        page = report_page(program, "net", baseline=False)
        said = f'<data value="{len(program.regions[0].orders)}">'
        assert ("which is not the model's in\n" + said in page) == (order == "packed")


# -- options ---------------------------------------------------------------------------------------


def test_the_option_is_checked() -> None:
    assert CompileOptions().channel_order == "given"
    options = CompileOptions.from_mapping({"channel_order": "packed"})
    assert CompileOptions.from_json(options.to_json()) == options
    with pytest.raises(OptionError, match="'pakced' is not given or packed"):
        CompileOptions(channel_order="pakced")
    with pytest.raises(OptionError, match="'packt' is not given or packed"):
        build([NamedGraph.of(every_kind_of_layer())], MARS, channel_order="packt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose channels were shuffled, as a file."""
    pytest.importorskip("tvm")
    onnx = pytest.importorskip("onnx")
    from tvm_mars.onnx_export import to_onnx

    path = tmp_path_factory.mktemp("permute") / "net.onnx"
    onnx.save(to_onnx(shuffled(networks.resnet20(0.3))), path)
    return path


SHAPE = {"x0": (1, 3, 32, 32)}  # TVM with Relay compiles for one batch


def test_every_compilation_takes_it(model: Path) -> None:
    import tvm_mars

    expected = build(
        [NamedGraph.of(shuffled(networks.resnet20(0.3)))], MARS, channel_order="packed"
    )
    compiled = tvm_mars.compile(model, shape=SHAPE, channel_order="packed")
    assert compiled.program is not None
    assert compiled.program.regions[0].code == expected.regions[0].code
    assert compiled.program.regions[0].image == expected.regions[0].image
    inputs = random_inputs(shuffled(networks.resnet20(0.3)), 0, images=1)
    given = tvm_mars.compile(model, shape=SHAPE)
    for name, result in given.run(inputs).items():
        np.testing.assert_array_equal(compiled.run(inputs)[name], result)


def test_the_relax_pipeline_takes_it(model: Path) -> None:
    from tvm_mars.frontend import adapter

    if adapter().IR != "Relax":
        pytest.skip("this TVM has Relay")
    import tvm

    from tvm_mars.frontend.relax.api import import_model
    from tvm_mars.frontend.relax.codegen import collect_programs

    with collect_programs() as programs:
        pipeline = tvm.relax.get_pipeline("mars", channel_order="packed")
        tvm.compile(import_model(model), "llvm", relax_pipeline=pipeline)
    (program,) = programs
    assert program.regions[0].orders
    with pytest.raises(OptionError, match="is not given or packed"):
        tvm.relax.get_pipeline("mars", channel_order="sorted")


def test_a_partitioned_module_keeps_it(model: Path) -> None:
    import tvm_mars
    from tvm_mars.frontend import adapter

    ir = adapter()
    mod = ir.import_model(model, SHAPE if ir.IR == "Relay" else {})
    partitioned = tvm_mars.partition_for_mars(mod, channel_order="packed")
    program = tvm_mars.compile(partitioned).program
    assert program is not None and program.regions[0].orders
    with pytest.raises(OptionError, match=r"option channel_order: .* for packed, not for given"):
        tvm_mars.partition_for_mars(partitioned, channel_order="given")


def test_commands_take_it(model: Path, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    """Compile, tune, compile by the records, explain, compare."""
    pytest.importorskip("onnxruntime")
    from tvm_mars.cli import main
    from tvm_mars.tuner.database import Database

    shape = ["--input-shapes", "x0:[1,3,32,32]"]
    program, work = str(tmp_path / "net.mars"), str(tmp_path / "tuned")
    order = ["--channel-order", "packed"]
    assert main(["compile", str(model), "--program", program, *shape, *order]) == 0
    graph = shuffled(networks.resnet20(0.3))
    default = simulate(Program.load(program).regions[0], MARS).cycles
    assert default == cycles(packed(graph).graph) < cycles(graph)

    assert main(["tune", str(model), "-D", work, "-n", "16", *shape, *order]) == 0
    best = min(record.cycles for record in Database(work).records)
    tuned = ["--tuned", work]
    assert main(["compile", str(model), "--program", program, *shape, *order, *tuned]) == 0
    assert simulate(Program.load(program).regions[0], MARS).cycles == best < default
    assert not caplog.records
    assert main(["compile", str(model), "--program", program, *shape, *tuned]) == 0
    assert "no tuning records" in caplog.text

    capsys.readouterr()
    assert main(["explain", str(model), *shape, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["packed_saved_cycles"] == cycles(graph) - default
    by_layer = {one["name"]: one["group_sets"] for one in data["layers"] if one["group_sets"]}
    counts = {name: layer.group_sets for name, layer in pack(packed(graph).graph, MARS).items()}
    assert {name: one["packed"] for name, one in by_layer.items()} == counts
    assert main(["explain", str(model), *shape]) == 0
    text = capsys.readouterr().out
    before, after = stored(graph), stored(packed(graph).graph)
    assert f"With --channel-order packed (mars compile, mars tune) {after:,} group-sets of" in text
    assert f"{before:,} are stored, and {cycles(graph) - default:,} cycles saved" in text
    assert main(["explain", str(model), *shape, "--op", "conv9"]) == 0
    said = f"with --channel-order packed {counts['conv9']:,} group-sets are stored"
    assert said in capsys.readouterr().out

    assert main(["compile", str(model), "--program", program, *shape, *order]) == 0
    np.savez(tmp_path / "x.npz", **random_inputs(graph, 0, images=1))
    asked = ["-i", str(tmp_path / "x.npz"), "--program", program]
    capsys.readouterr()
    assert main(["diff", str(model), *asked, "--engines", "onnxruntime,machine"]) == 0
    assert "no difference" in capsys.readouterr().out


def test_graphs_are_tuned_as_they_are_compiled(tmp_path: Path) -> None:
    from tvm_mars.tuner.api import tune
    from tvm_mars.tuner.database import arch_key, workload_key

    graph = shuffled(networks.resnet20(0.3))
    database = tune(graph, work_dir=tmp_path, max_trials_global=8, channel_order="packed")
    found = packed(graph)
    best = database.best(workload_key(found.graph, pack(found.graph, MARS)), arch_key(MARS))
    assert best is not None
    with database:
        program = build([NamedGraph.of(graph)], MARS, channel_order="packed")
    assert simulate(program.regions[0], MARS).cycles == best.cycles


def test_orders_are_typed_as_documented() -> None:
    """Integer arrays that are permutations, by value, and none of the network's ends."""
    graph = shuffled(networks.resnet20(0.3))
    for orders in found_orders(graph, MARS):
        given: Orders = orders
        for name, order in given.items():
            assert sorted(order.tolist()) == list(range(graph.types[name].channels))
        assert not {"x0", *(out.value for out in graph.outputs)} & set(given)
