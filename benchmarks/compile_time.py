"""Time from an ONNX file to a shared library: as a whole process, by stage, and peak memory.

Runs ``mars compile`` and, in turn with it, a process that only imports tvm and onnx; the difference
of their medians is what compiling costs beside the imports. The networks grow from ResNet-20 for
32x32 images to ResNet-50 for 224x224, 90 % of whose group-sets are zero. Run:
``python benchmarks/compile_time.py [runs]``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from tvm_mars.graph import Graph
from tvm_mars.networks import mobilenet_v1, resnet18, resnet20, resnet50, vgg16
from tvm_mars.onnx_export import to_onnx

DENSITY = 0.1
NETWORKS: Mapping[str, Callable[[], Graph]] = {
    "ResNet-20, 32": lambda: resnet20(DENSITY),
    "VGG16, 32": vgg16,
    "ResNet-18, 32": lambda: resnet18(DENSITY),
    "MobileNet v1, 224": lambda: mobilenet_v1(DENSITY, size=224),
    "ResNet-18, 224": lambda: resnet18(DENSITY, size=224),
    "ResNet-50, 224": lambda: resnet50(DENSITY),
}
STAGES = ("import", "partition", "program", "build")


def seconds(command: list[str]) -> float:
    """Wall-clock time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak_mebibytes(command: list[str]) -> float:
    """Most memory that a process had."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / 1024


def spread(times: list[float]) -> str:
    """Median with the range."""
    return f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"


def row_of(model: Path, runs: int) -> list[str]:
    """Measure one model."""
    mars = [sys.executable, "-c", "from tvm_mars.cli import main; raise SystemExit(main())"]
    command = [*mars, "compile", str(model), "-o", str(model.with_suffix(".so"))]
    imports = [sys.executable, "-c", "import tvm, onnx"]
    pairs = [(seconds(command), seconds(imports)) for _ in range(runs)]
    whole, bare = (list(column) for column in zip(*pairs, strict=True))
    told = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    stages = json.loads(told.stdout)["seconds"]
    return [
        spread(whole),
        spread(bare),
        f"{statistics.median(whole) - statistics.median(bare):.2f}",
        *(f"{stages[stage]:.2f}" for stage in STAGES),
        f"{peak_mebibytes(command):.0f}",
    ]


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    versions = ("apache-tvm", "onnx", "numpy")
    console = Console(width=160)
    console.print(
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
        + f"; seconds: median and range of {runs} runs in turn, stages of one more; MiB at most"
    )
    table = Table(box=None)
    table.add_column("network, pixels")
    for name in ("ONNX, MB", "mars compile", "imports", "beside", *STAGES, "MiB"):
        table.add_column(name, justify="right")
    for name, make in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "net.onnx"
            onnx.save(to_onnx(make()), model)
            table.add_row(name, f"{model.stat().st_size / 1e6:.1f}", *row_of(model, runs))
    console.print(table)


if __name__ == "__main__":
    main()
