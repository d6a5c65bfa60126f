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

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, UnsupportedError

from .spec import (
    AddSpec,
    AvgPoolSpec,
    Codes,
    ConvSpec,
    DequantizeSpec,
    MaxPoolSpec,
    Quantizer,
    QuantizeSpec,
    ReshapeSpec,
    Spec,
    TermSpec,
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
    "explain",
    "match",
    "parse",
]

Array: TypeAlias = npt.NDArray[Any]

OPERATORS = (
    "add",
    "avg_pool2d",
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
    "quantize",
    "relu",
    "reshape",
)
# Operators that a report accounts for one by one.
CANDIDATES = ("conv2d", "matmul", "max_pool2d", "avg_pool2d", "mean", "add")


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
        axes = sorted(int(axis) % len(data.shape) for axis in call.attrs["axis"] or ())
        if axes != [2, 3] or len(shape) != 3:
            raise UnsupportedError(
                f"a mean over axes {axes} of {data.shape}, MARS averages rows and columns (2, 3)",
                where=call.name,
            )
        whole = (shape[1], shape[2])
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
    if node.op == "add":
        return "its operands are not both quantized, or nothing quantizes the sum"
    if node.op == "max_pool2d":
        return "its input is not quantized"
    if not node.args or node.args[0].op != "dequantize":
        return "its input is not quantized (no dequantize before it)"
    return "nothing quantizes its result"
