"""``tvmc-mars``: TVM's command line, with MARS among its targets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mars_runtime import load_arch, simulate
from python_tests.onnx_models import ModelWriter, float_model, imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from python_tests.test_permute import shuffled
from tvm_mars import graph as reference
from tvm_mars.graph import Graph, evaluate
from tvm_mars.networks import mobilenet_v1, mobilenet_v2, resnet18, resnet20, vgg16
from tvm_mars.onnx_export import to_onnx
from tvm_mars.tuner.database import Database
from tvm_mars.tvmc import main
from tvm_mars.zoo import digits_split, load_digits

tvm = pytest.importorskip("tvm")
pytest.importorskip("tvm.driver.tvmc")

from tvm.driver.tvmc import composite_target, frontends  # noqa: E402

from python_tests.tflite_model import TfliteWriter  # noqa: E402
from tvm_mars.frontend.relay import import_model  # noqa: E402
from tvm_mars.frontend.relay.codegen import (  # noqa: E402
    collect_programs,
    host_target,
    whole_program,
)

ROOT = Path(__file__).parents[1]
SEED = 3
HOST = f"llvm -mtriple={host_target().attrs['mtriple']}"
# Kernels as TVM makes them without choosing layouts: quicker to compile, the same arithmetic.
CPU = ("--target", HOST, "-O", "1")

Arrays = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, for short names on command lines."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shapes(inputs: Arrays) -> str:
    return " ".join(f"{name}:{list(array.shape)}" for name, array in inputs.items())


def results(model: onnx.ModelProto, inputs: Arrays, *options: str) -> list[Any]:
    """Compile and run by command lines, in the current directory; gives the outputs."""
    onnx.save(model, "net.onnx")
    np.savez("x.npz", **inputs)
    compiling = ["compile", "net.onnx", "-o", "net.tar", "--input-shapes", shapes(inputs)]
    assert main([*compiling, *options]) == 0
    assert main(["run", "net.tar", "-i", "x.npz", "--outputs", "y.npz"]) == 0
    with np.load("y.npz") as found:
        assert found.files == [f"output_{i}" for i in range(len(found.files))]
        return list(found.values())


def differing(first: Sequence[Any], second: Sequence[Any]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))


# -- exactness -------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], Graph]] = {
    "digits": load_digits,
    "mobilenet v1": mobilenet_v1,
    "mobilenet v2": mobilenet_v2,
    "resnet18": resnet18,
    "vgg16": vgg16,
}


@pytest.fixture
def imported_once(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have tvmc import the test's model once, which takes longest; the list holds it."""
    original, loaded = frontends.load_model, []

    def load(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(original(*arguments))
        return loaded[0]

    monkeypatch.setattr(frontends, "load_model", load)
    return loaded


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exact(name: str, folder: Path, imported_once: list[Any]) -> None:
    """No code differs between MARS, Relay's CPU build of the module as imported, and the reference.

    Networks of eq. 5 have no tie that rounding could tell apart but in their input: a half of
    2**b - 1 steps rounds up by either rule.
    """
    graph = NETWORKS[name]()
    images = (
        digits_split()[0][:8]
        if name == "digits"
        else np.random.default_rng(SEED).random((2, 3, 32, 32), np.float32)
    )
    inputs, model = {"x0": images}, to_onnx(graph)
    expected = evaluate(graph, inputs)
    offloads = ("--target", f"mars, {HOST}", "--dump-offloads", "offloads.txt")
    assert differing(results(model, inputs, *offloads), expected) == 0
    lines = Path("offloads.txt").read_text().splitlines()
    assert all(line.startswith("MARS  ") for line in lines[:-1])
    assert lines[-1] == f"{len(lines) - 1} of {len(lines) - 1} operators on MARS, in 1 region(s)"
    assert [gvar.name_hint for gvar in imported_once[0].mod.functions] == ["main"]
    assert differing(results(model, inputs, *CPU), expected) == 0


def halves_away_from_zero(value: Any, divisor: Any) -> Any:
    value, divisor = np.asarray(value, np.int64), np.asarray(divisor, np.int64)
    return np.sign(value) * ((2 * np.abs(value) + divisor) // (2 * divisor))


@pytest.mark.random(10)
def test_relay_on_the_cpu_differs_by_ties_alone(
    seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rounding of ties exchanged, the reference is Relay's CPU code to the last bit."""
    graph = random_graph(seed, native=True)
    inputs, model = random_inputs(graph, seed), to_onnx(graph)
    expected = evaluate(graph, inputs)
    assert differing(results(model, inputs, "--target=mars"), expected) == 0
    alone = results(model, inputs, *CPU)
    monkeypatch.setattr(reference, "divide_half_even", halves_away_from_zero)
    for entry in graph.inputs:  # numpy rounds them to even: leave it no tie
        inputs[entry.name] = without_ties(inputs[entry.name], entry.quantize)
    assert differing(alone, evaluate(graph, inputs)) == 0


def without_ties(values: Any, quantize: Any) -> Any:
    """Move values at exact halves of a step away from zero, as a rounding by Relay does."""
    if values.dtype != np.float32:
        return values
    low, high = quantize.clip or (-np.inf, np.inf)
    inside = np.clip(values, np.float32(low), np.float32(high))
    steps = inside * np.float32(quantize.factor) / np.float32(quantize.scale)
    tie = np.abs(steps - np.trunc(steps)) == 0.5
    step = np.float32(quantize.scale / quantize.factor)
    return np.where(tie, inside + np.sign(inside) * step / 4, inside).astype(np.float32)


@pytest.mark.random(6)
def test_a_layer_quantized_elsewhere_differs_by_one_code(seed: int, folder: Path) -> None:
    """MARS multiplies by integers where the CPU's code divides floats: rarely, a code differs."""
    rng = np.random.default_rng([SEED, seed])
    writer = ModelWriter(rng)
    weight = writer.weight(rng.normal(0, 0.1, (24, 16, 3, 3)), per_channel=bool(seed % 2))
    x = writer.requantize("image", -1.1, 1.3, ("uint8", "int8")[seed // 2 % 2])
    bias = writer.bias(rng.normal(0, 0.3, 24), 1e-4)
    x = writer.node("Conv", x, weight, bias, pads=[1] * 4)
    x = writer.node("Relu", x)
    writer.requantize(x, 0.0, 2.7)
    writer.name_last("result")
    model = writer.model({"image": [2, 16, 12, 12]}, {"result": [2, 24, 12, 12]})
    inputs = {"image": rng.normal(0, 0.6, (2, 16, 12, 12)).astype(np.float32)}
    offloads = ("--target", f"mars, {HOST}", "--dump-offloads", "offloads.txt")
    (found,) = results(model, inputs, *offloads)
    assert "1 of 1 operators on MARS" in Path("offloads.txt").read_text()
    (other,) = results(model, inputs, *CPU)
    codes = np.rint((found - other) / (2.7 / 255)).astype(int)
    assert np.abs(codes).max() <= 1
    assert np.count_nonzero(codes) <= 0.002 * codes.size
    assert len(np.unique(found)) > 50


# -- tuning ----------------------------------------------------------------------------------------


def cycles_of(*arguments: str) -> list[int]:
    """Compile by a command line; gives the cycles of the regions."""
    with collect_programs() as programs:
        assert main(["compile", *arguments]) == 0
    program = whole_program(programs)
    assert program is not None
    return [simulate(region, program.arch).cycles for region in program.regions]


def records(directory: str) -> list[Any]:
    return Database(directory).records


@pytest.fixture
def network(folder: Path) -> tuple[onnx.ModelProto, Arrays]:
    """The current directory has a small network, ``net.onnx``."""
    model = imported_model(SEED, batch=1)
    onnx.save(model, "net.onnx")
    return model, model_inputs(model, SEED, images=1)


FULL = ("--target", f"mars, {HOST}", "--target-mars-set", "overlap=full")


def test_tuned_programs_are_faster_and_give_the_same_codes(
    network: tuple[onnx.ModelProto, Arrays],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the records of `tune` by its own names of options, or by those of `mars tune`."""
    from tvm_mars.cli import main as mars

    model, inputs = network
    tuning = ["tune", "net.onnx", *FULL, "--trials", "16", "--parallel", "2", "--seed", "5"]
    assert main([*tuning, "-o", "tuned", "-v"]) == 0
    said = capsys.readouterr()
    assert "16 records" in said.out and "16/16 trials, best" in said.err
    given = ["-D", "same", "--trials", "16", "--set", "overlap=full", "--seed", "5"]
    assert mars(["tune", "net.onnx", *given]) == 0
    assert records("same") == records("tuned")

    (default,) = cycles_of("net.onnx", *FULL)
    (tuned,) = cycles_of("net.onnx", *FULL, "--tuning-records", "tuned")
    assert tuned == min(one.cycles for one in records("tuned")) < default
    assert not caplog.records
    expected = results(model, inputs, *FULL)
    assert differing(results(model, inputs, *FULL, "--tuning-records", "tuned"), expected) == 0
    cycles_of("net.onnx", "--tuning-records", "tuned")
    assert "no tuning records of a region" in caplog.text and "on machine mars" in caplog.text


def test_a_search_is_resumed_and_follows_another(network: Any) -> None:
    tuning = ["tune", "net.onnx", *FULL, "--cost-model", "none", "--parallel", "1"]
    assert main([*tuning, "--trials", "8", "-o", "cut"]) == 0
    assert main([*tuning, "--trials", "16", "-o", "cut", "--resume"]) == 0
    assert main([*tuning, "--trials", "16", "-o", "whole"]) == 0
    assert records("cut") == records("whole")
    after = [*tuning, "--trials", "17", "-o", "after", "--tuning-records", "whole"]
    assert main(after) == 0
    assert min(one.cycles for one in records("after")) <= min(one.cycles for one in records("cut"))
    assert len({one.run for one in records("whole") + records("after")}) == 2


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("", {}),
        ("--tuner ga", {"cost_model": "none"}),
        ("--tuner gridsearch", {"strategy": "grid"}),
        ("--tuner random --cost-model none", {"strategy": "random", "cost_model": "none"}),
        ("--strategy annealing --objective edp", {"strategy": "annealing", "objective": "edp"}),
        ("--early-stopping 7 --parallel 3 --seed 9", {"patience": 7, "num_workers": 3, "seed": 9}),
        ("--trials 33 --resume", {"max_trials_global": 33, "resume": True}),
        (
            "--runner ray --ray-address auto --trial-timeout 5",
            {"runner": "ray", "ray_address": "auto", "trial_timeout": 5.0},
        ),
    ],
)
def test_options_of_the_search(
    options: str, asked: dict[str, Any], network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def search(mod: Any, **options: Any) -> Database:
        seen.update(options)
        return Database(options["work_dir"])

    monkeypatch.setattr("tvm_mars.tvmc.tuning.tune", search)
    assert main(["tune", "net.onnx", "-o", "tuned", *options.split()]) == 0
    del seen["on_trial"]
    usual = {
        "work_dir": "tuned",
        "max_trials_global": 1000,
        "arch": load_arch("mars"),
        "channel_order": "given",
        "num_workers": 4,
        "patience": None,
        "earlier": None,
    }
    assert seen == usual | asked


def test_an_interrupted_search_says_how_to_go_on(
    network: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tvm_mars.tuner.progress.Progress.report", interrupted)
    assert main(["tune", "net.onnx", "-o", "tuned", "--parallel", "1"]) == 4
    assert "Error: interrupted (--resume goes on" in capsys.readouterr().err


def test_without_xgboost_a_search_says_what_to_do(
    network: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "xgboost" else original(name, package),
    )
    tuning = ["tune", "net.onnx", "-o", "tuned", "--trials", "8", "--parallel", "1"]
    assert main(tuning) == 4
    assert "needs XGBoost (pip install xgboost-cpu, or search with the" in capsys.readouterr().err
    assert main([*tuning, "--cost-model", "none"]) == 0


def test_kernels_of_the_other_target_are_tuned_as_tvmc_does(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file of their records goes on to tvmc, whose it is."""
    from tvm.driver.tvmc import autotuner, compiler

    seen: list[Any] = []
    monkeypatch.setattr(autotuner, "tune_model", lambda *args, **given: seen.append(given))
    assert main(["tune", "net.onnx", "--target", HOST, "-o", "log.json", "--tuner", "ga"]) in (0, 4)
    assert seen[0]["tuning_records"] == "log.json" and seen[0]["tuner"] == "ga"
    monkeypatch.setattr(compiler, "compile_model", lambda *args, **given: seen.append(given))
    Path("log.json").write_text("")
    for target in (HOST, f"mars, {HOST}"):
        compiling = ["compile", "net.onnx", "--target", target, "--tuning-records", "log.json"]
        assert main(compiling) == 0
        assert seen[-1]["tuning_records"] == "log.json"


# -- what the commands say -------------------------------------------------------------------------


def test_what_stays_on_the_cpu_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(float_model(batch=1), "float.onnx")
    assert main(["compile", "float.onnx", "-o", "net.tar", "--dump-offloads", "-"]) == 0
    said = capsys.readouterr().out
    assert "CPU   conv2d" in said and "its input is not quantized" in said
    assert "0 of 1 operators on MARS" in said and "on the CPU: nn.conv2d, sigmoid" in said
    assert main(["run", "net.tar", "--outputs", "y.npz"]) == 0


def test_the_report_is_that_of_the_other_commands(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tvm_mars

    model = imported_model(SEED, batch=1)
    onnx.save(model, "net.onnx")
    arguments = ["--target-mars-min-macs", "1000000000", "--dump-offloads", "-"]
    assert main(["compile", "net.onnx", "-o", "net.tar", *arguments]) == 0
    report = tvm_mars.offload_report(import_model(model), min_macs=10**9)
    assert not report.offloaded and len(report.rejected) == 9
    assert all("option min_macs asks for 1000000000" in entry.reason for entry in report.rejected)
    assert str(report) in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--target", "mars -arch=mars-80b, llvm"],
        ["--target-mars-arch", "mars-80b"],
        ["--target", "mars, llvm", "--target-mars-set", "offchip_bits_per_cycle=80"],
        ["--target-mars-arch", "{folder}/machine.toml", "--target-llvm-mtriple", "{triple}"],
    ],
    ids=["in the target", "of its own", "a field", "a file"],
)
def test_options_of_the_target(
    options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvm_mars.frontend.relay import partition_for_mars
    from tvm_mars.tvmc import target

    chosen = []

    def seen(*args: Any, **options: Any) -> Any:
        mod = partition_for_mars(*args, **options)
        chosen.append(str(mod.attrs["mars.options"]))
        return mod

    monkeypatch.setattr(target, "partition_for_mars", seen)
    (folder / "machine.toml").write_text('base = "mars"\noffchip_bits_per_cycle = 80\n')
    triple = str(host_target().attrs["mtriple"])
    onnx.save(imported_model(SEED, batch=1), "net.onnx")
    given = [option.format(folder=folder, triple=triple) for option in options]
    assert main(["compile", "net.onnx", "-o", "net.tar", *given]) == 0
    (text,) = chosen
    assert '"offchip_bits_per_cycle": 80' in text


@pytest.mark.parametrize(
    "options",
    [["--target", "mars -channel_order=packed, llvm"], ["--target-mars-channel-order", "packed"]],
)
def test_channels_are_reordered(options: list[str], folder: Path) -> None:
    onnx.save(to_onnx(shuffled(resnet20(0.3))), "net.onnx")
    given = ["net.onnx", "--input-shapes", "x0:[1,3,32,32]"]
    with collect_programs() as programs:
        assert main(["compile", *given, "-o", "net.tar", *options]) == 0
    program = whole_program(programs)
    assert program is not None and program.regions[0].orders
    tune = ["-o", "tuned", "--trials", "8", "--parallel", "1"]
    assert main(["tune", *given, *tune, *options]) == 0
    with collect_programs() as programs:
        more = ["--tuning-records", "tuned"]
        assert main(["compile", *given, "-o", "net.tar", *options, *more]) == 0
    tuned = whole_program(programs)
    assert tuned is not None
    best = min(record.cycles for record in Database("tuned").records)
    assert simulate(tuned.regions[0], tuned.arch).cycles == best


def test_regions_are_made_for_the_target_that_requantizes(folder: Path) -> None:
    """By floats on a CPU with SSE4.1, by integers elsewhere; MARS can do as the integers do."""
    rng = np.random.default_rng(SEED)
    writer = TfliteWriter()
    x = writer.tensor((1, 6, 6, 64), "uint8", scale=0.02, zero=130)
    weight = writer.constant(
        rng.integers(-127, 128, (8, 3, 3, 64)).astype("int8"), np.full(8, 3e-5)
    )
    bias = writer.constant(rng.integers(-2000, 2000, 8).astype("int32"))
    writer.conv(x, weight, bias, writer.tensor((1, 6, 6, 8), "uint8", scale=0.02, zero=128))
    Path("net.tflite").write_bytes(bytes(writer.model(x)._tab.Bytes))
    found = {}
    for cpu in ("", " -mcpu=core2", " -mcpu=skylake"):
        options = ["--target", f"mars, {HOST}{cpu}", "--dump-offloads", "offloads.txt"]
        assert main(["compile", "net.tflite", "-o", "net.tar", *options]) == 0
        found[cpu] = Path("offloads.txt").read_text()
    assert "1 of 1 operators on MARS" in found[""] and found[""] == found[" -mcpu=core2"]
    assert "0 of 1 operators on MARS" in found[" -mcpu=skylake"]
    assert "in float32: accumulators up to" in found[" -mcpu=skylake"]


def test_top_results_and_times(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = imported_model(SEED, batch=1)
    (logits,) = results(model, model_inputs(model, SEED, images=1), "--target=mars")
    capsys.readouterr()
    assert main(["run", "net.tar", "-i", "x.npz", "--print-top", "2", "--print-time"]) == 0
    said = capsys.readouterr().out
    best = logits[0].argsort()[::-1][:2]
    assert "mean (ms)" in said
    numbers = np.array(said.partition("[[")[2].replace("[", "").replace("]", "").split(), float)
    np.testing.assert_allclose(numbers, [*best, *logits[0][best]], rtol=1e-6)
    assert main(["run", "net.tar", "--fill-mode", "ones", "--outputs", "ones"]) == 0
    with np.load("ones.npz") as found:
        assert found["output_0"].shape == (1, 10)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["tvmc-mars compile --target", "--dump-offloads", "tvmc-mars run"]),
        (["compile", "--help"], ["tvmc-mars compile", "target mars", "--target-mars-set"]),
        (["run", "--help"], ["tvmc-mars run", "--print-top"]),
        (["tune", "--help"], ["tvmc-mars tune", "target mars", "--cost-model", "--objective"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr().out
        assert left.value.code == 0 and all(word in said for word in words), said


# -- errors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, its package, and what is none."""
    made = tmp_path_factory.mktemp("compiled")
    onnx.save(float_model(batch=1), made / "net.onnx")
    onnx.save(float_model(), made / "open.onnx")
    onnx.save(imported_model(SEED, batch=1), made / "tiny.onnx")
    (made / "text").write_text("no archive")
    (made / "bad").mkdir()
    (made / "bad" / "database_tuning_record.json").write_text('{"trial": 1}\n')
    (made / "empty").mkdir()
    np.savez(made / "x.npz", image=np.zeros((1, 3, 8, 9)))
    np.savez(made / "other.npz", picture=np.zeros(3))
    assert main(["compile", str(made / "net.onnx"), "-o", str(made / "net.tar")]) == 0
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compile none.onnx", "Input file 'none.onnx' doesn't exist"),
        ("compile open.onnx", "--input-shapes"),
        ("compile open.onnx --input-shapes image:[-1,3,8,8]", "a size is open"),
        ("compile open.onnx --input-shapes image:[1,4,8,8]", "the model has (N, 3, 8, 8)"),
        ("compile net.onnx --target-mars-arch mars-dens", "did you mean mars-dense"),
        ("compile net.onnx --target-mars-set coers=2", "did you mean cores"),
        ("compile net.onnx --target-mars-min-macs few", "'few' is not an integer"),
        ("compile net.onnx --target=mars~-arc=mars,~llvm", "did you mean arch"),
        ("compile net.onnx --target=mars,~llvm~-mtripel=x", "Cannot recognize 'mtripel'"),
        ("compile net.onnx --target=mars,~marsupial", "The last target needs to be a TVM target"),
        ("compile net.onnx --target=marsupial,~llvm", "Composite target marsupial is not defined"),
        ("compile net.onnx --target=llvm,~mars", "The last target needs to be a TVM target"),
        ("compile net.onnx --target=", "cannot be read"),
        ("compile net.onnx --target=llvm --target-mars-arch mars", "did not specify mars target"),
        ("compile net.onnx --target=llvm --dump-offloads -", 'try --target="mars, llvm"'),
        ("compile net.onnx --executor aot -f mlf", "--executor graph and -f so"),
        ("compile net.onnx -o nowhere/net.tar", "nowhere/net.tar: No such file"),
        ("compile net.onnx --dump-offloads nowhere/x", "nowhere/x: No such file"),
        ("compile net.onnx --tuning-records none", "none: no such directory (mars tune and tvmc-"),
        ("compile net.onnx --tuning-records empty", "empty: holds no records"),
        ("compile net.onnx --tuning-records bad", "a record does not make sense"),
        (
            "compile net.onnx --tuning-records bad/database_tuning_record.json",
            "is a file (records are a directory that holds database_workload.json",
        ),
        ("compile net.onnx --target=llvm --tuning-records bad", 'try --target="mars, llvm"'),
        ("tune none.onnx -o records", "Input file 'none.onnx' doesn't exist"),
        ("tune net.onnx -o records", "nothing of it is on MARS (tvm_mars.offload_report"),
        ("tune open.onnx -o records", "--input-shapes"),
        ("tune net.onnx -o records --target=mars,~llvm~-mtripel=x", "Cannot recognize 'mtripel'"),
        ("tune net.onnx -o records --target-mars-set coers=2", "did you mean cores"),
        ("tune net.onnx -o records --target=llvm --seed 1", "Passed --seed but did not specify"),
        ("tune net.onnx -o records --target=llvm --resume", "Passed --resume but did not specify"),
        ("tune net.onnx -o records --number 3", "--number is about kernels of TVM's own targets"),
        ("tune net.onnx -o records --rpc-key board", "--rpc-key is about kernels"),
        ("tune net.onnx -o records --tuner xgb_curve", "mars has xgb, ga, gridsearch, random"),
        ("tune tiny.onnx -o bad", "a record does not make sense"),
        ("tune tiny.onnx -o text", "text: is a file (records are a directory"),
        ("tune tiny.onnx -o records --trials 0", "option max_trials_global: 0 is not above 0"),
        ("tune tiny.onnx -o records --tuning-records none", "none: no such directory"),
        ("run none.tar", "File none.tar does not exist"),
        ("run .", "must be an archive"),
        ("run text", "Could not read model from archive text"),
        ("run net.tar -i none.npz", "none.npz: No such file"),
        ("run net.tar -i text", "is not an .npz file"),
        ("run net.tar -i x.npz", "shape (1, 3, 8, 9), expected (1, 3, 8, 8)"),
        ("run net.tar -i other.npz", "no such input (did you mean image?)"),
        ("run net.tar --outputs nowhere/y.npz", "nowhere/y.npz: No such file"),
    ],
)
def test_errors_are_told_as_tvmc_tells_them(
    arguments: str,
    message: str,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 4 and one line of stderr; `~` stands for a space."""
    monkeypatch.chdir(compiled)
    given = [argument.replace("~", " ") for argument in arguments.split()]
    if given[0] == "compile" and "-o" not in given:
        given += ["-o", "made.tar"]
    assert main(given) == 4
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith("Error: ") and "Traceback" not in said


def test_a_wrong_command_line_is_2(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compile", str(compiled / "net.onnx"), "--target-mars-set", "cores"])
    assert left.value.code == 2
    assert "'cores' is not FIELD=VALUE" in capsys.readouterr().err
    assert main([]) == 1


# -- in a process of its own -----------------------------------------------------------------------


def test_as_a_module_and_deployed_without_the_compiler(folder: Path) -> None:
    """TVM and mars_runtime load the library that a package holds."""
    model = imported_model(SEED, batch=2)
    inputs = model_inputs(model, SEED)
    onnx.save(model, "net.onnx")
    command = [sys.executable, "-m", "tvm_mars.tvmc", "compile", "--target", f"mars, {HOST}"]
    places = f"{ROOT}{os.pathsep}{ROOT / 'runtime'}"
    done = subprocess.run(
        [*command, "net.onnx", "-o", "net.tar"],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (expected,) = results(model, inputs, "--target=mars")
    np.savez("arrays.npz", image=inputs["image"], logits=expected)
    script = """
        import sys, tarfile
        import numpy as np
        import tvm, mars_runtime
        from tvm.contrib import graph_executor

        with tarfile.open("net.tar") as package:
            package.extractall("package")
        library = tvm.runtime.load_module("package/mod.so")
        graph = open("package/mod.json").read()
        executor = graph_executor.create(graph, library, tvm.cpu())
        executor.load_params(open("package/mod.params", "rb").read())
        arrays = np.load("arrays.npz")
        executor.set_input("image", arrays["image"])
        executor.run()
        np.testing.assert_array_equal(executor.get_output(0).numpy(), arrays["logits"])
        assert "tvm_mars" not in sys.modules
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "runtime")},
    )


# -- a tvmc that loads extensions ------------------------------------------------------------------


def test_the_extension_makes_mars_a_target(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The hook of upstream's tvmc, which the TVM of these tests lacks, by a stand-in of its class.

    It imports every module of a package ``tvm_extension`` in the directory that it is given, makes
    an object of each class that derives from ``TVMExtension``, and asks it for UMA backends.
    """
    stand_in = types.ModuleType("tvm.driver.tvmc.extensions")
    stand_in.TVMExtension = type("TVMExtension", (), {})
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(frontends, "ALL_FRONTENDS", [frontends.OnnxFrontend])
    monkeypatch.setattr(composite_target, "REGISTERED_CODEGEN", {})
    monkeypatch.setattr(
        "tvm_mars.tvmc.target.REGISTERED_CODEGEN", composite_target.REGISTERED_CODEGEN
    )
    monkeypatch.syspath_prepend(extension_directory())
    import tvm_extension.mars as loaded

    (found,) = [
        value
        for value in vars(loaded).values()
        if isinstance(value, type) and issubclass(value, stand_in.TVMExtension)
        if value is not stand_in.TVMExtension
    ]
    assert found().uma_backends() == []
    assert composite_target.get_codegen_names() == ["mars"]
    partition = composite_target.get_codegen_by_target("mars")["pass_pipeline"]
    onnx.save(imported_model(SEED, batch=1), "net.onnx")
    model = frontends.load_model("net.onnx")
    mod = partition(
        model.mod,
        model.params,
        mod_name="default",
        **{"arch": "mars-dense", "dump-offloads": "offloads.txt"},
    )
    assert "9 of 9 operators on MARS" in Path("offloads.txt").read_text()
    assert '"zero_skipping": false' in str(mod.attrs["mars.options"])
    for name in [name for name in sys.modules if name.startswith("tvm_extension")]:
        monkeypatch.delitem(sys.modules, name)


def extension_directory() -> str:
    import tvm_mars.tvmc

    (place,) = tvm_mars.tvmc.__path__
    return place
