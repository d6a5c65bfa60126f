"""The README's Python runs as it stands, and its figure is the machine's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("tvm")

from python_tests.float_models import float_image_model  # noqa: E402
from tvm_mars.onnx_export import to_onnx  # noqa: E402
from tvm_mars.zoo import load_digits  # noqa: E402

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
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


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3
