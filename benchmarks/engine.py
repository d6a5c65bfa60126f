"""The exact engine against ONNX Runtime's int8, PyTorch and TVM's CPU build, on this processor.

The engine runs programs of several densities; the others run the dense network, as they would for
a user. ONNX Runtime gets a standard QDQ file whose every convolution runs as QLinearConv: that is
asserted on the graph that it optimized. PyTorch computes in float32 and bfloat16, channels last.
TVM compiles ONNX Runtime's file for this processor with its default pipeline, without tuned
kernels; it is timed at batch 1 alone, for more would take it seconds.

All contenders of a cell take turns in one process; a ratio is the median over the rounds of ONNX
Runtime's time over the engine's in the same round, its range beside it. Every time counts from
float32 images to float32 results.

Run: ``python benchmarks/engine.py`` (ten minutes), or with ``--cpu-time --threads 1`` on a machine
that is at work on other things: that counts processor time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import mars_runtime
from mars_runtime import PRESETS, Program, native
from mars_runtime.run import engine_of
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import Conv, ConvTerm, Graph, Pool
from tvm_mars.networks import TABLE_IV, Density, mobilenet_v1, resnet18, resnet20, vgg16

NETWORKS: Mapping[str, Callable[..., Graph]] = {
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "mobilenet_v1": mobilenet_v1,
}
DENSITIES = (1.0, 0.5, 0.1, 0.05, 0.02)
LEAST_SECONDS = 0.04  # of one measurement; short calls are repeated
PAUSE = 0.02  # between contenders, until idle threads of the one before have stopped to spin
ACTIVATION, WEIGHT = 2.0**-8, 2.0**-7  # steps of the codes

Run = Callable[[np.ndarray], Any]


# -- contenders ------------------------------------------------------------------------------------


def qdq_model(graph: Graph) -> onnx.ModelProto:
    """Write a network's shapes as a standard QDQ file: uint8 maps, int8 weights per channel."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    step = constant("step", np.float32(ACTIVATION).reshape(()))
    zero = constant("zero", np.uint8(0).reshape(()))

    def quantized(value: str) -> str:
        codes = node("QuantizeLinear", [value, step, zero], f"{value}.q")
        return node("DequantizeLinear", [codes, step, zero], f"{value}.dq")

    def convolution(name: str, source: str, term: ConvTerm, bias: np.ndarray) -> str:
        channels = len(term.weight)
        scale = constant(f"{name}.ws", np.full(channels, WEIGHT, np.float32))
        zeros = constant(f"{name}.wz", np.zeros(channels, np.int8))
        codes = constant(f"{name}.w", np.asarray(term.weight, np.int8))
        weight = node("DequantizeLinear", [codes, scale, zeros], f"{name}.wdq", axis=0)
        both = constant(f"{name}.bs", np.full(channels, WEIGHT * ACTIVATION, np.float32))
        none = constant(f"{name}.bz", np.zeros(channels, np.int32))
        sums = constant(f"{name}.b", bias.astype(np.int32))
        added = node("DequantizeLinear", [sums, both, none], f"{name}.bdq", axis=0)
        return node(
            "Conv",
            [source, weight, added],
            f"{name}.conv",
            strides=term.stride,
            pads=term.padding,
            dilations=term.dilation,
            group=term.groups,
            kernel_shape=term.kernel,
        )

    values = {"x0": quantized("x0")}
    for layer in graph.layers:
        if isinstance(layer, Conv):
            parts = []
            for i, term in enumerate(layer.terms):
                bias = layer.bias if not i else np.zeros_like(layer.bias)
                found = convolution(f"{layer.name}.{i}", values[term.input], term, bias)
                alone = len(layer.terms) == 1 and not layer.residual
                parts.append(found if alone else quantized(found))
            if layer.residual:
                parts.append(values[layer.residual.input])
            value = parts[0] if len(parts) == 1 else node("Add", parts, f"{layer.name}.add")
        elif isinstance(layer, Pool) and layer.mode == "max":
            value = node(
                "MaxPool",
                [values[layer.input]],
                f"{layer.name}.pool",
                kernel_shape=layer.kernel,
                strides=layer.stride,
                pads=layer.padding,
            )
        else:
            value = node("GlobalAveragePool", [values[layer.inputs[0]]], f"{layer.name}.pool")
        values[layer.name] = quantized(value)
    shape = graph.inputs[0].shape
    made = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", *shape])],
        [
            helper.make_tensor_value_info(
                values[graph.outputs[0].value], TensorProto.FLOAT, ["n", "c", "h", "w"]
            )
        ],
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def onnxruntime_int8(graph: Graph, threads: int) -> Run:
    """Give ONNX Runtime on the dense network, proved to convolve in int8."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of the optimized graph, which is only looked at
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(
            qdq_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    count = sum(len(layer.terms) for layer in graph.layers if isinstance(layer, Conv))
    assert kinds.count("QLinearConv") == count and "Conv" not in kinds, kinds
    return lambda images: session.run(None, {"x0": images})


def tvm_cpu(graph: Graph) -> Run:
    """Give TVM's own build of the dense network for one image: what partitioning leaves out."""
    from tvm_mars.frontend.relax.api import build_for_cpu

    return build_for_cpu(qdq_model(graph), {"x0": (1, *graph.inputs[0].shape)})


def torch_dense(graph: Graph, threads: int, dtype_name: str) -> Run:
    """Give PyTorch on the dense network: float32 or bfloat16, channels last."""
    import torch
    from torch.nn import functional

    dtype = getattr(torch, dtype_name)
    weights = {
        (layer.name, i): (
            torch.tensor(np.asarray(term.weight) * WEIGHT, dtype=dtype).to(
                memory_format=torch.channels_last
            ),
            torch.tensor(layer.bias * WEIGHT * ACTIVATION, dtype=dtype),
        )
        for layer in graph.layers
        if isinstance(layer, Conv)
        for i, term in enumerate(layer.terms)
    }

    @torch.inference_mode()
    def run(images: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        values = {"x0": torch.from_numpy(images).to(dtype, memory_format=torch.channels_last)}
        for layer in graph.layers:
            if isinstance(layer, Conv):
                total: Any = values[layer.residual.input] if layer.residual else 0
                for i, term in enumerate(layer.terms):
                    weight, bias = weights[layer.name, i]
                    total = total + functional.conv2d(
                        values[term.input],
                        weight,
                        None if i else bias,
                        term.stride,
                        term.padding[:2],
                        term.dilation,
                        term.groups,
                    )
                values[layer.name] = total if layer.requant is None else functional.relu(total)
            elif isinstance(layer, Pool) and layer.mode == "max":
                values[layer.name] = functional.max_pool2d(
                    values[layer.input], layer.kernel, layer.stride, layer.padding[:2]
                )
            else:
                values[layer.name] = values[layer.inputs[0]].mean((2, 3), keepdim=True)
        return values[graph.layers[-1].name].float().numpy()

    return run


def engine(program: Program) -> Run:
    """Give the exact engine on a program, made sure that it is what runs."""
    assert engine_of(program.regions[0], program.arch) is not None
    return lambda images: mars_runtime.run(program, {"x0": images}, engine="layers")


# -- measuring -------------------------------------------------------------------------------------


@attrs.frozen
class Cell:
    """Seconds per call of each contender, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def ratio(self, contender: str, reference: str) -> str:
        """Give how many times faster one is, median and range over the rounds."""
        ratios = [
            b / a for a, b in zip(self.seconds[contender], self.seconds[reference], strict=True)
        ]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    def rate(self, contender: str, images: int) -> str:
        """Give images per second, of the median round."""
        rate = images / statistics.median(self.seconds[contender])
        return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def measure(
    contenders: Mapping[str, Run], images: np.ndarray, rounds: int, clock: Callable[[], float]
) -> Cell:
    """Let contenders take turns."""
    repeats = {}
    for name, run in contenders.items():
        run(images)
        start = clock()
        run(images)
        repeats[name] = max(1, round(LEAST_SECONDS / max(clock() - start, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE)
            start = clock()
            for _ in range(repeats[name]):
                run(images)
            seconds[name].append((clock() - start) / repeats[name])
    return Cell(seconds)


def programs(make: Callable[..., Graph]) -> Iterator[tuple[str, Program]]:
    """Give programs of a network at each density; one of them with 4-bit activations too."""
    wanted: list[tuple[str, Density, int]] = [(f"{d:.0%}", d, 8) for d in DENSITIES]
    wanted.append(("5% a4", 0.05, 4))
    if make is vgg16:
        wanted.append(("Table IV", TABLE_IV, 8))
    for name, density, bits in wanted:
        graph = make(density, activation_bits=bits)
        yield name, build([NamedGraph.of(graph)], PRESETS["mars"])


def compare(arguments: argparse.Namespace) -> None:
    """Print a table for each network and number of threads."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for name in arguments.networks:
        dense = NETWORKS[name](1.0)
        made = {f"mars {label}": engine(program) for label, program in programs(NETWORKS[name])}
        for threads in arguments.threads:
            os.environ["MARS_NUM_THREADS"] = str(threads)
            contenders = {"ort int8": onnxruntime_int8(dense, threads)}
            if importlib.util.find_spec("torch"):
                contenders["torch fp32"] = torch_dense(dense, threads, "float32")
                contenders["torch bf16"] = torch_dense(dense, threads, "bfloat16")
            contenders |= made
            print(f"\n### {name}, {threads} thread{'s' * (threads > 1)}\n")
            print(
                "| contender | "
                + " | ".join(f"batch {b}: images/s | over ort int8" for b in arguments.batches)
                + " |"
            )
            print("|---|" + "---:|---|" * len(arguments.batches))
            cells = []
            for batch in arguments.batches:
                rng = np.random.default_rng(batch)
                images = rng.random((batch, *dense.inputs[0].shape), dtype=np.float32)
                here = contenders | ({"tvm cpu": tvm_cpu(dense)} if batch == 1 else {})
                cells.append((batch, measure(here, images, arguments.rounds, clock)))
            for contender in dict.fromkeys(name for _, cell in cells for name in cell.seconds):
                columns = [
                    f"{cell.rate(contender, batch)} | {cell.ratio(contender, 'ort int8')}"
                    if contender in cell.seconds
                    else " | "
                    for batch, cell in cells
                ]
                print(f"| {contender} | {' | '.join(columns)} |", flush=True)


_FIRST = """
import time; start = time.perf_counter()
import mars_runtime, numpy
imported = time.perf_counter()
program = mars_runtime.Program.load({path!r})
loaded = time.perf_counter()
mars_runtime.run(program, {{"x0": numpy.zeros((1, 3, 32, 32), numpy.float32)}})
done = time.perf_counter()
print(imported - start, loaded - imported, done - loaded)
"""
_MEMORY = """
import re, numpy
images = numpy.zeros((256, 3, 32, 32), numpy.float32)
if {path!r}.endswith(".mars"):
    import mars_runtime
    mars_runtime.run(mars_runtime.Program.load({path!r}), {{"x0": images}})
else:
    import onnxruntime
    onnxruntime.InferenceSession({path!r}).run(None, {{"x0": images}})
status = open("/proc/self/status").read()  # what the parent had does not count there
print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)
"""


def start_up(runs: int) -> None:
    """Print what a fresh process pays, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        program, model = Path(folder) / "vgg16.mars", Path(folder) / "vgg16.onnx"
        build([NamedGraph.of(vgg16(0.05))], PRESETS["mars"]).save(program)
        onnx.save(qdq_model(vgg16(1.0)), model)
        cold = {**os.environ, "MARS_CACHE_DIR": str(Path(folder) / "cache")}
        script = [sys.executable, "-c", _FIRST.format(path=str(program))]

        def parts() -> list[float]:
            done = subprocess.run(script, check=True, capture_output=True, text=True, env=cold)
            return [float(part) for part in done.stdout.split()]

        print("\n### A fresh process, VGG16 with 5 % of the group-sets, one image\n")
        first = parts()
        print(f"- cold cache: {_parts(first)}")
        later = [parts() for _ in range(runs)]
        medians = [statistics.median(column) for column in zip(*later, strict=True)]
        spread = [sum(row) for row in later]
        print(f"- warm cache: {_parts(medians)} (all {min(spread):.2f}-{max(spread):.2f} s)")
        bare = [_seconds([sys.executable, "-c", "pass"]) for _ in range(runs)]
        main = "import sys; from tvm_mars.cli import main; sys.exit(main(['--help']))"
        helped = [_seconds([sys.executable, "-c", main]) for _ in range(runs)]
        print(
            f"- `mars --help`: {statistics.median(helped):.2f} s ({min(helped):.2f}-"
            f"{max(helped):.2f}), of which the interpreter alone {statistics.median(bare):.2f} s"
        )
        for name, path in (("engine", program), ("ONNX Runtime", model)):
            if not Path("/proc/self/status").exists():
                continue
            script = [sys.executable, "-c", _MEMORY.format(path=str(path))]
            done = subprocess.run(script, check=True, capture_output=True, text=True, env=cold)
            print(f"- peak memory at batch 256, {name}: {float(done.stdout):.0f} MiB")


def _parts(parts: Sequence[float]) -> str:
    imported, loaded, ran = parts
    return (
        f"import {imported:.2f} s, load {loaded:.2f} s, first image {ran:.2f} s, "
        f"together {sum(parts):.2f} s"
    )


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time")
    arguments = parser.parse_args()
    versions = ["numpy", "llvmlite", "onnxruntime", "torch", "apache-tvm"]
    found = [name for name in versions if name != "torch" or importlib.util.find_spec(name)]
    print(
        f"{_processor()}, kernels {native.variants()[0]}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
        + ("; processor time" if arguments.cpu_time else "; wall clock")
    )
    compare(arguments)
    start_up(arguments.rounds)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


if __name__ == "__main__":
    main()
