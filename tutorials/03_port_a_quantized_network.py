"""
Port a network that somebody else quantized
===========================================

A float ONNX model goes through onnxruntime's static quantization, as many deployments do, and comes
to MARS as it is: scales, zero points and all. Then what stays on the CPU and why, what the codes of
two engines may differ by, and pruning's absence in the profile.

Needs the demo's extras: ``pip install -c constraints.txt ".[demo]"``.
"""

# %%
# A float model
# -------------
#
# Any exporter will do; to need no training framework, this one is written with ONNX's own helpers:
# two convolutions with ReLU, pools, a classifier.

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)
weights = {
    "w0": rng.normal(0, 0.3, (16, 3, 3, 3)),
    "b0": rng.normal(0, 0.1, 16),
    "w1": rng.normal(0, 0.1, (32, 16, 3, 3)),
    "b1": rng.normal(0, 0.1, 32),
    "w2": rng.normal(0, 0.2, (32, 10)),
}
nodes = [
    helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], pads=[1] * 4),
    helper.make_node("Relu", ["c0"], ["r0"]),
    helper.make_node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
    helper.make_node("Conv", ["p0", "w1", "b1"], ["c1"], pads=[1] * 4),
    helper.make_node("Relu", ["c1"], ["r1"]),
    helper.make_node("GlobalAveragePool", ["r1"], ["p1"]),
    helper.make_node("Flatten", ["p1"], ["f1"]),
    helper.make_node("MatMul", ["f1", "w2"], ["logits"]),
]
graph = helper.make_graph(
    nodes,
    "float",
    [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
    [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
folder = Path(tempfile.mkdtemp())
onnx.save(model, folder / "float.onnx")

# %%
# Quantize it as its owner would
# ------------------------------
#
# Activations of eight unsigned bits, weights of eight signed bits, one scale per channel. Images to
# calibrate with come from a reader.

from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

images = rng.random((64, 3, 16, 16)).astype(np.float32)


class Reader(CalibrationDataReader):
    """Gives images one by one."""

    def __init__(self) -> None:
        self.rest = iter(images)

    def get_next(self) -> "dict[str, np.ndarray] | None":
        """Give the next feed."""
        image = next(self.rest, None)
        return None if image is None else {"image": image[None]}


quant_pre_process(folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
quantize_static(
    folder / "prepared.onnx",
    folder / "quantized.onnx",
    Reader(),
    quant_format=QuantFormat.QDQ,
    activation_type=QuantType.QUInt8,
    weight_type=QuantType.QInt8,
    per_channel=True,
)

# %%
# Compile
# -------

import tvm_mars

compiled = tvm_mars.compile(folder / "quantized.onnx")
print(compiled.report)
assert not compiled.report.rejected

# %%
# Compare
# -------
#
# Scales are arbitrary real numbers now. ONNX Runtime rescales in float32; MARS multiplies by an
# integer and shifts. Each layer, given the same codes, is within one code of the float graph, and a
# code that differs may move a few of the next layer's.

import onnxruntime

session = onnxruntime.InferenceSession(
    folder / "quantized.onnx", providers=["CPUExecutionProvider"]
)
(theirs,) = session.run(None, {"image": images})
ours = compiled.run({"image": images})["logits"]
step = np.abs(np.diff(np.unique(theirs))).min()
print(
    f"logits: largest difference {np.abs(ours - theirs).max() / step:.0f} codes, "
    f"{(ours == theirs).mean():.1%} equal"
)
assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.95

# %%
# Where the time goes
# -------------------
#
# Nothing has been pruned: every group-set is stored and computed, and the speed-up over the dense
# baseline is 1. (To prune a network of one's own, see the tutorial on porting from PyTorch.)

from tvm_mars.report import profile_program

profile = profile_program(compiled.program)
print(f"{profile.cycles:,} core cycles, {profile.speedup:.2f}x the dense baseline")

# %%
# What stays on the CPU
# ---------------------
#
# An operator that MARS does not take stays on the CPU, in the same module, with its reason. A
# sigmoid behind the logits, for instance:

with_sigmoid = onnx.load(folder / "quantized.onnx")
with_sigmoid.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["probabilities"]))
with_sigmoid.graph.output[0].name = "probabilities"
mixed = tvm_mars.compile(with_sigmoid)
print(mixed.report)
probabilities = mixed.run({"image": images})["probabilities"]
assert np.allclose(probabilities, 1 / (1 + np.exp(-ours)), atol=1e-6)

# %%
# Files of Brevitas are read in the same way, codes of four bits included: see
# :doc:`08_port_from_brevitas`.
