"""Time from an ONNX file to a shared library: as a whole process, by stage, and peak memory.

Runs ``mars compile`` and, in turn with it, a process that only imports tvm and onnx; the difference
of their medians is what compiling costs beside the imports. Run:
``python benchmarks/compile_time.py [runs]``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx

from tvm_mars.networks import resnet50, vgg16
from tvm_mars.onnx_export import to_onnx


def seconds(command: list[str]) -> float:
    """Wall-clock time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak_megabytes(command: list[str]) -> float:
    """Most memory that a process had."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / 1000


def spread(times: list[float]) -> str:
    """Median with the range."""
    return f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    versions = ("apache-tvm", "onnx", "numpy")
    print(
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    )
    networks = (
        ("VGG16 32x32", vgg16(), runs),
        ("ResNet-50 224x224, 90 % zero group-sets", resnet50(0.1), max(1, runs // 3)),
    )
    for name, graph, count in networks:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "net.onnx"
            onnx.save(to_onnx(graph), model)
            print(f"\n{name}, {model.stat().st_size / 1e6:.1f} MB of ONNX, {count} runs in turn")
            measure(model, count)


def measure(model: Path, runs: int) -> None:
    """Measure one model."""
    mars = [sys.executable, "-c", "from tvm_mars.cli import main; raise SystemExit(main())"]
    command = [*mars, "compile", str(model), "-o", str(model.with_suffix(".so"))]
    imports = [sys.executable, "-c", "import tvm, onnx"]
    pairs = [(seconds(command), seconds(imports)) for _ in range(runs)]
    whole, bare = (list(column) for column in zip(*pairs, strict=True))
    beside = statistics.median(whole) - statistics.median(bare)
    print(f"mars compile, whole process   {spread(whole)}, {peak_megabytes(command):.0f} MB")
    print(f"import tvm, onnx              {spread(bare)}, {peak_megabytes(imports):.0f} MB")
    print(f"compiling beside the imports  {beside:.2f} s (difference of the medians)")
    stages = subprocess.run([*command, "--timing"], check=True, capture_output=True, text=True)
    print("stages of one run:", (stages.stdout + stages.stderr).strip(), sep="\n")


if __name__ == "__main__":
    main()
