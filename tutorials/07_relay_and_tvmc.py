"""
Relay and tvmc
==============

The same compiler from Relay: pattern matching, ``relay.build`` with target ``mars``, the graph
executor, and the command line ``tvmc-mars``. Programs are the same, byte for byte, as from Relax.

Needs a TVM that has Relay: CPython 3.10, ``make relay``, or ``pip install -c constraints-relay.txt
".[relay,demo]"``.
"""

# %%
# A model
# -------

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from tvm_mars import zoo
from tvm_mars.onnx_export import to_onnx

folder = Path(tempfile.mkdtemp())
path = folder / "digits.onnx"
onnx.save(to_onnx(zoo.load("digits")), path)
images, labels = zoo.digits_split()
images, labels = images[:32], labels[:32]

# %%
# Partition
# ---------
#
# Relay's importer gives Q/DQ around float convolutions. ``partition_for_mars`` matches the chains
# that the machine computes exactly, and moves them into functions of their own for the code
# generator ``mars``.

import tvm
from tvm import relay

import tvm_mars
from tvm_mars.frontend.relay import import_model

mod = import_model(path, {"x0": images.shape})
partitioned = tvm_mars.partition_for_mars(mod)
print(tvm_mars.offload_report(partitioned))
regions = [v.name_hint for v in partitioned.get_global_vars() if v.name_hint != "main"]
print(regions)

# %%
# Build and run
# -------------
#
# Relay compiles what is left for the CPU; its external code generator makes the MARS program, which
# the library carries.

from tvm.contrib import graph_executor

library = relay.build(partitioned, target=tvm.target.Target("mars"))
executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
executor.set_input("x0", images)
executor.run()
logits = executor.get_output(0).numpy()
print(f"{(logits.argmax(1) == labels).mean():.1%} of {len(images)} images")

# %%
# The same in one call, with the program at hand for the profiler and the simulator:

model = tvm_mars.compile(path, shape={"x0": images.shape})
assert np.array_equal(model.run({"x0": images})["y0"], logits)
print(f"{sum(len(region.instructions) for region in model.program.regions)} instructions")

# %%
# tvmc
# ----
#
# ``tvmc-mars`` is that TVM's own command line with MARS among its targets.

np.savez(folder / "digits.npz", x0=images)


def tvmc(*arguments: "str | Path") -> str:
    """Run the command and give what it printed."""
    command = [sys.executable, "-m", "tvm_mars.tvmc", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


shapes = ["--input-shapes", f"x0:[{','.join(map(str, images.shape))}]"]
tar = folder / "digits.tar"
print(tvmc("compile", "--target=mars, llvm", path, "-o", tar, "--dump-offloads", "-", *shapes))
outputs = folder / "outputs.npz"
tvmc("run", tar, "--inputs", folder / "digits.npz", "--outputs", outputs)
assert np.array_equal(np.load(outputs)["output_0"], logits)
print("codes of the command line are those of the API")

# %%
# Its ``tune`` searches schedules on the simulated machine; ``compile --tuning-records`` uses what
# it found. The records are those of ``mars tune``.

records, tuned = folder / "tuned", folder / "tuned.tar"
search = ["--trials", "16", "--tuner", "random", "--parallel", "1"]
print(tvmc("tune", "--target=mars, llvm", path, "-o", records, *search, *shapes))
tvmc("compile", "--target=mars, llvm", path, "-o", tuned, "--tuning-records", records, *shapes)
tvmc("run", tuned, "--inputs", folder / "digits.npz", "--outputs", outputs)
assert np.array_equal(np.load(outputs)["output_0"], logits)
