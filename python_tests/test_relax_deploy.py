"""Every documented way to compile and to load what was compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import mars_runtime
from mars_runtime.errors import InputError, OptionError, ProgramError
from python_tests.onnx_models import imported_model, model_inputs
from python_tests.random_graphs import random_graph, random_inputs
from tvm_mars.onnx_export import to_onnx

tvm = pytest.importorskip("tvm")
tomllib = pytest.importorskip("tomllib")  # CPython 3.11 has it, as has TVM with Relax

import tvm_mars  # noqa: E402
from tvm_mars.frontend.relax.api import CompiledModel, import_model  # noqa: E402
from tvm_mars.frontend.relax.exported import load_library  # noqa: E402

ROOT = Path(__file__).parents[1]
SEED = 3


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return imported_model(SEED)


@pytest.fixture(scope="module")
def inputs(model: onnx.ModelProto) -> dict[str, Any]:
    return model_inputs(model, SEED, images=3)


@pytest.fixture(scope="module")
def compiled(model: onnx.ModelProto) -> CompiledModel:
    return tvm_mars.compile(model)


@pytest.fixture(scope="module")
def expected(compiled: CompiledModel, inputs: dict[str, Any]) -> Any:
    return compiled.run(inputs)["logits"]


def run(executable: Any, inputs: dict[str, Any]) -> Any:
    machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values())).numpy()


def python(code: str, *arguments: str, path: tuple[str, ...] = (), **environment: str) -> str:
    """Run code in a fresh process."""
    places = [*path, str(ROOT), str(ROOT / "runtime")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.anchor,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A directory that makes the packages look installed, with their entry points."""
    info = tmp_path / "site" / "tvm_mars-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tvm-mars\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["tvm.backends"].items()
    lines = ["[tvm.backends]", *(f"{name} = {value}" for name, value in entries)]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return str(info.parent)


# -- ways to compile -------------------------------------------------------------------------------


def test_partition_and_run_codegen(
    model: onnx.ModelProto, inputs: dict[str, Any], expected: Any
) -> None:
    mod = tvm_mars.partition_for_mars(import_model(model), mod_name="net")
    regions = [f for _, f in mod.functions_items() if f.attrs and "Codegen" in f.attrs]
    assert [str(f.attrs["Codegen"]) for f in regions] == ["mars"]
    assert [str(f.attrs["global_symbol"]) for f in regions] == ["mars_net_0"]
    mod = tvm.relax.transform.RunCodegen()(mod)
    np.testing.assert_array_equal(run(tvm.compile(mod, "llvm"), inputs), expected)


def test_options_of_run_codegen_win(model: onnx.ModelProto) -> None:
    from tvm_mars.frontend.relax.codegen import collect_programs

    mod = tvm_mars.partition_for_mars(import_model(model), arch="mars-80b")
    with collect_programs() as programs:
        tvm.relax.transform.RunCodegen()(mod)
        tvm.relax.transform.RunCodegen({"mars": {"arch": "mars-dense"}})(mod)
    assert [program.arch.name for program in programs] == ["mars-80b", "mars-dense"]


def test_pipeline_by_name(model: onnx.ModelProto, inputs: dict[str, Any], expected: Any) -> None:
    target = tvm.target.Target("mars")
    assert target.kind.name == "llvm" and "mars" in target.keys
    executable = tvm.compile(import_model(model), target=target, relax_pipeline="mars")
    np.testing.assert_array_equal(run(executable, inputs), expected)


def test_pipeline_with_options(
    model: onnx.ModelProto, inputs: dict[str, Any], expected: Any
) -> None:
    pipeline = tvm.relax.get_pipeline("mars", arch="mars-dense")
    executable = tvm.compile(import_model(model), "llvm", relax_pipeline=pipeline)
    np.testing.assert_array_equal(run(executable, inputs), expected)


@pytest.mark.parametrize("generated", [False, True])
def test_a_partitioned_module_keeps_its_options(model: onnx.ModelProto, generated: bool) -> None:
    mod = tvm_mars.partition_for_mars(import_model(model), arch="mars-80b")
    if generated:
        mod = tvm.relax.transform.RunCodegen()(mod)
    for compiling in (
        lambda: tvm.relax.get_pipeline("mars", arch="mars-dense")(mod),
        lambda: tvm_mars.compile(mod, arch="mars-dense"),
        lambda: tvm_mars.offload_report(mod, arch="mars-dense"),
    ):
        with pytest.raises(OptionError, match="partitioned for mars-80b, not for mars-dense"):
            compiling()
    with pytest.raises(OptionError, match=r"option min_macs: .* for 0, not for 5"):
        tvm_mars.partition_for_mars(mod, min_macs=5)
    for opts in ({}, {"arch": "mars-80b"}):
        assert tvm.compile(mod, "llvm", relax_pipeline=tvm.relax.get_pipeline("mars", **opts))
    if not generated:
        assert tvm_mars.compile(mod).program.arch.name == "mars-80b"


@pytest.mark.parametrize("kind", ["path", "text", "model", "module"])
def test_one_call_takes(
    kind: str, model: onnx.ModelProto, inputs: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    sources = {"path": path, "text": str(path), "model": model, "module": import_model(model)}
    compiled = tvm_mars.compile(sources[kind], target="mars", arch="mars-dense")
    np.testing.assert_array_equal(compiled.run(inputs)["logits"], expected)
    assert compiled.program is not None and compiled.program.arch.name == "mars-dense"
    assert list(compiled.timings) == ["import", "partition", "program", "build"]


def test_the_program_runs_alone(
    compiled: CompiledModel, inputs: dict[str, Any], expected: Any
) -> None:
    assert compiled.program is not None
    result = mars_runtime.run(compiled.program, inputs)
    np.testing.assert_array_equal(result["logits"], expected)


def test_batches_of_any_size(compiled: CompiledModel, expected: Any) -> None:
    for images in (1, 2, 5):
        inputs = model_inputs(imported_model(SEED), SEED, images)
        assert compiled.run(inputs)["logits"].shape == (images, 10)


def test_batch_of_one_size() -> None:
    model = imported_model(SEED, batch=2)
    compiled = tvm_mars.compile(model)
    wanted = tvm_mars.compile(imported_model(SEED))
    inputs = model_inputs(model, SEED, 2)
    np.testing.assert_array_equal(compiled.run(inputs)["logits"], wanted.run(inputs)["logits"])
    with pytest.raises(InputError, match=r"expected \(2, 3, "):
        compiled.run(model_inputs(model, SEED, 3))


# -- bad input -------------------------------------------------------------------------------------


def test_bad_inputs_are_typed_errors(compiled: CompiledModel, inputs: dict[str, Any]) -> None:
    (image,) = inputs.values()
    with pytest.raises(InputError, match="input image: missing"):
        compiled.run({})
    with pytest.raises(InputError, match="did you mean image"):
        compiled.run({"images": image})
    with pytest.raises(InputError, match="shape"):
        compiled.run({"image": image[:, :2]})
    with pytest.raises(InputError, match="dtype float64"):
        compiled.run({"image": image.astype(np.float64)})
    with pytest.raises(InputError, match="NaN"):
        compiled.run({"image": np.where(image > 1, np.nan, image).astype(np.float32)})


def test_bad_sources_and_targets(tmp_path: Path, model: onnx.ModelProto) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model at all")
    with pytest.raises(InputError, match=r"bad\.onnx"):
        tvm_mars.compile(tmp_path / "bad.onnx")
    with pytest.raises(InputError, match="No such file"):
        tvm_mars.compile(tmp_path / "missing.onnx")
    with pytest.raises(OptionError, match="no TVM target"):
        tvm_mars.compile(model, target="no such target")
    with pytest.raises(mars_runtime.UnsupportedError, match="a dict"):
        tvm_mars.compile({})


# -- fresh processes -------------------------------------------------------------------------------

LOAD = """
    import sys
    import mars_runtime
    import tvm
    import numpy as np
    data = np.load(sys.argv[2])
    module = tvm.runtime.load_module(sys.argv[1])
    machine = tvm.relax.VirtualMachine(module, tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(data["image"])).numpy()
    assert np.array_equal(result, data["expected"])
    assert "tvm_mars" not in sys.modules
    try:
        machine["main"](tvm.runtime.tensor(data["image"] * np.float32("nan")))
    except mars_runtime.InputError as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("order", ["runtime first", "tvm first"])
def test_library_in_a_fresh_process(
    order: str,
    compiled: CompiledModel,
    inputs: dict[str, Any],
    expected: Any,
    tmp_path: Path,
    installed: str,
) -> None:
    library, data = tmp_path / "net.so", tmp_path / "data.npz"
    compiled.export_library(library)
    np.savez(data, expected=expected, **inputs)
    # The runtime alone: the compiler would register it as well.
    (Path(installed) / "tvm_mars-0.dist-info" / "entry_points.txt").write_text(
        "[tvm.backends]\nmars_runtime = mars_runtime.tvm_bridge:register\n"
    )
    code = LOAD if order == "runtime first" else LOAD.replace("import sys\n", "import sys, tvm\n")
    out = python(code, str(library), str(data), path=(installed,))
    assert out == "refused: input image: holds NaN\n"


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_a_damaged_library_is_an_error(compiled: CompiledModel, tmp_path: Path) -> None:
    """Loading the part of a library that is there would end the process."""
    whole, damaged = tmp_path / "net.so", tmp_path / "damaged.so"
    compiled.export_library(whole)
    data = whole.read_bytes()
    load_library(whole)
    for part, problem in (
        (data[: len(data) // 2], "is truncated: .* bytes of at least"),
        (data[:40], "is truncated: 40 bytes of at least 64"),
        (b"", "is empty"),
        (b"no library" * 100, "is no library"),
    ):
        damaged.write_bytes(part)
        with pytest.raises(ProgramError, match=f"damaged.so: {problem}.*mars compile"):
            load_library(damaged)
    with pytest.raises(InputError, match=r"missing\.so: cannot be read"):
        load_library(tmp_path / "missing.so")


def test_the_library_holds_the_weights_once(tmp_path: Path) -> None:
    """RunCodegen lists a region's constants for the library as well; the program is enough."""
    graph = random_graph(5, native=True)
    compiled = tvm_mars.compile(to_onnx(graph))
    compiled.export_library(tmp_path / "net.so")
    assert compiled.program is not None
    size = (tmp_path / "net.so").stat().st_size
    assert size < 60_000 + 1.4 * len(compiled.program.to_bytes())
    assert compiled.run(random_inputs(graph, 1))


@pytest.mark.parametrize("first", ["tvm", "tvm_mars"])
def test_import_registers_in_either_order(first: str, installed: str) -> None:
    second = {"tvm": "tvm_mars", "tvm_mars": "tvm"}[first]
    out = python(
        f"""
        import {first}
        import {second}
        import tvm_ffi
        print(tvm_ffi.get_global_func("relax.ext.mars", allow_missing=True) is not None)
        print(tvm.target.Target("mars").kind.name, "mars" in tvm.relax.pipeline.PIPELINE_MAP)
        """,
        path=(installed,) if first == "tvm_mars" else (),
    )
    assert out.split() == ["True", "llvm", "True"]


@pytest.mark.parametrize("first", ["tvm_mars.compile", "tvm_mars.frontend.relax"])
def test_tvm_may_come_behind_the_frontend(first: str, installed: str) -> None:
    """TVM calls the entry point while the frontend that imports it is half imported."""
    module, _, name = first.rpartition(".")
    out = python(
        f"""
        import warnings
        warnings.simplefilter("error")  # TVM warns of an entry point that fails
        from {module} import {name}
        import tvm
        print(tvm.target.Target("mars").kind.name, "mars" in tvm.relax.pipeline.PIPELINE_MAP)
        """,
        path=(installed,),
    )
    assert out.split() == ["llvm", "True"]


def test_importing_the_package_needs_no_tvm() -> None:
    out = python("import sys, tvm_mars; print('tvm' in sys.modules, dir(tvm_mars))")
    assert out.startswith("False") and "compile" in out


def test_programs_do_not_depend_on_hash_seeds(tmp_path: Path, model: onnx.ModelProto) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    code = """
        import hashlib, sys, tvm_mars
        program = tvm_mars.compile(sys.argv[1]).program
        print(hashlib.sha256(program.to_bytes()).hexdigest())
    """
    digests = {python(code, str(tmp_path / "net.onnx"), PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert len(digests) == 1
