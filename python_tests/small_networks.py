"""Small networks and programs that several tests share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np

from mars_runtime import PRESETS, MarsArch, Program, Region
from mars_runtime.quantize import Dequantize, Quantize
from tvm_mars.compiler import NamedGraph, build, build_region
from tvm_mars.graph import (
    Add,
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Operand,
    Output,
    Pool,
    Requant,
    Residual,
)
from tvm_mars.pack import PackedConv
from tvm_mars.schedule import Border, Point, Schedule, plan
from tvm_mars.tuner.space import Space


def every_kind_of_layer(seed: int = 0) -> Graph:
    """Every instruction's worth: fused pool, residual, projection, multipliers, pools, addition."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return rng.integers(-40, 41, shape)

    def bias(channels: int) -> np.ndarray:
        return rng.integers(-3000, 3001, channels)

    def fitted(zero: int = 0) -> Requant:
        multiplier = rng.integers(2**20, 2**21, 32)
        return Requant(multiplier, rng.integers(29, 31, 32), 8, zero, zero, 250)

    same = (1, 1, 1, 1)
    kind = MapType(32, 12, 12, 8, 3)
    images = Input("x0", kind, kind.shape, Quantize(scale=0.01, zero_point=3))
    layers = [
        Conv("conv0", [ConvTerm("x0", weight(32, 32, 3, 3), padding=same)], bias(32), fitted(5)),
        Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)),
        Conv(
            "conv2",
            [ConvTerm("maxpool1", weight(32, 32, 3, 3), padding=same)],
            bias(32),
            Requant.eq5(8, 16),
            Residual("maxpool1", 4),
        ),
        Conv(
            "conv3",
            [
                ConvTerm("conv2", weight(32, 32, 3, 3), padding=(1, 1, 0, 0), stride=(2, 2)),
                ConvTerm("maxpool1", weight(32, 32, 1, 1), stride=(2, 2), shift=2),
            ],
            bias(32),
            fitted(7),
        ),
        Pool("avgpool4", "avg", "conv3", (2, 2), (1, 1), (1, 1, 0, 0), False, Requant.eq5(8, 8)),
        Add(
            "add5",
            [Operand("conv3", 3), Operand("avgpool4", -2)],
            Requant([1000], [11], 8, 9, 0, 255),
        ),
        Pool("maxpool6", "max", "add5", (2, 2), (1, 1)),
        Conv("conv7", [ConvTerm("maxpool6", weight(20, 32, 1, 1))], bias(20)),
    ]
    return Graph([images], layers, [Output("conv7", (20, 2, 2), Dequantize(scale=(0.5,)))])


def pooled_convs(seed: int) -> Graph:
    """Two convolutions of three to nine kernel blocks, each before a max pool that may be fused.

    A third of their group-sets is zero, so that the blocks are not alike.
    """
    rng = np.random.default_rng(seed)
    size = 16
    kind = MapType(int(rng.integers(17, 65)), size, size, 8)
    images = Input("x0", kind, kind.shape, Quantize("uint8"))
    layers: list[Conv | Pool] = []
    source, before = "x0", kind.channels
    for number in range(2):
        conv, pool = f"conv{2 * number}", f"maxpool{2 * number + 1}"
        channels = int(rng.integers(33, 145))
        kernel = int(rng.choice([1, 3]))
        weight = rng.integers(-40, 41, (channels, before, kernel, kernel))
        kept = rng.random((-(-channels // 16), -(-before // 16), kernel, kernel)) < 2 / 3
        weight *= kept.repeat(16, 0).repeat(16, 1)[:channels, :before]
        term = ConvTerm(source, weight, padding=4 * (kernel // 2,))
        bias = rng.integers(-3000, 3001, channels)
        layers.append(Conv(conv, [term], bias, Requant.eq5(int(rng.choice([4, 8])), 17)))
        window = (2, 2) if number else (int(rng.choice([2, 3])), 2)
        layers.append(Pool(pool, "max", conv, window, window))
        source, before, size = pool, channels, size // 2
    out = Output(source, (before, 16 // layers[1].kernel[0] // 2, 4), Dequantize("uint8"))
    return Graph([images], layers, [out])


def overlapping(seed: int) -> Graph:
    """A convolution, a pool and a convolution with a residual, all with windows that overlap."""
    rng = np.random.default_rng(seed)

    def axis(size: int) -> tuple[int, int, int, int, int]:
        """Give kernel, stride, dilation, padding, and what they make of a size."""
        kernel = int(rng.integers(2, 6))
        dilation = int(rng.integers(1, 3)) if kernel < 4 else 1
        reach = (kernel - 1) * dilation
        stride, padding = int(rng.integers(1, min(reach, 3) + 1)), int(rng.integers(0, reach))
        return kernel, stride, dilation, padding, (size + 2 * padding - reach - 1) // stride + 1

    def conv(name: str, source: str, before: int, channels: int, term: ConvTerm) -> Conv:
        return Conv(name, [term], rng.integers(-4000, 4000, channels), Requant.eq5(bits, 13))

    bits, size = int(rng.choice([4, 8])), (int(rng.integers(16, 31)), int(rng.integers(5, 9)))
    kind = MapType(int(rng.integers(10, 40)), *size, int(rng.choice([4, 8])))
    rows, columns = axis(size[0]), axis(size[1])
    channels = int(rng.integers(10, 70))
    weight = rng.integers(-40, 41, (channels, kind.channels, rows[0], columns[0]))
    strides, dilations, paddings = ((rows[i], columns[i]) for i in (1, 2, 3))
    term = ConvTerm("x0", weight, stride=strides, dilation=dilations, padding=2 * paddings)
    layers: list[Conv | Pool] = [conv("conv0", "x0", kind.channels, channels, term)]
    source, height, width = "conv0", rows[4], columns[4]
    if rng.random() < 0.4 and min(height, width) > 3:  # to be fused
        layers.append(Pool("maxpool1", "max", source, (2, 2), (2, 2)))
        source, height, width = "maxpool1", height // 2, width // 2
    mode, stride = str(rng.choice(["max", "avg"])), int(rng.integers(1, 3))
    requant = None if mode == "max" else Requant.eq5(bits, 8)
    name = f"{mode}pool{len(layers)}"
    layers.append(Pool(name, mode, source, (3, 3), (stride, 1), (1, 1, 1, 1), requant=requant))
    height = (height - 1) // stride + 1
    weight = rng.integers(-40, 41, (channels, channels, 3, 3))
    last = f"conv{len(layers)}"
    term = ConvTerm(name, weight, padding=(1, 1, 1, 1))
    layers.append(
        attrs.evolve(conv(last, name, channels, channels, term), residual=Residual(name, 5))
    )
    output = Output(last, (channels, height, width), Dequantize("uint8"))
    images = Quantize("uint8", high=2**kind.bits - 1)
    return Graph([Input("x0", kind, kind.shape, images)], layers, [output])


def bordered_region(graph: Graph, arch: MarsArch, border: Border = "both") -> Region:
    """Build a region by the default schedule, but for one choice of the border in all layers."""
    space = Space.of(graph, arch)
    choices = (attrs.evolve(choice, border=border) for choice in space.default.choices)
    schedule = space.realize(Point(tuple(choices)))
    return build_region(NamedGraph.of(graph), arch, scheduler=lambda *_: schedule)


def reloading(graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]) -> Schedule:
    """Make the default schedule, but that all rows of a window are moved in for each tile."""
    schedule = plan(graph, arch, packed)
    layers = tuple(attrs.evolve(entry, halo="reload") for entry in schedule.layers)
    return attrs.evolve(schedule, layers=layers)


def tiny_conv() -> Graph:
    """One group-set on a 2x2 map: 16 channels, 1x1, eq. 5."""
    kind = MapType(16, 2, 2, 8)
    weight = np.zeros((16, 16, 1, 1), np.int8)
    weight[np.arange(16), np.arange(16)[::-1]] = np.arange(1, 17)[:, None, None]
    return Graph(
        [Input("x0", kind, kind.shape, Quantize("uint8"))],
        [Conv("conv0", [ConvTerm("x0", weight)], np.arange(16) * 8, Requant.eq5(8, 12))],
        [Output("conv0", kind.shape, Dequantize("uint8"))],
    )


def small_program() -> Program:
    """The program of :func:`every_kind_of_layer`."""
    return build([NamedGraph.of(every_kind_of_layer())], PRESETS["mars"])


_HEADER = struct.Struct("<8sIIQ32sQ")


def open_program(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Give a program file's index and what follows it, without the runtime's reader."""
    payload = data[_HEADER.size :]
    (length,) = struct.unpack_from("<Q", payload)
    return json.loads(payload[8 : 8 + length]), payload[8 + length :]


def seal_program(index: object, rest: bytes) -> bytes:
    """Make a program file with a good checksum of any index (an object, or its JSON text)."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    payload = struct.pack("<Q", len(text)) + text + rest
    digest = hashlib.sha256(payload).digest()
    return _HEADER.pack(b"MARSPROG", 1, 0, len(payload), digest, 0) + payload
