"""TVM's requantization on MARS: equal for every accumulator, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from mars_runtime.errors import UnsupportedError
from tvm_mars.frontend.rescale import Expressed, express, limited, rescale
from tvm_mars.frontend.spec import Codes, Requantizer, Rescale

ROUNDINGS = ("UPWARD", "TONEAREST")
REACH = 3000


def requantizer(one: Rescale, zero: int = 100, low: int = 0, high: int = 255) -> Requantizer:
    return Requantizer(one, Codes("uint8", 1.0, zero), low, high)


def codes(found: Expressed, accumulators: np.ndarray) -> np.ndarray:
    """What MARS gives for accumulators ``[points, channels]``."""
    lifted = (accumulators << found.lift) + found.offset
    return found.requant.apply(lifted[..., None, None])[..., 0, 0]


def check(one: Rescale, *, channels: int = 1, reach: int = REACH, zero: int = 100) -> Expressed:
    """Compare on every accumulator in reach."""
    spec = limited(requantizer(one, zero))
    ends = np.full(channels, reach)
    found = express(spec, -ends, ends, 0, 8)
    points = np.arange(-reach, reach + 1)[:, None] * np.ones(channels, int)
    expected = np.clip(rescale(one, points) + zero, 0, 255)
    np.testing.assert_array_equal(codes(found, points), expected)
    return found


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_tvm_rounds_halves(rounding: str) -> None:
    """As its CPU build was seen to do."""
    halves = rescale(Rescale(0.5, 1.0, rounding), np.array([-5, -3, -1, 1, 3, 5])[:, None])
    expected = {"UPWARD": [-2, -1, 0, 1, 2, 3], "TONEAREST": [-3, -2, -1, 1, 2, 3]}
    assert halves[:, 0].tolist() == expected[rounding]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25, 2.0**-9, 2.0, 3 / 8, 5 / 64, 3.0, 255 / 256])
def test_ratios_that_meet_halves(ratio: float, rounding: str) -> None:
    check(Rescale(ratio, 1.0, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.random(20)
def test_any_ratio(seed: int, rounding: str) -> None:
    rng = np.random.default_rng([3, seed])
    scale = np.exp(rng.uniform(-9, 1, 5)).astype(np.float32)
    scale[:2] = 2.0 ** rng.integers(-9, 2, 2)  # some channels meet halves
    check(Rescale(scale, np.float32(rng.uniform(0.5, 2)), rounding), channels=5)
    check(Rescale(scale, 0.5, rounding), channels=5, zero=int(rng.integers(0, 256)))


def test_most_ratios_need_nothing() -> None:
    found = check(Rescale(np.float32(0.0123), 1.0))
    assert found.lift == 0 and not found.offset.any()


def test_a_half_up_takes_a_bit_below_the_accumulator() -> None:
    found = check(Rescale(0.25, 1.0, "UPWARD"))
    assert (found.lift, int(found.offset[0])) == (1, 1)
    found = check(Rescale(0.25, 1.0, "TONEAREST"))
    assert found.lift == 0 and int(found.requant.multiplier[0]) == 2**30 + 1


@pytest.mark.parametrize("zero", [-255, -40, 300, 510])
@pytest.mark.parametrize("ratio", [1.5, 0.7, 2.0, 0.5])
def test_codes_whose_zero_lies_outside(zero: int, ratio: float) -> None:
    """As the second map needs that holds what one cannot."""
    check(Rescale(np.float32(ratio), 1.0), reach=255, zero=zero)


def test_limits_of_the_accumulators_are_followed() -> None:
    """A ReLU before the requantization."""
    check(Rescale(0.25, 1.0, floor=0), zero=0)
    found = check(Rescale(0.25, 1.0, floor=-200, ceiling=300))
    assert (found.requant.low, found.requant.high) == (50, 175)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_floating_point_is_taken_where_it_is_equal(compute_dtype: str) -> None:
    check(Rescale(0.25, 1.0, compute_dtype=compute_dtype))
    check(Rescale(np.float32(0.013), 1.0, compute_dtype=compute_dtype), reach=50)


def test_what_cannot_be_expressed_is_refused() -> None:
    """In float32, accumulators near 2**24 lose the bits that decide."""
    ends = np.asarray([2**26])
    one = Rescale(np.float32(1e-6), 1.0, compute_dtype="float32")
    with pytest.raises(UnsupportedError, match=r"requantizes by 1e-06 .*UPWARD in float32"):
        express(requantizer(one), -ends, ends, 0, 8)
    ends = np.asarray([2**30 - 1])
    one = Rescale(2.0**-22 * 3, 1.0)
    with pytest.raises(UnsupportedError, match="meet halves"):
        express(requantizer(one), -ends, ends, 0, 8)


def test_what_wraps_in_tvm_is_refused() -> None:
    ends = np.asarray([2**30])
    with pytest.raises(UnsupportedError, match="leaves 32 bits"):
        express(requantizer(Rescale(3.0, 1.0)), -ends, ends, 0, 8)
    with pytest.raises(UnsupportedError, match="leaves 32 bits"):
        rescale(Rescale(2.0**-70, 1.0), np.zeros((1, 1), int))
