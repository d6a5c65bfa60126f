"""
Extend MARS
===========

What it takes to give the backend another operator, on an example that the machine can do already
but no frontend asks for: the difference of two maps. From the integer layer to the instruction,
then where the pieces of the frontend go. No TVM is needed here.
"""

# %%
# First the integers
# ------------------
#
# The compiler's core knows integer layers alone: convolutions, pools, and sums of maps whose codes
# are multiplied by integers. A new operator is best made of these. The difference of two maps is a
# sum with multipliers 1 and -1, behind it eq. 5, whose clamp at 0 is the ReLU.

import numpy as np

from mars_runtime import PRESETS, isa, simulate
from mars_runtime.quantize import Dequantize, Quantize
from mars_runtime.run import run_region
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.graph import Add, Graph, Input, MapType, Operand, Output, Requant, evaluate

enters = MapType(32, 8, 8, bits=8)
to_codes = Quantize(high=255, factor=255.0, clip=(0.0, 1.0))
graph = Graph(
    [Input(name, enters, enters.shape, to_codes) for name in ("x0", "x1")],
    [Add("add0", [Operand("x0", 1), Operand("x1", -1)], Requant.eq5(bits=8, shift=8))],
    [Output("add0", enters.shape, Dequantize(scale=(2.0**-8,)))],
)

# %%
# The reference evaluates it; what it should give is written down independently, ties to even:

rng = np.random.default_rng(0)
maps = [rng.integers(0, 256, (4, *enters.shape)) for _ in range(2)]
images = {f"x{i}": (codes / 255).astype(np.float32) for i, codes in enumerate(maps)}
wanted = np.rint(np.maximum(maps[0] - maps[1], 0) * 255 / 256) / 256
(reference,) = evaluate(graph, images)
assert np.array_equal(reference, wanted)

# %%
# Then the machine
# ----------------
#
# Schedule, instructions and simulator follow from the layer: no code was written for it.

arch = PRESETS["mars"]
program = build([NamedGraph.of(graph)], arch)
for line in isa.disassemble(program.regions[0].instructions):
    if line.startswith(("ADD", "SAS", "APW")):
        print(line)
(computed,) = run_region(program, 0, [images["x0"], images["x1"]])
assert np.array_equal(computed, wanted)
print(f"equal, in {simulate(program.regions[0], arch).cycles:,} cycles")

# %%
# If it needs an instruction
# --------------------------
#
# What cannot be made of the layers needs one: a frozen class in ``mars_runtime.isa``, whose fields
# carry their width and meaning (encoding, decoding, assembler, disassembler and ``docs/isa.md``
# follow from them), a handler in ``mars_runtime.machine`` that computes on the memories and books
# time by ``mars_runtime.timing``, an arithmetic in ``mars_runtime.datapath``, and an emitter in
# ``tvm_mars.codegen``. Programs that hold it run on the machine, until ``mars_runtime.lift``
# follows it too, for the exact engine. The fields of an existing one, for instance:

for field in isa.Add.__attrs_attrs__[:6]:
    print(f"{field.name:12} {field.metadata.get('width')} bit  {field.metadata.get('doc')}")

# %%
# Then the frontend
# -----------------
#
# - ``tvm_mars/frontend/patterns.py`` names the operators that chains are made of; ``subtract``
#   would join them, and each adapter (``relax``, ``relay``) maps its IR's operator to that name.
# - ``tvm_mars/frontend/float_chains.py`` declares a chain once for both IRs: here, ``subtract`` of
#   two dequantized maps, a ReLU, a quantize; and its parsing into a spec, a frozen value.
# - ``tvm_mars/frontend/lower.py`` turns the spec into the layer above.
# - ``tvm_mars/constraints.py`` holds limits, once, with the sentences that reports and
#   ``docs/operators.md`` print.
#
# Every one has a test that fails without it: random graphs with the new layer through reference,
# machine and ONNX Runtime (``python_tests/random_graphs.py``), the chain in both IRs
# (``python_tests/test_frontends.py``), and a refusal with its reason.
