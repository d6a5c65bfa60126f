"""The tutorials run as they stand, warnings being errors; each where what it needs is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "tutorials").glob("[0-9]*.py"))
# TVM 0.16 itself uses what ONNX has deprecated.
IGNORED = {"07_relay_and_tvmc": ("-W", "ignore::DeprecationWarning")}
RELAX, RELAY = "tvm with Relax", "tvm with Relay"
NEEDS = {
    "01_run_a_zoo_network": (RELAX, "onnxruntime", "sklearn"),
    "02_port_a_cnn_from_pytorch": (RELAX, "torch", "onnxruntime", "sklearn"),
    "03_port_a_quantized_network": (RELAX, "onnxruntime"),
    "04_read_the_instructions": (),
    "05_explore_architectures": ("matplotlib",),
    "06_extend_mars": (),
    "07_relay_and_tvmc": (RELAY, "sklearn"),
    "08_port_from_brevitas": (RELAX, "brevitas", "sklearn"),
}


def installed(name: str) -> bool:
    if name not in (RELAX, RELAY):
        return importlib.util.find_spec(name) is not None
    if importlib.util.find_spec("tvm") is None:
        return False
    return (importlib.util.find_spec("tvm.relay") is not None) == (name == RELAY)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    for name in NEEDS[path.stem]:
        if not installed(name):
            pytest.skip(f"needs {name}")
    command = [sys.executable, "-W", "error", *IGNORED.get(path.stem, ()), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_begins_with_a_title(path: Path) -> None:
    """As a gallery takes it: a title, underlined, in the docstring; then cells."""
    text = path.read_text(encoding="utf-8")
    found = re.match(r'"""\n(.+)\n(=+)\n\n', text)
    assert found and len(found[1]) == len(found[2])
    assert "\n# %%\n" in text
