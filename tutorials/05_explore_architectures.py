"""
Explore architectures
=====================

The machine is data: a frozen description whose every field has a unit, a default and a source. A
program compiled for a variant runs on that variant. Here: how many cores, how large macros, how
fast loads make sense for one network, as latency against silicon.

No TVM is needed; the plot needs Matplotlib.
"""

# %%
# A network and a machine
# -----------------------
#
# VGG16 for 32x32 images with random weights at the densities of the paper's Table IV. Cycles depend
# on which group-sets are zero, not on what the others hold.

from mars_runtime import PRESETS, simulate
from tvm_mars.compiler import NamedGraph, build_region
from tvm_mars.networks import vgg16

network = NamedGraph.of(vgg16(activation_bits=4))
mars = PRESETS["mars"]


def latency(**changes: object) -> float:
    """Milliseconds for one image on a variant of MARS."""
    arch = mars.replace(changes)
    return simulate(build_region(network, arch), arch).cycles / arch.core_clock_mhz / 1e3


print(f"MARS: {latency():.3f} ms an image")

# %%
# One field at a time
# -------------------
#
# (The top level's clock has to serve all cores: a description that cannot work is refused.)
#
# What the network is bound by shows in what changes it. Cores count for most, as both computing and
# writing the macros spread over them. Off-chip bandwidth counts for next to nothing: it is the
# second hop, into the macros, that loads wait for.

for changes in (
    {"cores": 2},
    {"cores": 8, "top_clock_mhz": 800},
    {"macro_write_bits": 64},
    {"offchip_bits_per_cycle": 256},
    {"array_fill_cycles": 0},
    {"overlap": "full"},
):
    print(f"{changes!s:40} {latency(**changes):.3f} ms")

# %%
# A Pareto front
# --------------
#
# Cores against latency, for three ways of loading. Silicon counts as macro capacity (cells), as the
# paper states no area for the rest.

front = {
    (overlap, bits): [
        (cores, latency(cores=cores, top_clock_mhz=800, overlap=overlap, macro_write_bits=bits))
        for cores in (1, 2, 4, 8)
    ]
    for overlap, bits in (("none", 32), ("full", 32), ("full", 128))
}
for (overlap, bits), points in front.items():
    print(overlap, bits, " ".join(f"{cores}: {time:.3f} ms" for cores, time in points))
    times = [time for _, time in points]
    assert times == sorted(times, reverse=True)  # more cores are not slower here

# %%
# Overlap helps at every size, by 8 to 17 %, and macros that are written four times as fast by as
# much again.

for slow, fast in zip(front["none", 32], front["full", 32], strict=True):
    assert fast < slow

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for (overlap, bits), points in front.items():
    cells = [
        cores * mars.group_sets_per_core * mars.group_set_weights * 8 / 1024 for cores, _ in points
    ]
    label = f"overlap {overlap}, {bits} bit/cycle into macros"
    axes.plot(cells, [time for _, time in points], "o-", label=label)
axes.set(
    xscale="log",
    xlabel="macro capacity (Kibit)",
    ylabel="latency of one image (ms)",
    title="VGG16 w8a4, variants of MARS (load rates assumed)",
)
axes.legend()
figure.savefig("architectures.png", dpi=120)

# %%
# A variant to keep is a TOML file: ``mars arch mars --set cores=8 > eight.toml``, then ``--arch
# eight.toml`` in any command.
