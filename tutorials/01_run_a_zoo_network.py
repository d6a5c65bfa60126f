"""
Compile and run a network of the zoo
====================================

From a trained, quantized network to logits, cycles and energy: through TVM, onto the simulated
MARS.

Needs the demo's extras: ``pip install -c constraints.txt ".[demo]"``.
"""

# %%
# A trained network
# -----------------
#
# Networks of the zoo are integer codes with a record of how they were trained. ``digits`` reads
# handwritten digits; its ONNX file is in the Q/DQ format, as any quantizer writes it.

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tvm_mars import zoo
from tvm_mars.onnx_export import to_onnx

print(zoo.names())
network, record = zoo.load("digits"), zoo.record("digits")
print(f"{record.title}: {record.accuracy:.2%} on held-out images")

path = Path(tempfile.mkdtemp()) / "digits.onnx"
onnx.save(to_onnx(network), path)

# %%
# Compile
# -------
#
# TVM imports the file, tvm-mars takes what the machine can do, TVM builds the rest for the CPU. The
# report lists each operator, with the reason if it stays on the CPU.

import tvm_mars

model = tvm_mars.compile(path, target="mars")
print(model.report)

# %%
# Run
# ---
#
# The model is called by the ONNX file's own names. What is offloaded runs on the simulated machine,
# exactly: its logits are ONNX Runtime's, to the last bit.

images, labels = zoo.digits_split()
logits = model.run({"x0": images})["y0"]
print(f"{(logits.argmax(1) == labels).mean():.2%} of {len(images)} images")

session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
(expected,) = session.run(None, {"x0": images})
assert np.array_equal(logits, expected)

# %%
# What it costs
# -------------
#
# The same program executed on the timed machine. A column of waiting times says what each layer is
# bound by: here mostly by weights that have to be loaded, as the network is small.

from tvm_mars.report import profile_program
from tvm_mars.report.text import print_profile

profile = profile_program(model.program)
print_profile(profile, sys.stdout)

# %%
# A network for CIFAR-10
# ----------------------
#
# VGG16 with more than 95 % of its group-sets zero, on generated images (the data set is not in the
# package; ``mars zoo eval vgg16-w8a4 --data cifar-10-binary.tar.gz`` reads it). Every code at every
# layer boundary is compared.

from tvm_mars.datasets import generated_images
from tvm_mars.verification import compare, mars_engine, onnxruntime_engine

large = zoo.load("vgg16-w8a4")
engines = {"ONNX Runtime": onnxruntime_engine(large), "MARS": mars_engine(large)}
found = compare(engines, generated_images(4, large.inputs[0].type.shape), large.outputs[0].value)
print(f"{found.codes:,} codes, {sum(found.differing['MARS'].values())} differ")
assert found.agree

# %%
# The latency does not depend on the image, so that the program alone gives it:

from mars_runtime import PRESETS
from tvm_mars.compiler import NamedGraph, build

costs = profile_program(build([NamedGraph.of(large)], PRESETS["mars"]))
print(f"{costs.cycles:,} core cycles, {costs.fps:.0f} FPS, {costs.speedup:.1f}x the dense baseline")
assert costs.speedup > 1
