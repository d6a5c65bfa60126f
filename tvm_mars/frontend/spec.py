"""What an operator chain computes, parsed once: frozen values without a framework type in them.

A frontend matches a chain (see :mod:`tvm_mars.frontend.patterns`) and parses it into one of these
specs; constraints and lowering read only the spec.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

__all__ = [
    "AddSpec",
    "AverageSpec",
    "AvgPoolSpec",
    "Codes",
    "ConvSpec",
    "DequantizeSpec",
    "MaxPoolSpec",
    "QuantizeSpec",
    "Quantizer",
    "Requantizer",
    "Rescale",
    "ReshapeSpec",
    "Spec",
    "SumSpec",
    "TermSpec",
]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
Padding: TypeAlias = tuple[int, int, int, int]

_RANGES = {"uint8": (0, 255), "int8": (-128, 127), "uint4": (0, 15), "int4": (-8, 7)}


def code_range(dtype: str) -> tuple[int, int] | None:
    """Lowest and highest code of an integer type that MARS stores, else None."""
    return _RANGES.get(dtype)


def _one(value: npt.ArrayLike) -> Array:
    return np.asarray(value).reshape(-1)


@attrs.frozen(eq=False)
class Codes:
    """How integer codes stand for numbers: ``scale * (code - zero_point)``.

    ``scale`` (float64, the exact float32 values) and ``zero_point`` have one entry or one per
    channel.
    """

    dtype: str
    scale: Array = attrs.field(converter=_one)
    zero_point: Array = attrs.field(converter=_one)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and one zero point hold for the whole tensor."""
        return self.scale.size == self.zero_point.size == 1


@attrs.frozen(eq=False)
class Quantizer:
    """The end of a chain: clip, multiply, quantize.

    ``code = saturate(round_half_even(clip(x, *clip) * factor / scale) + zero_point)``
    """

    codes: Codes
    clip: tuple[float, float] = (-np.inf, np.inf)
    factor: float = 1.0

    @property
    def eq5(self) -> bool:
        """Whether this is eq. 5 for 4 or 8 bits."""
        return (
            self.codes.dtype == "uint8"
            and self.codes.per_tensor
            and self.clip == (0.0, 1.0)
            and self.factor in (15.0, 255.0)
            and self.codes.scale[0] == 1.0
            and self.codes.zero_point[0] == 0
        )


@attrs.frozen(eq=False)
class Rescale:
    """Steps of one grid to the nearest steps of another, as TVM's ``qnn.requantize`` computes it.

    Parameters
    ----------
    scale : float64 array
        What an incoming step stands for (an exact float32 value), one or one per channel.
    out_scale : float
        What an outgoing step stands for.
    rounding : str
        Where exact halves go: ``UPWARD`` to the greater, ``TONEAREST`` away from zero.
    compute_dtype : str
        ``int64``: a multiplier of 31 bits and a shift. ``float32``, ``float64``: a product.
    floor, ceiling : integer array
        Limits of the incoming steps, one or one per channel.
    """

    scale: Array = attrs.field(converter=_one)
    out_scale: float
    rounding: str = "UPWARD"
    compute_dtype: str = "int64"
    floor: Array = attrs.field(default=-(2**31), converter=_one)
    ceiling: Array = attrs.field(default=2**31 - 1, converter=_one)

    @property
    def ratio(self) -> Array:
        """Outgoing steps for one that comes in."""
        return np.asarray(self.scale / self.out_scale)


@attrs.frozen(eq=False)
class Requantizer:
    """The end of a chain of integer operators: ``clip(rescale(steps) + zero_point, low, high)``."""

    rescale: Rescale
    codes: Codes
    low: int
    high: int


@attrs.frozen(eq=False)
class TermSpec:
    """One convolution or dense product, with its bias.

    Parameters
    ----------
    data : Codes
        The quantization of the map that it reads.
    data_shape, out_shape : tuple of int
        Per image.
    weight : integer array
        Codes minus zero point, ``[O, C / groups, KH, KW]``, or ``[O, I]`` of a dense product.
    weight_dtype : str
        The type that the codes were stored in.
    weight_scale : float64 array
        One or one per output channel.
    bias : array, optional
        float32 numbers, or int32 accumulators where ``bias_scale`` is their grid.

    An operator on integers has no scale of its own: its data counts in steps, and ``weight_scale``
    is what a step of its accumulators stands for to whoever reads them.
    """

    data: Codes
    data_shape: Shape
    out_shape: Shape
    weight: Array
    weight_dtype: str
    weight_scale: Array
    bias: Array | None = None
    bias_scale: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "NCHW/OIHW"

    @property
    def grid(self) -> Array:
        """What one step of the accumulators stands for, one or one per output channel."""
        return self.data.scale * self.weight_scale


@attrs.frozen(eq=False)
class ConvSpec:
    """Convolutions or dense products into the same accumulators, then perhaps a quantizer.

    Operands are the data of each term, then the residual.
    """

    kind: ClassVar[str] = "conv"

    op: Literal["conv2d", "dense"]
    terms: tuple[TermSpec, ...]
    residual: Codes | None = None
    quantizer: Quantizer | Requantizer | None = None

    @property
    def out_shape(self) -> Shape:
        """Per image."""
        return self.terms[0].out_shape


@attrs.frozen(eq=False)
class AddSpec:
    """Sum of one or two quantized maps, quantized again (one: a requantization)."""

    kind: ClassVar[str] = "add"

    operands: tuple[Codes, ...]
    shapes: tuple[Shape, ...]
    quantizer: Quantizer

    @property
    def op(self) -> str:
        """``add`` or ``requantize``."""
        return "add" if len(self.operands) == 2 else "requantize"


@attrs.frozen(eq=False)
class SumSpec:
    """Sum of one or two quantized maps, each rounded to steps of the result before it is added."""

    kind: ClassVar[str] = "sum"

    operands: tuple[Codes, ...]
    shapes: tuple[Shape, ...]
    rescales: tuple[Rescale, ...]
    codes: Codes
    low: int
    high: int

    @property
    def op(self) -> str:
        """``add`` or ``requantize``."""
        return "add" if len(self.operands) == 2 else "requantize"


@attrs.frozen(eq=False)
class MaxPoolSpec:
    """Max pooling of codes."""

    kind: ClassVar[str] = "maxpool"
    op: ClassVar[str] = "max_pool2d"

    dtype: str
    data_shape: Shape
    out_shape: Shape
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int] = (1, 1)
    layout: str = "NCHW"


@attrs.frozen(eq=False)
class AvgPoolSpec:
    """Average pooling of a quantized map, quantized again."""

    kind: ClassVar[str] = "avgpool"
    op: ClassVar[str] = "avg_pool2d"

    data: Codes
    data_shape: Shape
    out_shape: Shape
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    quantizer: Quantizer
    count_include_pad: bool = False
    dilation: tuple[int, int] = (1, 1)
    layout: str = "NCHW"


@attrs.frozen(eq=False)
class AverageSpec:
    """Average of codes as integers, cut off towards code 0, requantized before or after or neither.

    ``data`` has scale and zero point where a requantization tells them. Padding counts as code 0.
    ``entry`` gives the integers that are averaged where they are not the codes, with the zero point
    ``entry_zero``.
    """

    kind: ClassVar[str] = "average"
    op: ClassVar[str] = "avg_pool2d"

    dtype: str
    data_shape: Shape
    out_shape: Shape
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    low: int
    high: int
    count_include_pad: bool = False
    dilation: tuple[int, int] = (1, 1)
    layout: str = "NCHW"
    data: Codes | None = None
    entry: Rescale | None = None
    entry_zero: int = 0
    requantizer: Requantizer | None = None


@attrs.frozen(eq=False)
class ReshapeSpec:
    """Codes in another shape, in the same order; or numbers that leave."""

    kind: ClassVar[str] = "reshape"
    op: ClassVar[str] = "reshape"

    dtype: str
    data_shape: Shape
    out_shape: Shape

    @property
    def numbers(self) -> bool:
        """Whether it reshapes numbers, not codes."""
        return self.dtype == "float32"


@attrs.frozen(eq=False)
class QuantizeSpec:
    """Numbers from the caller to codes."""

    kind: ClassVar[str] = "quantize"
    op: ClassVar[str] = "quantize"

    dtype: str
    data_shape: Shape
    quantizer: Quantizer


@attrs.frozen(eq=False)
class DequantizeSpec:
    """Codes to numbers for the caller."""

    kind: ClassVar[str] = "dequantize"
    op: ClassVar[str] = "dequantize"

    codes: Codes
    data_shape: Shape
    out_dtype: str = "float32"


Spec: TypeAlias = (
    ConvSpec
    | AddSpec
    | SumSpec
    | MaxPoolSpec
    | AvgPoolSpec
    | AverageSpec
    | ReshapeSpec
    | QuantizeSpec
    | DequantizeSpec
)
