"""What is installed on this host, and what each part is for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from mars_runtime.cache import cache_folder

__all__ = ["CACHES", "PACKAGES", "Cache", "Findings", "Package", "examine"]

#: Packages by their module: the names of their distributions, what they are for, and the extra of
#: tvm-mars that installs them (nothing for those that it always needs).
PACKAGES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "numpy": (("numpy",), "arrays", ""),
    "attrs": (("attrs",), "values", ""),
    "cattrs": (("cattrs",), "values to and from JSON", ""),
    "click": (("click",), "the command line", ""),
    "rich": (("rich",), "tables and progress bars", ""),
    "llvmlite": (("llvmlite",), "machine code of the exact engine", ""),
    "onnx": (("onnx",), "reading and writing models", ""),
    "xgboost": (("xgboost-cpu", "xgboost"), "the cost model of mars tune", ""),
    "onnxruntime": (("onnxruntime",), "mars diff, mars zoo eval, the demo", "demo"),
    "sklearn": (("scikit-learn",), "images of the network digits", "demo"),
    "torch": (("torch",), "mars train, tvm_mars.qat", "train"),
    "torchao": (("torchao",), "MarsQATConfig", "train"),
    "brevitas": (("brevitas",), "its networks as a source", "brevitas"),
    "tensorboard": (("tensorboard",), "curves of mars train", "tensorboard"),
    "matplotlib": (("matplotlib",), "mars reproduce --plots", "plots"),
    "ray": (("ray",), "mars tune --runner ray", "ray"),
}

#: Where files are kept that are made again when they are missing, by what they are; None is off.
CACHES: dict[str, Callable[[], Path | None]] = {"machine code and lifted layers": cache_folder}

# Features of a processor that make 8-bit dot products fast, by their names in Linux.
_FEATURES = ("avx2", "avx_vnni", "avx512bw", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
_CPUINFO = Path("/proc/cpuinfo")
_PROBE_SECONDS = 120


@attrs.frozen
class Package:
    """A package: its version, None if it is missing; what for; the extra that installs it."""

    name: str
    version: str | None
    purpose: str
    extra: str


@attrs.frozen
class Cache:
    """A folder of files that are made again when they are missing: how many, and their bytes."""

    name: str
    path: str
    files: int
    bytes: int


@attrs.frozen(kw_only=True)
class Findings:
    """What was found.

    Parameters
    ----------
    tvm_mars : str or None
        Version; None if it runs from its sources.
    python, system : str
        Of this host.
    processor, features : str, tuple of str
        Its name, and which features that matter it has; empty where the system does not tell.
    cores : int
        Processors of this process.
    tvm : str
        ``Relax``, ``Relay`` or ``none``.
    tvm_version : str or None
        Of the distribution.
    tvm_problem : str
        Why it does not import; empty if it does, or is not there.
    compiler : str or None
        The C++ compiler that TVM links libraries with.
    """

    tvm_mars: str | None
    python: str
    system: str
    processor: str
    features: tuple[str, ...]
    cores: int
    tvm: str
    tvm_version: str | None
    tvm_problem: str
    compiler: str | None
    packages: tuple[Package, ...]
    caches: tuple[Cache, ...]

    def to_dict(self) -> dict[str, object]:
        """Give it as plain data for JSON."""
        return attrs.asdict(self)


def examine() -> Findings:
    """Look at this host. Nothing that is missing or broken makes it fail."""
    processor, flags = _processor()
    kind = _tvm_kind()
    affinity = getattr(os, "sched_getaffinity", None)
    return Findings(
        tvm_mars=_version("tvm-mars"),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor,
        features=tuple(name for name in _FEATURES if name in flags),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        tvm=kind,
        tvm_version=_version("apache-tvm", "hhb-tvm", "tvm"),
        tvm_problem="" if kind == "none" else _import_problem("tvm"),
        compiler=_compiler(),
        packages=tuple(
            Package(module, _version(*names) if _there(module) else None, purpose, extra)
            for module, (names, purpose, extra) in PACKAGES.items()
        ),
        caches=tuple(_caches()),
    )


def _version(*names: str) -> str | None:
    """Give the version of the first distribution that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of one that is half installed
        return False


def _tvm_kind() -> str:
    """Tell which IR the installed TVM has, without importing it."""
    if not _there("tvm"):
        return "none"
    spec = importlib.util.find_spec("tvm")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    for name, kind in (("relay", "Relay"), ("relax", "Relax")):
        if any((folder / name).is_dir() for folder in folders):
            return kind
    return "none"


def _import_problem(module: str) -> str:
    """Import a module in a process of its own, which may crash; give the last that it says."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if not found.returncode:
        return ""
    lines = found.stderr.strip().splitlines()
    return lines[-1] if lines else f"ends with {found.returncode}"


def _processor() -> tuple[str, set[str]]:
    """Give the processor's name and flags, as Linux has them."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    lines = (line.partition(":") for line in reversed(text.splitlines()))
    entries = {key.strip(): value.strip() for key, _, value in lines}  # the first processor's
    name = entries.get("model name") or platform.processor() or platform.machine()
    return name, set((entries.get("flags") or entries.get("Features") or "").split())


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _caches() -> Iterator[Cache]:
    """Measure the caches that are there."""
    for name, where in CACHES.items():
        folder = where()
        if folder is not None:
            files = [path for path in folder.rglob("*") if path.is_file()]
            yield Cache(name, str(folder), len(files), sum(map(_size, files)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone meanwhile
        return 0
