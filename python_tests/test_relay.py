"""Networks through Relay onto MARS: what is offloaded, what it computes, what is exported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mars_runtime import simulate
from mars_runtime.errors import InputError, OptionError, ProgramError, UnsupportedError
from python_tests.onnx_models import ModelWriter, float_model, imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import Graph, evaluate
from tvm_mars.onnx_export import to_onnx
from tvm_mars.options import CompileOptions
from tvm_mars.zoo import digits_split, load_digits

tvm = pytest.importorskip("tvm")
relay = pytest.importorskip("tvm.relay")
onnxruntime = pytest.importorskip("onnxruntime")

from tvm.contrib import graph_executor  # noqa: E402

import tvm_mars  # noqa: E402
from tvm_mars.frontend.lower import lower  # noqa: E402
from tvm_mars.frontend.relay import build_for_cpu, load_library, read_region  # noqa: E402
from tvm_mars.frontend.relay.codegen import (  # noqa: E402
    collect_programs,
    host_target,
    whole_program,
)
from tvm_mars.frontend.relay.importer import import_model  # noqa: E402
from tvm_mars.frontend.relay.regions import regions  # noqa: E402

ROOT = Path(__file__).parents[1]
SEED = 3


def shapes(inputs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in inputs.items()}


def onnx_runtime(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def run(library: Any, inputs: dict[str, Any]) -> list[Any]:
    executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
    for name, array in inputs.items():
        executor.set_input(name, array)
    executor.run()
    return [executor.get_output(i).numpy() for i in range(executor.get_num_outputs())]


def graph_of(partitioned: Any) -> Graph:
    (region,) = regions(partitioned).values()
    return lower(read_region(region), CompileOptions().arch).graph


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.random(10)
def test_native_network_is_exact(seed: int) -> None:
    """The graph that was written comes back; no code differs from the reference."""
    graph = random_graph(seed, native=True, paper=True)
    inputs = random_inputs(graph, seed)
    model = to_onnx(graph)
    compiled = tvm_mars.compile(model, shape=shapes(inputs))
    assert not compiled.report.rejected and not compiled.report.host_operators
    assert compiled.report.regions == 1 and compiled.report.offloaded
    expected = evaluate(graph, inputs)
    found = list(compiled.run(inputs).values())
    for result, other, wanted in zip(found, onnx_runtime(model, inputs), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
        np.testing.assert_array_equal(other, wanted)
    mod = tvm_mars.partition_for_mars(import_model(model, shapes(inputs)))
    returned = graph_of(mod)
    if returned == graph:
        direct = build([NamedGraph.of(graph)], CompileOptions().arch)
        assert compiled.program is not None
        assert compiled.program.to_bytes() == direct.to_bytes()
    else:  # the same weights may be written as 4 or as 8 bits
        assert str(returned).replace(" w4 ", " w8 ") == str(graph).replace(" w4 ", " w8 ")


@pytest.mark.random(4)
def test_imported_network(seed: int) -> None:
    """What was quantized elsewhere is taken whole and computes what its integer graph says."""
    model = imported_model(seed, batch=2)
    inputs = model_inputs(model, seed)
    compiled = tvm_mars.compile(model)
    assert len(compiled.report.offloaded) == 9, str(compiled.report)
    assert not compiled.report.rejected and not compiled.report.host_operators
    graph = graph_of(tvm_mars.partition_for_mars(import_model(model)))
    (expected,) = evaluate(graph, {graph.inputs[0].name: inputs["image"]})
    found = compiled.run(inputs)["logits"]
    np.testing.assert_array_equal(found, expected)
    (other,) = onnx_runtime(model, inputs)
    assert np.abs(found - other).max() < 0.25 * np.abs(other).max()


def test_relay_itself_rounds_halves_away_from_zero() -> None:
    """Why Relay's CPU build may differ by a code from ONNX Runtime, eq. 5 and so from MARS."""
    x = relay.var("x", shape=(4,), dtype="float32")
    codes = relay.qnn.op.quantize(x, relay.const(1.0), relay.const(0), axis=0, out_dtype="uint8")
    mod = tvm.IRModule.from_expr(relay.Function([x], codes))
    halves = np.array([0.5, 1.5, 2.5, 3.5], np.float32)
    (found,) = run(relay.build(mod, host_target()), {"x": halves})
    np.testing.assert_array_equal(found, [1, 2, 3, 4])


# -- what is offloaded -----------------------------------------------------------------------------


def split_model(depth: int = 1) -> onnx.ModelProto:
    """Quantized convolutions, a sigmoid, and as many convolutions again."""
    rng = np.random.default_rng(0)
    writer = ModelWriter(rng)

    def conv(x: str) -> str:
        weight = writer.weight(rng.normal(0, 0.2, (8, 8, 3, 3)), per_channel=True)
        x = writer.node("Conv", x, weight, pads=[1] * 4)
        return writer.requantize(x, -2, 2)

    x = writer.requantize("image", -1, 1)
    for _ in range(depth):
        x = conv(x)
    x = writer.requantize(writer.node("Sigmoid", x), 0, 1)
    for _ in range(depth):
        x = conv(x)
    writer.name_last("result")
    return writer.model({"image": [1, 8, 8, 8]}, {"result": [1, 8, 8, 8]})


def test_what_mars_lacks_stays_on_the_cpu_between_two_regions() -> None:
    model = split_model()
    compiled = tvm_mars.compile(model)
    assert compiled.report.regions == 2 and len(compiled.report.offloaded) == 2
    assert compiled.report.host_operators == ("sigmoid",)
    program = compiled.program
    assert program is not None and len(program.regions) == 2
    first, second = program.regions
    assert [port.name for port in first.inputs] == ["image"]
    assert [port.name for port in second.outputs] == ["result"]
    inputs = model_inputs(model, SEED, images=1)
    (other,) = onnx_runtime(model, inputs)
    assert np.abs(compiled.run(inputs)["result"] - other).max() <= 1.01 * 4 / 255  # one code


def test_nothing_is_offloaded_of_a_float_model(caplog: pytest.LogCaptureFixture) -> None:
    mod = tvm_mars.partition_for_mars(import_model(float_model(batch=1)))
    report = tvm_mars.offload_report(mod)
    assert not report.offloaded and report.regions == 0 and not regions(mod)
    (decision,) = report.rejected
    assert decision.op == "conv2d" and "not quantized" in decision.reason
    assert "nothing was offloaded" in caplog.text


def test_control_flow_is_left_alone_and_told(caplog: pytest.LogCaptureFixture) -> None:
    x = relay.var("x", shape=(2,), dtype="float32")
    flag = relay.var("flag", shape=(), dtype="bool")
    chosen = relay.If(flag, relay.nn.relu(x), x)
    mod = tvm_mars.partition_for_mars(tvm.IRModule.from_expr(relay.Function([flag, x], chosen)))
    assert not regions(mod) and "control flow" in caplog.text


def test_min_macs_gives_small_regions_back() -> None:
    model = imported_model(SEED, batch=1)
    inputs = model_inputs(model, SEED, images=1)
    compiled = tvm_mars.compile(model, min_macs=10**9)
    assert not compiled.report.offloaded and compiled.program is None
    assert all("option min_macs" in entry.reason for entry in compiled.report.rejected)
    (other,) = onnx_runtime(model, inputs)
    assert np.abs(compiled.run(inputs)["logits"] - other).max() < 0.25 * np.abs(other).max()


def test_a_value_that_is_also_an_output_leaves_as_numbers() -> None:
    """The chain ends there, and what would have ended it runs on the CPU."""
    model = imported_model(SEED, batch=1)
    inputs = model_inputs(model, SEED, images=1)
    (alone,) = tvm_mars.compile(model).run(inputs).values()
    inner = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    shape = onnx_runtime(with_output(model, inner), inputs)[1].shape
    assert model.graph.output[1].name == inner
    compiled = tvm_mars.compile(model)
    assert not compiled.report.rejected and compiled.report.regions == 2
    assert compiled.report.host_operators == ("nn.relu", "quantize")
    found = compiled.run(inputs)
    assert list(found) == ["logits", inner] and found[inner].shape == shape
    np.testing.assert_allclose(found["logits"], alone, atol=0.1 * np.abs(alone).max())


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make an inner value an output as well, in place."""
    model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    return model


def test_reports_name_operators_as_the_model_does() -> None:
    model = imported_model(SEED, batch=1)
    names = {node.name for node in model.graph.node}
    report = tvm_mars.offload_report(import_model(model))
    assert {entry.name for entry in report.decisions} <= names


# -- TVM's own way ---------------------------------------------------------------------------------


def test_relay_build_with_the_target_tag_and_free_parameters() -> None:
    """``from_onnx`` with its parameters apart, ``partition_for_mars``, ``relay.build``."""
    model = to_onnx(random_graph(SEED, native=True))
    inputs = random_inputs(random_graph(SEED, native=True), SEED)
    mod, params = relay.frontend.from_onnx(
        with_zero_points(model), shapes(inputs), freeze_params=False
    )
    assert params
    mod = tvm_mars.partition_for_mars(mod, params)
    report = tvm_mars.offload_report(mod)
    assert report.regions == 1 and not report.rejected and not report.host_operators
    library = relay.build(mod, target=tvm.target.Target("mars"), params=params)
    expected = evaluate(random_graph(SEED, native=True), inputs)
    for found, wanted in zip(run(library, inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def with_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """Relay's importer needs the zero points that ONNX lets one leave out."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2:
            name = f"{node.output[0]}_zero"
            model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int32), name))
            node.input.append(name)
    return model


def test_the_pattern_table_has_every_chain() -> None:
    from tvm.relay.op.contrib import get_pattern_table

    from tvm_mars.frontend.patterns import COMPOSITES, OPERATORS
    from tvm_mars.frontend.relay.nodes import OPERATORS as KNOWN

    assert set(KNOWN) == set(OPERATORS)  # Relay has all of them
    assert [name for name, *_ in get_pattern_table("mars")] == [entry.name for entry in COMPOSITES]


def test_partitioning_twice_is_partitioning_once() -> None:
    mod = tvm_mars.partition_for_mars(import_model(imported_model(SEED, batch=1)))
    assert tvm_mars.partition_for_mars(mod).same_as(mod)
    with pytest.raises(OptionError, match="partitioned for 0, not for 5"):
        tvm_mars.partition_for_mars(mod, min_macs=5)


def test_weights_are_not_exported_twice() -> None:
    compiled = tvm_mars.compile(imported_model(SEED, batch=1))
    assert not compiled.library.get_params()


# -- other executors -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> tuple[Any, dict[str, Any], Any]:
    """A partitioned model of two regions, its inputs, and its result by the graph executor."""
    model = split_model()
    inputs = model_inputs(model, SEED, images=1)
    mod = tvm_mars.partition_for_mars(import_model(model))
    assert tvm_mars.offload_report(mod).host_operators == ("sigmoid",) and len(regions(mod)) == 2
    (expected,) = run(relay.build(mod, target=tvm.target.Target("mars")), inputs)
    return mod, inputs, expected


def test_every_executor_has_the_tuned_schedules(tmp_path: Path) -> None:
    """Both regions are tuned, from the module as it is partitioned; the codes stay the same."""
    from tvm.relay.backend import Executor

    model = split_model(depth=2)
    mod = tvm_mars.partition_for_mars(import_model(model))
    target, aot = tvm.target.Target("mars"), Executor("aot", {"interface-api": "packed"})
    database = tvm_mars.tune(mod, work_dir=tmp_path, max_trials_global=24, cost_model="none")
    builds: dict[str, Callable[[], Any]] = {
        "graph": lambda: relay.build(mod, target=target),
        "aot": lambda: relay.build(mod, target=target, executor=aot),
        "vm": lambda: relay.vm.compile(mod, target=target),
    }
    inputs = model_inputs(model, SEED, images=1)
    (expected,) = run(builds["graph"](), inputs)
    default = cycles_of(builds["graph"])
    assert len(default) == 2
    with database:
        tuned = {name: cycles_of(built) for name, built in builds.items()}
        library = builds["graph"]()
        program = tvm_mars.compile(model).program
    assert program is not None
    tuned["one call"] = [simulate(region, program.arch).cycles for region in program.regions]
    assert all(found == tuned["graph"] for found in tuned.values())
    assert all(new < old for new, old in zip(tuned["graph"], default, strict=True))
    assert set(tuned["graph"]) <= {record.cycles for record in database.records}
    np.testing.assert_array_equal(run(library, inputs)[0], expected)


def cycles_of(built: Callable[[], Any]) -> list[int]:
    """Give the cycles of the regions that something compiles."""
    with collect_programs() as programs:
        built()
    program = whole_program(programs)
    assert program is not None
    return [simulate(region, program.arch).cycles for region in program.regions]


def test_the_virtual_machine(split: tuple[Any, dict[str, Any], Any], tmp_path: Path) -> None:
    mod, inputs, expected = split
    executable = relay.vm.compile(mod, target=tvm.target.Target("mars"))
    executable.mod.export_library(str(tmp_path / "net.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "net.so"))
    for code in (executable, loaded):
        machine = tvm.runtime.vm.VirtualMachine(code, tvm.cpu())
        found = machine.invoke("main", **inputs)
        np.testing.assert_array_equal(found.numpy(), expected)
    for wrong in (inputs["image"][:, :, :-1], inputs["image"].astype(np.float64)):
        with pytest.raises(tvm.error.TVMError, match="is not a compact float32 tensor"):
            machine.invoke("main", np.ascontiguousarray(wrong))


def test_the_executor_ahead_of_time(split: tuple[Any, dict[str, Any], Any], tmp_path: Path) -> None:
    """It passes bare data to a region, without shape or type."""
    from tvm.relay.backend import Executor, Runtime
    from tvm.runtime.executor import AotModule

    mod, inputs, expected = split
    library = relay.build(
        mod,
        target=tvm.target.Target("mars"),
        executor=Executor("aot", {"interface-api": "packed"}),
        runtime=Runtime("cpp"),
    )
    library.export_library(str(tmp_path / "net.so"))
    loaded = tvm.runtime.load_module(str(tmp_path / "net.so"))
    executor = AotModule(loaded["default"](tvm.cpu()))
    executor.set_input("image", tvm.nd.array(inputs["image"]))
    executor.run()
    np.testing.assert_array_equal(executor.get_output(0).numpy(), expected)


def test_regions_are_compiled_for_the_models_target() -> None:
    target = "llvm -mtriple=aarch64-linux-gnu"
    compiled = tvm_mars.compile(imported_model(SEED, batch=1), target=target)
    assert compiled.report.regions == 1 and not compiled.report.rejected

    def triples(module: Any) -> list[str]:
        own = re.findall('^target triple = "(.*)"', source(module), re.MULTILINE)
        return own + [name for inner in module.imported_modules for name in triples(inner)]

    def source(module: Any) -> str:
        return module.get_source("ll") if module.type_key == "llvm" else ""

    found = triples(compiled.library.get_lib())
    assert len(found) >= 2 and set(found) == {"aarch64-linux-gnu"}


def test_regions_carry_their_own_options() -> None:
    """What a module was partitioned with compiles it, wherever that happens."""
    from tvm_mars.frontend.relay.codegen import collect_programs

    model = imported_model(SEED, batch=1)
    with collect_programs() as programs:
        for arch in ("mars-80b", "mars-dense"):
            mod = tvm_mars.partition_for_mars(import_model(model), arch=arch)
            relay.build(mod, target=tvm.target.Target("mars"))
    assert [piece.program.arch.name for piece in programs] == ["mars-80b", "mars-dense"]


# -- exporting -------------------------------------------------------------------------------------


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    graph = load_digits()
    images, _ = digits_split()
    names: dict[str, Any] = {"images": images[:4]}
    onnx.save(to_onnx(graph), "net.onnx")
    exec(block, names)
    (expected,) = evaluate(graph, {"x0": images[:4]})
    np.testing.assert_array_equal(names["executor"].get_output(0).numpy(), expected)
    np.testing.assert_array_equal(names["model"].run({"x0": images[:4]})["y0"], expected)


def test_the_cpu_build_agrees_on_the_demo() -> None:
    """Relay's own code for the module as it was imported, where no half of a step occurs."""
    graph = load_digits()
    images = digits_split()[0][:16]
    (expected,) = evaluate(graph, {"x0": images})
    alone = build_for_cpu(to_onnx(graph), {"x0": images.shape})
    np.testing.assert_array_equal(alone(images), expected)


@pytest.mark.parametrize("suffix", ["so", "tar"])
def test_a_fresh_process_runs_what_was_exported(tmp_path: Path, suffix: str) -> None:
    """It has TVM and mars_runtime, and no compiler."""
    model = imported_model(SEED, batch=2)
    inputs = model_inputs(model, SEED)
    compiled = tvm_mars.compile(model)
    library = tmp_path / f"net.{suffix}"
    compiled.export_library(library)
    np.savez(tmp_path / "arrays.npz", image=inputs["image"], logits=compiled.run(inputs)["logits"])
    script = """
        import sys
        import numpy as np
        import tvm, mars_runtime
        from tvm.contrib import graph_executor

        arrays = np.load(sys.argv[2])
        library = tvm.runtime.load_module(sys.argv[1])
        executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
        executor.set_input("image", arrays["image"])
        executor.run()
        np.testing.assert_array_equal(executor.get_output(0).numpy(), arrays["logits"])
        assert "tvm_mars" not in sys.modules
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), library, tmp_path / "arrays.npz"],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "runtime")},
    )


@pytest.mark.parametrize("suffix", ["so", "tar"])
def test_the_command_line(suffix: str, tmp_path: Path) -> None:
    """``mars compile``, then ``mars run`` on the library and on the program."""
    from click.testing import CliRunner

    from tvm_mars.cli import mars

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(mars, [str(argument) for argument in arguments])

    model = imported_model(SEED)
    inputs = model_inputs(model, SEED)
    onnx.save(model, tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", **inputs)
    library, program = tmp_path / f"net.{suffix}", tmp_path / "net.mars"
    compiling = ("compile", tmp_path / "net.onnx", "-o", library, "--program", program)
    without = call(*compiling)
    assert without.exit_code == 1 and '--input-shapes "image:[...]"' in without.stderr
    sizes = f"image:{list(inputs['image'].shape)}"
    compiled = call(*compiling, "--input-shapes", sizes, "--dump-offloads", "-")
    assert compiled.exit_code == 0, compiled.stderr
    assert "9 of 9 operators on MARS, in 1 region(s)" in compiled.stdout
    found = []
    for made in (library, program):
        ran = call("run", made, "-i", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
        assert ran.exit_code == 0, ran.stderr
        with np.load(tmp_path / "y.npz") as results:
            assert results.files == ["logits"]
            found.append(results["logits"])
    np.testing.assert_array_equal(*found)
    np.savez(tmp_path / "x.npz", image=inputs["image"][:1])
    ran = call("run", library, "-i", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert ran.exit_code == 1 and "shape (1, 3, 6, 6), expected (2, 3, 6, 6)" in ran.stderr


def test_other_files_are_no_libraries(tmp_path: Path) -> None:
    for name, data, problem in (
        ("empty.so", b"", "is empty"),
        ("text.so", b"no library" * 100, "is no library"),
        ("text.tar", b"no archive" * 100, "is no archive"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((InputError, ProgramError), match=f"{name}: {problem}.*mars compile"):
            load_library(tmp_path / name)
    with tarfile.open(tmp_path / "package.tar", "w") as archive:
        for name in ("mod.so", "mod.json"):
            (tmp_path / name).touch()
            archive.add(tmp_path / name, name)
    with pytest.raises(InputError, match="is a package of tvmc"):
        load_library(tmp_path / "package.tar")
    with pytest.raises(InputError, match="cannot be read"):
        load_library(tmp_path / "none.so")
    mod = tvm_mars.partition_for_mars(import_model(imported_model(SEED, batch=1)))
    bare = relay.build(mod, target=tvm.target.Target("mars"))
    bare.export_library(str(tmp_path / "bare.so"))
    with pytest.raises(InputError, match="does not say its inputs and outputs"):
        load_library(tmp_path / "bare.so")


# -- errors ----------------------------------------------------------------------------------------


def test_an_open_batch_is_an_error_with_its_remedy() -> None:
    with pytest.raises(InputError, match=r"give shape=\{'image'"):
        tvm_mars.compile(imported_model(SEED))
    with pytest.raises(InputError, match="the model has"):
        tvm_mars.compile(imported_model(SEED), shape={"image": (1, 4, 8, 8)})
    with pytest.raises(InputError, match="no such input"):
        tvm_mars.compile(imported_model(SEED), shape={"picture": (1, 3, 8, 8)})


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean min_macs"):
        tvm_mars.compile(imported_model(SEED, batch=1), min_mac=3)
    with pytest.raises(OptionError, match="no TVM target"):
        tvm_mars.compile(imported_model(SEED, batch=1), target="marsupial")
    with pytest.raises(UnsupportedError, match="a int"):
        tvm_mars.compile(3)
    with pytest.raises(InputError, match="cannot be read"):
        tvm_mars.compile(tmp_path / "none.onnx")
    compiled = tvm_mars.compile(imported_model(SEED, batch=1))
    with pytest.raises(InputError, match="did you mean image"):
        compiled.run({"imag": np.zeros((1, 3, 8, 8), np.float32)})
