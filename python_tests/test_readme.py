"""The README's Python and its way to a first profile run as they stand; all commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("tvm")

from python_tests.float_models import float_image_model  # noqa: E402
from tvm_mars.cli import mars  # noqa: E402
from tvm_mars.onnx_export import to_onnx  # noqa: E402
from tvm_mars.zoo import load_digits  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "import torch" in BLOCKS[number]:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    onnx.save(to_onnx(load_digits()), "net.onnx")
    onnx.save(float_image_model(), "float.onnx")
    names: dict[str, Any] = {"images": np.zeros((2, 1, 16, 16), np.float32)}
    exec(BLOCKS[number], names)
    figure = re.search(r"# ([\d,]+) core cycles", BLOCKS[number])
    if figure:
        assert capsys.readouterr().out.splitlines()[-1] == figure[1].replace(",", "")


def commands(text: str) -> list[list[str]]:
    """Give the arguments of the calls of ``mars`` in a page's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and Path(line[0]).name == "mars"]


def test_a_network_of_ones_own_is_three_commands_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(float_image_model(), "float.onnx")
    np.savez("images.npz", image=np.random.default_rng(0).random((64, 1, 16, 16), np.float32))
    (block,) = re.findall(
        r"^```sh\n(\.venv/bin/mars quantize.*?```)", README, re.DOTALL | re.MULTILINE
    )
    for arguments in (calls := commands(f"```sh\n{block}")):
        result = CliRunner().invoke(mars, arguments)
        assert result.exit_code == 0, result.stderr
    assert [arguments[0] for arguments in calls] == ["quantize", "compile", "profile"]
    assert "Time by layer" in result.stdout


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, *arguments in commands(page.read_text(encoding="utf-8")):
        command = mars.get_command(None, name)
        while isinstance(command, click.Group):
            command = command.get_command(None, arguments.pop(0))
        assert command is not None, name
        command.make_context(name, arguments)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3
