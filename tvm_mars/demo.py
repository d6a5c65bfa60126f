"""The demo behind ``make demo``: trained networks, through TVM, onto the simulated MARS.

Everything that it prints is measured in this run: accuracies on held-out images by three engines,
differing outputs, cycles, accesses and energy. It leaves the ONNX files, the shared library and the
programs behind, to go on with.
"""

from __future__ import annotations

import argparse
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
LARGE, LARGE_IMAGES = "vgg16-w8a4", 32


def main() -> int:
    """Run the demo; gives 0 if every engine agrees to the last bit."""
    parser = argparse.ArgumentParser(prog="python -m tvm_mars.demo", description="Run the demo.")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help=f"CIFAR-10 (binary archive or .npz), for the accuracy of {LARGE}",
    )
    options = parser.parse_args()
    try:
        import onnxruntime  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as missing:
        print(
            f"error: the demo needs {missing.name}: run `make demo`, or `pip install '.[demo]'`",
            file=sys.stderr,
        )
        return 1
    agree = _digits()
    agree &= _large(options.data)
    _go_on()
    return 0 if agree else 1


def _digits() -> bool:
    import onnx

    import tvm_mars
    from tvm_mars.frontend import adapter
    from tvm_mars.graph import evaluate
    from tvm_mars.onnx_export import to_onnx
    from tvm_mars.report.profile import profile_program
    from tvm_mars.report.text import print_profile
    from tvm_mars.zoo import digits_split, load_digits, record

    FOLDER.mkdir(parents=True, exist_ok=True)
    graph, about = load_digits(), record("digits")
    images, labels = digits_split()
    recipe = about.recipe
    path = FOLDER / "digits.onnx"
    onnx.save(to_onnx(graph), path)
    _say(
        "1. A trained network",
        f"Handwritten digits, a residual CNN with {graph.macs() / 1e6:.1f} M multiply-accumulates, "
        f"w{recipe['weight_bits']}a{recipe['activation_bits']};",
        f"{recipe['sparsity']:.0%} of the 16x16 group-sets of its larger layers are pruned to "
        "zero.",
        f"Accuracy when trained: {about.accuracy:.2%} on held-out images, its dense "
        f"twin {about.dense_accuracy:.2%}.",
        f"Written to {path}.",
    )

    with _stopwatch() as seconds:
        model = tvm_mars.compile(path, target="mars", **_fixed(images.shape))
        model.export_library(FOLDER / "digits.so")
    program = model.program
    if program is None:
        print("error: TVM offloaded nothing to MARS", file=sys.stderr)
        return False
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
        "TVM on the CPU": adapter().build_for_cpu(path, **_fixed(images.shape)),
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
    return agree


def _large(data: str | None) -> bool:
    """Run a CIFAR-10 network of the zoo: on generated images, or on a given data set."""
    import onnx

    import tvm_mars
    from tvm_mars.datasets import generated_images, load_dataset
    from tvm_mars.onnx_export import to_onnx
    from tvm_mars.report import compression, profile_program
    from tvm_mars.verification import compare, mars_engine, onnxruntime_engine
    from tvm_mars.zoo import load, record

    graph, about = load(LARGE), record(LARGE)
    path = FOLDER / f"{LARGE}.onnx"
    onnx.save(to_onnx(graph), path)
    shape = graph.inputs[0].type.shape
    images = load_dataset(data)[1] if data else generated_images(LARGE_IMAGES, shape)
    with _stopwatch() as seconds:
        program = tvm_mars.compile(path, target="mars", **_fixed((1, *shape))).program
    if program is None:
        print("error: TVM offloaded nothing to MARS", file=sys.stderr)
        return False
    program.save(FOLDER / f"{LARGE}.mars")
    compiled = seconds()
    engines = {"ONNX Runtime": onnxruntime_engine(graph), "simulated MARS": mars_engine(graph)}
    found = compare(engines, images, graph.outputs[0].value)
    profile = profile_program(program)
    _say(
        f"5. A network for CIFAR-10: {LARGE} of the zoo",
        f"{about.title}, {graph.macs() / 1e6:.0f} M multiply-accumulates; "
        f"{compression(graph).zero_share:.1%} of its group-sets are zero.",
        f"Recorded test accuracy {about.accuracy:.2%}, its dense twin {about.dense_accuracy:.2%} "
        f"({about.data}; `mars zoo info {LARGE}`).",
        f"Compiled in {compiled:.2f} s to {FOLDER / f'{LARGE}.mars'}.",
        f"On {found.images} {'test' if data else 'generated'} images, "
        f"{found.codes:,} codes at every layer boundary: "
        f"{sum(found.differing['simulated MARS'].values())} differ between MARS and ONNX Runtime.",
        *([f"Accuracy on MARS: {found.accuracy('simulated MARS'):.2%}."] if data else []),
        f"One image takes {profile.cycles:,} core cycles, {profile.fps:.0f} FPS; "
        f"{profile.speedup:.1f} times the dense baseline.",
    )
    return found.agree


def _go_on() -> None:
    _say(
        "6. Go on",
        f"mars run {FOLDER / 'digits.so'} --inputs {FOLDER / 'digits.npz'} -o logits.npz",
        f"mars disasm {FOLDER / 'digits.mars'}         the instruction stream",
        f"mars profile {FOLDER / 'digits.mars'} --trace trace.json    for ui.perfetto.dev",
        "mars quantize FLOAT.onnx --data images.npz -o YOUR.onnx    if yours is a float network",
        "mars compile YOUR.onnx --program your.mars --dump-offloads -",
        "mars zoo list                                 what else is trained",
        f"(the command is in {Path(sys.executable).parent})",
    )


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


def _fixed(shape: tuple[int, ...]) -> dict[str, Any]:
    """Give the option that says the batch, which Relay has to know."""
    from tvm_mars.frontend import adapter

    return {"shape": {INPUT: shape}} if adapter().IR == "Relay" else {}


if __name__ == "__main__":
    raise SystemExit(main())
