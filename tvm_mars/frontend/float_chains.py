"""Chains of floating-point operators between dequantize and quantize, and their parsing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import UnsupportedError

from .matching import Captures, Composite, Const, Op, Pattern, Value, commute, either, op
from .parts import (
    added_padding,
    averaged_map,
    biased,
    codes_of,
    image_shape,
    map_numbers,
    numbers,
    pair,
    parse_bias,
    scalar,
    weight_numbers,
    window_of,
    with_bias,
)
from .spec import (
    AddSpec,
    AvgPoolSpec,
    ConvSpec,
    DequantizeSpec,
    MaxPoolSpec,
    Quantizer,
    QuantizeSpec,
    ReshapeSpec,
    TermSpec,
)

__all__ = ["FLOAT_CHAINS"]

Array: TypeAlias = npt.NDArray[Any]


# -- the chains ------------------------------------------------------------------------------------


def _conv(tag: str) -> Op:
    padded = op("pad", Value(f"data{tag}"), capture=f"pad{tag}")
    data = numbers(f"data{tag}", either(padded, Value(f"data{tag}")))
    return op("conv2d", data, weight_numbers(f"weight{tag}"), capture=f"op{tag}")


def _dense(tag: str) -> Op:
    weight = weight_numbers(f"weight{tag}")
    transposed = op("permute_dims", weight, capture=f"transpose{tag}")
    return op("matmul", map_numbers(f"data{tag}"), either(weight, transposed), capture=f"op{tag}")


def _sum(product: Callable[[str], Op]) -> Pattern:
    """A product plus a second one (a projection shortcut), a residual, or both."""
    alone = biased(product("0"), "0")
    pair = op("add", alone, biased(product("1"), "1"))
    return either(commute("add", either(pair, alone), map_numbers("residual")), pair)


def _whole(product: Callable[[str], Op]) -> Pattern:
    return either(biased(product("0"), "0"), _sum(product))


def _activated(source: Pattern) -> Pattern:
    low, high = Const("low"), Const("high")
    source = either(op("relu", source, capture="relu"), source)
    return either(
        op("minimum", op("maximum", source, low), high),
        op("maximum", op("minimum", source, high), low),
        op("clip", source, capture="clip"),
        op("maximum", source, low),
        op("minimum", source, high),
        source,
    )


def _quantized(source: Pattern) -> Op:
    scaled = _activated(source)
    return op(
        "quantize",
        either(commute("multiply", scaled, Const("factor")), scaled),
        Const("out.scale"),
        Const("out.zero"),
        capture="out",
    )


def _constant_sum() -> Pattern:
    constant = either(Const("bias"), weight_numbers("bias"))
    constant = either(constant, op("reshape", constant, capture="shaped"))
    return either(
        op("add", map_numbers("data"), constant, capture="sum"),
        op("add", constant, map_numbers("data"), capture="sum"),
    )


def _average() -> Pattern:
    """Averages; the native export multiplies before it divides."""
    data = either(op("multiply", map_numbers("data"), Const("before")), map_numbers("data"))
    return either(op("avg_pool2d", data, capture="op"), op("mean", data, capture="op"))


# -- parsing ---------------------------------------------------------------------------------------


def _quantizer(found: Captures) -> Quantizer:
    low, high = -np.inf, np.inf
    if "relu" in found:
        low = 0.0
    if "clip" in found:
        bounds = found["clip"].attrs
        low, high = max(low, float(bounds["min"])), min(high, float(bounds["max"]))
    if "low" in found:
        low = max(low, scalar(found["low"]))
    if "high" in found:
        high = min(high, scalar(found["high"]))
    factor = scalar(found["factor"]) if "factor" in found else 1.0
    return Quantizer(codes_of(found, "out", found["out"].dtype), (low, high), factor)


def _term(found: Captures, tag: str) -> TermSpec:
    call, data = found[f"op{tag}"], found[f"data{tag}"]
    source = found[f"data{tag}.codes"].args[0]
    codes = codes_of(found, f"data{tag}", source.dtype)
    weight, scale = _weight_codes(found, tag, "O")
    bias, bias_scale = parse_bias(found, tag, call)
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
        window = {**window_of(call), "groups": int(call.attrs["groups"])}
        window["layout"] = f"{call.attrs['data_layout']}/{call.attrs['kernel_layout']}"
        if f"pad{tag}" in found:
            window["padding"] = added_padding(window["padding"], found[f"pad{tag}"], codes)
    return TermSpec(
        data=codes,
        data_shape=image_shape(data),
        out_shape=image_shape(call),
        weight=weight,
        weight_dtype=found[f"weight{tag}"].dtype,
        weight_scale=scale,
        bias=bias,
        bias_scale=bias_scale,
        **window,
    )


def _weight_codes(found: Captures, tag: str, axis: str) -> tuple[Array, Array]:
    node, call = found[f"weight{tag}"], found[f"weight{tag}.codes"]
    assert node.value is not None
    codes = codes_of(found, f"weight{tag}", node.dtype)
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


def _parse_conv(found: Captures) -> ConvSpec:
    tags = [tag for tag in ("0", "1") if f"op{tag}" in found]
    residual = None
    if "residual" in found:
        residual = codes_of(found, "residual", found["residual"].dtype)
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
    shape = image_shape(data)
    bias, bias_scale = parse_bias(found, "", found["sum"])
    term = TermSpec(
        data=codes_of(found, "data", data.dtype),
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
        operands=tuple(codes_of(found, name, found[name].dtype) for name in names),
        shapes=tuple(image_shape(found[name]) for name in names),
        quantizer=_quantizer(found),
    )


def _parse_maxpool(found: Captures) -> MaxPoolSpec:
    call, data = found["op"], found["data"]
    window = window_of(call)
    kernel = pair(call.attrs["pool_size"])
    data_shape, out_shape = image_shape(data), image_shape(call)
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
    shape = image_shape(data)
    quantizer = _quantizer(found)
    if "before" in found:
        before = scalar(found["before"])
        low, high = quantizer.clip
        quantizer = attrs.evolve(
            quantizer, factor=quantizer.factor * before, clip=(low / before, high / before)
        )
    quantization: dict[str, Any] = {
        "data": codes_of(found, "data", data.dtype),
        "quantizer": quantizer,
        "data_shape": shape,
    }
    if call.op == "mean":
        whole = averaged_map(call, data)
        return AvgPoolSpec(
            **quantization,
            out_shape=image_shape(call),
            kernel=whole,
            stride=whole,
            padding=(0, 0, 0, 0),
        )
    return AvgPoolSpec(
        **quantization,
        out_shape=image_shape(call),
        kernel=pair(call.attrs["pool_size"]),
        count_include_pad=bool(call.attrs["count_include_pad"]),
        layout=str(call.attrs["layout"]),
        **window_of(call),
    )


def _parse_reshape(found: Captures) -> ReshapeSpec:
    call, data = found["op"], found["data"]
    if call.shape[:1] != data.shape[:1] and None not in (call.shape[0], data.shape[0]):
        raise UnsupportedError(f"{data.shape} to {call.shape} mixes images", where=call.name)
    return ReshapeSpec(data.dtype, image_shape(data), image_shape(call))


def _parse_quantize(found: Captures) -> QuantizeSpec:
    data = found["data"]
    return QuantizeSpec(data.dtype, image_shape(data), _quantizer(found))


def _parse_dequantize(found: Captures) -> DequantizeSpec:
    data, call = found["data"], found["data.codes"]
    return DequantizeSpec(codes_of(found, "data", data.dtype), image_shape(data), call.dtype)


# -- the list --------------------------------------------------------------------------------------

_CONV_OPERANDS = ("data0", "data1", "residual")


def _accumulators(name: str, product: Callable[[str], Op]) -> Iterator[Composite]:
    """Chains that nothing quantizes, each root by itself: matching starts at the first root."""
    chains = {
        "_add": (_sum(product), "plus a residual or a second product"),
        "_bias": (with_bias(product("0"), "0"), "plus bias"),
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


#: In order of priority: a longer chain first.
FLOAT_CHAINS = (
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
        _quantized(op("add", map_numbers("left"), map_numbers("right"))),
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
        op("max_pool2d", Value("data"), capture="op"),
        _parse_maxpool,
        ("data",),
        "max pool of codes",
    ),
    Composite(
        "mars.requantize",
        _quantized(map_numbers("left")),
        _parse_add,
        ("left",),
        "codes to codes of another scale, ReLU or clip",
    ),
    Composite(
        "mars.reshape",
        op("reshape", Value("data"), capture="op"),
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
        map_numbers("data"),
        _parse_dequantize,
        ("data",),
        "codes that leave as numbers",
        border=True,
    ),
)
