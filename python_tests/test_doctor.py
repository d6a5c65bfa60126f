"""`mars doctor` says what is there, and never fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import attrs
import numpy as np
import pytest
from click.testing import CliRunner

from tvm_mars import doctor
from tvm_mars.cli import mars
from tvm_mars.doctor import PACKAGES, examine
from tvm_mars.report.doctor_text import print_findings

ROOT = Path(__file__).parents[1]


def text_of(found: doctor.Findings) -> str:
    file = io.StringIO()
    print_findings(found, file)
    return file.getvalue()


def test_command() -> None:
    result = CliRunner().invoke(mars, ["doctor"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert np.__version__ in result.stdout
    data = json.loads(CliRunner().invoke(mars, ["doctor", "--json"]).stdout)
    assert data["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert data["cores"] >= 1
    packages = {package["name"]: package for package in data["packages"]}
    assert packages["numpy"]["version"] == version("numpy")
    assert set(packages) == set(PACKAGES)


def test_it_tells_which_tvm() -> None:
    tvm = pytest.importorskip("tvm")
    found = examine()
    assert found.tvm == ("Relay" if hasattr(tvm, "relay") else "Relax")
    assert found.tvm_problem == ""


def test_every_extra_is_one_of_the_project() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("reads TOML")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for names, _, extra in PACKAGES.values():
        wanted = extras[extra] if extra else project["dependencies"]
        assert any(entry.startswith(name) for entry in wanted for name in names), names


def test_nothing_missing_makes_it_fail() -> None:
    """Without any package that can be left out, and with a TVM that does not import."""
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'tvm', 'torch', 'onnxruntime', 'matplotlib'}:\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from tvm_mars.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "TVM        none" in result.stdout
    assert "pip install '.[train]'" in result.stdout


def test_a_broken_tvm_is_part_of_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tvm" / "relax").mkdir(parents=True)
    (tmp_path / "tvm" / "__init__.py").write_text("raise OSError('libtvm.so is not there')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._import_problem("tvm") == "OSError: libtvm.so is not there"
    broken = attrs.evolve(
        examine(), tvm="Relax", tvm_problem="OSError: libtvm.so is not there", compiler=None
    )
    text = text_of(broken)
    assert "it does not import: OSError" in text
    assert "none: mars compile -o needs g++" in text


def test_a_host_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CPUINFO", Path("nowhere"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = examine()
    assert found.features == ()
    assert found.processor
    assert found.compiler is None


def test_caches_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.o").write_bytes(bytes(1000))
    (tmp_path / "two.o").write_bytes(bytes(24))
    monkeypatch.setattr(doctor, "CACHES", {"kernels": lambda: tmp_path, "off": lambda: None})
    assert examine().caches == (doctor.Cache("kernels", str(tmp_path), 2, 1024),)
