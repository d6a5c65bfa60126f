"""From the operators of a float module to a :class:`tvm_mars.ptq.FloatNetwork`, whatever the IR.

An adapter hands over a module's operators one by one. Each turns values into a value: a
:class:`_Map` that is never negative (or enters the network) can be read, a :class:`_Pending` sum
still gathers terms and what scales them. A ReLU (or the network's end) closes a sum, so that every
map is quantized exactly once. Constants are computed with on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import UnsupportedError

from ..ptq import (
    Addition,
    FloatInput,
    FloatLayer,
    FloatNetwork,
    FloatOutput,
    FloatPool,
    Norm,
    Sum,
    Term,
)
from ..ptq.network import layer_shape

__all__ = ["Operator", "float_network"]

Array: TypeAlias = npt.NDArray[Any]
Padding: TypeAlias = tuple[int, int, int, int]

_KNOWN = (
    "known: convolutions and dense products with constant weights, batch norm and constant factors "
    "behind them, ReLU and clips from 0, max and average pools, additions, flattening, dropout; "
    "leave the rest out of the module"
)


@attrs.frozen(eq=False)
class Operator:
    """One call of a module.

    Parameters
    ----------
    op : str
        Our name of the operator, or the IR's where we have none.
    inputs : tuple of str or array
        Values by name; constants as they are.
    result : str
        The name of the value that it gives.
    shape : tuple of int or None
        Of the result, the batch first; None where it is not known.
    name : str
        What messages call it.
    """

    op: str
    inputs: tuple[str | Array, ...]
    result: str
    shape: tuple[int | None, ...]
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    name: str = ""

    @property
    def where(self) -> str:
        """What it is, for messages."""
        return f"{self.name or self.result} ({self.op})"


def float_network(
    inputs: Sequence[FloatInput], operators: Iterable[Operator], results: Sequence[tuple[str, str]]
) -> FloatNetwork:
    """Read a module's operators.

    Parameters
    ----------
    inputs : sequence of FloatInput
        Named as the operators call them.
    operators : iterable of Operator
        In topological order.
    results : sequence of (str, str)
        For each result the caller's name and the value.

    Raises
    ------
    UnsupportedError
        Naming the first operator that has no place in a quantized network, with the remedy.
    """
    operators = list(operators)
    for operator in operators:
        if operator.op in ("quantize", "dequantize"):
            raise UnsupportedError(
                "the module is quantized already",
                where=operator.where,
                hint="give it to partition_for_mars as it is",
            )
    readers = Counter(name for op in operators for name in op.inputs if isinstance(name, str))
    readers.update(value for _, value in results)
    builder = _Builder(readers)
    for entry in inputs:
        builder.values[entry.name] = _Map(entry.name, entry=True)
        builder.shapes[entry.name] = (*entry.shape, 1, 1)[:3]
    for operator in operators:
        builder.values[operator.result] = builder.value(operator)
    outputs = [builder.output(name, value) for name, value in results]
    return FloatNetwork(inputs, builder.layers, outputs)


# -- values ----------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Map:
    """A map; ``pad``: with zeros around it; ``entry``: it enters the network, with any sign."""

    name: str
    flat: bool = False
    pad: Padding = (0, 0, 0, 0)
    entry: bool = False


@attrs.frozen(eq=False)
class _Pending:
    """A sum without its ReLU; ``after`` holds pools, which commute with it."""

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    residual: str | None = None
    after: tuple[FloatPool, ...] = ()
    flat: bool = False

    @property
    def bare(self) -> bool:
        """Whether it is one convolution and no more."""
        return len(self.terms) == 1 and self.residual is None and not self.after


_Value: TypeAlias = "_Map | _Pending | Array"


@attrs.define(eq=False)
class _Builder:
    readers: Counter[str]
    values: dict[str, Any] = attrs.field(factory=dict)
    layers: list[FloatLayer] = attrs.field(factory=list)
    shapes: dict[str, tuple[int, ...]] = attrs.field(factory=dict)

    def value(self, operator: Operator) -> _Value:
        """Give what an operator gives."""
        operands = [
            self.values[entry] if isinstance(entry, str) else entry for entry in operator.inputs
        ]
        if operator.op in _CONSTANT and all(isinstance(entry, np.ndarray) for entry in operands):
            return np.asarray(_CONSTANT[operator.op](operator, *operands))
        read = _OPERATORS.get(operator.op)
        if read is None:
            raise UnsupportedError("has no quantized form", where=operator.where, hint=_KNOWN)
        for name, operand in zip(operator.inputs, operands, strict=True):
            if isinstance(operand, _Pending) and self.readers[str(name)] > 1:
                raise UnsupportedError(
                    "is read before its ReLU by more than one operator",
                    where=operand.terms[-1].name,
                    hint="eq. 5 stores a map once, behind the ReLU",
                )
        found: _Value = read(self, operator, *operands)
        return found

    def output(self, name: str, value: str) -> FloatOutput:
        """Let a value leave."""
        found = self.values[value]
        if isinstance(found, np.ndarray) or (isinstance(found, _Map) and found.pad != (0,) * 4):
            raise UnsupportedError("is a constant or a padding", where=f"output {name}")
        if isinstance(found, _Pending):
            if found.after:
                raise UnsupportedError("pools numbers without a ReLU", where=f"output {name}")
            found = attrs.evolve(self.close(found, relu=False), flat=found.flat)
        if found.entry:
            raise UnsupportedError("is an input", where=f"output {name}")
        shape = self.shapes[found.name]
        return FloatOutput(name, found.name, (int(np.prod(shape)),) if found.flat else shape)

    # -- layers --

    def add(self, layer: FloatLayer, shape: tuple[int, ...]) -> _Map:
        """Append a layer."""
        self.layers.append(layer)
        self.shapes[layer.name] = shape
        return _Map(layer.name)

    def close(self, sum_: _Pending, *, relu: bool = True, ceiling: float = np.inf) -> _Map:
        """End a sum."""
        name = self.fresh(sum_.terms[0].name)
        found = self.add(Sum(name, sum_.terms, sum_.residual, relu, ceiling), sum_.shape)
        for layer in sum_.after:
            found = self.pool(attrs.evolve(layer, input=found.name))
        return attrs.evolve(found, flat=sum_.flat)

    def pool(self, layer: FloatPool) -> _Map:
        """Append a pool."""
        layer = attrs.evolve(layer, name=self.fresh(layer.name))
        return self.add(layer, layer_shape(layer, self.shapes))  # type: ignore[arg-type]

    def fresh(self, name: str) -> str:
        """Give a name that no map has yet."""
        found, count = name, 1
        while found in self.shapes:
            count += 1
            found = f"{name}#{count}"
        return found


# -- reading ---------------------------------------------------------------------------------------


def _readable(value: _Value, operator: Operator) -> _Map:
    if isinstance(value, _Map):
        return value
    if isinstance(value, _Pending):
        raise UnsupportedError(
            f"reads {value.terms[-1].name}, which has no ReLU",
            where=operator.where,
            hint="eq. 5 stores 0..1 alone: put a ReLU between them",
        )
    raise UnsupportedError("reads a constant", where=operator.where)


def _positive(value: _Value, operator: Operator, *, padded: bool = False) -> _Map:
    """Give a map whose codes may be pooled, added and clipped as they are."""
    found = _readable(value, operator)
    if found.pad != (0,) * 4 and not padded:
        raise UnsupportedError("reads a padded map", where=operator.where)
    if found.entry:
        raise UnsupportedError(
            "reads an input as it is",
            where=operator.where,
            hint="put a convolution with a ReLU before it, or compute this outside the module",
        )
    return found


def _constant(value: _Value, operator: Operator, what: str) -> Array:
    if isinstance(value, np.ndarray):
        return value
    raise UnsupportedError(
        f"its {what} is no constant",
        where=operator.where,
        hint="give the module's parameters as params, or bind them",
    )


def _per_channel(value: Array, operator: Operator) -> Array:
    """Give a constant of one value, or one per channel of the result, as ``[O]``."""
    rank, channels = len(operator.shape), operator.shape[1]
    wide = value.reshape((1,) * (rank - value.ndim) + value.shape) if value.ndim <= rank else value
    good = wide.ndim == rank and wide.size in (1, channels) and wide.shape[1] == wide.size
    if not good:
        raise UnsupportedError(
            f"a constant of shape {value.shape}, neither one value nor one per channel",
            where=operator.where,
        )
    return np.broadcast_to(wide.reshape(-1), (int(channels or 1),))


def _require_layout(operator: Operator) -> None:
    given = operator.attributes.get("layout", "NCHW")
    if given not in ("NCHW", "NCHW/OIHW"):
        raise UnsupportedError(
            f"layout {given}", where=operator.where, hint="convert the module to NCHW and OIHW"
        )


def _two(value: Iterable[Any]) -> tuple[int, int]:
    first, second = (int(entry) for entry in value)
    return first, second


def _four(value: Iterable[Any]) -> Padding:
    top, left, bottom, right = (int(entry) for entry in value)
    return top, left, bottom, right


def _sum_paddings(one: Padding, other: Padding) -> Padding:
    return _four(a + b for a, b in zip(one, other, strict=True))


# -- operators -------------------------------------------------------------------------------------


def _conv2d(build: _Builder, operator: Operator, data: _Value, weight: _Value) -> _Value:
    source = _readable(data, operator)
    _require_layout(operator)
    given = operator.attributes
    term = Term(
        operator.name or operator.result,
        source.name,
        _constant(weight, operator, "weight"),
        np.zeros(int(operator.shape[1] or 0)),
        None,
        _two(given["strides"]),
        _sum_paddings(source.pad, _four(given["padding"])),
        _two(given["dilation"]),
        int(given["groups"]),
    )
    return _Pending((term,), _known(operator))


def _dense(build: _Builder, operator: Operator, data: _Value, weight: _Value) -> _Value:
    """Take a product with weights ``[O, I]``."""
    source = _readable(data, operator)
    codes = _constant(weight, operator, "weight")
    shape = build.shapes[source.name]
    if not source.flat and shape[1:] != (1, 1):
        raise UnsupportedError(f"multiplies a map {shape} that is not flat", where=operator.where)
    name = operator.name or operator.result
    term = Term(name, source.name, codes, np.zeros(len(codes)))
    return _Pending((term,), (len(codes), 1, 1), flat=True)


def _matmul(build: _Builder, operator: Operator, data: _Value, weight: _Value) -> _Value:
    matrix = _constant(weight, operator, "second factor")
    if matrix.ndim != 2:
        raise UnsupportedError(f"multiplies by {matrix.shape}", where=operator.where)
    return _dense(build, operator, data, matrix.T)


def _known(operator: Operator) -> tuple[int, ...]:
    sizes = [size for size in operator.shape[1:] if size is not None]
    if len(sizes) != 3 or len(operator.shape) != 4:
        raise UnsupportedError(
            f"gives shape {operator.shape}", where=operator.where, hint="give a static size"
        )
    return tuple(sizes)


def _batch_norm(build: _Builder, operator: Operator, data: _Value, *parameters: _Value) -> _Value:
    gamma, beta, mean, variance = (
        _constant(entry, operator, what)
        for entry, what in zip(parameters, ("gamma", "beta", "mean", "variance"), strict=True)
    )
    if not isinstance(data, _Pending) or not data.bare or data.terms[0].norm is not None:
        raise UnsupportedError(
            "does not stand directly behind one convolution",
            where=operator.where,
            hint="only there can it be folded into weights",
        )
    if int(operator.attributes["axis"]) != 1:
        raise UnsupportedError("normalizes another axis than 1", where=operator.where)
    ones = np.ones_like(mean)
    norm = Norm(
        operator.name or operator.result,
        gamma if operator.attributes["scale"] else ones,
        beta if operator.attributes["center"] else 0 * ones,
        mean,
        variance,
        float(operator.attributes["epsilon"]),
    )
    return attrs.evolve(data, terms=(attrs.evolve(data.terms[0], norm=norm),))


def _scaled(term: Term, factor: Array) -> Term:
    if term.norm is not None:
        norm = term.norm
        norm = attrs.evolve(norm, gamma=norm.gamma * factor, beta=norm.beta * factor)
        return attrs.evolve(term, norm=norm)
    weight = term.weight * factor.reshape(-1, *[1] * (term.weight.ndim - 1))
    return attrs.evolve(term, weight=weight, bias=term.bias * factor)


def _moved(term: Term, offset: Array) -> Term:
    if term.norm is not None:
        return attrs.evolve(term, norm=attrs.evolve(term.norm, beta=term.norm.beta + offset))
    return attrs.evolve(term, bias=term.bias + offset)


def _scale(operator: Operator, data: _Value, factor: Array) -> _Value:
    """Multiply a sum by a constant."""
    if not isinstance(data, _Pending) or data.residual is not None or data.after:
        raise UnsupportedError(
            "scales something else than convolutions",
            where=operator.where,
            hint="only there can a factor be folded into weights; scale an input outside",
        )
    per = _per_channel(factor, operator)
    return attrs.evolve(data, terms=tuple(_scaled(term, per) for term in data.terms))


def _multiply(build: _Builder, operator: Operator, one: _Value, other: _Value) -> _Value:
    if isinstance(one, np.ndarray):
        one, other = other, one
    return _scale(operator, one, _constant(other, operator, "factor"))


def _divide(build: _Builder, operator: Operator, data: _Value, divisor: _Value) -> _Value:
    return _scale(operator, data, np.asarray(1 / _constant(divisor, operator, "divisor")))


def _subtract(build: _Builder, operator: Operator, data: _Value, other: _Value) -> _Value:
    return _add(build, operator, data, np.asarray(-_constant(other, operator, "subtrahend")))


def _add(build: _Builder, operator: Operator, left: _Value, right: _Value) -> _Value:
    if isinstance(left, np.ndarray):
        left, right = right, left
    if isinstance(right, np.ndarray):
        if not isinstance(left, _Pending) or left.after:
            raise UnsupportedError(
                "adds a constant to something else than convolutions",
                where=operator.where,
                hint="only there is it a bias; shift an input outside the module",
            )
        first, *others = left.terms
        return attrs.evolve(left, terms=(_moved(first, _per_channel(right, operator)), *others))
    if isinstance(left, _Map) and isinstance(right, _Map):
        names = (_positive(left, operator).name, _positive(right, operator).name)
        shape = build.shapes[names[0]]
        if shape != build.shapes[names[1]]:
            raise UnsupportedError("adds maps of different shapes", where=operator.where)
        return build.add(Addition(build.fresh(operator.name or operator.result), names), shape)
    if isinstance(left, _Map):
        left, right = right, left
    assert isinstance(left, _Pending)
    terms, residual, after = left.terms, left.residual, left.after
    if isinstance(right, _Pending):
        terms, after, extra = terms + right.terms, after + right.after, right.residual
        shape = right.shape
    else:
        extra = _positive(right, operator).name
        shape = build.shapes[extra]
    if after or (residual is not None and extra is not None):
        raise UnsupportedError(
            "adds more than convolutions and one map",
            where=operator.where,
            hint="put a ReLU between the additions",
        )
    if shape != left.shape or len({term.dense for term in terms}) > 1:
        raise UnsupportedError("adds maps of different shapes", where=operator.where)
    return attrs.evolve(left, terms=terms, residual=residual or extra)


def _relu(build: _Builder, operator: Operator, data: _Value) -> _Value:
    if isinstance(data, _Pending):
        return build.close(data)
    return _positive(data, operator)


def _clip(build: _Builder, operator: Operator, data: _Value) -> _Value:
    low, high = float(operator.attributes["min"]), float(operator.attributes["max"])
    if low != 0 or high <= 0 or not isinstance(data, _Pending):
        raise UnsupportedError(
            f"clips to {low:g}..{high:g}",
            where=operator.where,
            hint="a clip from 0, behind a convolution, is taken",
        )
    return build.close(data, ceiling=high)


def _maximum(build: _Builder, operator: Operator, data: _Value, bound: _Value) -> _Value:
    """Take the lower half of a clip."""
    if np.any(_constant(bound, operator, "bound") != 0):
        raise UnsupportedError("clips below at something else than 0", where=operator.where)
    return _relu(build, operator, data)


def _minimum(build: _Builder, operator: Operator, data: _Value, bound: _Value) -> _Value:
    """Take the upper half of a clip: of the layer that has just been closed by the lower one."""
    high = _constant(bound, operator, "bound")
    last = build.layers[-1] if build.layers else None
    fresh = isinstance(data, _Map) and isinstance(last, Sum) and data.name == last.name
    if (
        not fresh
        or high.size != 1
        or high.item() <= 0
        or build.readers[str(operator.inputs[0])] > 1
    ):
        raise UnsupportedError(
            "clips above, and not right behind the ReLU of a convolution", where=operator.where
        )
    assert isinstance(last, Sum)
    build.layers[-1] = attrs.evolve(last, ceiling=float(high.item()))
    return data


def _max_pool2d(build: _Builder, operator: Operator, data: _Value) -> _Value:
    return _pool(build, operator, data, "max")


def _avg_pool2d(build: _Builder, operator: Operator, data: _Value) -> _Value:
    return _pool(build, operator, _positive(data, operator), "avg")


def _pool(build: _Builder, operator: Operator, data: _Value, mode: Any) -> _Value:
    given = operator.attributes
    _require_layout(operator)
    if given["ceil_mode"] or any(int(size) != 1 for size in given["dilation"]):
        raise UnsupportedError("has ceil_mode or a dilation", where=operator.where)
    layer = FloatPool(
        operator.name or operator.result,
        mode,
        "",
        _two(given["pool_size"]),
        _two(given["strides"]),
        _four(given["padding"]),
        bool(given.get("count_include_pad", False)),
    )
    if isinstance(data, _Pending):
        return attrs.evolve(data, after=(*data.after, layer))
    source = _positive(data, operator, padded=mode == "max")
    # The zeros of a padding are below no value of the map.
    padding = _sum_paddings(source.pad, layer.padding)
    return build.pool(attrs.evolve(layer, input=source.name, padding=padding))


def _mean(build: _Builder, operator: Operator, data: _Value) -> _Value:
    source = _positive(data, operator)
    axes = sorted(int(axis) % 4 for axis in operator.attributes["axis"])
    if axes != [2, 3] or source.flat:
        raise UnsupportedError(
            f"averages over axes {axes}", where=operator.where, hint="rows and columns are taken"
        )
    size = _two(build.shapes[source.name][1:])
    name = operator.name or operator.result
    found = build.pool(FloatPool(name, "avg", source.name, size, size))
    return attrs.evolve(found, flat=len(operator.shape) == 2)


def _adaptive_avg_pool2d(build: _Builder, operator: Operator, data: _Value) -> _Value:
    if operator.shape[2:] != (1, 1):
        raise UnsupportedError(
            f"adapts to {operator.shape[2:]}", where=operator.where, hint="1x1 is taken"
        )
    return _mean(build, attrs.evolve(operator, attributes={"axis": (2, 3)}), data)


def _pad(build: _Builder, operator: Operator, data: _Value) -> _Value:
    source, given = _readable(data, operator), operator.attributes
    widths = [int(width) for width in given["pad_width"]]
    if given["pad_mode"] != "constant" or float(given["pad_value"]) != 0 or any(widths[:4]):
        raise UnsupportedError(
            "pads with something else than zeros, or not rows and columns", where=operator.where
        )
    top, bottom, left, right = widths[4:]
    return attrs.evolve(source, pad=_sum_paddings(source.pad, (top, left, bottom, right)))


def _reshape(build: _Builder, operator: Operator, data: _Value) -> _Value:
    assert not isinstance(data, np.ndarray)
    shape = data.shape if isinstance(data, _Pending) else build.shapes[data.name]
    wanted, size = operator.shape[1:], int(np.prod(shape))
    padded = isinstance(data, _Map) and data.pad != (0,) * 4
    if (
        padded
        or wanted not in (shape, (size,), (size, 1, 1))
        or (wanted == (size, 1, 1) and shape[1:] != (1, 1))
    ):
        raise UnsupportedError(
            f"gives shape {operator.shape} of maps {shape}",
            where=operator.where,
            hint="flattening each image is taken",
        )
    return attrs.evolve(data, flat=len(wanted) == 1)


def _identity(build: _Builder, operator: Operator, data: _Value) -> _Value:
    return data


_OPERATORS: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": _add,
    "avg_pool2d": _avg_pool2d,
    "batch_norm": _batch_norm,
    "clip": _clip,
    "conv2d": _conv2d,
    "dense": _dense,
    "divide": _divide,
    "dropout": _identity,
    "matmul": _matmul,
    "max_pool2d": _max_pool2d,
    "maximum": _maximum,
    "mean": _mean,
    "minimum": _minimum,
    "multiply": _multiply,
    "pad": _pad,
    "relu": _relu,
    "reshape": _reshape,
    "subtract": _subtract,
}

# What is computed where all operands are constant, as in a batch norm that a pass has decomposed.
_CONSTANT: dict[str, Callable[..., Any]] = {
    "add": lambda _, a, b: a + b,
    "divide": lambda _, a, b: a / b,
    "multiply": lambda _, a, b: a * b,
    "negative": lambda _, a: -a,
    "permute_dims": lambda op, a: np.transpose(a, op.attributes.get("axes")),
    "reshape": lambda op, a: a.reshape([size for size in op.shape if size is not None]),
    "rsqrt": lambda _, a: 1 / np.sqrt(a),
    "sqrt": lambda _, a: np.sqrt(a),
    "subtract": lambda _, a, b: a - b,
}

OPERATORS = tuple(sorted({*_OPERATORS, *_CONSTANT}))
