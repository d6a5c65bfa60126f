"""What may import what (DESIGN.md): the runtime stands alone, the core needs no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "runtime" / "mars_runtime"
CORE = [
    "mars_runtime",
    "tvm_mars.codegen",
    "tvm_mars.compiler",
    "tvm_mars.constraints",
    "tvm_mars.graph",
    "tvm_mars.networks",
    "tvm_mars.options",
    "tvm_mars.pack",
    "tvm_mars.ptq",
    "tvm_mars.schedule",
    "tvm_mars.skeleton",
]

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it, without those of its own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("module", CORE)
def test_core_imports_without_any_framework(module):
    blocked = ["tvm", "tvm_ffi", "torch", "onnx", "onnxruntime", "sklearn", "ray", "matplotlib"]
    script = BLOCK.format(blocked=blocked, modules=[module])
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def test_core_works_without_any_framework():
    """A network becomes a program and runs, with no TVM to be found."""
    script = BLOCK.format(blocked=["tvm", "tvm_ffi", "torch", "onnx"], modules=["tvm_mars"]) + (
        "from python_tests.small_networks import tiny_conv\n"
        "import mars_runtime, numpy as np\n"
        "from tvm_mars.compiler import NamedGraph, build\n"
        "from tvm_mars.graph import evaluate\n"
        "graph = tiny_conv()\n"
        "program = build([NamedGraph.of(graph)], mars_runtime.PRESETS['mars'])\n"
        "program = mars_runtime.Program.from_bytes(program.to_bytes())\n"
        "x = {'x0': np.ones((1, *graph.inputs[0].shape), graph.inputs[0].quantize.dtype)}\n"
        "np.testing.assert_array_equal(\n"
        "    mars_runtime.run(program, x)['y0'], evaluate(graph, x)[0])\n"
        "assert 'tvm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


def test_runtime_imports_with_numpy_and_attrs_alone():
    script = BLOCK.format(blocked=["tvm_mars", "tvm", "torch", "onnx"], modules=["mars_runtime"])
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: path.stem)
def test_runtime_imports_nothing_of_the_compiler(path):
    allowed = {"numpy", "attrs", "cattrs", "llvmlite", "tomli", "tomllib", *sys.stdlib_module_names}
    if path.stem == "tvm_bridge":
        allowed |= {"tvm", "tvm_ffi"}
    assert imported(path) <= allowed


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tvm_mars").rglob("*.py")),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_frameworks_are_imported_where_they_belong(path):
    place = path.relative_to(ROOT / "tvm_mars").as_posix()
    found = imported(path)
    if not place.startswith(("frontend/relax", "frontend/relay", "tvmc/")):
        lazy = place in {"__init__.py", "demo.py"} or place.startswith(("cli/", "zoo/", "report/"))
        assert lazy or not found & {"tvm", "tvm_ffi"}
    if not place.startswith(("qat/", "zoo/", "frontend/relax")):
        assert "torch" not in found


def test_a_stage_knows_only_those_before_it():
    """Graph, pack, schedule, codegen: no stage imports a later one."""
    order = ["graph", "pack", "schedule", "codegen", "compiler"]
    for place, stage in enumerate(order):
        base = ROOT / "tvm_mars" / stage
        files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        for path in files:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.level:
                    assert node.module.split(".")[0] not in order[place + 1 :], path
