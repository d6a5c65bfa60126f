"""Write a native integer graph as ONNX in Q/DQ form, exact in float32.

Every value of a native graph is a map of codes; ``code / 2**bits`` is its real value. In the file

- an input is ``Clip(0, 1)``, ``Mul(2**bits - 1)``, ``QuantizeLinear`` with scale 1; one of another
  range is ``Clip``, ``QuantizeLinear`` with its scale and zero point;
- each arithmetic operator reads ``DequantizeLinear`` nodes whose scales are powers of two, and a
  requantization is again Clip, Mul, QuantizeLinear (eq. 5: ``round(clamp(a) * (2**bits - 1))``);
- a convolution is ``Conv``, a layer whose kernel covers its input ``Flatten`` and ``Gemm``; further
  terms (projection shortcuts) and a residual are added before the Clip;
- an average pool is ``AveragePool``, then eq. 5: up to 256 codes, its two roundings in float32
  change no code (shown by going through every sum; 278 8-bit codes are the first exception);
- max pools and reshapes work on the uint8 codes: eq. 5 is not idempotent, so nothing quantizes
  twice.

A layer's accumulators lie on the grid ``2**-P``, ``P`` the shift of its requantization. Its weight
codes have the scale ``2**-(bits_weight - 1)``, by which importers know 4 bits, and the map that
they meet has what is left of ``2**(shift - P)``, which is ``2**-bits`` in a network of eq. 5 to 8;
its residual, and the operands of an addition ``m_i * 2**-P``, likewise. float32 adds such values
without rounding, in any order and with or without fused multiply-add, as long as they stay below
``2**24`` steps of the grid: :func:`check_exact` proves that for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mars_runtime.errors import CapacityError, UnsupportedError

from .graph import (
    EXACT,
    Add,
    Conv,
    ConvTerm,
    Graph,
    Input,
    Layer,
    Output,
    Pool,
    Requant,
    worst_accumulator,
)

__all__ = ["check_exact", "to_onnx"]

OPSET = 17  # the newest that Relay's and Relax's importers share; no operator here needs more
IR_VERSION = 8
BATCH = "N"


def to_onnx(
    graph: Graph, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> onnx.ModelProto:
    """Export a native graph.

    Parameters
    ----------
    graph : Graph
        All requantizations native (eq. 5); inputs float32, by eq. 5 or by a scale and zero point.
    inputs, outputs : sequence of str, optional
        Their names; if None, ``x0, x1, ...`` and ``y0, y1, ...``.

    Returns
    -------
    onnx.ModelProto
        Checked; the batch dimension is ``N``. The same graph gives the same bytes.

    Raises
    ------
    UnsupportedError
        If something in the graph is not native.
    CapacityError
        If a layer's sums could leave the integers that float32 holds.

    Examples
    --------
    >>> from mars_runtime.quantize import Dequantize, Quantize
    >>> from tvm_mars.graph import MapType
    >>> quantize = Quantize(high=15, factor=15.0, clip=(0.0, 1.0))
    >>> x = Input("x0", MapType(1, 2, 2, 4), (1, 2, 2), quantize)
    >>> pool = Pool("maxpool0", "max", "x0", (2, 2), (2, 2))
    >>> y = Output("maxpool0", (1, 1, 1), Dequantize(scale=(2.0**-4,)))
    >>> [node.op_type for node in to_onnx(Graph([x], [pool], [y])).graph.node]
    ['Clip', 'Mul', 'QuantizeLinear', 'MaxPool', 'DequantizeLinear']
    """
    grids = _raw_grids(graph)
    check_exact(graph)
    writer = _Writer(graph, grids)
    for entry in graph.inputs:
        writer.input(entry)
    for layer in graph.layers:
        writer.layer(layer)
    ours = [f"y{i}" for i in range(len(graph.outputs))]
    for name, out in zip(ours, graph.outputs, strict=True):
        writer.output(name, out)
    asked = dict(zip(ours, outputs or ours, strict=True))
    entries = [entry.name for entry in graph.inputs]
    asked.update(zip(entries, inputs or entries, strict=True))
    return writer.model(asked)


def check_exact(graph: Graph) -> None:
    """Prove that float32 evaluates a native graph exactly.

    Raises
    ------
    UnsupportedError
        If a layer or a border is not native.
    CapacityError
        If a layer's accumulators, or a product before a rounding, may need more than 24 bits.
    """
    for entry in graph.inputs:
        _check_input(entry)
    for layer in graph.layers:
        if layer.requant is not None and not layer.requant.native:
            raise UnsupportedError(
                f"requantizes by {layer.requant}",
                where=layer.name,
                hint="only eq. 5 has an exact float form",
            )
        _check_layer(layer, graph)


def _check_input(entry: Input) -> None:
    top = 2**entry.type.bits - 1
    quantize, zero = entry.quantize, entry.type.zero_point
    whole = (quantize.dtype, quantize.low, quantize.high) == ("float32", 0, top)
    scaled = quantize.factor == 1 and quantize.zero_point == zero and quantize.clip is not None
    if not whole or not (scaled or _is_eq5(entry)):
        raise UnsupportedError(
            f"quantizes {quantize}",
            where=entry.name,
            hint=f"eq. 5 is clip 0..1 * {top} in 0..{top}; a scale and zero point need a clip",
        )


def _is_eq5(entry: Input) -> bool:
    quantize = entry.quantize
    step = (quantize.scale, quantize.zero_point, quantize.clip, entry.type.zero_point)
    return quantize.factor == 2**entry.type.bits - 1 and step == (1.0, 0, (0.0, 1.0), 0)


def _check_layer(layer: Layer, graph: Graph) -> None:
    if isinstance(layer, Pool):
        if layer.requant is None:
            return
        # See above: the quotient is inexact, but no code comes out wrong up to this size.
        count = layer.kernel[0] * layer.kernel[1]
        bits = graph.types[layer.input].bits + layer.requant.bits
        _require_exact(layer.name, "the sum of the window", count << bits, EXACT)
        return
    if isinstance(layer, Conv):
        worst = worst_accumulator(layer, graph.types)
    else:
        worst = sum(
            (2 ** graph.types[operand.input].bits - 1) * abs(operand.multiplier)
            for operand in layer.operands
        )
    _require_exact(layer.name, "accumulators", worst, EXACT - 1)
    if layer.requant is not None:
        clamped = min(worst, 2 ** int(layer.requant.shift[0]) - 1)
        product = clamped * (2**layer.requant.bits - 1)
        _require_exact(layer.name, "clamped accumulators times 2**bits - 1", product, EXACT - 1)


def _require_exact(name: str, what: str, need: int, have: int) -> None:
    if need > have:
        raise CapacityError(
            f"{what} may leave the integers that float32 holds",
            op=name,
            need=need,
            have=have,
            hint="prune the layer, use fewer weight or activation bits, or split its inputs",
        )


def _raw_grids(graph: Graph) -> dict[str, int]:
    """Give the grid of each layer without requantization, which its output's scale tells."""
    raw = {layer.name for layer in graph.layers if isinstance(layer, Conv) and not layer.requant}
    grids: dict[str, int] = {}
    for out in graph.outputs:
        if out.value not in raw:
            continue
        if out.dequantize.dtype != "float32" or len(set(out.dequantize.scale)) != 1:
            raise UnsupportedError(
                f"accumulators leave {out.dequantize}",
                where=out.value,
                hint="dequantize them by one power of two",
            )
        grid = -_exponent(out.dequantize.scale[0], out.value)
        if grids.setdefault(out.value, grid) != grid:
            raise UnsupportedError("accumulators leave with two scales", where=out.value)
    unread = sorted(raw - set(grids))
    if unread:
        raise UnsupportedError("accumulators that nothing reads", where=unread[0])
    return grids


def _exponent(scale: float, where: str) -> int:
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise UnsupportedError(f"scale {scale:g} is no power of two", where=where)
    return exponent - 1


@attrs.define
class _Writer:
    """Nodes and constants of a model in the making.

    ``tensors`` holds, for each value, the tensor of its codes (or accumulators) by its shape per
    image: ``(C, H, W)``, or ``(C,)`` as a dense layer takes and gives it.
    """

    graph: Graph
    raw_grids: dict[str, int]
    tensors: dict[str, dict[tuple[int, ...], str]] = attrs.field(factory=dict)
    nodes: list[onnx.NodeProto] = attrs.field(factory=list)
    written: set[str] = attrs.field(factory=set)
    constants: dict[str, onnx.TensorProto] = attrs.field(factory=dict)
    inputs: list[onnx.ValueInfoProto] = attrs.field(factory=list)
    outputs: list[onnx.ValueInfoProto] = attrs.field(factory=list)

    def model(self, names: Mapping[str, str]) -> onnx.ModelProto:
        """Assemble and check the model, some of its tensors named otherwise."""
        self.name(names)
        graph = helper.make_graph(
            self.nodes, "mars", self.inputs, self.outputs, list(self.constants.values())
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="tvm-mars")
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model

    def name(self, names: Mapping[str, str]) -> None:
        """Name inputs and outputs; what else has such a name takes another."""
        if len(set(names.values())) < len(names) or "" in names.values():
            raise UnsupportedError(
                f"{sorted(names.values())} do not name each input and output apart", where="names"
            )
        inner = {*self.constants, *(out for node in self.nodes for out in node.output)} - set(names)
        given = dict(names)
        for name in sorted(inner & set(names.values())):
            other = f"{name}_"
            while other in inner or other in names.values():
                other += "_"
            given[name] = other
        for node in self.nodes:
            node.input[:] = [given.get(entry, entry) for entry in node.input]
            node.output[:] = [given.get(entry, entry) for entry in node.output]
        for entry in (*self.inputs, *self.outputs, *self.constants.values()):
            entry.name = given.get(entry.name, entry.name)

    # -- pieces --

    def node(self, kind: str, inputs: Sequence[str], result: str, **attributes: Any) -> str:
        """Add a node unless its result is there already."""
        if result not in self.written:
            self.written.add(result)
            self.nodes.append(helper.make_node(kind, inputs, [result], name=result, **attributes))
        return result

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """Add a constant unless it is there already."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def number(self, value: int) -> str:
        """Give a float32 scalar."""
        return self.constant(f"float_{value}", np.array(value, np.float32))

    def dequantize(
        self, codes: str, dtype: str, exponent: int, result: str, zero_point: int = 0
    ) -> str:
        """Multiply codes minus their zero point by ``2**exponent``."""
        scale = self.constant(f"two_power_{exponent}", np.array(2.0**exponent, np.float32))
        zero = self.zero(zero_point, dtype)
        return self.node("DequantizeLinear", [codes, scale, zero], result)

    def zero(self, code: int, dtype: str) -> str:
        """Give a zero point."""
        return self.constant(f"zero_{dtype}{code or ''}", np.array(code, dtype))

    def parameter(self, codes: npt.NDArray[np.generic], exponent: int, name: str) -> str:
        """Dequantize a constant of weight or bias codes."""
        stored = self.constant(f"{name}_codes", codes)
        return self.dequantize(stored, str(codes.dtype), exponent, name)

    def eq5(self, source: str, bits: int, result: str) -> str:
        """Quantize a float tensor by eq. 5."""
        zero = self.constant("zero_uint8", np.array(0, np.uint8))
        clipped = self.node("Clip", [source, self.number(0), self.number(1)], f"{result}_clip")
        steps = self.node("Mul", [clipped, self.number(2**bits - 1)], f"{result}_steps")
        return self.node("QuantizeLinear", [steps, self.number(1), zero], result)

    def put(self, value: str, shape: tuple[int, ...], tensor: str) -> None:
        """Note the tensor that holds a value."""
        self.tensors[value] = {shape: tensor}

    def codes(self, value: str, shape: tuple[int, ...]) -> str:
        """Give a value's tensor in some shape, reshaped if it has another."""
        known = self.tensors[value]
        if shape not in known:
            source = next(iter(known.values()))
            result = f"{value}_as_{'x'.join(map(str, shape))}"
            if len(shape) == 1:
                known[shape] = self.node("Flatten", [source], result, axis=1)
            else:
                sizes = self.constant(f"{result}_sizes", np.array([0, *shape], np.int64))
                known[shape] = self.node("Reshape", [source, sizes], result)
        return known[shape]

    def real(self, value: str, shape: tuple[int, ...], exponent: int) -> str:
        """Give the codes of a value times ``2**exponent``."""
        codes, zero = self.codes(value, shape), self.graph.types[value].zero_point
        return self.dequantize(codes, "uint8", exponent, f"{codes}_times_2^{exponent}", zero)

    # -- borders --

    def input(self, entry: Input) -> None:
        """Add an input and its quantization."""
        self.inputs.append(_declare(entry.name, TensorProto.FLOAT, entry.shape))
        result = f"{entry.name}_codes"
        if _is_eq5(entry):
            self.eq5(entry.name, entry.type.bits, result)
        else:
            self.scaled(entry, result)
        self.put(entry.name, entry.shape, result)

    def scaled(self, entry: Input, result: str) -> None:
        """Quantize an input by a scale and zero point."""
        form = entry.quantize
        assert form.clip is not None  # _check_input
        bounds = [
            self.constant(f"{entry.name}_{end}", np.array(value, np.float32))
            for end, value in zip(("low", "high"), form.clip, strict=True)
        ]
        clipped = self.node("Clip", [entry.name, *bounds], f"{result}_clip")
        scale = self.constant(f"{entry.name}_scale", np.array(form.scale, np.float32))
        self.node("QuantizeLinear", [clipped, scale, self.zero(form.zero_point, "uint8")], result)

    def output(self, name: str, out: Output) -> None:
        """Add an output and the conversion to it."""
        form = out.dequantize
        raw = out.value in self.raw_grids
        if raw or (form.dtype, form.low) == ("uint8", 0):
            self.rename(self.codes(out.value, out.shape), name)
        elif form.dtype == "float32" and len(form.scale) == 1 and form.zero_point == 0:
            codes, scale = self.codes(out.value, out.shape), form.scale[0]
            if math.frexp(scale)[0] == 0.5:
                self.dequantize(codes, "uint8", _exponent(scale, out.value), name)
            else:
                step = self.constant(f"{name}_scale", np.array(scale, np.float32))
                self.node("DequantizeLinear", [codes, step, self.zero(0, "uint8")], name)
        else:
            raise UnsupportedError(
                f"leaves {form}", where=out.value, hint="give codes, or one scale"
            )
        dtype = TensorProto.FLOAT if form.dtype == "float32" else TensorProto.UINT8
        self.outputs.append(_declare(name, dtype, out.shape))

    def rename(self, tensor: str, name: str) -> None:
        """Let an output be the tensor itself: an Identity would be an operator left to the CPU."""
        if any(tensor == out.name for out in self.outputs):
            self.node("Identity", [tensor], name)
            return
        for node in self.nodes:
            node.input[:] = [name if entry == tensor else entry for entry in node.input]
            node.output[:] = [name if entry == tensor else entry for entry in node.output]
        for known in self.tensors.values():
            known.update({shape: name for shape, entry in known.items() if entry == tensor})

    # -- layers --

    def layer(self, layer: Layer) -> None:
        """Add a layer."""
        if isinstance(layer, Conv):
            self.conv(layer)
        elif isinstance(layer, Pool):
            self.pool(layer)
        else:
            self.sum(layer)

    def conv(self, layer: Conv) -> None:
        """Add a convolution, or a dense layer where every kernel covers its whole input."""
        types = self.graph.types
        grid = self.raw_grids[layer.name] if layer.requant is None else _grid(layer.requant)
        dense = all(self.covers(term) for term in layer.terms)
        full = types[layer.name].shape
        shape: tuple[int, ...] = full[:1] if dense else full
        # The term on the layer's own grid takes the bias, if there is one.
        carrier = min(range(len(layer.terms)), key=lambda i: layer.terms[i].shift)
        bias = self.bias(layer, grid, dense and layer.terms[carrier].shift > 0)
        parts = []
        for i, term in enumerate(layer.terms):
            name = f"{layer.name}_term{i}"
            source = types[term.input]
            given = (math.prod(source.shape),) if dense else source.shape
            step = 1 - term.weight_bits
            data = self.real(term.input, given, term.shift - grid - step)
            codes = term.weight.reshape(len(term.weight), -1) if dense else term.weight
            weight = self.parameter(codes, step, f"{name}_weight")
            operands = [data, weight, bias] if i == carrier else [data, weight]
            parts.append(
                self.node("Gemm", operands, name, transB=1)
                if dense
                else self.node("Conv", operands, name, **_window(term))
            )
        if layer.residual:
            parts.append(self.real(layer.residual.input, shape, layer.residual.shift - grid))
        total = self.total(parts, layer.name)
        if layer.requant is not None:
            total = self.eq5(total, layer.requant.bits, f"{layer.name}_codes")
        self.put(layer.name, shape, total)

    def bias(self, layer: Conv, grid: int, real: bool) -> str:
        """Give the bias: dequantized, or as exact real numbers.

        ONNX Runtime 1.32 makes a QGemm of a Gemm between DequantizeLinear nodes and there takes the
        bias to have the product of the other two scales, whatever its own is.
        """
        name = f"{layer.name}_bias"
        if real:
            return self.constant(name, (layer.bias * 2.0**-grid).astype(np.float32))
        return self.parameter(layer.bias, -grid, name)

    def covers(self, term: ConvTerm) -> bool:
        """Whether a kernel covers its whole input."""
        source = self.graph.types[term.input]
        size = (source.height, source.width)
        return term.kernel == size and term.groups == 1 and not any(term.padding)

    def total(self, parts: Sequence[str], name: str) -> str:
        """Add tensors."""
        total = parts[0]
        for i, part in enumerate(parts[1:], 1):
            total = self.node("Add", [total, part], f"{name}_sum{i}")
        return total

    def pool(self, layer: Pool) -> None:
        """Add a pool: of codes if it takes their maximum, of real values if their average."""
        source, shape = self.graph.types[layer.input], self.graph.types[layer.name].shape
        window: dict[str, Any] = {
            "kernel_shape": layer.kernel,
            "strides": layer.stride,
            "pads": layer.padding,
        }
        if layer.requant is None:
            codes = self.codes(layer.input, source.shape)
            self.put(layer.name, shape, self.node("MaxPool", [codes], layer.name, **window))
            return
        real = self.real(layer.input, source.shape, -_grid(layer.requant))
        include = int(layer.count_include_pad)
        average = self.node("AveragePool", [real], layer.name, count_include_pad=include, **window)
        codes = self.eq5(average, layer.requant.bits, f"{layer.name}_codes")
        self.put(layer.name, shape, codes)

    def sum(self, layer: Add) -> None:
        """Add the sum of maps, each dequantized by its multiplier's share of the grid."""
        shape, grid = self.graph.types[layer.name].shape, _grid(layer.requant)
        parts = [
            self.real(operand.input, shape, _exponent(operand.multiplier, layer.name) - grid)
            for operand in layer.operands
        ]
        total = self.total(parts, layer.name)
        codes = self.eq5(total, layer.requant.bits, f"{layer.name}_codes")
        self.put(layer.name, shape, codes)


def _declare(name: str, dtype: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, [BATCH, *shape])


def _grid(requant: Requant) -> int:
    return int(requant.shift[0])


def _window(term: ConvTerm) -> dict[str, Any]:
    return {
        "kernel_shape": term.kernel,
        "strides": term.stride,
        "pads": term.padding,
        "dilations": term.dilation,
        "group": term.groups,
    }
