"""The limits: each is checked on both sides, and documented by its own words."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError
from tvm_mars.constraints import (
    CONSTRAINTS,
    check_layer,
    check_spec,
    on_layer,
    supported_ops,
)
from tvm_mars.frontend.lower import Call as SpecCall
from tvm_mars.frontend.lower import Region, check, lower
from tvm_mars.frontend.patterns import COMPOSITES
from tvm_mars.frontend.spec import (
    AddSpec,
    AverageSpec,
    AvgPoolSpec,
    Codes,
    ConvSpec,
    DequantizeSpec,
    MaxPoolSpec,
    Quantizer,
    QuantizeSpec,
    Requantizer,
    Rescale,
    ReshapeSpec,
    SumSpec,
    TermSpec,
)
from tvm_mars.graph import Conv, ConvTerm, MapType, Pool, Requant

ARCH = MarsArch()
UINT8 = Codes("uint8", [0.5], [3])
QUANTIZER = Quantizer(Codes("uint8", [0.25], [0]), (0.0, 4.0))
TERM = TermSpec(
    data=UINT8,
    data_shape=(16, 6, 6),
    out_shape=(8, 4, 4),
    weight=np.ones((8, 16, 3, 3), np.int8),
    weight_dtype="int8",
    weight_scale=np.asarray([0.125]),
)
CONV = ConvSpec("conv2d", (TERM,), quantizer=QUANTIZER)
POOL = MaxPoolSpec("uint8", (16, 6, 6), (16, 3, 3), (2, 2), (2, 2), (0, 0, 0, 0))
AVERAGE = AvgPoolSpec(UINT8, (16, 6, 6), (16, 3, 3), (2, 2), (2, 2), (0, 0, 0, 0), QUANTIZER)
ADD = AddSpec((UINT8, UINT8), ((16, 6, 6), (16, 6, 6)), QUANTIZER)
RESCALE = Rescale(0.5, 0.7)
SUM = SumSpec(
    (UINT8, UINT8), ((16, 6, 6), (16, 6, 6)), (RESCALE, RESCALE), Codes("int8", 0.7, 4), -128, 127
)
INTEGERS = ConvSpec(
    "conv2d",
    (attrs.evolve(TERM, data=Codes("uint8", 1.0, 3)),),
    quantizer=Requantizer(Rescale(0.01, 1.0), Codes("uint8", 1.0, 0), 0, 255),
)
CUT_OFF = AverageSpec(
    "int8", (16, 6, 6), (16, 3, 3), (2, 2), (2, 2), (0, 0, 0, 0), low=-128, high=127
)
RESHAPE = ReshapeSpec("uint8", (16, 6, 6), (576,))
QUANTIZE = QuantizeSpec("float32", (3, 8, 8), QUANTIZER)
DEQUANTIZE = DequantizeSpec(UINT8, (3, 8, 8))
GOOD = (CONV, INTEGERS, POOL, AVERAGE, CUT_OFF, ADD, SUM, RESHAPE, QUANTIZE, DEQUANTIZE)


def term(**changes: Any) -> ConvSpec:
    return attrs.evolve(CONV, terms=(attrs.evolve(TERM, **changes),))


PER_CHANNEL = Codes("uint8", [0.5, 0.25], [3, 3])
BROKEN = [
    (term(data=attrs.evolve(UINT8, dtype="int16")), "Maps are uint8", "int16"),
    (term(data=PER_CHANNEL), "A map has one scale", "2 scales"),
    (term(weight_scale=np.asarray([0.0])), "Scales are greater than zero", "0.0"),
    (attrs.evolve(POOL, dtype="float32"), "Maps are uint8", "its input is float32, not codes"),
    (term(weight_dtype="int32"), "Weights are int8", "int32"),
    (term(layout="NHWC/HWIO"), "Maps are laid out NCHW", "NHWC/HWIO"),
    (attrs.evolve(QUANTIZE, dtype="float64"), "Numbers that enter are float32", "float64"),
    (attrs.evolve(DEQUANTIZE, out_dtype="float16"), "Numbers that leave are float32", "float16"),
    (attrs.evolve(ADD, shapes=((16, 6, 6), (16, 1, 1))), "have the same shape", "(16, 1, 1)"),
    (attrs.evolve(SUM, shapes=((16, 6, 6), (16, 1, 1))), "have the same shape", "(16, 1, 1)"),
    (attrs.evolve(SUM, codes=Codes("int16", 1.0, 0)), "Maps are uint8", "int16"),
    (attrs.evolve(CUT_OFF, dtype="int32"), "Maps are uint8", "int32"),
    (attrs.evolve(CUT_OFF, padding=(1, 1, 1, 1)), "as many codes at the border", "not counted"),
    (attrs.evolve(POOL, dilation=(2, 1)), "not dilated", "(2, 1)"),
    (attrs.evolve(AVERAGE, out_shape=(16, 4, 4)), "ceil_mode", "(16, 4, 4)"),
    (attrs.evolve(RESHAPE, out_shape=(36, 16)), "A reshape flattens", "(36, 16)"),
]


@pytest.mark.parametrize("spec", GOOD, ids=lambda spec: spec.kind)
def test_good_specs_pass(spec: Any) -> None:
    check(spec, ARCH)


@pytest.mark.parametrize(("spec", "limit", "value"), BROKEN, ids=lambda given: str(given)[:24])
def test_broken_specs_say_why(spec: Any, limit: str, value: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_spec(spec, "lv7")
    assert limit in str(caught.value) and value in str(caught.value)
    assert str(caught.value).startswith("lv7: ")


# -- layers ----------------------------------------------------------------------------------------


def conv(weight: Any, **changes: Any) -> Conv:
    requant = Requant.eq5(8, 15)
    return Conv("conv0", [ConvTerm("x0", weight, **changes)], np.zeros(len(weight)), requant)


def types(channels: int, size: int = 1, out: int = 16) -> dict[str, MapType]:
    return {"x0": MapType(channels, size, size, 8), "conv0": MapType(out, 1, 1, 8)}


def test_accumulators_at_the_bound() -> None:
    """255 * 127 * n fits below 2**31 for n = 66,310 and not for one more."""
    most = (2**31 - 1) // (255 * 127)
    good = conv(np.full((1, most, 1, 1), 127, np.int8))
    bad = conv(np.full((1, most + 1, 1, 1), 127, np.int8))
    limits = [c.check for c in CONSTRAINTS if c.check.__name__ == "accumulators_fit"]
    assert limits[0](good, types(most), ARCH) is None
    assert limits[0](bad, types(most + 1), ARCH) == f"they may reach {255 * 127 * (most + 1)}"


@pytest.mark.parametrize(
    ("layer", "kinds", "limit"),
    [
        (conv(np.ones((16, 1, 32, 65), np.int8)), types(1, 70), "at most 2048 taps: 32 x 65"),
        (conv(np.ones((16, 1, 1, 1), np.int8), stride=(64, 1)), types(1), "are at most 63"),
        (conv(np.ones((16, 1, 1, 1), np.int8)), types(1, 2**13), "8191 rows"),
        (
            conv(np.ones((16, 8320, 1, 1), np.int8)),
            {"x0": MapType(8320 * 16, 1, 1, 8), "conv0": MapType(16, 1, 1, 8)},
            "at most 65536 channels",
        ),
        (
            conv(np.ones((16, 8192, 3, 3), np.int8)),
            {"x0": MapType(8192, 8, 8, 8), "conv0": MapType(16, 6, 6, 8)},
            "fits the feature-map SRAMs: needs 9216 words of 8192",
        ),
        (
            Pool("maxpool0", "max", "x0", (2, 2), (1, 1), (2, 0, 0, 0)),
            {"x0": MapType(16, 4, 4, 8), "maxpool0": MapType(16, 5, 3, 8)},
            "padding is less than its window",
        ),
    ],
)
def test_layers_beyond_a_limit(layer: Any, kinds: dict[str, MapType], limit: str) -> None:
    with pytest.raises(UnsupportedError, match=limit):
        check_layer(layer, kinds, ARCH)


def test_a_new_limit_is_one_function() -> None:
    @on_layer("maxpool")
    def no_pools(layer: Any, types: Any, arch: MarsArch) -> str | None:
        """Pools are not taken."""
        return layer.name

    try:
        with pytest.raises(UnsupportedError, match="Pools are not taken: maxpool0"):
            check(POOL, ARCH)
        assert "Pools are not taken." in supported_ops()
    finally:
        CONSTRAINTS.pop()


def test_the_documentation_names_everything() -> None:
    text = supported_ops()
    assert all(f"`{composite.name}`" in text for composite in COMPOSITES)
    for constraint in CONSTRAINTS:
        assert f"- {constraint.text}." in text
        assert constraint.text and "\n" not in constraint.text


# -- numbers ---------------------------------------------------------------------------------------


def lowered(spec: Any, *params: tuple[str, tuple[int, ...]]) -> Any:
    names = [f"p{i}" for i in range(len(params))]
    region = Region(
        dict(zip(names, params, strict=True)), [SpecCall(spec, tuple(names), "r")], ["r"]
    )
    return lower(region, ARCH).graph


@pytest.mark.parametrize("scale", [0.0009765625, 0.37, 1e-7, 3.1e-12, 900.0])
def test_multipliers_are_within_31_bits_of_the_scale(scale: float) -> None:
    codes = Codes("uint8", [np.float64(np.float32(scale))], [0])
    spec = AddSpec((codes,), ((4, 1, 1),), Quantizer(Codes("uint8", [1.0], [0])))
    requant = lowered(spec, ("uint8", (4, 1, 1))).layers[0].requant
    found = float(requant.multiplier[0]) * 2.0 ** -float(requant.shift[0])
    assert abs(found / codes.scale[0] - 1) <= max(2.0**-31, 2.0**-63 / codes.scale[0])


def test_codes_of_four_bits_are_recognized() -> None:
    for dtype, clip, low in (("uint8", (0.0, 15.0), 0), ("int8", (-8.0, 7.0), -8)):
        quantizer = Quantizer(Codes(dtype, [1.0], [0]), clip)
        spec = AddSpec((Codes(dtype, [2.0], [0]),), ((4, 1, 1),), quantizer)
        graph = lowered(spec, (dtype, (4, 1, 1)))
        assert graph.layers[0].requant.bits == 4
        assert graph.outputs[0].dequantize.low == low
        assert graph.types["add0"].zero_point == -low


def test_residual_grids_align() -> None:
    """Eq. 5: P is the larger of the product's grid and the residual's."""
    quantizer = Quantizer(Codes("uint8", [1.0], [0]), (0.0, 1.0), 255.0)
    eight = Codes("uint8", [2.0**-8], [0])
    for weight_bits in (4, 8):
        grid = weight_bits - 1 + 4
        spec = ConvSpec(
            "conv2d",
            (
                attrs.evolve(
                    TERM,
                    data=Codes("uint8", [2.0**-4], [0]),
                    weight=np.full(TERM.weight.shape, 2 ** (weight_bits - 1) - 1, np.int8),
                    weight_scale=np.asarray([2.0 ** -(weight_bits - 1)]),
                    bias=np.full(8, 0.3, np.float32),
                ),
            ),
            residual=eight,
            quantizer=quantizer,
        )
        layer = lowered(spec, ("uint8", (16, 6, 6)), ("uint8", (8, 4, 4))).layers[0]
        whole = max(grid, 8)
        assert int(layer.requant.shift[0]) == whole and layer.requant.native
        assert layer.terms[0].shift == whole - grid
        assert layer.residual.shift == whole - 8
        expected = round(float(np.float32(0.3)) * 2**grid) << (whole - grid)
        assert set(layer.bias.tolist()) == {expected}
        assert layer.terms[0].weight_bits == weight_bits
