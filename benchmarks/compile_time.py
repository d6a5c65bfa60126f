"""Time from an ONNX file to a shared library: VGG16 on 32x32, as a whole process and by stage.

Runs ``mars compile`` and, in turn with it, a process that only imports tvm and onnx; the difference
of their medians is what compiling costs beside the imports. Run:
``python benchmarks/compile_time.py [runs]``.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx

from tvm_mars.networks import vgg16
from tvm_mars.onnx_export import to_onnx


def seconds(command: list[str]) -> float:
    """Wall-clock time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


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
    with tempfile.TemporaryDirectory() as folder:
        model, library = Path(folder) / "vgg16.onnx", Path(folder) / "vgg16.so"
        onnx.save(to_onnx(vgg16()), model)
        mars = str(Path(sys.executable).with_name("mars"))
        command = [mars, "compile", str(model), "-o", str(library)]
        imports = [sys.executable, "-c", "import tvm, onnx"]
        pairs = [(seconds(command), seconds(imports)) for _ in range(runs)]
        whole, bare = (list(column) for column in zip(*pairs, strict=True))
        beside = statistics.median(whole) - statistics.median(bare)
        print(f"VGG16 32x32, {model.stat().st_size / 1e6:.1f} MB of ONNX, {runs} runs in turn")
        print(f"mars compile, whole process   {spread(whole)}")
        print(f"import tvm, onnx              {spread(bare)}")
        print(f"compiling beside the imports  {beside:.2f} s (difference of the medians)")
        stages = subprocess.run([*command, "--timing"], check=True, capture_output=True, text=True)
        print("stages of one run:", (stages.stdout + stages.stderr).strip(), sep="\n")


if __name__ == "__main__":
    main()
