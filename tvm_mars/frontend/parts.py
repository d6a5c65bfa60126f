"""What chains of floating-point and of integer operators share: pieces, and how they are read."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError, UnsupportedError

from .matching import Captures, Const, Either, Node, Op, Pattern, Value, commute, either, op
from .spec import Codes

__all__ = [
    "added_padding",
    "averaged_map",
    "biased",
    "codes_of",
    "image_shape",
    "map_numbers",
    "numbers",
    "pair",
    "parse_bias",
    "require_finite",
    "scalar",
    "scalars",
    "weight_numbers",
    "window_of",
    "with_bias",
]

Array: TypeAlias = npt.NDArray[Any]


def numbers(name: str, source: Pattern) -> Op:
    """Codes as numbers."""
    return op(
        "dequantize", source, Const(f"{name}.scale"), Const(f"{name}.zero"), capture=f"{name}.codes"
    )


def map_numbers(name: str) -> Op:
    return numbers(name, Value(name))


def weight_numbers(name: str) -> Op:
    return numbers(name, Const(name))


def with_bias(product: Pattern, tag: str) -> Either:
    bias = either(Const(f"bias{tag}"), weight_numbers(f"bias{tag}"))
    shaped = op("reshape", bias, capture=f"shaped{tag}")
    return commute("add", product, either(bias, shaped))


def biased(product: Pattern, tag: str) -> Either:
    return either(with_bias(product, tag), product)


def scalars(node: Node) -> Array:
    assert node.value is not None
    return np.asarray(node.value).reshape(-1)


def codes_of(found: Captures, name: str, dtype: str) -> Codes:
    scale = scalars(found[f"{name}.scale"]).astype(np.float64)
    call = found.get(f"{name}.codes", found.get(name))
    require_finite(scale, call.name if call else name, "a scale")
    return Codes(dtype, scale, scalars(found[f"{name}.zero"]).astype(np.int64))


def require_finite(values: Array, where: str, what: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            f"{what} holds {values[~np.isfinite(values)][0]}",
            where=where,
            hint="the model itself is broken: train or export it again",
        )


def image_shape(node: Node) -> tuple[int, ...]:
    """Shape per image; every size but the batch must be known."""
    sizes = node.shape[1:]
    if None in sizes:
        raise UnsupportedError(f"shape {node.shape} is not known at compile time", where=node.name)
    return tuple(int(size) for size in sizes if size is not None)


def scalar(node: Node) -> float:
    values = scalars(node)
    if values.size != 1:
        raise UnsupportedError(
            f"{values.size} factors or clip bounds instead of one", where=node.name
        )
    return float(values[0])


def pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def window_of(call: Node) -> dict[str, Any]:
    top, left, bottom, right = (int(value) for value in call.attrs["padding"])
    return {
        "stride": pair(call.attrs["strides"]),
        "padding": (top, left, bottom, right),
        "dilation": pair(call.attrs["dilation"]),
    }


def added_padding(padding: tuple[int, ...], pad: Node, codes: Codes) -> tuple[int, ...]:
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


def parse_bias(found: Captures, tag: str, result: Node) -> tuple[Array | None, Array | None]:
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
    values = np.broadcast_to(scalars(node), (channels,))
    require_finite(values, result.name, "its bias")
    if f"bias{tag}.codes" not in found:
        return values, None
    codes = codes_of(found, f"bias{tag}", node.dtype)
    if codes.zero_point.any() or node.dtype != "int32":
        return ((values - codes.zero_point) * codes.scale).astype(np.float64), None
    return values, codes.scale


def averaged_map(call: Node, data: Node) -> tuple[int, int]:
    """Give the rows and columns of the map that a mean is taken over, and refuse other means."""
    axes = sorted(int(axis) % len(data.shape) for axis in call.attrs["axis"] or ())
    shape = image_shape(data)
    if axes != [2, 3] or len(shape) != 3:
        raise UnsupportedError(
            f"a mean over axes {axes} of {data.shape}, MARS averages rows and columns (2, 3)",
            where=call.name,
        )
    return shape[1], shape[2]
