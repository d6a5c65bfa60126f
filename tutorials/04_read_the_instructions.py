"""
Read the instruction stream of one layer
========================================

From sixteen kernels to index codes, instructions and cycles, by hand: what the machine stores, what
it skips and where the time goes. No TVM is needed here.
"""

# %%
# A layer
# -------
#
# One convolution, 32 kernels over 48 input channels with 3x3 taps. In units of the machine: two
# kernel blocks of 16 kernels, and for each of them 3 channel blocks x 9 taps = 27 group-sets.

import numpy as np

from mars_runtime import PRESETS, simulate
from mars_runtime.quantize import Dequantize, Quantize
from tvm_mars.compiler import NamedGraph, build, pack
from tvm_mars.graph import Conv, ConvTerm, Graph, Input, MapType, Output, Requant

arch = PRESETS["mars"]
kernels, channels, size = 32, 48, 8
rng = np.random.default_rng(0)
weight = rng.integers(-127, 128, (kernels, channels, 3, 3)).astype(np.int8)

# %%
# Pruning leaves five group-sets: of the first kernel block, channel block 0 at the three taps of
# the middle row; of the second, channel block 2 at the first and the last tap.

keep = np.zeros((kernels, channels, 3, 3), bool)
keep[:16, :16, 1, :] = True
keep[16:, 32:, 0, 0] = keep[16:, 32:, 2, 2] = True
weight[~keep] = 0

# %%
# The layer computes on codes: 8-bit maps, eq. 5 behind the sums. What enters are real numbers in
# 0..1, what leaves are codes over 256.

layer = Conv(
    "conv0",
    [ConvTerm("x0", weight, weight_bits=8, padding=(1, 1, 1, 1))],
    np.zeros(kernels, np.int32),
    Requant.eq5(bits=8, shift=15),
)
enters = MapType(channels, size, size, bits=8)
to_codes = Quantize(high=255, factor=255.0, clip=(0.0, 1.0))
graph = Graph(
    [Input("x0", enters, enters.shape, to_codes)],
    [layer],
    [Output("conv0", (kernels, size, size), Dequantize(scale=(2.0**-8,)))],
)

# %%
# Packing
# -------
#
# What is stored are the group-sets that hold a weight, kernel block by kernel block, with the tap
# and the channel block that each belongs to. The other 49 of 54 cost neither memory nor cycles.

packed = pack(graph, arch)["conv0"]
for number, block in enumerate(packed.blocks):
    print(
        f"kernel block {number}: taps {block.taps.tolist()}, channel blocks {block.inputs.tolist()}"
    )
print(f"{packed.group_sets} of {packed.dense_group_sets} group-sets")

# %%
# Instructions
# ------------

from mars_runtime import isa

program = build([NamedGraph.of(graph)], arch)
region = program.regions[0]
print("\n".join(isa.disassemble(region.instructions)))

# %%
# Line by line, for core 0 (the fields that are not shown are zero):
#
# - ``PREPARE``: the cores' memories for a new layer.
# - ``FETCH memory=index``: index codes; ``memory=parameter``: biases; then three group-sets of
#   weights (768 bytes) into the core's weight SRAM.
# - ``FILL count=3``: from the weight SRAM into the macros, once the fetch has signalled.
# - ``MOVE``: the input map from off-chip memory into bank 0. 48 channels are six planes: the word
#   of a bank holds eight channels of eight bits.
# - ``SAS``: how the shift-and-select unit feeds the cores: where the kernel's window begins (at -1,
#   as there is padding), how wide it is, the map's size.
# - ``APW``: how results leave: eq. 5 with a shift of 15, into bank 1.
# - ``CONV cores=0b11``: cores 0 and 1 compute the upper four rows, each its kernel block. Cores 2
#   and 3 hold the same group-sets and compute the lower four.
# - ``MOVE direction=out``, ``HALT``.
#
# Index codes
# -----------
#
# The first ten bytes of the image are what core 0 was sent: one word that opens a segment (which
# kernel block, from which tap and channel block on the codes count, where sums begin and end), then
# 16 bits for each group-set, the paper's Fig. 6.

word = int.from_bytes(region.image[:4], "little")
segment = isa.unpack_word(isa.Segment, word)
codes = [
    isa.unpack_word(isa.IndexCode, int.from_bytes(region.image[at : at + 2], "little"))
    for at in (4, 6, 8)
]
print(segment)
for code in codes:
    print(code)
assert [code.tap for code in codes] == packed.blocks[0].taps.tolist()

# %%
# Weights follow as the macros hold them; unpacked again, they are the kernels' own.

from mars_runtime.packing import group_set_bytes, unpack_group_sets

length = group_set_bytes(weight_bits=8)
source = next(
    instruction.source
    for instruction in region.instructions
    if isinstance(instruction, isa.Fetch) and instruction.length == 3 * length
)
stored = np.frombuffer(region.image[source : source + length], np.uint8)
assert np.array_equal(unpack_group_sets(stored, 8)[0].T, weight[:16, :16, 1, 0])

# %%
# Cycles
# ------
#
# The macros take one access for four bits of input, so two for an 8-bit map. Each core computes
# half of the 64 pixels; block 0 has three group-sets, block 1 two.

accesses = arch.accesses(input_bits=8)
busy = 2 * (size * size // 2) * (3 + 2) * accesses
print(f"{accesses} accesses, {busy} busy cycles over all cores")

layer_time = simulate(region, arch).layers[0]
print(layer_time)
assert layer_time.macro_cycles == busy

# %%
# The layer takes far longer than that: before a core computes, its array is opened and filled. How
# many cycles that takes is assumed, as the paper does not state it (``mars arch`` names the source
# of each field).

opened = arch.array_fill_cycles
filled = 3 * length * 8 // arch.macro_write_bits
fetched = 3 * length * 8 // arch.offchip_bits_per_cycle
print(
    f"core 0: {fetched} cycles to fetch, {opened} to open the array, {filled} to fill it, "
    f"{size * size // 2 * 3 * accesses} to compute"
)
assert opened + filled + size * size // 2 * 3 * accesses < layer_time.cycles

# %%
# The machine that ran these instructions is a simulator of the datapath: its codes are the
# convolution's.

from mars_runtime.run import run_region

image = rng.random((1, channels, size, size)).astype(np.float32)
(out,) = run_region(program, 0, [image], engine="machine")
padded = np.pad(np.rint(image[0] * np.float32(255)).astype(np.int64), ((0, 0), (1, 1), (1, 1)))
windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
sums = np.einsum("chwyx,ocyx->ohw", windows, weight.astype(np.int64))
expected = np.rint(np.clip(sums, 0, 2**15) * 255 / 2**15) / 256
assert np.array_equal(out[0], expected)
print("codes equal")
