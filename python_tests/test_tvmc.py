"""``tvmc-mars``: TVM's command line, with MARS among its targets."""

from __future__ import annotations

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

from python_tests.onnx_models import ModelWriter, float_model, imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from tvm_mars import graph as reference
from tvm_mars.graph import Graph, evaluate
from tvm_mars.networks import mobilenet_v1, mobilenet_v2, resnet18, vgg16
from tvm_mars.onnx_export import to_onnx
from tvm_mars.tvmc import main
from tvm_mars.zoo import digits_split, load_digits

tvm = pytest.importorskip("tvm")
pytest.importorskip("tvm.driver.tvmc")

from tvm.driver.tvmc import composite_target, frontends  # noqa: E402

from tvm_mars.frontend.relay import import_model  # noqa: E402
from tvm_mars.frontend.relay.codegen import host_target  # noqa: E402

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
    (made / "text").write_text("no archive")
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
        ("tune net.onnx --target=mars,~llvm -o records", "tvmc tunes kernels that TVM generates"),
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
