"""The demo behind ``make demo``: a trained network, through TVM, onto the simulated MARS.

Everything that it prints is measured in this run: accuracies on held-out images by three engines,
differing outputs, cycles, accesses and energy. It leaves the ONNX file, the shared library and the
program behind, to go on with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Engine = Callable[[Array], Array]

FOLDER = Path("build/demo")
INPUT, OUTPUT = "x0", "y0"


def main() -> int:
    """Run the demo; gives 0 if every engine agrees to the last bit."""
    try:
        import onnxruntime  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as missing:
        print(
            f"error: the demo needs {missing.name}: run `make demo`, or `pip install '.[demo]'`",
            file=sys.stderr,
        )
        return 1
    return _demo()


def _demo() -> int:
    import onnx

    import tvm_mars
    from tvm_mars.frontend import adapter
    from tvm_mars.graph import evaluate
    from tvm_mars.onnx_export import to_onnx
    from tvm_mars.report.profile import profile_program
    from tvm_mars.report.text import print_profile
    from tvm_mars.zoo import digits_record, digits_split, load_digits

    FOLDER.mkdir(parents=True, exist_ok=True)
    graph, record = load_digits(), digits_record()
    images, labels = digits_split()
    recipe, accuracies = record["recipe"], record["accuracy"]
    path = FOLDER / "digits.onnx"
    onnx.save(to_onnx(graph), path)
    _say(
        "1. A trained network",
        f"Handwritten digits, a residual CNN with {graph.macs() / 1e6:.1f} M multiply-accumulates, "
        f"w{recipe['weight_bits']}a{recipe['activation_bits']};",
        f"{recipe['sparsity']:.0%} of the 16x16 group-sets of its larger layers are pruned to "
        "zero.",
        f"Accuracy when trained: {accuracies['held out']:.2%} on held-out images, its dense "
        f"twin {accuracies['held out, dense twin']:.2%}.",
        f"Written to {path}.",
    )

    with _stopwatch() as seconds:
        model = tvm_mars.compile(path, target="mars", **_fixed(images))
        model.export_library(FOLDER / "digits.so")
    program = model.program
    if program is None:
        print("error: TVM offloaded nothing to MARS", file=sys.stderr)
        return 1
    program.save(FOLDER / "digits.mars")
    offloaded, rejected = len(model.report.offloaded), len(model.report.rejected)
    _say(
        f"2. Compiled by TVM for target mars, from {adapter().IR}",
        f"{offloaded} of {offloaded + rejected} operators offloaded, in {len(program.regions)} "
        f"region; {seconds():.2f} s with {FOLDER / 'digits.so'}",
        f"and {FOLDER / 'digits.mars'}: "
        f"{sum(len(region.instructions) for region in program.regions)} instructions.",
    )

    (expected,) = evaluate(graph, {INPUT: images})
    engines: Mapping[str, Engine] = {
        "ONNX Runtime": _onnxruntime(path),
        "TVM on the CPU": adapter().build_for_cpu(path, **_fixed(images)),
        "simulated MARS": lambda batch: model.run({INPUT: batch})[OUTPUT],
    }
    lines = [f"{'engine':16}{'accuracy':>10}{'differing logits':>18}{'seconds':>9}"]
    agree = True
    for name, engine in engines.items():
        with _stopwatch() as seconds:
            logits = engine(images)
        different = int((logits != expected).sum())
        agree &= different == 0
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        lines.append(
            f"{name:16}{accuracy:>10.2%}{different:>9} of {expected.size:<5}{seconds():>9.2f}"
        )
    _say(
        f"3. Run on {len(images)} held-out images",
        "Training never saw them. Logits are compared with the integer reference, bit for bit.",
        *lines,
    )

    _say("4. What it costs on the chip, beside the dense baseline")
    print_profile(profile_program(program), sys.stdout)
    np.savez(FOLDER / "digits.npz", **{INPUT: images})  # type: ignore[arg-type]
    _say(
        "5. Go on",
        f"mars run {FOLDER / 'digits.so'} --inputs {FOLDER / 'digits.npz'} -o logits.npz",
        f"mars disasm {FOLDER / 'digits.mars'}         the instruction stream",
        f"mars profile {FOLDER / 'digits.mars'} --trace trace.json    for ui.perfetto.dev",
        "mars compile YOUR.onnx -o your.so --dump-offloads -",
        f"(the command is in {Path(sys.executable).parent})",
    )
    return 0 if agree else 1


def _say(title: str, *lines: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", *lines, sep="\n", flush=True)


@contextmanager
def _stopwatch() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start


def _onnxruntime(path: Path) -> Engine:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: np.asarray(session.run([OUTPUT], {INPUT: batch})[0])


def _fixed(images: Array) -> dict[str, Any]:
    """Give the option that says the batch, which Relay has to know."""
    from tvm_mars.frontend import adapter

    return {"shape": {INPUT: images.shape}} if adapter().IR == "Relay" else {}


if __name__ == "__main__":
    raise SystemExit(main())
