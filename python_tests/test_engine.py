"""The exact engine: code for code the reference, with every kernel that this processor executes.

Arm's kernels run on any machine, under emulation, if the package unicorn is installed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mars_runtime
from mars_runtime import PRESETS, InputError, OptionError, ProgramError, isa, native
from mars_runtime.cache import cache_folder, kept
from mars_runtime.engine import CHUNKS, Engine, _from_blocks, _Runner, engine_of
from mars_runtime.errors import MachineError
from mars_runtime.kernel_code import ConvKernel, PoolKernel
from mars_runtime.layers import ConvLayer, Entry, Layers, Map, dump, load
from mars_runtime.lift import NotLifted, lift
from mars_runtime.plan import Plan, _Scaling, _vectors
from mars_runtime.program import Region
from mars_runtime.quantize import Dequantize, Quantize
from python_tests.random_graphs import random_inputs
from python_tests.small_networks import bordered_region, overlapping, reloading
from python_tests.test_machine import MACHINES, network_of
from tvm_mars.compiler import NamedGraph, build, build_region
from tvm_mars.graph import (
    Conv,
    ConvTerm,
    Graph,
    Input,
    MapType,
    Output,
    Pool,
    Requant,
    Residual,
    evaluate_values,
    window_size,
)
from tvm_mars.networks import resnet20, vgg16

MARS = PRESETS["mars"]
VARIANTS = native.variants()
HOST_LIBRARY = native.library


@pytest.fixture(params=[*VARIANTS, "emulated neon-dotprod", "emulated portable"])
def variant(request, monkeypatch) -> str:
    """Kernels of this processor, or of Arm's under emulation."""
    emulated, _, name = request.param.rpartition(" ")
    if emulated:
        pytest.importorskip("unicorn", reason="unicorn, which emulates Arm, is not installed")
        from python_tests import emulated_arm

        monkeypatch.setattr(native, "library", emulated_arm.library)
    return str(name)


def lifted(graph: Graph, arch=MARS) -> Layers:
    return lift(build_region(NamedGraph.of(graph), arch), arch)


def run_engine(engine: Engine, inputs: Sequence[np.ndarray], threads: int = 1) -> list[np.ndarray]:
    parts: dict[int, list[np.ndarray]] = {}

    def take(part, outputs):
        parts[part.start] = [np.array(output) for output in outputs]

    engine.run(inputs, take, threads)
    return [np.concatenate([parts[at][i] for at in sorted(parts)]) for i in range(len(parts[0]))]


def assert_exact(
    graph: Graph, network: Layers, inputs: dict[str, np.ndarray], variant: str, threads: int = 1
) -> None:
    codes = {
        entry.name: entry.quantize.apply(inputs[entry.name]).reshape(-1, *entry.type.shape)
        for entry in graph.inputs
    }
    values = evaluate_values(graph, codes)
    engine = Engine(network, variant)
    engine.work = 2**40  # enough that threads share even these
    if native.library is not HOST_LIBRARY:
        threads = 1  # emulators do not share memory as processors do
    found = run_engine(engine, [inputs[entry.name] for entry in graph.inputs], threads)
    for out, output in zip(graph.outputs, found, strict=True):
        expected = values[out.value]
        np.testing.assert_array_equal(output[:, : expected.shape[1]], expected, out.value)


def test_the_portable_kernels_are_everywhere():
    assert VARIANTS[-1] == "portable"


def test_a_processor_executes_what_its_features_say():
    def able(triple: str, *features: str) -> tuple[str, ...]:
        return native.Processor(triple, "generic", dict.fromkeys(features, True)).variants()

    assert able("aarch64-linux-gnu", "neon", "dotprod") == ("neon-dotprod", "portable")
    assert able("aarch64-linux-gnu", "neon") == ("portable",)
    assert able("x86_64-linux-gnu", "avx2", "avxvnni") == ("avx-vnni", "avx2", "portable")
    assert able("x86_64-linux-gnu", "avx2", "avx512vnni") == ("avx2", "portable")


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (["fp asimd evtstrm aes asimdhp asimddp"] * 2, True),
        (["fp asimd evtstrm aes crc32 cpuid"] * 4, False),
        (["fp asimd asimddp", "fp asimd"], False),  # of two kinds
        ([], False),
    ],
)
def test_linux_tells_of_arms_dot_products(cores, expected):
    text = "\n".join(f"processor\t: {i}\nFeatures\t: {core}\n" for i, core in enumerate(cores))
    assert native._has_dot_products(text) is expected


def test_arms_threads_meet_behind_each_layer():
    """One after the other, for the emulator runs one: the other is said to have arrived."""
    pytest.importorskip("unicorn", reason="unicorn, which emulates Arm, is not installed")
    from python_tests import emulated_arm

    graph = depthwise(3, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", emulated_arm.library)
        runner = _Runner(Plan(lifted(graph), "neon-dotprod", 1, 2))
    codes = random_codes(graph, np.random.default_rng(0), 1)
    runner.point_to([codes["x0"]])
    for thread in (0, 1, 0, 1):  # again, with what the other did of the step before
        steps = len(runner.steps)
        runner.meeting[0] = steps
        runner._share(thread)
        assert runner.meeting[0] == 2 * steps
    expected = evaluate_values(graph, codes)["conv0"]
    found = _from_blocks(runner.outputs[0])
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)


def test_arms_kernels_are_made_of_its_dot_products():
    pytest.importorskip("unicorn", reason="unicorn, which emulates Arm, is not installed")
    from python_tests.emulated_arm import ARM, assembly

    pixels = tuple(16 * i for i in range(6))
    for variant, expected in (("neon-dotprod", 4 * len(pixels)), ("portable", 0)):
        kernel = ConvKernel(
            variant, ((pixels,),), (0,), None, 1, pixels, "float32", True, True, True, 1, False
        )
        assert assembly((kernel,), ARM).count("sdot\t") == expected


#: Leaves free memory of one page here, and of more than that only 6 GiB below it.
FAR_APART = """
import ctypes, mmap
from python_tests.emulated_arm import library
from python_tests.test_engine import Plan, depthwise, lifted, native

native.library = library
network = lifted(depthwise(3, 1))  # its kernel has constants

FAR, NO_ACCESS, PRIVATE_ANONYMOUS_NORESERVE = 6 << 30, 0, 0x4022
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t
libc.mmap.argtypes = [ctypes.c_size_t] * 2 + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_size_t] * 2

def reserve(size):
    found = libc.mmap(0, size, NO_ACCESS, PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
    assert found != ctypes.c_size_t(-1).value, f"no {size} bytes of addresses are left"
    return found

far = reserve(FAR)
for size in (2**20, 2**16, mmap.PAGESIZE):
    while reserve(size) > far:
        pass
libc.munmap(far + FAR - mmap.PAGESIZE, mmap.PAGESIZE)
print(len(Plan(network, "portable", 1, 1).library.addresses))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="places memory as Linux does")
def test_arms_code_is_loaded_where_memory_is_far_apart():
    pytest.importorskip("unicorn", reason="unicorn, which emulates Arm, is not installed")
    found = subprocess.run([sys.executable, "-c", FAR_APART], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "3\n"), found.stderr


@pytest.mark.parametrize("part", range(8))
def test_random_networks(variant, part, first_seed):
    """On machines whose tiles, partial sums and spills differ; batches that fill no chunk."""
    names = list(MACHINES)
    for number in range(3):
        seed = first_seed + 3 * part + number
        arch = MACHINES[names[seed % len(names)]]
        graph = network_of(seed)
        images = (1, 3, 16 + 5)[number]
        try:
            network = lifted(graph, arch)
        except mars_runtime.CapacityError:
            continue
        inputs = random_inputs(graph, seed, images=images)
        assert_exact(graph, network, inputs, variant, threads=1 + number)


@pytest.mark.parametrize("name", MACHINES)
def test_every_compiled_program_is_lifted(name, first_seed):
    """The same layers come off it whatever its schedule."""
    for seed in range(first_seed, first_seed + 20):
        graph = network_of(seed)
        try:
            found = lifted(graph, MACHINES[name])
        except mars_runtime.CapacityError:
            continue
        assert [out.bits for out in (found.maps[i] for i in found.outputs)] == [
            graph.types[out.value].bits for out in graph.outputs
        ]


def set_registers(region: Region, name: str) -> list[int]:
    """Give the SAS instructions in which a register is not 0."""
    return [
        place
        for place, one in enumerate(region.instructions)
        if isinstance(one, isa.Sas) and getattr(one, name)
    ]


def altered(region: Region, place: int, instruction: isa.Instruction) -> Region:
    """Give a region with another instruction in one place."""
    code = list(region.instructions)
    code[place] = instruction
    return attrs.evolve(region, code=isa.encode_all(code))


@pytest.mark.parametrize("name", ["mars", "small", "tiny"])
def test_taps_that_are_passed_over_belong_to_the_layer(name, first_seed):
    """Layers are the same with borders cut and without; a mask that hides data is no layer's."""
    compared = hidden = 0
    for seed in range(first_seed, first_seed + 40):
        graph = network_of(seed)
        try:
            region = bordered_region(graph, MACHINES[name])
        except mars_runtime.CapacityError:
            continue
        masks = set_registers(region, "skip")
        if not masks:
            continue
        compared += 1
        assert dump(lift(region, MACHINES[name])) == dump(lifted(graph, MACHINES[name]))
        every_tap = attrs.evolve(region.instructions[masks[0]], skip=2**16 - 1)
        try:
            lift(altered(region, masks[0], every_tap), MACHINES[name])
        except NotLifted as reason:
            hidden += 1
            assert "passes over taps that meet the map" in str(reason)
    assert compared >= 8 and hidden > compared // 2


@pytest.mark.parametrize("bank_bits", [12 * 1024, 24 * 1024])
def test_rings_of_rows_are_windows_of_the_map(bank_bits, first_seed):
    """Layers are the same with halos kept and without; a ring that begins elsewhere is no map."""
    compared = 0
    arch = attrs.evolve(MARS, bank_bits=bank_bits)
    for seed in range(first_seed, first_seed + 30):
        graph = overlapping(seed)
        try:
            region = build_region(NamedGraph.of(graph), arch)
            moved_anew = build_region(NamedGraph.of(graph), arch, scheduler=reloading)
        except mars_runtime.CapacityError:
            continue
        rings = set_registers(region, "row")
        if not rings:
            continue
        compared += 1
        assert dump(lift(region, arch)) == dump(lift(moved_anew, arch))
        for ring in rings:
            sas = region.instructions[ring]
            later = attrs.evolve(sas, row=(sas.row + 1) % sas.height)
            with pytest.raises(NotLifted, match="reads a window of several maps"):
                lift(altered(region, ring, later), arch)
    assert compared >= 10, compared


@st.composite
def convolutions(draw: st.DrawFn) -> Graph:
    """One convolution, with a residual and a pool or without."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits, weight_bits = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8]))
    grouping = draw(st.sampled_from(["none", "none", "two", "depthwise"]))
    channels = draw(st.integers(1, 40)) * (2 if grouping == "two" else 1)
    outputs = channels if grouping == "depthwise" else draw(st.integers(1, 40)) * 2
    groups = {"none": 1, "two": 2, "depthwise": channels}[grouping]
    size = (draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    zero = draw(st.sampled_from([0, 2 ** (bits - 1), 2**bits - 1]))
    limit = 2 ** (weight_bits - 1)
    weight = rng.integers(-limit, limit, (outputs, channels // groups, *kernel))
    weight *= rng.random((outputs, 1, *kernel)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    term = ConvTerm(
        "x0",
        weight,
        weight_bits,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        tuple(draw(st.integers(0, 3)) for _ in range(4)),
        (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups,
    )
    out_bits = draw(st.sampled_from([4, 8]))
    top = 2**out_bits - 1
    kind = draw(st.sampled_from(["eq5", "small", "large", "negative", "raw"]))
    requant = None
    if kind == "eq5":
        requant = Requant.eq5(out_bits, draw(st.sampled_from([1, 8, 15, 20, 31, 40])))
    elif kind != "raw":
        low, high = sorted((int(rng.integers(0, top + 1)), top))
        bound, shift = {"small": (3, 9), "large": (2**31 - 1, 44), "negative": (200, 16)}[kind]
        multiplier = rng.integers(-bound if kind == "negative" else 0, bound, outputs)
        shifts = np.clip(shift + rng.integers(-9, 6, outputs), 0, 62)
        requant = Requant(multiplier, shifts, out_bits, int(rng.integers(0, top)), low, high)
    shape = (
        outputs,
        *(
            window_size(size[i], kernel[i], term.stride[i], *term.padding[i::2], term.dilation[i])
            for i in (0, 1)
        ),
    )
    assume(min(shape) >= 1)
    inputs = [_input("x0", MapType(channels, *size, bits, zero))]
    residual = None
    if draw(st.booleans()):
        inputs.append(_input("x1", MapType(*shape, bits, zero)))
        residual = Residual("x1", draw(st.integers(0, 7)))
    layers: list[Conv | Pool] = [
        Conv("conv0", [term], rng.integers(-3000, 3000, outputs), requant, residual)
    ]
    if requant is not None and min(shape[1:]) >= 2 and draw(st.booleans()):
        layers.append(Pool("maxpool1", "max", "conv0", (2, 2), (2, 2)))
        shape = (outputs, shape[1] // 2, shape[2] // 2)
    dequantize = Dequantize("int32" if requant is None else "uint8")
    return Graph(inputs, layers, [Output(layers[-1].name, shape, dequantize)])


def _input(name: str, kind: MapType) -> Input:
    return Input(name, kind, kind.shape, Quantize("uint8", 0, 2**kind.bits - 1))


def random_codes(graph: Graph, rng: np.random.Generator, images: int) -> dict[str, np.ndarray]:
    return {
        entry.name: rng.integers(0, 2**entry.type.bits, (images, *entry.type.shape), dtype=np.uint8)
        for entry in graph.inputs
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graph=convolutions(), images=st.sampled_from([1, 2, 5]), threads=st.sampled_from([1, 2]))
def test_convolutions(variant, graph, images, threads):
    """Shapes, strides, paddings, dilation, groups, widths, zero points, requantizations."""
    try:
        network = lifted(graph)
    except mars_runtime.CapacityError:
        assume(False)
    codes = random_codes(graph, np.random.default_rng(images), images)
    assert_exact(graph, network, codes, variant, threads)


def extreme(weight: int, bits: int, size: int = 1) -> Graph:
    """4,608 products of the largest code with one weight, in every output."""
    weights = np.full((16, 512, 3, 3), weight)
    kind = MapType(512, 2 + size, 2 + size, bits)
    term = ConvTerm("x0", weights)
    out = Output("conv0", (16, size, size), Dequantize("int32"))
    return Graph([_input("x0", kind)], [Conv("conv0", [term], np.zeros(16))], [out])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("weight", [-128, -127, 127])
def test_sums_do_not_saturate(variant, weight, size, bits):
    graph = extreme(weight, bits, size)
    top = 2**bits - 1
    codes = np.full((1, *graph.inputs[0].type.shape), top, np.uint8)
    (found,) = run_engine(Engine(lifted(graph), variant), [codes])
    assert (found == 4608 * top * weight).all()  # 2**24 is passed nine times over


def test_layers_without_weights_write_their_bias(variant):
    kind = MapType(20, 5, 5, 8)
    term = ConvTerm("x0", np.zeros((20, 20, 3, 3)), padding=(1, 1, 1, 1))
    bias = np.arange(-10, 10) * 1000
    layer = Conv("conv0", [term], bias, Requant.eq5(8, 13))
    out = Output("conv0", (20, 5, 5), Dequantize("uint8"))
    graph = Graph([_input("x0", kind)], [layer], [out])
    network = lifted(graph)
    assert isinstance(network.layers[0], ConvLayer) and not len(network.layers[0].weights)
    assert_exact(graph, network, random_codes(graph, np.random.default_rng(0), 2), variant)


def convolution_kernel(network: Layers, variant: str) -> ConvKernel:
    kernels = Plan(network, variant, 1, 1).library.addresses
    (made,) = (kernel for kernel in kernels if isinstance(kernel, ConvKernel))
    return made


def depthwise(kernel: int, dilation: int, stride: int = 1, weight: int | None = None) -> Graph:
    """40 channels, each with a kernel of its own."""
    weights = np.random.default_rng(kernel).integers(1, 128, (40, 1, kernel, kernel))
    if weight is not None:
        weights[:] = weight
    padding = (0, 0, 0, 0) if weight else (dilation,) * 4
    term = ConvTerm("x0", weights, 8, (stride, stride), padding, (dilation, dilation), 40)
    size = window_size(13, kernel, stride, *padding[:2], dilation)
    out = Output("conv0", (40, size, size), Dequantize("int32"))
    layer = Conv("conv0", [term], np.zeros(40))
    return Graph([_input("x0", MapType(40, 13, 13, 8, 9))], [layer], [out])


@pytest.mark.parametrize(
    ("kernel", "dilation", "per_row"),
    [(1, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 2), (3, 2, 2), (3, 4, 3)],
)
def test_depthwise_layers_take_four_pixels_at_a_time(variant, kernel, dilation, per_row):
    for stride in (1, 2):
        graph = depthwise(kernel, dilation, stride)
        network = lifted(graph)
        (layer,) = network.layers
        assert isinstance(layer, ConvLayer) and len(_vectors(layer)[0]) == 3 * kernel * per_row
        made = convolution_kernel(network, variant)
        assert made.diagonal
        codes = random_codes(graph, np.random.default_rng(stride), 3)
        assert_exact(graph, network, codes, variant)


def test_one_weight_off_the_diagonal_is_not_forgotten(variant):
    weight = np.zeros((32, 32, 3, 3), int)
    weight[np.arange(32), np.arange(32)] = 5
    weight[17, 16, 2, 2] = -7
    term = ConvTerm("x0", weight, padding=(1, 1, 1, 1))
    out = Output("conv0", (32, 7, 7), Dequantize("int32"))
    graph = Graph(
        [_input("x0", MapType(32, 7, 7, 8))], [Conv("conv0", [term], np.zeros(32))], [out]
    )
    network = lifted(graph)
    made = convolution_kernel(network, variant)
    assert not made.diagonal
    assert_exact(graph, network, random_codes(graph, np.random.default_rng(0), 2), variant)


@pytest.mark.parametrize("weight", [-128, 127])
def test_depthwise_sums_do_not_saturate(variant, weight):
    graph = depthwise(5, 1, 1, weight)
    codes = np.full((1, 40, 13, 13), 255, np.uint8)
    (found,) = run_engine(Engine(lifted(graph), variant), [codes])
    assert (found[:, :40] == 25 * (255 - 9) * weight).all()


@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("shifts", [(0, 3), (5, 2)])
def test_terms_are_aligned(variant, shifts, groups):
    """Two maps into the same sums, each term on a grid of its own."""
    rng = np.random.default_rng(groups)
    terms = [
        ConvTerm(f"x{i}", rng.integers(1, 128, (24, 24 // groups, 3, 3)), groups=groups, shift=by)
        for i, by in enumerate(shifts)
    ]
    inputs = [_input(term.input, MapType(24, 9, 9, 8)) for term in terms]
    layer = Conv("conv0", terms, rng.integers(-3000, 3000, 24))
    out = Output("conv0", (24, 7, 7), Dequantize("int32"))
    graph = Graph(inputs, [layer], [out])
    network = lifted(graph)
    assert sorted(source.shift for source in network.layers[0].sources) == sorted(shifts)
    assert_exact(graph, network, random_codes(graph, rng, 2), variant)


def taps_of(size: int, kernel: int, padding: int, zero: int = 0) -> Graph:
    """A convolution with every tap."""
    rng = np.random.default_rng(size)
    weight = rng.integers(-127, 128, (24, 40, kernel, kernel))
    term = ConvTerm("x0", weight, padding=(padding,) * 4)
    grown = size + 2 * padding - kernel + 1
    out = Output("conv0", (24, grown, grown), Dequantize("int32"))
    kind = MapType(40, size, size, 8, zero)
    return Graph([_input("x0", kind)], [Conv("conv0", [term], rng.integers(-9, 9, 24))], [out])


@pytest.mark.parametrize(
    ("size", "zero", "pixels"),
    [
        (4, 0, [9, 9, 9, 9, 12, 12, 12, 12, 16]),
        (2, 0, [1, 1, 1, 1, 2, 2, 2, 2, 4]),
        (1, 0, [1]),
        (8, 0, [14, 14, 16]),  # tiles of two rows; each row is met by the taps of one tile
        (16, 0, [15, 15, 16]),
        (32, 0, [16]),  # two tiles in a row
        (4, 128, [16]),  # what lies outside counts
    ],
)
def test_taps_are_not_multiplied_with_zeros_outside(size, zero, pixels):
    """Of a tile's pixels those that a tap brings outside the map in all tiles."""
    graph = taps_of(size, 3, 1, zero)
    if "avx512-vnni" in VARIANTS:
        kernel = convolution_kernel(lifted(graph), "avx512-vnni")
        (runs,) = kernel.sources
        assert sorted(sum(p is not None for p in run) for run in runs) == pixels
    for variant in VARIANTS:
        codes = random_codes(graph, np.random.default_rng(0), 2)
        assert_exact(graph, lifted(graph), codes, variant)


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("size", [(2, 5, 2), (3, 7, 3), (5, 3, 2), (7, 5, 2)])
def test_borders_as_wide_as_maps(variant, size, images):
    graph = taps_of(*size)
    codes = random_codes(graph, np.random.default_rng(1), images)
    assert_exact(graph, lifted(graph), codes, variant)


def pooled(size: int, multiplier: int, shift: int, zero: int = 0, pad: int = 0) -> Graph:
    """One average."""
    requant = Requant([multiplier], [shift], 8, zero, 0, 255)
    pool = Pool("avgpool0", "avg", "x0", (size, size), (1, 1), (pad,) * 4, requant=requant)
    grown = 1 + 2 * pad
    return Graph(
        [_input("x0", MapType(20, size, size, 8, 3))],
        [pool],
        [Output("avgpool0", (20, grown, grown), Dequantize("uint8"))],
    )


@pytest.mark.parametrize(
    ("size", "multiplier", "shift", "division"),
    [
        (2, 1, 0, "float64"),
        (2, 2**31 - 1, 0, "float64"),
        (4, 255, 8, "float64"),
        (4, -5, 2, "float64"),
        (7, 2**31 - 1, 31, "float64"),
        (8, 2**31 - 1, 38, "int64"),
        (9, 2**30, 38, "int64"),
        (8, -(2**31), 38, "int64"),
    ],
)
def test_averages(variant, size, multiplier, shift, division):
    for zero, pad in ((0, 0), (100, 1)):
        graph = pooled(size, multiplier, shift, zero, pad)
        network = lifted(graph)
        kernels = Plan(network, variant, 1, 1).library.addresses
        divisions = [k.division for k in kernels if isinstance(k, PoolKernel)]
        assert divisions == [division]
        codes = random_codes(graph, np.random.default_rng(size), 60)
        codes["x0"][:9] = np.arange(9)[:, None, None, None]  # of equal codes
        assert_exact(graph, network, codes, variant)


def test_averages_beside_ties(variant):
    """Quotients that miss an odd half by as little as those that are divided in float64 can."""
    count, shift = 49, 37
    found = 0
    for half in (1, 3, 5):
        for miss in (-1, 0, 1):
            product = half * (count << shift - 1) + miss
            sums = (s for s in range(50, 255 * count) if product % s == 0)
            total = next((s for s in sums if product // s < 2**31), None)
            if total is None:
                continue
            found += 1
            graph = pooled(7, product // total, shift, 5)
            less = graph.inputs[0].type.zero_point
            codes = np.full((1, 20, 49), (total // count) + less, np.uint8)
            codes[:, :, : total % count] += 1
            graph_codes = {"x0": codes.reshape(1, 20, 7, 7)}
            expected = 5 + {-1: half // 2, 0: half // 2 + half // 2 % 2, 1: half // 2 + 1}[miss]
            values = evaluate_values(graph, graph_codes)["avgpool0"]
            assert (values == expected).all()
            assert_exact(graph, lifted(graph), graph_codes, variant)
    assert found >= 5


def test_ties_round_to_even(variant):
    """Odd halves of a small grid: every second accumulator is a tie."""
    weight = np.zeros((16, 16, 1, 1), int)
    weight[np.arange(16), np.arange(16), 0, 0] = np.arange(16) - 8
    requant = Requant([1], [1], 8, 100, 0, 255)
    layer = Conv("conv0", [ConvTerm("x0", weight)], np.zeros(16), requant)
    out = Output("conv0", (16, 1, 16), Dequantize("uint8"))
    graph = Graph([_input("x0", MapType(16, 1, 16, 4))], [layer], [out])
    codes = np.broadcast_to(np.arange(16, dtype=np.uint8), (1, 16, 1, 16))
    expected = 100 + np.array(
        [[round((channel - 8) * code / 2) for code in range(16)] for channel in range(16)]
    )
    (found,) = run_engine(Engine(lifted(graph), variant), [codes])
    np.testing.assert_array_equal(found[0, :, 0], np.clip(expected, 0, 255))


def test_every_kind_of_number_is_chosen(variant):
    """The products decide: float32 to 2**24, float64 to 2**53, int64 beyond, none for raw sums."""
    weight = np.ones((16, 16, 1, 1))
    kind = MapType(16, 1, 1, 8)
    for requant, expected in (
        (Requant.eq5(8, 15), "float32"),
        (Requant.eq5(8, 17), "float64"),
        (Requant([2**31 - 1], [40], 8, 0, 0, 255), "float64"),
        (Requant([2**31 - 1], [62], 8, 0, 0, 255), "int64"),
        (Requant.eq5(8, 1), "int64"),  # scaled, the largest sums leave 32 bits
        (None, "raw"),
    ):
        bias = np.full(16, {"int64": 2**30, "float64": 2**17}.get(expected, 0))
        layer = Conv("conv0", [ConvTerm("x0", weight)], bias, requant)
        dequantize = Dequantize("uint8" if requant else "int32")
        out = Output("conv0", (16, 1, 1), dequantize)
        graph = Graph([_input("x0", kind)], [layer], [out])
        network = lifted(graph)
        (found,) = network.layers
        assert isinstance(found, ConvLayer) and _Scaling.of(found, found.bias).numbers == expected
        codes = random_codes(graph, np.random.default_rng(1), 40)
        assert_exact(graph, network, codes, variant)


def test_chunks_and_threads_do_not_change_the_codes():
    """Groups of images nest differently in each; the whole network runs in all of them."""
    graph = resnet20()
    network = lifted(graph)
    images = 2 * CHUNKS[-1] + 3
    given = random_inputs(graph, 5, images=images)["x0"]
    codes = graph.inputs[0].quantize.apply(given)
    expected = evaluate_values(graph, {"x0": codes})[graph.outputs[0].value]
    for threads, count in ((1, images), (2, images), (3, images), (2, 1), (2, 7)):
        engine = Engine(network, VARIANTS[0])
        engine.work = 2**40
        (found,) = run_engine(engine, [given[:count]], threads)
        np.testing.assert_array_equal(found[:, :10], expected[:count])
    assert len(set(Plan(network, VARIANTS[0], CHUNKS[-1], 1).groups)) > 1


# -- what is given ---------------------------------------------------------------------------------


def entering(quantize: Quantize, channels: int, height: int, width: int) -> Layers:
    """No layer: the codes of what is given come out."""
    given = Map(-(-channels // 16), height, width, 8)
    return Layers((given,), (), (Entry("x0", 0, channels, quantize),), (0,))


@st.composite
def quantizers(draw: st.DrawFn) -> Quantize:
    dtype = draw(st.sampled_from(["float32", "float32", "uint8", "int8"]))
    low = -128 if dtype == "int8" else draw(st.sampled_from([0, 0, 3]))
    high = draw(st.integers(low, 127 if dtype == "int8" else 255))
    if dtype != "float32":
        return Quantize(dtype, low, high)
    low = draw(st.sampled_from([low, -128, 0]))
    return Quantize(
        "float32",
        low,
        min(high, low + 255),
        draw(st.sampled_from([1.0, 0.1, 0.0078125, -3.0, 1e-30])),
        draw(st.sampled_from([0, 7, -128, 255, 2**24 + 1])),
        draw(st.sampled_from([1.0, 255.0, 15.0, 0.3])),
        draw(st.sampled_from([None, (0.0, 1.0), (-2.5, 3.0)])),
    )


def random_values(quantize: Quantize, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Give values of which many are ties, some far outside, some at the limits."""
    rng = np.random.default_rng(seed)
    if quantize.dtype != "float32":
        return rng.integers(quantize.low, quantize.high + 1, shape).astype(quantize.dtype)
    step = quantize.scale / quantize.factor
    values = rng.integers(-20, 600, shape) / 2 * step
    values[rng.random(shape) < 0.2] = rng.random()
    values[rng.random(shape) < 0.1] *= 1e9
    values[rng.random(shape) < 0.05] = rng.choice([np.inf, -np.inf])
    return values.astype(np.float32)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    quantize=quantizers(),
    shape=st.tuples(st.integers(1, 35), st.integers(1, 4), st.integers(1, 35)),
    images=st.sampled_from([1, 3, 4, 21]),
    threads=st.sampled_from([1, 2]),
)
def test_codes_are_those_of_the_conversion(variant, quantize, shape, images, threads):
    """Channels that fill no block, rows that fill no vector; chunks that are not full."""
    values = random_values(quantize, (images, *shape), images)
    engine = Engine(entering(quantize, *shape), variant)
    engine.work = 2**40
    threads = threads if native.library is HOST_LIBRARY else 1
    (found,) = run_engine(engine, [values], threads)
    np.testing.assert_array_equal(found[:, : shape[0]], quantize.apply(values))
    assert not found[:, shape[0] :].any()


def test_arrays_may_lie_anyhow(variant):
    """With gaps, backwards, at odd addresses."""
    quantize = Quantize(factor=255.0)
    values = np.random.default_rng(0).random((4, 5, 6, 7), np.float32)
    odd = np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    odd[:] = values
    wide = np.repeat(values, 2, axis=3)
    engine = Engine(entering(quantize, 5, 6, 7), variant)
    for array in (odd, wide[..., ::2], values[::-1], values.transpose(0, 1, 3, 2).swapaxes(2, 3)):
        (found,) = run_engine(engine, [array])
        np.testing.assert_array_equal(found[:, :5], quantize.apply(np.ascontiguousarray(array)))


@pytest.mark.parametrize("image", [0, 2, 4])
def test_values_without_a_code_are_refused(variant, image):
    for quantize, wrong in (
        (Quantize(factor=255.0, clip=(0.0, 1.0)), np.nan),
        (Quantize("uint8", 3, 9), 2),
        (Quantize("uint8", 3, 9), 10),
        (Quantize("int8", -5, 5), -6),
    ):
        engine = Engine(entering(quantize, 20, 3, 9), variant)
        values = random_values(quantize, (5, 20, 3, 9), 0)
        np.nan_to_num(values, copy=False)
        run_engine(engine, [values])
        values[image, 19, 2, 8] = wrong
        with pytest.raises(InputError, match=r"input x0: (holds NaN|codes .* expected)"):
            run_engine(engine, [values])
        with pytest.raises(InputError, match="input x0: dtype float64, expected"):
            run_engine(engine, [values.astype(float)])
        values[image, 19, 2, 8] = 5
        run_engine(engine, [values])  # nothing of it is left


# -- which engine runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> mars_runtime.Program:
    return build([NamedGraph.of(network_of(0))], MARS)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return random_inputs(network_of(0), 0, images=3)


def test_all_engines_agree(small, images, monkeypatch):
    expected = mars_runtime.run(small, images, engine="machine")
    for engine in (None, "auto", "layers"):
        found = mars_runtime.run(small, images, engine=engine)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    for variant in VARIANTS:
        monkeypatch.setenv("MARS_KERNELS", variant)
        found = mars_runtime.run(small, images)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert engine_of(small.regions[0], small.arch).variant == variant


def whole(region: Region) -> Region:
    """Give a region that does not say where its layers end."""
    return attrs.evolve(region, layers=())


def test_what_is_no_sequence_of_layers_is_left_to_the_machine(small, images):
    program = attrs.evolve(small, regions=tuple(map(whole, small.regions)))
    with pytest.raises(NotLifted):
        lift(program.regions[0], MARS)
    expected = mars_runtime.run(small, images)
    found = mars_runtime.run(program, images)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ProgramError, match="no sequence of whole layers"):
        mars_runtime.run(program, images, engine="layers")


@pytest.mark.parametrize("kind", [isa.Move, isa.Fetch])
def test_what_the_machine_refuses_is_refused(small, images, kind):
    """The lifter makes the machine's checks: here of words that nothing wrote."""
    region = small.regions[0]
    index = next(i for i, one in enumerate(region.instructions) if isinstance(one, kind))
    left_out = region.instructions[index]
    nothing = isa.Sync(wait=left_out.wait, signal=left_out.signal)
    program = attrs.evolve(small, regions=(altered(region, index, nothing),))
    messages = []
    for engine in ("machine", "layers"):
        with pytest.raises(MachineError) as raised:
            mars_runtime.run(program, images, engine=engine)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_bad_options_are_refused_by_name(small, images, monkeypatch):
    with pytest.raises(OptionError, match="'fast' is no engine"):
        mars_runtime.run(small, images, engine="fast")
    monkeypatch.setenv("MARS_KERNELS", "mmx")
    with pytest.raises(OptionError, match="MARS_KERNELS"):
        mars_runtime.run(small, images)
    monkeypatch.delenv("MARS_KERNELS")
    monkeypatch.setenv("MARS_NUM_THREADS", "none")
    with pytest.raises(OptionError, match="MARS_NUM_THREADS"):
        mars_runtime.run(small, images)


def test_errors_of_threads_are_raised(monkeypatch):
    monkeypatch.setenv("MARS_NUM_THREADS", "2")
    graph = vgg16(0.05)
    program = build([NamedGraph.of(graph)], MARS)
    x = np.zeros((3 * CHUNKS[-1], 3, 32, 32), np.float32)
    x[-1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        mars_runtime.run(program, {"x0": x})


def test_an_empty_batch_gives_an_empty_batch(small, images):
    for engine in mars_runtime.ENGINES:
        found = mars_runtime.run(small, {n: a[:0] for n, a in images.items()}, engine=engine)
        assert all(len(array) == 0 for array in found.values())


# -- the cache -------------------------------------------------------------------------------------


def test_layers_survive_the_cache():
    network = lifted(network_of(3))
    again = load(dump(network))
    assert dump(again) == dump(network)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in network.layers]


def test_damaged_files_are_made_again(cache):
    calls = []

    def make() -> bytes:
        calls.append(1)
        return b"content"

    assert kept("damaged", make) == kept("damaged", make) == b"content" and len(calls) == 1
    path = cache / "damaged"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert kept("damaged", make) == b"content" and len(calls) == 2
    assert kept("damaged", make) == b"content" and len(calls) == 2


def test_nothing_is_kept_without_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MARS_CACHE_DIR", "")
    assert cache_folder() is None
    assert kept("x", lambda: b"1") == b"1" and kept("x", lambda: b"2") == b"2"
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("MARS_CACHE_DIR", str(file))  # which cannot be made a folder
    assert kept("x", lambda: b"3") == b"3"
    monkeypatch.delenv("MARS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if os.name == "posix":
        assert cache_folder() == tmp_path / "tvm-mars"


def _first_run(folder: str, program: bytes, start) -> bytes:
    os.environ["MARS_CACHE_DIR"] = folder
    start.wait()
    loaded = mars_runtime.Program.from_bytes(program)
    found = mars_runtime.run(loaded, random_inputs(network_of(0), 0, images=1))
    return b"".join(array.tobytes() for array in found.values())


def _reporting(folder: str, program: bytes, start, results) -> None:
    results.put(_first_run(folder, program, start))


def test_two_processes_fill_one_cache(small, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    folder = tmp_path / "shared"
    given = (str(folder), small.to_bytes(), start, results)
    processes = [context.Process(target=_reporting, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    files = sorted(path.suffix for path in Path(folder).iterdir())
    assert files == [".layers", ".o"]
