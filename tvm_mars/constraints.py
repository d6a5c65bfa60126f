"""What MARS takes: one function per limit; its docstring is the message and the documentation.

A limit looks at a parsed spec (:func:`on_spec`) or at the integer layer made of it
(:func:`on_layer`), and gives None if it holds, else the value that breaks it. A layer that breaks a
limit stays on the CPU and the report carries the docstring and the value. Names in braces in a
docstring stand for the instruction set's limits, see :data:`LIMITS`.

To add one, write a function with the decorator: nothing else refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs
import numpy as np

from mars_runtime import isa
from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError
from mars_runtime.maps import RAW_BITS, WORD_CHANNELS

from .frontend.patterns import COMPOSITES
from .frontend.spec import (
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
    ReshapeSpec,
    Spec,
    SumSpec,
    code_range,
)
from .graph import Conv, Layer, MapType, Pool, Requant, worst_accumulator
from .schedule import Step, smallest_tile

__all__ = [
    "CONSTRAINTS",
    "LIMITS",
    "Constraint",
    "check_layer",
    "check_spec",
    "on_layer",
    "on_spec",
    "supported_ops",
]

# What the fields of the instructions and of the load descriptor can say.
LIMITS: dict[str, int] = {
    "channels": (isa.field_limit(isa.Segment, "out_block") + 1) * WORD_CHANNELS,
    "size": isa.field_limit(isa.Apw, "height"),
    "taps": (isa.field_limit(isa.Segment, "tap_base") + 1) * isa.TAPS_PER_SEGMENT,
    "step": isa.field_limit(isa.Sas, "stride_y"),
    "terms": isa.field_limit(isa.Sas, "context") + 1,
    "accumulator": RAW_BITS,
    "shift": isa.field_limit(isa.Apw, "shift"),
}

_CONV = ("conv",)
_SUMS = ("add", "sum")
_POOLS = ("maxpool", "avgpool")
_WINDOWS = (*_POOLS, "average")
_ALL = ("conv", *_SUMS, *_WINDOWS, "reshape", "quantize", "dequantize")


@attrs.frozen(eq=False)
class Constraint:
    """One limit: what it applies to and the function that checks it."""

    stage: Literal["spec", "layer"]
    kinds: tuple[str, ...]
    check: Callable[..., str | None]

    @property
    def text(self) -> str:
        """The function's docstring on one line, without the full stop."""
        text = " ".join((self.check.__doc__ or "").split()).rstrip(".")
        return text.format_map(LIMITS)


CONSTRAINTS: list[Constraint] = []

SpecCheck = Callable[[Any], "str | None"]
LayerCheck = Callable[[Any, Mapping[str, MapType], MarsArch], "str | None"]


def on_spec(*kinds: str) -> Callable[[SpecCheck], SpecCheck]:
    """Register a limit on specs of these kinds: ``f(spec) -> None or the value``."""

    def register(check: SpecCheck) -> SpecCheck:
        CONSTRAINTS.append(Constraint("spec", kinds, check))
        return check

    return register


def on_layer(*kinds: str) -> Callable[[LayerCheck], LayerCheck]:
    """Register a limit on layers of these kinds: ``f(layer, types, arch) -> None or the value``.

    ``types`` has the layer's inputs and the layer itself.
    """

    def register(check: LayerCheck) -> LayerCheck:
        CONSTRAINTS.append(Constraint("layer", kinds, check))
        return check

    return register


def check_spec(spec: Spec, where: str = "") -> None:
    """Check a spec.

    Raises
    ------
    UnsupportedError
        If it breaks a limit, with the limit's text and the value.
    """
    _check("spec", spec.kind, where, (spec,))


def check_layer(
    layer: Layer, types: Mapping[str, MapType], arch: MarsArch, where: str = ""
) -> None:
    """Check a layer; raises as :func:`check_spec`."""
    _check("layer", layer.kind, where, (layer, types, arch))


def _check(stage: str, kind: str, where: str, arguments: tuple[Any, ...]) -> None:
    for constraint in CONSTRAINTS:
        if constraint.stage != stage or kind not in constraint.kinds:
            continue
        value = constraint.check(*arguments)
        if value is not None:
            raise UnsupportedError(f"{constraint.text}: {value}", where=where)


# -- on specs --------------------------------------------------------------------------------------


def _map_codes(spec: Spec) -> Iterable[Codes]:
    if isinstance(spec, ConvSpec):
        yield from (term.data for term in spec.terms)
        if spec.residual is not None:
            yield spec.residual
    elif isinstance(spec, (AddSpec, SumSpec)):
        yield from spec.operands
    elif isinstance(spec, (AvgPoolSpec, AverageSpec)):
        yield from [] if spec.data is None else [spec.data]
    elif isinstance(spec, DequantizeSpec):
        yield spec.codes


def _quantizer(spec: Spec) -> Quantizer | Requantizer | None:
    if isinstance(spec, (ConvSpec, AddSpec, AvgPoolSpec, QuantizeSpec)):
        return spec.quantizer
    return spec.requantizer if isinstance(spec, AverageSpec) else None


def _result(spec: Spec) -> Codes | None:
    if isinstance(spec, SumSpec):
        return spec.codes
    quantizer = _quantizer(spec)
    return None if quantizer is None else quantizer.codes


@on_spec(*_ALL)
def map_codes_are_integers(spec: Spec) -> str | None:
    """Maps are uint8, int8, uint4 or int4 codes."""
    dtypes = [codes.dtype for codes in _map_codes(spec)]
    if isinstance(spec, (MaxPoolSpec, AverageSpec)) or (
        isinstance(spec, ReshapeSpec) and not spec.numbers
    ):
        if spec.dtype.startswith("float"):
            return f"its input is {spec.dtype}, not codes"
        dtypes.append(spec.dtype)
    result = _result(spec)
    if result is not None:
        dtypes.append(result.dtype)
    return next((dtype for dtype in dtypes if code_range(dtype) is None), None)


@on_spec(*_ALL)
def maps_have_one_scale(spec: Spec) -> str | None:
    """A map has one scale and one zero point."""
    result = _result(spec)
    found = [*_map_codes(spec), *([result] if result else [])]
    wrong = next((codes for codes in found if not codes.per_tensor), None)
    return None if wrong is None else f"{wrong.scale.size} scales"


@on_spec(*_ALL)
def scales_are_positive(spec: Spec) -> str | None:
    """Scales are greater than zero."""
    quantizer, result = _quantizer(spec), _result(spec)
    scales = [codes.scale for codes in _map_codes(spec)]
    if result is not None:
        scales.append(result.scale)
    if isinstance(quantizer, Quantizer):
        scales.append(np.asarray([quantizer.factor]))
    if isinstance(spec, ConvSpec):
        scales += [term.weight_scale for term in spec.terms]
    for scale in scales:
        if not (scale > 0).all():
            return str(float(np.asarray(scale).min()))
    return None


@on_spec("quantize")
def numbers_are_float32(spec: QuantizeSpec) -> str | None:
    """Numbers that enter are float32."""
    return None if spec.dtype == "float32" else spec.dtype


@on_spec("dequantize")
def results_are_float32(spec: DequantizeSpec) -> str | None:
    """Numbers that leave are float32."""
    return None if spec.out_dtype == "float32" else spec.out_dtype


@on_spec(*_CONV, *_WINDOWS)
def layout_is_channels_first(
    spec: ConvSpec | MaxPoolSpec | AvgPoolSpec | AverageSpec,
) -> str | None:
    """Maps are laid out NCHW and weights OIHW."""
    if not isinstance(spec, ConvSpec):
        return None if spec.layout == "NCHW" else spec.layout
    layouts = [term.layout for term in spec.terms]
    return next((layout for layout in layouts if layout != "NCHW/OIHW"), None)


@on_spec(*_CONV)
def weights_are_integers(spec: ConvSpec) -> str | None:
    """Weights are int8, uint8, int4 or uint4 codes."""
    dtypes = (term.weight_dtype for term in spec.terms)
    return next((dtype for dtype in dtypes if code_range(dtype) is None), None)


@on_spec(*_SUMS)
def operands_have_one_shape(spec: AddSpec | SumSpec) -> str | None:
    """Maps that are added have the same shape."""
    return None if len(set(spec.shapes)) == 1 else " and ".join(map(str, spec.shapes))


@on_spec(*_WINDOWS)
def pools_are_not_dilated(spec: MaxPoolSpec | AvgPoolSpec | AverageSpec) -> str | None:
    """Pooling windows are not dilated."""
    return None if spec.dilation == (1, 1) else str(spec.dilation)


@on_spec("average")
def averages_have_one_count(spec: AverageSpec) -> str | None:
    """An average of integers is of as many codes at the border as elsewhere."""
    if spec.count_include_pad or not any(spec.padding):
        return None
    return f"padding {spec.padding} that is not counted"


@on_spec("avgpool", "average")
def average_is_rounded_down_in_size(spec: AvgPoolSpec | AverageSpec) -> str | None:
    """An average pool has no window that is only partly inside the padded map (ceil_mode)."""
    for axis in (0, 1):
        size = spec.data_shape[1 + axis] + spec.padding[axis] + spec.padding[2 + axis]
        count = (size - spec.kernel[axis]) // spec.stride[axis] + 1
        if len(spec.out_shape) == 3 and spec.out_shape[1 + axis] != count:
            return f"output {spec.out_shape}"
    return None


@on_spec("reshape")
def reshape_flattens(spec: ReshapeSpec) -> str | None:
    """A reshape flattens a map, or drops or adds sizes of one."""
    channels = spec.data_shape[:1]
    size = int(np.prod(spec.data_shape))
    if spec.out_shape == (size,):
        return None
    same_channels = spec.out_shape[:1] == channels and len(spec.out_shape) == 3
    if same_channels and (size,) == channels:
        return None
    return f"{spec.data_shape} to {spec.out_shape}"


# -- on layers -------------------------------------------------------------------------------------


@on_layer(*_CONV)
def accumulators_fit(layer: Conv, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Accumulators fit signed {accumulator} bit whatever the input."""
    worst = worst_accumulator(layer, types)
    return None if worst < 2 ** (LIMITS["accumulator"] - 1) else f"they may reach {worst}"


@on_layer("conv", "add", *_POOLS)
def map_sizes(layer: Layer, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Maps have at most {channels} channels and {size} rows and columns."""
    for name in (*layer.inputs, layer.name):
        entry = types[name]
        if entry.channels > LIMITS["channels"] or max(entry.height, entry.width) > LIMITS["size"]:
            return str(entry)
    return None


@on_layer(*_CONV)
def kernel_taps(layer: Conv, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Kernels have at most {taps} taps."""
    for term in layer.terms:
        if term.kernel[0] * term.kernel[1] > LIMITS["taps"]:
            return f"{term.kernel[0]} x {term.kernel[1]}"
    return None


@on_layer(*_CONV)
def conv_terms(layer: Conv, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """At most {terms} convolutions are summed before one requantization."""
    return None if len(layer.terms) <= LIMITS["terms"] else str(len(layer.terms))


@on_layer(*_CONV)
def conv_steps(layer: Conv, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Strides and dilations of a convolution are at most {step}, paddings at most {size}."""
    for term in layer.terms:
        if max(*term.stride, *term.dilation) > LIMITS["step"] or max(term.padding) > LIMITS["size"]:
            return f"stride {term.stride}, dilation {term.dilation}, padding {term.padding}"
    return None


@on_layer(*_POOLS)
def pool_steps(layer: Pool, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Strides of a pool are at most {step}; its padding is less than its window."""
    top, left, bottom, right = layer.padding
    if max(layer.stride) > LIMITS["step"]:
        return f"stride {layer.stride}"
    if max(top, bottom) >= layer.kernel[0] or max(left, right) >= layer.kernel[1]:
        return f"window {layer.kernel}, padding {layer.padding}"
    return None


@on_layer("conv", "add", *_POOLS)
def smallest_tile_fits(layer: Layer, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """What one output pixel needs, all its channels, fits the feature-map SRAMs."""
    missing = smallest_tile(Step(layer), types, arch)
    return None if missing is None else f"needs {missing[0]} words of {missing[1]}"


@on_layer("conv", "add", *_POOLS)
def requantization_shift(layer: Layer, types: Mapping[str, MapType], arch: MarsArch) -> str | None:
    """Requantization shifts to the right by at most {shift} bits and never to the left."""
    requant: Requant | None = layer.requant
    if requant is None:
        return None
    low, high = int(requant.shift.min()), int(requant.shift.max())
    return None if low >= 0 and high <= LIMITS["shift"] else f"{low}..{high}"


# -- the documentation -----------------------------------------------------------------------------


def supported_ops() -> str:
    """Describe in Markdown what MARS takes, generated from the chains and the limits.

    Examples
    --------
    >>> supported_ops().splitlines()[0]
    '# What MARS takes'
    """
    lines = ["# What MARS takes", "", "## Operator chains", ""]
    lines += [f"- `{composite.name}`: {composite.doc}" for composite in COMPOSITES]
    for kind in _ALL:
        lines += ["", f"## Limits of {kind}", ""]
        lines += [f"- {entry.text}." for entry in CONSTRAINTS if kind in entry.kinds]
    return "\n".join(lines) + "\n"
