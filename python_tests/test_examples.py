"""The examples of docstrings and of the page on the Python interface run as they stand."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
FOLDERS = {"tvm_mars": ROOT / "tvm_mars", "mars_runtime": ROOT / "runtime" / "mars_runtime"}
MODULES = sorted(
    ".".join((package, *path.relative_to(folder).with_suffix("").parts))
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FUNCTIONS = [
    name if "." in name else f"tvm_mars.{name}"
    for name in re.findall(r"^\.\. autofunction:: (.+)$", API.read_text(), re.MULTILINE)
]


def imported(name: str) -> object:
    """Import a module; one whose framework is not installed skips the test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in FOLDERS or not missing:
            raise
        pytest.skip(f"needs {missing}")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(imported(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


def test_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm.relax")
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(API), module_relative=False)
    assert found.attempted > 10 and not found.failed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_an_example(name: str) -> None:
    package, _, function = name.rpartition(".")
    try:
        text = inspect.getdoc(getattr(importlib.import_module(package), function)) or ""
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    called = re.search(rf"\b{re.escape(name)}\(", API.read_text())
    assert ">>> " in text or called, name
