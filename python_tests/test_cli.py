"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import mars_runtime
from mars_runtime import PRESETS, MarsArch, Program, isa, load_arch
from python_tests.small_networks import tiny_conv
from tvm_mars import networks, zoo
from tvm_mars.cli import _COMMANDS, main, mars
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import Graph
from tvm_mars.onnx_export import to_onnx
from tvm_mars.options import CHANNEL_ORDERS

ROOT = Path(__file__).resolve().parents[1]
START = [sys.executable, "-c", "import sys; from tvm_mars.cli import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'runtime'}"}


def call(*args: object) -> Result:
    return CliRunner().invoke(mars, [str(arg) for arg in args])


def spawn(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*START, *map(str, args)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    return networks.resnet20(0.1)


@pytest.fixture(scope="module")
def program(graph: Graph) -> Program:
    return build([NamedGraph.of(graph)], PRESETS["mars"])


@pytest.fixture
def path(program: Program, tmp_path: Path) -> Path:
    found = tmp_path / "net.mars"
    program.save(found)
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    found = tmp_path / "x.npz"
    pixels = np.random.default_rng(0).random((20, 3, 32, 32), np.float32)
    np.savez(found, x0=pixels)
    return found


# -- the overview ----------------------------------------------------------------------------------


def test_overview_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name, (_, text) in _COMMANDS.items():
        assert f"  {name} " in result.output
        assert text in result.output


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_teaches_by_example(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"mars {name}" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tvm_mars.cli import main\nmain(['--help'])\n"
        "print(sorted({'tvm', 'onnx', 'rich', 'cattrs'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"


def test_version() -> None:
    assert spawn("--version").stdout.startswith("mars")


@pytest.mark.parametrize(
    "name",
    [
        *("arch", "compile", "diff", "doctor", "explain", "profile", "reproduce", "train", "tune"),
        *("zoo list", "zoo info", "zoo eval"),
    ],
)
def test_what_prints_figures_prints_json(name: str) -> None:
    assert "--json" in call(*name.split(), "--help").output


def test_training_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from types import SimpleNamespace

    from tvm_mars import qat

    last = {"epoch": 3, "loss": 0.25, "test accuracy": 0.75, "zero group-sets": 0.5}
    made = SimpleNamespace(
        folder=tmp_path, history=[{}, last], finished=True, ranks=SimpleNamespace(first=True)
    )
    made.run = lambda: None
    monkeypatch.setattr(qat, "load_data", lambda path: (None, None))
    monkeypatch.setattr(qat, "Trainer", lambda *args, **options: made)
    result = call("train", "plain-w8a8", "--data", "nowhere", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"folder": str(tmp_path), **last}


@pytest.mark.parametrize("name", zoo.names())
def test_what_the_zoo_tells_has_80_columns(name: str) -> None:
    lines = call("zoo", "info", name).output.splitlines()
    assert any(line.startswith("layer ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_compile_as_json(graph: Graph, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    model = tmp_path / "net.onnx"
    model.write_bytes(to_onnx(graph).SerializeToString())
    args = ("compile", model, "--json", "--input-shapes", "x0:[1,3,32,32]")
    result = call(*args)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert {one["name"] for one in data["decisions"]} >= {"conv3_term0", "avgpool19"}
    assert all(one["offloaded"] for one in data["decisions"])
    assert sum(data["seconds"].values()) > 0
    assert call(*args, "--dump-offloads", "-").exit_code == 2


def test_searches_as_json(tmp_path: Path) -> None:
    from tvm_mars.tuner.api import tune

    work_dir = tmp_path / "tuned"
    made = tune(tiny_conv(), work_dir=work_dir, max_trials_global=8, cost_model="none", seed=0)
    result = call("tune", "-D", work_dir, "--show", "--json")
    assert result.exit_code == 0, result.stderr
    (one,) = json.loads(result.stdout)
    cycles = [record.cycles for record in made.records]
    assert (one["default"]["cycles"], one["best"]["cycles"]) == (cycles[0], min(cycles))
    (run,) = one["runs"]
    assert run["best_cost"] == [min(cycles[: i + 1]) for i in range(len(cycles))]


def completed(*words: str) -> list[str]:
    """What bash is offered in the place of the last word."""
    environment = {
        **ENVIRONMENT,
        "_MARS_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("mars", *words)),
        "COMP_CWORD": str(len(words)),
    }
    result = subprocess.run(START, env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_the_shell_completes() -> None:
    assert completed("pro") == ["profile"]
    assert completed("zoo", "e") == ["eval", "export"]
    assert completed("profile", "--tr") == ["--trace"]
    assert completed("reproduce", "fig1") == ["fig10", "fig11", "fig12"]
    environment = {**ENVIRONMENT, "_MARS_COMPLETE": "bash_source"}
    source = subprocess.run(START, env=environment, capture_output=True, text=True, check=True)
    assert "complete -o nosort -F _mars_completion mars" in source.stdout


# -- exit codes ------------------------------------------------------------------------------------


def test_wrong_command_lines_are_2() -> None:
    result = spawn("profil")
    assert result.returncode == 2
    assert "Did you mean 'profile'" in result.stderr
    assert spawn("profile").returncode == 2
    assert spawn("arch", "--set", "cores").returncode == 2
    assert spawn("arch", "--json", "--toml").returncode == 2
    assert spawn("compile", "net.onnx").returncode == 2
    shapes = spawn("compile", "net.onnx", "-o", "net.so", "--input-shapes", "x0:[1,3] y[2]")
    assert shapes.returncode == 2 and "'y[2]' is not NAME:[SIZE" in shapes.stderr


def test_errors_are_1_with_the_remedy_and_no_traceback(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mars"
    damaged.write_bytes(b"MARSPROG" + bytes(100))
    result = spawn("profile", damaged)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {damaged}: has format version 0")
    assert "compile the network again" in result.stderr
    assert "Traceback" not in result.stderr
    debugged = spawn("profile", damaged, "--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert debugged.stderr.splitlines()[-1] == result.stderr.strip()


def test_missing_files_are_1(path: Path, images: Path, tmp_path: Path) -> None:
    for args in (
        ("profile", "no.mars"),
        ("run", "no.mars", "--inputs", images, "-o", tmp_path / "y.npz"),
        ("run", "no.so", "--inputs", images, "-o", tmp_path / "y.npz"),
        ("run", path, "--inputs", "no.npz", "-o", tmp_path / "y.npz"),
        ("asm", "no.s", "-o", tmp_path / "x"),
        ("arch", "no.toml"),
        ("compile", "no.onnx", "-o", tmp_path / "x.so"),
    ):
        result = call(*args)
        assert result.exit_code == 1, args
        assert result.stderr.startswith("error: ")
        assert "no." in result.stderr
    unwritable = call("run", path, "--inputs", images, "-o", tmp_path / "no" / "y.npz")
    assert unwritable.exit_code == 1
    assert unwritable.stderr == f"error: {tmp_path / 'no' / 'y.npz'}: No such file or directory\n"


def test_an_interrupt_is_130(path: Path) -> None:
    code = (
        "import sys, mars_runtime.program as p\n"
        "def load(path): raise KeyboardInterrupt\n"
        "p.Program.load = load\n"
        "from tvm_mars.cli import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "profile", str(path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 130
    assert "error: interrupted" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind")
def test_a_closed_pipe_is_silent(path: Path) -> None:
    process = subprocess.Popen(
        [*START, "disasm", str(path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()


def test_main_gives_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch", "--list"]) == 0
    assert main(["arch", "nowhere"]) == 1
    assert main(["nothing"]) == 2
    assert "error: " in capsys.readouterr().err


def test_tvmc_needs_a_tvm_that_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    from tvm_mars import tvmc

    if tvmc._is_there():
        pytest.skip("this TVM has tvmc")
    assert tvmc.main(["compile", "net.onnx"]) == tvmc.NO_TVMC
    assert "use mars compile, mars tune and mars run" in capsys.readouterr().err


# -- run -------------------------------------------------------------------------------------------


def test_run_gives_what_the_runtime_gives(
    program: Program, path: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "y.npz"
    result = call("run", path, "--inputs", images, "-o", output)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "y0 (20, 10)" in result.stderr
    with np.load(images) as given, np.load(output) as found:
        assert found.files == ["y0"]
        expected = mars_runtime.run(program, dict(given))
        assert found["y0"].dtype == expected["y0"].dtype
        assert np.array_equal(found["y0"], expected["y0"])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["net.mars", "x.npz", "y.npz"]


def test_run_in_parts_gives_the_same(
    path: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", path, "--inputs", images, "-o", tmp_path / "y.npz").exit_code == 0
    monkeypatch.setattr("tvm_mars.cli.running.CHUNK", 7)
    assert call("run", path, "--inputs", images, "-o", tmp_path / "z.npz").exit_code == 0
    with np.load(tmp_path / "y.npz") as y, np.load(tmp_path / "z.npz") as z:
        assert np.array_equal(y["y0"], z["y0"])


def test_eval_counts_what_the_machine_classifies(path: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    program = mars_runtime.Program.load(path)
    given = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) / np.float32(255)
    logits = mars_runtime.run(program, {"x0": given}, engine="machine")["y0"]
    labels = logits.argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    data = tmp_path / "images.npz"
    np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    for options in ((), ("--batch", "4", "--engine", "layers"), ("--engine", "machine")):
        found = json.loads(call("eval", path, "--data", data, "--json", *options).stdout)
        assert (found["images"], found["right"]) == (11, 8)
        assert found["seconds"] > 0 and found["accuracy"] == 8 / 11
    told = call("eval", path, "--data", data, "--images", "3")
    assert told.stdout.startswith("3 images, accuracy 0.00%, ")
    refused = call("eval", path, "--data", data, "--engine", "fast")
    assert refused.exit_code == 2 and "layers" in refused.stderr


def test_eval_takes_networks_of_the_zoo(tmp_path: Path) -> None:
    refused = call("eval", "digit", "--data", "images.npz")
    assert refused.exit_code == 1 and "digits" in refused.stderr


def test_run_takes_inputs_by_a_short_name(path: Path, images: Path, tmp_path: Path) -> None:
    result = call("run", path, "-i", images, "-o", tmp_path / "y.npz")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((1, 3, 32, 32), np.float32)}, "takes x0"),
        ({}, "missing ['x0']"),
        ({"x0": np.zeros((1, 3, 32, 31), np.float32)}, "expected (N, 3, 32, 32)"),
        ({"x0": np.zeros((1, 3, 32, 32))}, "float64"),
        ({"x0": np.full((1, 3, 32, 32), np.nan, np.float32)}, "NaN"),
        ({"x0": np.float32(1)}, "shape ()"),
    ],
)
def test_run_refuses_wrong_arrays(
    path: Path, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    given = tmp_path / "x.npz"
    np.savez(given, **arrays)
    result = call("run", path, "--inputs", given, "-o", tmp_path / "y.npz")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "y.npz").exists()


def test_run_unpickles_nothing(path: Path, tmp_path: Path) -> None:
    given = tmp_path / "x.npz"
    np.savez(given, x0=np.array([{}], object), allow_pickle=True)
    plain = tmp_path / "x.npy"
    np.save(plain, np.zeros(3))
    text = tmp_path / "x.txt"
    text.write_text("x0")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(given.read_bytes()[:100])
    for bad in (given, plain, text, cut):
        result = call("run", path, "--inputs", bad, "-o", tmp_path / "y.npz")
        assert result.exit_code == 1
        assert str(bad) in result.stderr
        assert "allow_pickle" not in result.stderr


def test_run_names_operators_on_the_cpu(program: Program, images: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial.mars"
    attrs.evolve(program, host_operators=("softmax",)).save(partial)
    result = call("run", partial, "--inputs", images, "-o", tmp_path / "y.npz")
    assert result.exit_code == 1
    assert "softmax" in result.stderr


# -- profile ---------------------------------------------------------------------------------------


def test_profile_prints_tables(path: Path) -> None:
    result = call("profile", path)
    assert result.exit_code == 0
    for word in ("Time by layer", "Work by layer", "Energy of one image", "Totals", "TOPS/W"):
        assert word in result.stdout


def test_profile_as_json(program: Program, path: Path) -> None:
    result = call("profile", path, "--json", "--no-baseline")
    data = json.loads(result.stdout)
    cycles = mars_runtime.simulate(program.regions[0], program.arch).cycles
    assert data["total"]["cycles"] == cycles
    assert data["total"]["speedup"] is None


def test_profile_writes_a_trace(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    assert call("profile", path, "--no-baseline", "--trace", trace).exit_code == 0
    assert {e["ph"] for e in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}


def test_profile_in_a_plain_locale(path: Path) -> None:
    result = subprocess.run(
        [*START, "profile", str(path), "--no-baseline"],
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0
    assert result.stdout.isascii()


# -- asm, disasm -----------------------------------------------------------------------------------


def test_disasm_and_asm_give_the_same_program(path: Path, tmp_path: Path) -> None:
    text, again = tmp_path / "net.s", tmp_path / "again.mars"
    assert call("disasm", path, "-o", text).exit_code == 0
    assert call("disasm", path).stdout == text.read_text()
    assert call("asm", text, "--program", path, "-o", again).exit_code == 0
    assert again.read_bytes() == path.read_bytes()


def test_disasm_marks_layers(program: Program, path: Path) -> None:
    lines = call("disasm", path).stdout.splitlines()
    assert lines[0] == "# region 0: x0 -> y0"
    assert lines[2] == "# conv0 (conv, 9 of 9 group-sets)"
    marks = [line.split()[1] for line in lines[1:] if line.startswith("# ")]
    assert marks == [layer.name for layer in program.regions[0].layers]
    # Each mark stands before the layer's first instruction.
    instructions = 0
    starts = []
    for line in lines[1:]:
        if line.startswith("# "):
            starts.append(instructions)
        instructions += bool(line) and not line.startswith("#")
    assert starts == [layer.start for layer in program.regions[0].layers]
    assert instructions == len(program.regions[0].instructions)


def test_asm_alone_gives_bare_instructions(program: Program, path: Path, tmp_path: Path) -> None:
    text, code = tmp_path / "net.s", tmp_path / "net.bin"
    call("disasm", path, "-o", text)
    assert call("asm", text, "-o", code).exit_code == 0
    assert code.read_bytes() == program.regions[0].code


def edited(path: Path, tmp_path: Path, edit: Callable[[str], str]) -> tuple[Result, Path]:
    text, changed = tmp_path / "net.s", tmp_path / "changed.mars"
    text.write_text(edit(call("disasm", path).stdout))
    return call("asm", text, "--program", path, "-o", changed), changed


def test_asm_changes_a_program(path: Path, tmp_path: Path) -> None:
    longer, changed = edited(path, tmp_path, lambda text: text.replace("HALT", "SYNC\nHALT"))
    assert longer.exit_code == 0
    assert "one row" in longer.stderr
    found = Program.load(changed).regions[0]
    assert isinstance(found.instructions[-2], isa.Sync)
    assert found.layers == ()
    assert call("profile", changed).exit_code == 0


def test_asm_refuses_what_is_no_program(path: Path, tmp_path: Path) -> None:
    result, changed = edited(path, tmp_path, lambda text: text.replace("HALT", "SYNC"))
    assert result.exit_code == 1
    assert "does not end in HALT" in result.stderr
    assert not changed.exists()
    result, changed = edited(path, tmp_path, lambda text: text.replace("PREPARE", "PREPAR", 1))
    assert result.exit_code == 1
    assert "line 4" in result.stderr
    assert "did you mean PREPARE" in result.stderr
    binary = tmp_path / "binary.s"
    binary.write_bytes(b"\xff\xfe")
    assert "is no text" in call("asm", binary, "-o", tmp_path / "x").stderr


def test_regions_are_chosen(program: Program, tmp_path: Path) -> None:
    path, text, again = tmp_path / "two.mars", tmp_path / "one.s", tmp_path / "again.mars"
    other = build([NamedGraph.of(networks.resnet20(0.5))], PRESETS["mars"]).regions
    attrs.evolve(program, regions=(*program.regions, *other)).save(path)
    assert call("disasm", path, "--region", 1, "-o", text).exit_code == 0
    assert isa.encode_all(isa.assemble(text.read_text())) == other[0].code
    assert call("asm", text, "--program", path, "--region", 1, "-o", again).exit_code == 0
    assert again.read_bytes() == path.read_bytes()
    assert call("disasm", path).stdout.count("# region") == 2
    assert call("disasm", path, "--region", 2).exit_code == 1
    ambiguous = call("asm", text, "--program", path, "-o", again)
    assert ambiguous.exit_code == 2
    assert "--region" in ambiguous.stderr
    assert call("asm", text, "--region", 0, "-o", again).exit_code == 2


# -- arch, ops -------------------------------------------------------------------------------------


def test_arch_describes_every_field() -> None:
    text = call("arch").stdout
    data = json.loads(call("arch", "--json").stdout)
    assert max(map(len, text.splitlines())) <= 80
    assert [*data] == [field.name for field in attrs.fields(MarsArch)]
    for name, entry in data.items():
        assert f"\n{name} " in f"\n{text}"
        assert entry["assumed"] == entry["source"].startswith("[A]")
    assert data["cores"]["value"] == 4
    assert "    assumed: fitted to Table I\n" in text
    assert "core_clock_mhz               100 MHz\n" in text


def test_arch_takes_changes_and_files(tmp_path: Path) -> None:
    data = json.loads(call("arch", "mars-80b", "--set", "cores=2", "--json").stdout)
    assert data["cores"]["value"] == 2
    assert data["offchip_bits_per_cycle"]["value"] == 80
    file = tmp_path / "mine.toml"
    changes = {"cores": "3", "overlap": "full", "dual_4bit_cells": "true", "macro_access_pj": "1.5"}
    sets = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    file.write_text(call("arch", "--toml", *sets).stdout)
    assert load_arch(file) == load_arch("mars", changes)
    assert "did you mean cores" in call("arch", "--set", "coers=2").stderr


def test_arch_lists_presets() -> None:
    lines = call("arch", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "zero_skipping=false" in lines[list(PRESETS).index("mars-dense")]


def test_ops_prints_the_limits() -> None:
    from tvm_mars.constraints import CONSTRAINTS, supported_ops

    result = call("ops")
    assert result.stdout.split() == supported_ops().split()
    assert all(entry.text in supported_ops() for entry in CONSTRAINTS)
    assert max(map(len, result.stdout.splitlines())) <= 80


# -- compile ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_model(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tvm.relax")
    onnx = pytest.importorskip("onnx")
    from tvm_mars.onnx_export import to_onnx

    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    onnx.save(to_onnx(graph), path)
    return path


def test_compile_run_and_profile(onnx_model: Path, images: Path, tmp_path: Path) -> None:
    library, program = tmp_path / "net.so", tmp_path / "net.mars"
    args = ("compile", onnx_model, "-o", library, "--program", program)
    compiled = spawn(*args, "--dump-offloads", "-", "--timing", "--set", "cores=2")
    assert compiled.returncode == 0, compiled.stderr
    assert "operators on MARS" in compiled.stdout
    assert "CPU " not in compiled.stdout
    assert "partition" in compiled.stderr
    for path in (library, program):
        assert f"wrote {path}: " in compiled.stderr
    loaded = Program.load(program)
    assert loaded.arch == load_arch("mars", {"cores": "2"})
    assert loaded.host_operators == ()

    results = []
    for model in (library, program):
        output = tmp_path / f"{model.suffix[1:]}.npz"
        ran = spawn("run", model, "--inputs", images, "-o", output)
        assert ran.returncode == 0, ran.stderr
        with np.load(output) as found:
            assert found.files == ["y0"]
            results.append(found["y0"])
    assert np.array_equal(*results)
    assert "2 cores" in call("profile", program, "--no-baseline").stdout


def test_compile_refuses_what_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("tvm.relax")
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"\xff" * 64)
    result = call("compile", wrong, "-o", tmp_path / "x.so")
    assert result.exit_code == 1
    assert str(wrong) in result.stderr
    # A wrong machine is said first.
    result = call("compile", wrong, "-o", tmp_path / "x.so", "--arch", "marz")
    assert "did you mean mars" in result.stderr


@pytest.fixture
def quantized_operators() -> Any:
    """A model in ONNX Runtime's other format, whose operators TVM does not import."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    numbers = {"scale": (onnx.TensorProto.FLOAT, 0.1), "zero": (onnx.TensorProto.UINT8, 0)}
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, 4, 4]) for name in "xy"
    ]
    operands = ["x", "scale", "zero", "x", "scale", "zero", "scale", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", operands, ["y"])],
        "net",
        ports[:1],
        ports[1:],
        [helper.make_tensor(name, kind, [], [value]) for name, (kind, value) in numbers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.filterwarnings("ignore")
def test_compile_says_what_to_do_with_what_tvm_does_not_import(
    quantized_operators: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tvm.relax")
    model, empty = tmp_path / "qop.onnx", tmp_path / "empty.onnx"
    model.write_bytes(quantized_operators.SerializeToString())
    empty.write_bytes(b"")
    result = call("compile", model, "-o", tmp_path / "x.so")
    assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
    assert "QLinearMatMul" in result.stderr and "DequantizeLinear" in result.stderr
    result = call("compile", empty, "-o", tmp_path / "x.so")
    assert result.exit_code == 1 and "holds no operator" in result.stderr


def test_a_library_needs_a_folder_and_a_compiler(
    onnx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere" / "x.so"
    result = call("compile", onnx_model, "-o", nowhere)
    assert result.stderr == f"error: {nowhere}: No such file or directory\n"
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("compile", onnx_model, "-o", tmp_path / "x.so")
    assert result.exit_code == 1 and "install g++" in result.stderr


def test_run_says_that_a_model_is_to_be_compiled(
    onnx_model: Path, images: Path, tmp_path: Path
) -> None:
    result = call("run", onnx_model, "--inputs", images, "-o", tmp_path / "y.npz")
    assert result.exit_code == 1 and f"mars compile {onnx_model}" in result.stderr


def test_choices_are_those_that_the_library_takes():
    """They are written twice, for importing the library would slow down every --help."""
    commands = [mars.get_command(click.Context(mars), name) for name in ("compile", "run")]
    offered = {
        option.name: tuple(option.type.choices)
        for command in commands
        for option in command.params
        if isinstance(option.type, click.Choice)
    }
    assert offered["channel_order"] == CHANNEL_ORDERS
    assert offered["engine"] == mars_runtime.ENGINES
