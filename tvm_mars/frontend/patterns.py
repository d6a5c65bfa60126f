"""The operator chains that MARS takes, declared once for every IR, and their parsing into specs.

A pattern is data: :class:`Op`, :class:`Const`, :class:`Value` and :class:`Either`. An IR's adapter
translates it into the IR's own pattern language to find chains, and hands each match back as a
tree of :class:`Node`; :func:`parse` reads the tree with the same pattern. Operator names are those
of :data:`OPERATORS`; an adapter maps its IR's names to them.

Adapters bring a function into the normal form first: one dequantize for each consumer, max pool,
reshape and padding on codes rather than on dequantized numbers, clips as ``maximum`` and
``minimum``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, UnsupportedError

from .spec import (
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
    Spec,
    SumSpec,
    TermSpec,
    code_range,
)

__all__ = [
    "CANDIDATES",
    "COMPOSITES",
    "OPERATORS",
    "Composite",
    "Const",
    "Either",
    "Node",
    "Op",
    "Pattern",
    "Value",
    "composites_of",
    "explain",
    "match",
    "parse",
]

Array: TypeAlias = npt.NDArray[Any]

OPERATORS = (
    "add",
    "avg_pool2d",
    "cast",
    "clip",
    "conv2d",
    "dequantize",
    "matmul",
    "max_pool2d",
    "maximum",
    "mean",
    "minimum",
    "multiply",
    "pad",
    "permute_dims",
    "qnn.add",
    "qnn.conv2d",
    "qnn.dense",
    "quantize",
    "relu",
    "requantize",
    "reshape",
)
# Operators that a report accounts for one by one.
CANDIDATES = (
    "conv2d",
    "qnn.conv2d",
    "matmul",
    "qnn.dense",
    "max_pool2d",
    "avg_pool2d",
    "mean",
    "add",
    "qnn.add",
)


# -- the language ----------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Value:
    """A value that is no constant."""

    name: str


@attrs.frozen(eq=False)
class Const:
    """A constant."""

    name: str


@attrs.frozen(eq=False)
class Op:
    """A call of an operator."""

    op: str
    args: tuple[Pattern, ...]
    name: str = ""


@attrs.frozen(eq=False)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Pattern, ...]


Pattern: TypeAlias = Value | Const | Op | Either


@attrs.frozen(eq=False)
class Node:
    """A matched expression: a call, a constant (``op`` is ``const``) or an outer value.

    Parameters
    ----------
    op : str
        One of :data:`OPERATORS`, ``const`` or ``value``.
    shape : tuple of (int or None)
        None where a size is known at run time only.
    attrs : mapping
        The call's attributes.
    value : array, optional
        A constant's elements.
    index : int
        Which operand of the composite an outer value is.
    name : str
        The IR's name of the result, for reports.
    """

    op: str
    args: tuple[Node, ...] = ()
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    attrs: Mapping[str, Any] = attrs.field(factory=dict)
    value: Array | None = None
    index: int = -1
    name: str = ""


Captures: TypeAlias = dict[str, Node]


def match(pattern: Pattern, node: Node) -> Captures | None:
    """Match a tree; give its named parts, or None."""
    return next(_solutions(pattern, node, {}), None)


def _solutions(pattern: Pattern, node: Node, found: Captures) -> Iterator[Captures]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _solutions(option, node, found)
        return
    if isinstance(pattern, Op):
        if node.op != pattern.op or len(node.args) < len(pattern.args):
            return
        found = {**found, pattern.name: node} if pattern.name else found
        yield from _all_solutions(pattern.args, node.args, found)
        return
    if isinstance(pattern, Const) != (node.op == "const"):
        return
    yield {**found, pattern.name: node}


def _all_solutions(
    patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], found: Captures
) -> Iterator[Captures]:
    if not patterns:
        yield found
        return
    for first in _solutions(patterns[0], nodes[0], found):
        yield from _all_solutions(patterns[1:], nodes[1:], first)


# -- the chains ------------------------------------------------------------------------------------


def _op(name: str, *args: Pattern, capture: str = "") -> Op:
    return Op(name, args, capture)


def _either(*options: Pattern) -> Either:
    return Either(options)


def _commute(name: str, left: Pattern, right: Pattern) -> Either:
    return _either(_op(name, left, right), _op(name, right, left))


def _numbers(name: str, source: Pattern) -> Op:
    """Codes as numbers."""
    return _op(
        "dequantize", source, Const(f"{name}.scale"), Const(f"{name}.zero"), capture=f"{name}.codes"
    )


def _map(name: str) -> Op:
    return _numbers(name, Value(name))


def _weight(name: str) -> Op:
    return _numbers(name, Const(name))


def _conv(tag: str) -> Op:
    padded = _op("pad", Value(f"data{tag}"), capture=f"pad{tag}")
    data = _numbers(f"data{tag}", _either(padded, Value(f"data{tag}")))
    return _op("conv2d", data, _weight(f"weight{tag}"), capture=f"op{tag}")


def _dense(tag: str) -> Op:
    weight = _weight(f"weight{tag}")
    transposed = _op("permute_dims", weight, capture=f"transpose{tag}")
    return _op("matmul", _map(f"data{tag}"), _either(weight, transposed), capture=f"op{tag}")


def _with_bias(product: Pattern, tag: str) -> Either:
    bias = _either(Const(f"bias{tag}"), _weight(f"bias{tag}"))
    shaped = _op("reshape", bias, capture=f"shaped{tag}")
    return _commute("add", product, _either(bias, shaped))


def _biased(product: Pattern, tag: str) -> Either:
    return _either(_with_bias(product, tag), product)


def _sum(product: Callable[[str], Op]) -> Pattern:
    """A product plus a second one (a projection shortcut), a residual, or both."""
    alone = _biased(product("0"), "0")
    pair = _op("add", alone, _biased(product("1"), "1"))
    return _either(_commute("add", _either(pair, alone), _map("residual")), pair)


def _whole(product: Callable[[str], Op]) -> Pattern:
    return _either(_biased(product("0"), "0"), _sum(product))


def _activated(source: Pattern) -> Pattern:
    low, high = Const("low"), Const("high")
    source = _either(_op("relu", source, capture="relu"), source)
    return _either(
        _op("minimum", _op("maximum", source, low), high),
        _op("maximum", _op("minimum", source, high), low),
        _op("clip", source, capture="clip"),
        _op("maximum", source, low),
        _op("minimum", source, high),
        source,
    )


def _quantized(source: Pattern) -> Op:
    scaled = _activated(source)
    return _op(
        "quantize",
        _either(_commute("multiply", scaled, Const("factor")), scaled),
        Const("out.scale"),
        Const("out.zero"),
        capture="out",
    )


def _constant_sum() -> Pattern:
    constant = _either(Const("bias"), _weight("bias"))
    constant = _either(constant, _op("reshape", constant, capture="shaped"))
    return _either(
        _op("add", _map("data"), constant, capture="sum"),
        _op("add", constant, _map("data"), capture="sum"),
    )


def _average() -> Pattern:
    """Averages; the native export multiplies before it divides."""
    data = _either(_op("multiply", _map("data"), Const("before")), _map("data"))
    return _either(_op("avg_pool2d", data, capture="op"), _op("mean", data, capture="op"))


# Chains of integer operators. A product's arguments are data, weight and the zero points and scales
# of both; a requantization's are its steps and the scales and zero points of before and after.

_LIMITS = 3  # how many clips, maxima, minima and casts of codes a chain ends with


def _constants(*names: str) -> tuple[Const, ...]:
    return tuple(Const(name) for name in names)


def _integer_product(op: str, data: Pattern) -> Op:
    parameters = _constants("weight0", "data0.zero", "weight0.zero", "data0.scale", "weight0.scale")
    return _op(op, data, *parameters, capture="op0")


def _integer_conv() -> Op:
    padded = _op("pad", Value("data0"), capture="pad0")
    return _integer_product("qnn.conv2d", _either(padded, Value("data0")))


def _integer_dense() -> Op:
    return _integer_product("qnn.dense", Value("data0"))


def _limited(source: Pattern, name: str, depth: int) -> Pattern:
    """Limits of integers, and casts that their range allows; the innermost has number 0."""
    for number in range(depth):
        capture = f"{name}{number}"
        source = _either(
            _op("clip", source, capture=capture),
            _op("relu", source, capture=capture),
            _op("maximum", source, Const(f"{capture}.bound"), capture=capture),
            _op("minimum", source, Const(f"{capture}.bound"), capture=capture),
            _op("cast", source, capture=capture),
            source,
        )
    return source


def _requantized(source: Pattern, limits: int = _LIMITS) -> Pattern:
    parameters = _constants("in.scale", "in.zero", "out.scale", "out.zero")
    return _limited(_op("requantize", source, *parameters, capture="out"), "limit", limits)


def _integer_chain(product: Op) -> Pattern:
    return _requantized(_limited(_biased(product, "0"), "before", 2))


def _integer_out(product: Op) -> Op:
    return _op(
        "dequantize", _biased(product, "0"), *_constants("in.scale", "in.zero"), capture="numbers"
    )


def _integer_sum() -> Pattern:
    parameters = _constants(
        "left.scale", "left.zero", "right.scale", "right.zero", "out.scale", "out.zero"
    )
    total = _op("qnn.add", Value("left"), Value("right"), *parameters, capture="out")
    return _limited(total, "limit", _LIMITS)


def _integer_average() -> Pattern:
    parameters = _constants("entry.scale", "entry.zero", "entry.out.scale", "entry.out.zero")
    entry = _op("requantize", Value("data"), *parameters, capture="entry")
    data = _either(_op("cast", Value("data")), entry)
    average = _either(_op("avg_pool2d", data, capture="op"), _op("mean", data, capture="op"))
    return _either(_requantized(average), _limited(_op("cast", average, capture="as"), "limit", 2))


# -- parsing ---------------------------------------------------------------------------------------


def _scalars(node: Node) -> Array:
    assert node.value is not None
    return np.asarray(node.value).reshape(-1)


def _codes(found: Captures, name: str, dtype: str) -> Codes:
    scale = _scalars(found[f"{name}.scale"]).astype(np.float64)
    call = found.get(f"{name}.codes", found.get(name))
    _require_finite(scale, call.name if call else name, "a scale")
    return Codes(dtype, scale, _scalars(found[f"{name}.zero"]).astype(np.int64))


def _require_finite(values: Array, where: str, what: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            f"{what} holds {values[~np.isfinite(values)][0]}",
            where=where,
            hint="the model itself is broken: train or export it again",
        )


def _image(node: Node) -> tuple[int, ...]:
    """Shape per image; every size but the batch must be known."""
    sizes = node.shape[1:]
    if None in sizes:
        raise UnsupportedError(f"shape {node.shape} is not known at compile time", where=node.name)
    return tuple(int(size) for size in sizes if size is not None)


def _quantizer(found: Captures) -> Quantizer:
    low, high = -np.inf, np.inf
    if "relu" in found:
        low = 0.0
    if "clip" in found:
        bounds = found["clip"].attrs
        low, high = max(low, float(bounds["min"])), min(high, float(bounds["max"]))
    if "low" in found:
        low = max(low, _scalar(found["low"]))
    if "high" in found:
        high = min(high, _scalar(found["high"]))
    factor = _scalar(found["factor"]) if "factor" in found else 1.0
    return Quantizer(_codes(found, "out", found["out"].dtype), (low, high), factor)


def _scalar(node: Node) -> float:
    values = _scalars(node)
    if values.size != 1:
        raise UnsupportedError(
            f"{values.size} factors or clip bounds instead of one", where=node.name
        )
    return float(values[0])


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _window(call: Node) -> dict[str, Any]:
    top, left, bottom, right = (int(value) for value in call.attrs["padding"])
    return {
        "stride": _pair(call.attrs["strides"]),
        "padding": (top, left, bottom, right),
        "dilation": _pair(call.attrs["dilation"]),
    }


def _term(found: Captures, tag: str) -> TermSpec:
    call, data = found[f"op{tag}"], found[f"data{tag}"]
    source = found[f"data{tag}.codes"].args[0]
    codes = _codes(found, f"data{tag}", source.dtype)
    weight, scale = _weight_codes(found, tag, "O")
    bias, bias_scale = _bias(found, tag, call)
    if call.op == "matmul":
        if len(data.shape) != 2 or weight.ndim != 2:
            raise UnsupportedError(
                f"a product of shapes {data.shape} and {weight.shape}, MARS takes matrices",
                where=call.name,
            )
        window: dict[str, Any] = {}
        if f"transpose{tag}" not in found:
            weight = weight.T
    else:
        window = {**_window(call), "groups": int(call.attrs["groups"])}
        window["layout"] = f"{call.attrs['data_layout']}/{call.attrs['kernel_layout']}"
        if f"pad{tag}" in found:
            window["padding"] = _added(window["padding"], found[f"pad{tag}"], codes)
    return TermSpec(
        data=codes,
        data_shape=_image(data),
        out_shape=_image(call),
        weight=weight,
        weight_dtype=found[f"weight{tag}"].dtype,
        weight_scale=scale,
        bias=bias,
        bias_scale=bias_scale,
        **window,
    )


def _added(padding: tuple[int, ...], pad: Node, codes: Codes) -> tuple[int, ...]:
    """Add a padding of codes to that of the convolution which follows it."""
    widths = [int(width) for width in pad.attrs["pad_width"]]
    value = pad.attrs["pad_value"]
    if pad.attrs["pad_mode"] != "constant" or any(widths[:4]) or min(widths) < 0:
        raise UnsupportedError(
            f"padding {widths} in mode {pad.attrs['pad_mode']}, MARS pads rows and columns with "
            "zeros",
            where=pad.name,
        )
    if not codes.per_tensor or value != codes.zero_point[0]:
        raise UnsupportedError(f"padding with code {value}, not with zero", where=pad.name)
    top, bottom, left, right = widths[4:]
    return tuple(a + b for a, b in zip(padding, (top, left, bottom, right), strict=True))


def _weight_codes(found: Captures, tag: str, axis: str) -> tuple[Array, Array]:
    node, call = found[f"weight{tag}"], found[f"weight{tag}.codes"]
    assert node.value is not None
    codes = _codes(found, f"weight{tag}", node.dtype)
    if not codes.per_tensor:
        channel = 1 if found[f"op{tag}"].op == "matmul" and f"transpose{tag}" not in found else 0
        given = int(call.attrs["axis"]) % node.value.ndim
        if given != channel:
            raise UnsupportedError(
                f"weight scales along axis {given}, MARS takes them per output channel",
                where=found[f"op{tag}"].name,
            )
    if not codes.zero_point.any():
        return node.value, codes.scale
    zero = codes.zero_point
    if zero.size > 1:
        shape = [1] * node.value.ndim
        shape[channel] = zero.size
        zero = zero.reshape(shape)
    return node.value.astype(np.int16) - zero.astype(np.int16), codes.scale


def _bias(found: Captures, tag: str, result: Node) -> tuple[Array | None, Array | None]:
    """Give a bias as one value for each channel of a result, and its grid if it is an integer."""
    if f"bias{tag}" not in found:
        return None, None
    node = found[f"bias{tag}"]
    shape = found.get(f"shaped{tag}", node).shape
    channels = int(result.shape[1] or 0)
    aligned = (1,) * (len(result.shape) - len(shape)) + tuple(shape)
    if any(size != 1 and (axis != 1 or size != channels) for axis, size in enumerate(aligned)):
        raise UnsupportedError(
            f"adds a constant of shape {shape} to {result.shape}, MARS adds one value per channel",
            where=result.name,
        )
    values = np.broadcast_to(_scalars(node), (channels,))
    _require_finite(values, result.name, "its bias")
    if f"bias{tag}.codes" not in found:
        return values, None
    codes = _codes(found, f"bias{tag}", node.dtype)
    if codes.zero_point.any() or node.dtype != "int32":
        return ((values - codes.zero_point) * codes.scale).astype(np.float64), None
    return values, codes.scale


def _parse_conv(found: Captures) -> ConvSpec:
    tags = [tag for tag in ("0", "1") if f"op{tag}" in found]
    residual = None
    if "residual" in found:
        residual = _codes(found, "residual", found["residual"].dtype)
        if found["residual"].shape != found["op0"].shape:
            raise UnsupportedError(
                f"a residual of shape {found['residual'].shape} on {found['op0'].shape}",
                where=found["op0"].name,
            )
    return ConvSpec(
        op="dense" if found["op0"].op == "matmul" else "conv2d",
        terms=tuple(_term(found, tag) for tag in tags),
        residual=residual,
        quantizer=_quantizer(found) if "out" in found else None,
    )


# An identity of 1x1 kernels: a power of two, so that the constant keeps six bits below a code.
_IDENTITY = 64


def _parse_constant_add(found: Captures) -> ConvSpec:
    """Parse a map plus a constant: a depthwise identity whose bias is the constant."""
    data = found["data"]
    shape = _image(data)
    bias, bias_scale = _bias(found, "", found["sum"])
    term = TermSpec(
        data=_codes(found, "data", data.dtype),
        data_shape=shape,
        out_shape=shape,
        weight=np.full((shape[0], 1, 1, 1), _IDENTITY, np.int8),
        weight_dtype="int8",
        weight_scale=np.asarray([1 / _IDENTITY]),
        bias=bias,
        bias_scale=bias_scale,
        groups=shape[0],
    )
    return ConvSpec("conv2d", (term,), quantizer=_quantizer(found))


def _parse_add(found: Captures) -> AddSpec:
    names = [name for name in ("left", "right") if name in found]
    return AddSpec(
        operands=tuple(_codes(found, name, found[name].dtype) for name in names),
        shapes=tuple(_image(found[name]) for name in names),
        quantizer=_quantizer(found),
    )


def _parse_maxpool(found: Captures) -> MaxPoolSpec:
    call, data = found["op"], found["data"]
    window = _window(call)
    kernel = _pair(call.attrs["pool_size"])
    data_shape, out_shape = _image(data), _image(call)
    window["padding"] = _ceil_padding(
        data_shape, out_shape, kernel, window["stride"], window["padding"]
    )
    return MaxPoolSpec(
        data.dtype, data_shape, out_shape, kernel, layout=str(call.attrs["layout"]), **window
    )


def _ceil_padding(
    data: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> tuple[int, int, int, int]:
    """Turn a size that was rounded up into padding behind the map, which a max pool ignores."""
    ends = [
        max(after, (n_out - 1) * s + k - n - before)
        for n, n_out, k, s, before, after in zip(
            data[1:], out[1:], kernel, stride, padding[:2], padding[2:], strict=True
        )
    ]
    return (padding[0], padding[1], ends[0], ends[1])


def _parse_avgpool(found: Captures) -> AvgPoolSpec:
    call, data = found["op"], found["data"]
    shape = _image(data)
    quantizer = _quantizer(found)
    if "before" in found:
        before = _scalar(found["before"])
        low, high = quantizer.clip
        quantizer = attrs.evolve(
            quantizer, factor=quantizer.factor * before, clip=(low / before, high / before)
        )
    quantization: dict[str, Any] = {
        "data": _codes(found, "data", data.dtype),
        "quantizer": quantizer,
        "data_shape": shape,
    }
    if call.op == "mean":
        whole = _averages_whole_maps(call, data)
        return AvgPoolSpec(
            **quantization,
            out_shape=_image(call),
            kernel=whole,
            stride=whole,
            padding=(0, 0, 0, 0),
        )
    return AvgPoolSpec(
        **quantization,
        out_shape=_image(call),
        kernel=_pair(call.attrs["pool_size"]),
        count_include_pad=bool(call.attrs["count_include_pad"]),
        layout=str(call.attrs["layout"]),
        **_window(call),
    )


def _parse_reshape(found: Captures) -> ReshapeSpec:
    call, data = found["op"], found["data"]
    if call.shape[:1] != data.shape[:1] and None not in (call.shape[0], data.shape[0]):
        raise UnsupportedError(f"{data.shape} to {call.shape} mixes images", where=call.name)
    return ReshapeSpec(data.dtype, _image(data), _image(call))


# -- of integer operators --


def _rescale(found: Captures, name: str, axis: int, end: str = "out") -> Rescale:
    """Parse what a requantization does with incoming steps, whose channels lie along an axis."""
    out = found[end]
    scale = _scalars(found[f"{name}.scale"]).astype(np.float64)
    _require_finite(scale, out.name, "a scale")
    given = int(out.attrs.get("axis", axis)) % len(out.shape)
    if scale.size > 1 and given != axis:
        raise UnsupportedError(
            f"scales along axis {given}, MARS takes them per channel", where=out.name
        )
    out_scale = _scalars(found["entry.out.scale" if end == "entry" else "out.scale"])
    _require_finite(out_scale, out.name, "a scale")
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
    zero = _scalars(found["out.zero"]).astype(np.int64)
    dtype, low, high = _code_limits(found, out.dtype, out.name, numbers)
    return Codes(dtype, _scalars(found["out.scale"]).astype(np.float64), zero), low, high


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
    return _scalars(node).astype(np.int64)


def _parse_integer_conv(found: Captures) -> ConvSpec:
    out = found["out"]
    if _scalars(found["in.zero"]).any():
        raise UnsupportedError(
            f"its accumulators have zero point {_scalars(found['in.zero'])[0]}, not 0",
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
    codes = Codes(data.dtype, 1.0, _scalars(found["data0.zero"]).astype(np.int64))
    node = found["weight0"]
    assert node.value is not None
    zero = _scalars(found["weight0.zero"]).astype(np.int16)
    weight = node.value
    if zero.any():
        weight = weight.astype(np.int16) - zero.reshape(-1, *[1] * (weight.ndim - 1))
    bias, _ = _bias(found, "0", call)
    window: dict[str, Any] = {}
    if call.op == "qnn.conv2d":
        window = {**_window(call), "groups": int(call.attrs["groups"])}
        window["layout"] = f"{call.attrs['data_layout']}/{call.attrs['kernel_layout']}"
        if "pad0" in found:
            window["padding"] = _added(window["padding"], found["pad0"], codes)
    elif len(data.shape) != 2:
        raise UnsupportedError(f"a product of shape {data.shape}, not a matrix", where=call.name)
    return TermSpec(
        data=codes,
        data_shape=_image(data),
        out_shape=_image(call),
        weight=weight,
        weight_dtype=node.dtype,
        weight_scale=scale,
        bias=bias,
        bias_scale=None if bias is None else scale,
        **window,
    )


def _parse_integer_out(found: Captures) -> ConvSpec:
    if _scalars(found["in.zero"]).any():
        raise UnsupportedError("its accumulators have a zero point", where=found["numbers"].name)
    scale = _scalars(found["in.scale"]).astype(np.float64)
    _require_finite(scale, found["numbers"].name, "a scale")
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
        operands=tuple(_codes(found, name, found[name].dtype) for name in names),
        shapes=tuple(_image(found[name]) for name in names),
        rescales=tuple(_rescale(found, name, 1) for name in names),
        codes=codes,
        low=low,
        high=high,
    )


def _parse_integer_requantize(found: Captures) -> SumSpec:
    data = found["data"]
    codes, low, high = _end(found)
    operand = Codes(
        data.dtype, _scalars(found["in.scale"]).astype(np.float64), _scalars(found["in.zero"])
    )
    rescales = (_rescale(found, "in", 1),)
    return SumSpec((operand,), (_image(data),), rescales, codes, low, high)


def _parse_integer_average(found: Captures) -> AverageSpec:
    call, data = found["op"], found["data"]
    if call.dtype != "int32":
        raise UnsupportedError(f"averages {call.dtype}, not int32", where=call.name)
    first = "entry" if "entry" in found else "in"
    codes, entry, requantizer = None, None, None
    averaged = data.dtype
    if f"{first}.scale" in found:
        scale, zero = (_scalars(found[f"{first}.{part}"]) for part in ("scale", "zero"))
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
        data_shape=_image(data),
        out_shape=_image(call),
        low=low,
        high=high,
        data=codes,
        entry=entry,
        entry_zero=int(_scalars(found["entry.out.zero"])[0]) if entry else 0,
        requantizer=requantizer,
        **_averaged(call, data),
    )


def _averaged(call: Node, data: Node) -> dict[str, Any]:
    """Give the windows that an average is taken over."""
    if call.op != "mean":
        counts = bool(call.attrs["count_include_pad"])
        return {
            **_window(call),
            "kernel": _pair(call.attrs["pool_size"]),
            "count_include_pad": counts,
            "layout": str(call.attrs["layout"]),
        }
    whole = _averages_whole_maps(call, data)
    return {"kernel": whole, "stride": whole, "padding": (0, 0, 0, 0)}


def _averages_whole_maps(call: Node, data: Node) -> tuple[int, int]:
    """Give the rows and columns of the map that a mean is taken over, and refuse other means."""
    axes = sorted(int(axis) % len(data.shape) for axis in call.attrs["axis"] or ())
    shape = _image(data)
    if axes != [2, 3] or len(shape) != 3:
        raise UnsupportedError(
            f"a mean over axes {axes} of {data.shape}, MARS averages rows and columns (2, 3)",
            where=call.name,
        )
    return shape[1], shape[2]


def _parse_quantize(found: Captures) -> QuantizeSpec:
    data = found["data"]
    return QuantizeSpec(data.dtype, _image(data), _quantizer(found))


def _parse_dequantize(found: Captures) -> DequantizeSpec:
    data, call = found["data"], found["data.codes"]
    return DequantizeSpec(_codes(found, "data", data.dtype), _image(data), call.dtype)


# -- the list --------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Composite:
    """A chain that MARS takes as one.

    Parameters
    ----------
    name : str
        With the compiler's prefix, as in ``mars.qconv2d``.
    pattern : Pattern
        What to look for.
    parse : callable
        From the parts of a match to a spec; ``UnsupportedError`` if MARS does not take it.
    operands : tuple of str
        The captured values that become operands of the spec, in its order.
    doc : str
        What it is, for the list of supported operators.
    border : bool
        Whether it is worth nothing by itself: a conversion at the border of a region.
    """

    name: str
    pattern: Pattern
    parse: Callable[[Captures], Spec]
    operands: tuple[str, ...]
    doc: str
    border: bool = False

    @property
    def operators(self) -> frozenset[str]:
        """The operators that it mentions."""
        return frozenset(_mentioned(self.pattern))


def _mentioned(pattern: Pattern) -> Iterator[str]:
    if isinstance(pattern, Op):
        yield pattern.op
    parts = pattern.args if isinstance(pattern, Op) else getattr(pattern, "options", ())
    for part in parts:
        yield from _mentioned(part)


_CONV_OPERANDS = ("data0", "data1", "residual")


def _accumulators(name: str, product: Callable[[str], Op]) -> Iterator[Composite]:
    """Chains that nothing quantizes, each root by itself: matching starts at the first root."""
    chains = {
        "_add": (_sum(product), "plus a residual or a second product"),
        "_bias": (_with_bias(product("0"), "0"), "plus bias"),
        "": (product("0"), "alone"),
    }
    for suffix, (pattern, what) in chains.items():
        yield Composite(
            f"mars.{name}{suffix}_out",
            pattern,
            _parse_conv,
            _CONV_OPERANDS,
            f"{name} {what}, whose accumulators leave as numbers",
        )


# In order of priority: a longer chain first.
COMPOSITES = (
    Composite(
        "mars.qnn_conv2d",
        _integer_chain(_integer_conv()),
        _parse_integer_conv,
        _CONV_OPERANDS,
        "qnn.conv2d, bias, ReLU or clip, qnn.requantize, clip",
    ),
    Composite(
        "mars.qnn_dense",
        _integer_chain(_integer_dense()),
        _parse_integer_conv,
        _CONV_OPERANDS,
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
        _CONV_OPERANDS,
        "qnn.conv2d, bias, whose accumulators leave as numbers by qnn.dequantize",
    ),
    Composite(
        "mars.qnn_dense_out",
        _integer_out(_integer_dense()),
        _parse_integer_out,
        _CONV_OPERANDS,
        "qnn.dense, bias, whose accumulators leave as numbers by qnn.dequantize",
    ),
    Composite(
        "mars.qnn_requantize",
        _requantized(Value("data")),
        _parse_integer_requantize,
        ("data",),
        "qnn.requantize of codes, clip",
    ),
    Composite(
        "mars.qconv2d",
        _quantized(_whole(_conv)),
        _parse_conv,
        _CONV_OPERANDS,
        "conv2d, bias, residual or a second conv2d, ReLU or clip, quantize",
    ),
    Composite(
        "mars.qdense",
        _quantized(_whole(_dense)),
        _parse_conv,
        _CONV_OPERANDS,
        "dense product, bias, residual or a second product, ReLU or clip, quantize",
    ),
    Composite(
        "mars.qadd",
        _quantized(_op("add", _map("left"), _map("right"))),
        _parse_add,
        ("left", "right"),
        "sum of two quantized maps, ReLU or clip, quantize",
    ),
    Composite(
        "mars.qadd_constant",
        _quantized(_constant_sum()),
        _parse_constant_add,
        ("data",),
        "quantized map plus a constant per channel, ReLU or clip, quantize",
    ),
    Composite(
        "mars.qavg_pool2d",
        _quantized(_average()),
        _parse_avgpool,
        ("data",),
        "average pool or global mean, ReLU or clip, quantize",
    ),
    *_accumulators("conv2d", _conv),
    *_accumulators("dense", _dense),
    Composite(
        "mars.qmax_pool2d",
        _op("max_pool2d", Value("data"), capture="op"),
        _parse_maxpool,
        ("data",),
        "max pool of codes",
    ),
    Composite(
        "mars.requantize",
        _quantized(_map("left")),
        _parse_add,
        ("left",),
        "codes to codes of another scale, ReLU or clip",
    ),
    Composite(
        "mars.reshape",
        _op("reshape", Value("data"), capture="op"),
        _parse_reshape,
        ("data",),
        "flattening of codes",
        border=True,
    ),
    Composite(
        "mars.quantize",
        _quantized(Value("data")),
        _parse_quantize,
        ("data",),
        "numbers that enter",
        border=True,
    ),
    Composite(
        "mars.dequantize",
        _map("data"),
        _parse_dequantize,
        ("data",),
        "codes that leave as numbers",
        border=True,
    ),
)


def composites_of(operators: Collection[str]) -> tuple[Composite, ...]:
    """Give the chains of an IR that has these operators, in order of priority.

    Parameters
    ----------
    operators : collection of str
        Names of :data:`OPERATORS`.
    """
    return tuple(entry for entry in COMPOSITES if entry.operators <= set(operators))


_BY_NAME = {composite.name: composite for composite in COMPOSITES}


def parse(name: str, node: Node) -> tuple[Spec, tuple[Node, ...]]:
    """Parse a matched tree into a spec and its operands.

    Raises
    ------
    UnsupportedError
        If the tree is not of this composite, or holds something that MARS does not take.
    """
    composite = _BY_NAME[name]
    found = match(composite.pattern, node)
    if found is None:
        raise UnsupportedError(f"not a chain of {name}", where=node.name)
    operands = tuple(found[operand] for operand in composite.operands if operand in found)
    return composite.parse(found), operands


def explain(node: Node) -> str:
    """Say why a candidate was part of no chain."""
    if node.op in ("conv2d", "matmul"):
        for what, arg in zip(("input", "weight"), node.args, strict=False):
            inner = arg.args[0] if arg.op == "permute_dims" else arg
            if inner.op != "dequantize":
                return f"its {what} is not quantized (no dequantize before it)"
        return "its parts are also used elsewhere"
    if node.op in ("qnn.conv2d", "qnn.dense"):
        if len(node.args) > 1 and node.args[1].op != "const":
            return "its weight is no constant"
        return "nothing requantizes its result, or its parts are also used elsewhere"
    if node.op == "qnn.add":
        return "its scales and zero points are not all constants"
    if node.op == "add":
        return "its operands are not both quantized, or nothing quantizes the sum"
    if node.op == "max_pool2d":
        return "its input is not quantized"
    if node.args and node.args[0].op == "cast":
        return "its result is neither cast to codes nor requantized"
    if not node.args or node.args[0].op != "dequantize":
        return "its input is not quantized (no dequantize before it)"
    return "nothing quantizes its result"
