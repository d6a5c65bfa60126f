"""Chains of integer operators, as ``qnn.conv2d`` and ``qnn.requantize``, and their parsing.

A product's arguments are data, weight and the zero points and scales of both; a requantization's
are its steps and the scales and zero points of before and after.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import UnsupportedError

from .matching import Captures, Composite, Const, Node, Op, Pattern, Value, constants, either, op
from .parts import (
    added_padding,
    averaged_map,
    biased,
    codes_of,
    image_shape,
    pair,
    parse_bias,
    require_finite,
    scalars,
    window_of,
)
from .spec import (
    AverageSpec,
    Codes,
    ConvSpec,
    Requantizer,
    Rescale,
    SumSpec,
    TermSpec,
    code_range,
)

__all__ = ["INTEGER_CHAINS"]

Array: TypeAlias = npt.NDArray[Any]

_LIMITS = 3  # how many clips, maxima, minima and casts of codes a chain ends with


# -- the chains ------------------------------------------------------------------------------------


def _integer_product(name: str, data: Pattern) -> Op:
    parameters = constants("weight0", "data0.zero", "weight0.zero", "data0.scale", "weight0.scale")
    return op(name, data, *parameters, capture="op0")


def _integer_conv() -> Op:
    padded = op("pad", Value("data0"), capture="pad0")
    return _integer_product("qnn.conv2d", either(padded, Value("data0")))


def _integer_dense() -> Op:
    return _integer_product("qnn.dense", Value("data0"))


def _limited(source: Pattern, name: str, depth: int) -> Pattern:
    """Limits of integers, and casts that their range allows; the innermost has number 0."""
    for number in range(depth):
        capture = f"{name}{number}"
        source = either(
            op("clip", source, capture=capture),
            op("relu", source, capture=capture),
            op("maximum", source, Const(f"{capture}.bound"), capture=capture),
            op("minimum", source, Const(f"{capture}.bound"), capture=capture),
            op("cast", source, capture=capture),
            source,
        )
    return source


def _requantized(source: Pattern, limits: int = _LIMITS) -> Pattern:
    parameters = constants("in.scale", "in.zero", "out.scale", "out.zero")
    return _limited(op("requantize", source, *parameters, capture="out"), "limit", limits)


def _integer_chain(product: Op) -> Pattern:
    return _requantized(_limited(biased(product, "0"), "before", 2))


def _integer_out(product: Op) -> Op:
    return op(
        "dequantize", biased(product, "0"), *constants("in.scale", "in.zero"), capture="numbers"
    )


def _integer_sum() -> Pattern:
    parameters = constants(
        "left.scale", "left.zero", "right.scale", "right.zero", "out.scale", "out.zero"
    )
    total = op("qnn.add", Value("left"), Value("right"), *parameters, capture="out")
    return _limited(total, "limit", _LIMITS)


def _integer_average() -> Pattern:
    parameters = constants("entry.scale", "entry.zero", "entry.out.scale", "entry.out.zero")
    entry = op("requantize", Value("data"), *parameters, capture="entry")
    data = either(op("cast", Value("data")), entry)
    average = either(op("avg_pool2d", data, capture="op"), op("mean", data, capture="op"))
    return either(_requantized(average), _limited(op("cast", average, capture="as"), "limit", 2))


# -- parsing ---------------------------------------------------------------------------------------


def _rescale(found: Captures, name: str, axis: int, end: str = "out") -> Rescale:
    """Parse what a requantization does with incoming steps, whose channels lie along an axis."""
    out = found[end]
    scale = scalars(found[f"{name}.scale"]).astype(np.float64)
    require_finite(scale, out.name, "a scale")
    given = int(out.attrs.get("axis", axis)) % len(out.shape)
    if scale.size > 1 and given != axis:
        raise UnsupportedError(
            f"scales along axis {given}, MARS takes them per channel", where=out.name
        )
    out_scale = scalars(found["entry.out.scale" if end == "entry" else "out.scale"])
    require_finite(out_scale, out.name, "a scale")
    if out_scale.size != 1 or not (scale > 0).all() or not (out_scale > 0).all():
        raise UnsupportedError(
            f"requantizes from scale {scale.min():g} to {out_scale.size} scales of at least "
            f"{out_scale.min():g}, MARS takes one, greater than zero",
            where=out.name,
        )
    return Rescale(
        scale, float(out_scale[0]), str(out.attrs["rounding"]), str(out.attrs["compute_dtype"])
    )


def _integer_range(dtype: str, where: str) -> tuple[int, int]:
    try:
        info = np.iinfo(dtype)
    except ValueError:
        raise UnsupportedError(f"a cast to {dtype} in an integer chain", where=where) from None
    return int(info.min), int(info.max)


def _end(found: Captures, numbers: int = _LIMITS) -> tuple[Codes, int, int]:
    """Parse the codes that a chain ends with, and their limits."""
    out = found["out"]
    zero = scalars(found["out.zero"]).astype(np.int64)
    dtype, low, high = _code_limits(found, out.dtype, out.name, numbers)
    return Codes(dtype, scalars(found["out.scale"]).astype(np.float64), zero), low, high


def _code_limits(
    found: Captures, dtype: str, where: str, numbers: int = _LIMITS
) -> tuple[str, int, int]:
    """Follow limits and casts outwards from integers of a type."""
    low, high = _integer_range(dtype, where)
    for number in range(numbers):
        node = found.get(f"limit{number}")
        if node is None:
            continue
        if node.op == "cast":
            dtype = node.dtype
            least, greatest = _integer_range(dtype, node.name)
            if low < least or high > greatest:
                raise UnsupportedError(
                    f"codes {low}..{high} are cast to {dtype}, which wraps them", where=node.name
                )
            continue
        floor, ceiling = _bounds(found, f"limit{number}", node)
        if floor.min() != floor.max() or ceiling.min() != ceiling.max():
            raise UnsupportedError("limits of codes by channel, MARS has one", where=node.name)
        low, high = (int(np.clip(x, floor[0], ceiling[0])) for x in (low, high))
    if code_range(dtype) is None:
        raise UnsupportedError(f"its result is {dtype}, not codes", where=where)
    return dtype, low, high


def _bounds(found: Captures, name: str, node: Node) -> tuple[Array, Array]:
    """Give the least and the greatest integer that a clip, maximum or minimum lets through."""
    floor, ceiling = np.asarray([-(2**31)]), np.asarray([2**31 - 1])
    if node.op == "relu":
        return np.asarray([0]), ceiling
    if node.op == "clip":
        # Relay keeps the bounds as float64; on integers they are cut off.
        return np.asarray([int(node.attrs["min"])]), np.asarray([int(node.attrs["max"])])
    bound = found[f"{name}.bound"]
    values = _along_channels(bound, node)
    return (values, ceiling) if node.op == "maximum" else (floor, values)


def _along_channels(node: Node, result: Node) -> Array:
    """Give a constant of one value, or of one for each channel of a result."""
    rank, channels = len(result.shape), result.shape[1]
    aligned = (1,) * (rank - len(node.shape)) + tuple(node.shape)
    if any(size != 1 and (axis != 1 or size != channels) for axis, size in enumerate(aligned)):
        raise UnsupportedError(
            f"a constant of shape {node.shape} on {result.shape}, MARS takes one value per channel",
            where=result.name,
        )
    return scalars(node).astype(np.int64)


def _parse_integer_conv(found: Captures) -> ConvSpec:
    out = found["out"]
    if scalars(found["in.zero"]).any():
        raise UnsupportedError(
            f"its accumulators have zero point {scalars(found['in.zero'])[0]}, not 0",
            where=out.name,
        )
    one = _rescale(found, "in", 1)
    for number in range(2):
        node = found.get(f"before{number}")
        if node is None:
            continue
        if node.op == "cast":
            raise UnsupportedError("a cast of its accumulators", where=node.name)
        floor, ceiling = _bounds(found, f"before{number}", node)
        one = attrs.evolve(
            one,
            floor=np.clip(one.floor, floor, ceiling),
            ceiling=np.clip(one.ceiling, floor, ceiling),
        )
    codes, low, high = _end(found)
    return ConvSpec(
        op="dense" if found["op0"].op == "qnn.dense" else "conv2d",
        terms=(_integer_term(found, one.scale),),
        quantizer=Requantizer(one, codes, low, high),
    )


def _integer_term(found: Captures, scale: Array) -> TermSpec:
    """Parse a product of integers; ``scale`` is what a step of its accumulators stands for."""
    call, data = found["op0"], found["data0"]
    if call.dtype != "int32":
        raise UnsupportedError(f"accumulates {call.dtype}, MARS int32", where=call.name)
    codes = Codes(data.dtype, 1.0, scalars(found["data0.zero"]).astype(np.int64))
    node = found["weight0"]
    assert node.value is not None
    zero = scalars(found["weight0.zero"]).astype(np.int16)
    weight = node.value
    if zero.any():
        weight = weight.astype(np.int16) - zero.reshape(-1, *[1] * (weight.ndim - 1))
    bias, _ = parse_bias(found, "0", call)
    window: dict[str, Any] = {}
    if call.op == "qnn.conv2d":
        window = {**window_of(call), "groups": int(call.attrs["groups"])}
        window["layout"] = f"{call.attrs['data_layout']}/{call.attrs['kernel_layout']}"
        if "pad0" in found:
            window["padding"] = added_padding(window["padding"], found["pad0"], codes)
    elif len(data.shape) != 2:
        raise UnsupportedError(f"a product of shape {data.shape}, not a matrix", where=call.name)
    return TermSpec(
        data=codes,
        data_shape=image_shape(data),
        out_shape=image_shape(call),
        weight=weight,
        weight_dtype=node.dtype,
        weight_scale=scale,
        bias=bias,
        bias_scale=None if bias is None else scale,
        **window,
    )


def _parse_integer_out(found: Captures) -> ConvSpec:
    if scalars(found["in.zero"]).any():
        raise UnsupportedError("its accumulators have a zero point", where=found["numbers"].name)
    scale = scalars(found["in.scale"]).astype(np.float64)
    require_finite(scale, found["numbers"].name, "a scale")
    axis = int(found["numbers"].attrs["axis"]) % len(found["numbers"].shape)
    if scale.size > 1 and axis != 1:
        raise UnsupportedError(f"scales along axis {axis}", where=found["numbers"].name)
    return ConvSpec(
        op="dense" if found["op0"].op == "qnn.dense" else "conv2d",
        terms=(_integer_term(found, scale),),
    )


def _parse_integer_sum(found: Captures) -> SumSpec:
    names = [name for name in ("left", "right") if name in found]
    codes, low, high = _end(found)
    return SumSpec(
        operands=tuple(codes_of(found, name, found[name].dtype) for name in names),
        shapes=tuple(image_shape(found[name]) for name in names),
        rescales=tuple(_rescale(found, name, 1) for name in names),
        codes=codes,
        low=low,
        high=high,
    )


def _parse_integer_requantize(found: Captures) -> SumSpec:
    data = found["data"]
    codes, low, high = _end(found)
    operand = Codes(
        data.dtype, scalars(found["in.scale"]).astype(np.float64), scalars(found["in.zero"])
    )
    rescales = (_rescale(found, "in", 1),)
    return SumSpec((operand,), (image_shape(data),), rescales, codes, low, high)


def _parse_integer_average(found: Captures) -> AverageSpec:
    call, data = found["op"], found["data"]
    if call.dtype != "int32":
        raise UnsupportedError(f"averages {call.dtype}, not int32", where=call.name)
    first = "entry" if "entry" in found else "in"
    codes, entry, requantizer = None, None, None
    averaged = data.dtype
    if f"{first}.scale" in found:
        scale, zero = (scalars(found[f"{first}.{part}"]) for part in ("scale", "zero"))
        codes = Codes(data.dtype, scale.astype(np.float64), zero.astype(np.int64))
    if "entry" in found:
        entry = _rescale(found, "entry", 1, "entry")
        averaged = found["entry"].dtype
    if "out" in found:
        requantizer = Requantizer(_rescale(found, "in", 1), *_end(found))
        low, high = _integer_range(averaged, call.name)
    else:
        dtype, low, high = _code_limits(found, found["as"].dtype, call.name, 2)
        if dtype != data.dtype:
            raise UnsupportedError(f"averages {data.dtype} as {dtype}", where=call.name)
    return AverageSpec(
        dtype=data.dtype,
        data_shape=image_shape(data),
        out_shape=image_shape(call),
        low=low,
        high=high,
        data=codes,
        entry=entry,
        entry_zero=int(scalars(found["entry.out.zero"])[0]) if entry else 0,
        requantizer=requantizer,
        **_averaged(call, data),
    )


def _averaged(call: Node, data: Node) -> dict[str, Any]:
    """Give the windows that an average is taken over."""
    if call.op != "mean":
        counts = bool(call.attrs["count_include_pad"])
        return {
            **window_of(call),
            "kernel": pair(call.attrs["pool_size"]),
            "count_include_pad": counts,
            "layout": str(call.attrs["layout"]),
        }
    whole = averaged_map(call, data)
    return {"kernel": whole, "stride": whole, "padding": (0, 0, 0, 0)}


# -- the list --------------------------------------------------------------------------------------

#: In order of priority: a longer chain first.
INTEGER_CHAINS = (
    Composite(
        "mars.qnn_conv2d",
        _integer_chain(_integer_conv()),
        _parse_integer_conv,
        ("data0",),
        "qnn.conv2d, bias, ReLU or clip, qnn.requantize, clip",
    ),
    Composite(
        "mars.qnn_dense",
        _integer_chain(_integer_dense()),
        _parse_integer_conv,
        ("data0",),
        "qnn.dense, bias, ReLU or clip, qnn.requantize, clip",
    ),
    Composite(
        "mars.qnn_add",
        _integer_sum(),
        _parse_integer_sum,
        ("left", "right"),
        "qnn.add of two maps, clip",
    ),
    Composite(
        "mars.qnn_avg_pool2d",
        _integer_average(),
        _parse_integer_average,
        ("data",),
        "average pool or global mean of codes as int32, cast or qnn.requantize, clip",
    ),
    Composite(
        "mars.qnn_conv2d_out",
        _integer_out(_integer_conv()),
        _parse_integer_out,
        ("data0",),
        "qnn.conv2d, bias, whose accumulators leave as numbers by qnn.dequantize",
    ),
    Composite(
        "mars.qnn_dense_out",
        _integer_out(_integer_dense()),
        _parse_integer_out,
        ("data0",),
        "qnn.dense, bias, whose accumulators leave as numbers by qnn.dequantize",
    ),
    Composite(
        "mars.qnn_requantize",
        _requantized(Value("data")),
        _parse_integer_requantize,
        ("data",),
        "qnn.requantize of codes, clip",
    ),
)
