"""From a traced PyTorch module to layers.

The module is traced by ``torch.fx``; each of its operations turns symbolic values into symbolic
values: a :class:`_Map` has been quantized and can be read, a :class:`_Pending` sum still gathers
terms. A ReLU (or the network's end) closes a sum, so that every tensor is quantized exactly once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import fx, nn
from torch.nn import functional

from mars_runtime.errors import UnsupportedError

from .functions import Geometry
from .layers import Addition, Average, Drop, Entry, Layer, Maximum, Method, Sum, Term
from .network import MarsNetwork, Shape

__all__ = ["Bits", "trace_network"]


@attrs.frozen
class Bits:
    """Widths of one layer."""

    weight: int
    activation: int


@attrs.frozen(eq=False)
class _Map:
    """A quantized map; ``flat``: as ``[N, C * H * W]``."""

    name: str
    bits: int
    flat: bool = False


@attrs.frozen(eq=False)
class _Term:
    name: str
    source: _Map
    module: nn.Module
    norm: nn.Module | None = None


@attrs.frozen(eq=False)
class _Pending:
    """A sum without its quantizer; ``after`` holds what commutes with a ReLU: max pool, dropout."""

    terms: tuple[_Term, ...]
    residual: _Map | None = None
    after: tuple[Callable[[_Map], _Map], ...] = ()
    flat: bool = False


_Value: TypeAlias = _Map | _Pending
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout2d)


def trace_network(
    model: nn.Module,
    *,
    method: Method,
    bits: Callable[[str, bool, bool], Bits],
    input_bits: int,
    group: int,
    input_shape: Shape | None,
) -> MarsNetwork:
    """Build the network in training of a module; its parameters are copied.

    Parameters
    ----------
    bits : callable
        Widths of a layer by the name of its module, whether it reads the input, whether it gives
        the output.

    Raises
    ------
    UnsupportedError
        Naming the operation that MARS, or tracing, does not take.
    """
    try:
        graph = fx.Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedError(
            f"cannot be traced: {error}",
            where=type(model).__name__,
            hint="its forward must not branch on tensors",
        ) from None
    builder = _Builder(dict(model.named_modules()), method, bits, input_bits, group, input_shape)
    return builder.build(graph)


@attrs.define(eq=False)
class _Builder:
    modules: dict[str, nn.Module]
    method: Method
    bits: Callable[[str, bool, bool], Bits]
    input_bits: int
    group: int
    input_shape: Shape | None
    layers: list[Layer] = attrs.field(factory=list)
    shapes: dict[str, Shape] = attrs.field(factory=dict)
    used: dict[int, str] = attrs.field(factory=dict)
    named: set[str] = attrs.field(factory=set)

    def build(self, graph: fx.Graph) -> MarsNetwork:
        """Go through the operations."""
        values: dict[fx.Node, Any] = {}
        outputs: list[tuple[str, bool]] = []
        for node in graph.nodes:
            if node.op == "output":
                given = node.args[0]
                many = given if isinstance(given, tuple | list) else (given,)
                outputs = [
                    (self.close(values[entry], last=True).name, values[entry].flat)
                    for entry in many
                ]
            else:
                values[node] = self.value(node, values)
        return MarsNetwork(self.layers, outputs, self.method, self.input_shape)

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Give the value of one operation."""
        if node.op == "placeholder":
            return self.entry()
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            operation = _MODULES.get(type(module))
            described = f"{node.target} ({type(module).__name__})"
            arguments: tuple[Any, ...] = (module,)
        else:
            operation = _FUNCTIONS.get(node.target)
            described = f"{node.name} ({getattr(node.target, '__name__', node.target)})"
            arguments = ()
        if operation is None:
            return self.shape_arithmetic(node, described)
        sources = [entry for entry in node.all_input_nodes if values[entry] is not None]
        operands = [values[entry] for entry in sources]
        for entry, operand in zip(sources, operands, strict=True):
            readers = [user for user in entry.users if not _is_shape(user)]
            if isinstance(operand, _Pending) and len(readers) > 1:
                raise UnsupportedError(
                    "is read before and after its ReLU",
                    where=_origin(operand),
                    hint="eq. 5 stores a map once, behind the ReLU",
                )
        return operation(self, _Call(self.name_of(node), described, node), operands, *arguments)

    def name_of(self, node: fx.Node) -> str:
        """Name a layer by its module; where the module (a pool) is called again, by the call."""
        target = str(node.target)
        if node.op != "call_module" or target in self.named:
            return str(node.name)
        self.named.add(target)
        return target

    def shape_arithmetic(self, node: fx.Node, described: str) -> None:
        """Let ``x.size(0)`` and the like pass; everything else is not taken."""
        if not _is_shape(node):
            raise UnsupportedError(
                "is no operation that MARS takes",
                where=described,
                hint="known: conv, linear, batch norm behind a conv, ReLU, max and average pools, "
                "addition, flatten, dropout",
            )

    # -- layers --

    def add(self, layer: Layer, bits: int, shape: Shape | None) -> _Map:
        """Append a layer."""
        self.layers.append(layer)
        layer.shape = shape
        if shape is not None:
            self.shapes[layer.name] = shape
        return _Map(layer.name, bits)

    def entry(self) -> _Map:
        """Append the quantizer of the next input."""
        count = sum(isinstance(layer, Entry) for layer in self.layers)
        layer = Entry(f"x{count}", method=self.method, bits=self.input_bits)
        return self.add(layer, self.input_bits, self.input_shape)

    def close(self, value: _Value, *, last: bool = False) -> _Map:
        """Quantize a pending sum, or let it leave as it is if it is the network's result."""
        if isinstance(value, _Map):
            return value
        if last and value.after:
            raise UnsupportedError("pools numbers without a ReLU", where=_origin(value))
        entries = {layer.name for layer in self.layers if isinstance(layer, Entry)}
        first = any(term.source.name in entries for term in value.terms)
        name = value.terms[0].name
        widths = [self.bits(term.name, first, last) for term in value.terms]
        terms = [self.term(t, w.weight) for t, w in zip(value.terms, widths, strict=True)]
        sources = [term.source.name for term in value.terms]
        grid = 0
        if value.residual is not None:
            sources.append(value.residual.name)
            grid = value.residual.bits
        bits = None if last else widths[0].activation
        layer = Sum(name, sources, terms, method=self.method, bits=bits, residual_grid=grid)
        result = self.add(layer, bits or 0, self.sum_shape(value.terms[0]))
        for step in value.after:
            result = step(result)
        return attrs.evolve(result, flat=value.flat)

    def term(self, given: _Term, weight_bits: int) -> Term:
        """Make the parameters of one convolution."""
        module, shape = given.module, self.shapes.get(given.source.name)
        geometry = None
        if isinstance(module, nn.Conv2d):
            padding = _padding(module, given.name)
            geometry = Geometry(module.stride, padding, module.dilation, module.groups)
        return Term(
            given.name,
            module.weight,
            module.bias,
            geometry,
            given.norm,
            method=self.method,
            bits=weight_bits,
            group=self.group,
            input_bits=given.source.bits,
            taps=shape[1] * shape[2] if geometry is None and shape and len(shape) == 3 else 1,
        )

    def sum_shape(self, term: _Term) -> Shape | None:
        """Shape of what a convolution gives."""
        source, module = self.shapes.get(term.source.name), term.module
        if isinstance(module, nn.Linear):
            return (module.out_features, 1, 1)
        assert isinstance(module, nn.Conv2d)
        if source is None:
            return None
        size = _window(
            source, module.kernel_size, module.stride, _padding(module, term.name), module.dilation
        )
        return (module.out_channels, *size)

    def once(self, module: nn.Module, where: str) -> None:
        """Refuse a module, or a weight, that is used twice."""
        for key in [id(module), *(id(p) for p in module.parameters())]:
            if key in self.used:
                raise UnsupportedError(
                    f"shares its weights with {self.used[key]}",
                    where=where,
                    hint="scales are folded into weights, so each use needs its own: copy it",
                )
            self.used[key] = where


@attrs.frozen
class _Call:
    """Where an operation stands: a name for its layer, words for messages, the node."""

    name: str
    described: str
    node: fx.Node

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Read an argument that may be given either way."""
        args, kwargs = self.node.args, self.node.kwargs
        return args[position] if len(args) > position else kwargs.get(name, default)


def _origin(value: _Pending) -> str:
    return value.terms[-1].name


def _readable(value: _Value, call: _Call) -> _Map:
    if isinstance(value, _Map):
        return value
    raise UnsupportedError(
        f"reads {_origin(value)}, which has no ReLU",
        where=call.described,
        hint="eq. 5 stores 0..1 alone: put a ReLU between them",
    )


# -- operations ------------------------------------------------------------------------------------


def _convolution(build: _Builder, call: _Call, operands: list[_Value], module: Any) -> _Value:
    build.once(module, call.name)
    return _Pending((_Term(call.name, _readable(operands[0], call), module),))


def _normalization(build: _Builder, call: _Call, operands: list[_Value], module: Any) -> _Value:
    build.once(module, call.name)
    (value,) = operands
    bare = isinstance(value, _Pending) and len(value.terms) == 1 and not value.after
    if not bare or value.residual is not None or value.terms[0].norm is not None:  # type: ignore[union-attr]
        raise UnsupportedError(
            "does not stand directly behind one convolution",
            where=call.described,
            hint="only there can it be folded into weights",
        )
    if not (module.affine and module.track_running_stats):
        raise UnsupportedError("needs affine and track_running_stats", where=call.described)
    assert isinstance(value, _Pending)
    return _Pending((attrs.evolve(value.terms[0], norm=module),))


def _relu(build: _Builder, call: _Call, operands: list[_Value], *_module: Any) -> _Value:
    return build.close(operands[0])


def _clamp(build: _Builder, call: _Call, operands: list[_Value], module: Any) -> _Value:
    if (module.min_val, module.max_val) != (0, 1):
        raise UnsupportedError(
            f"clamps to {module.min_val}..{module.max_val}",
            where=call.described,
            hint="eq. 5: 0..1",
        )
    return build.close(operands[0])


def _identity(_build: _Builder, _call: _Call, operands: list[_Value], *_module: Any) -> _Value:
    return operands[0]


def _flatten(_build: _Builder, call: _Call, operands: list[_Value], *module: Any) -> _Value:
    if module:
        good = (module[0].start_dim, module[0].end_dim) == (1, -1)
    elif call.node.target in (torch.flatten, "flatten"):
        good = call.argument(1, "start_dim", 0) == 1 and call.argument(2, "end_dim", -1) == -1
    else:
        sizes = call.node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        good = len(sizes) == 2 and sizes[1] == -1
    if not good:
        raise UnsupportedError(
            "does not flatten each image", where=call.described, hint="use torch.flatten(x, 1)"
        )
    return attrs.evolve(operands[0], flat=True)


def _addition(build: _Builder, call: _Call, operands: list[_Value]) -> _Value:
    if len(operands) != 2:
        raise UnsupportedError("does not add two different maps", where=call.described)
    left, right = operands
    if isinstance(left, _Map) and isinstance(right, _Map):
        widths = build.bits(call.name, False, False)
        names = (left.name, right.name)
        layer = Addition(call.name, names, method=build.method, bits=widths.activation)
        return build.add(layer, widths.activation, build.shapes.get(left.name))
    if isinstance(left, _Map):
        left, right = right, left
    assert isinstance(left, _Pending)
    terms, residual, after = left.terms, left.residual, left.after
    if isinstance(right, _Pending):
        terms, after = terms + right.terms, after + right.after
        extra = right.residual
    else:
        extra = right
    if after or (residual is not None and extra is not None):
        raise UnsupportedError(
            "adds more than convolutions and one map",
            where=call.described,
            hint="put a ReLU between the additions",
        )
    if len({isinstance(term.module, nn.Linear) for term in terms}) > 1:
        raise UnsupportedError("adds a convolution and a dense layer", where=call.described)
    return _Pending(terms, residual or extra)


def _max_pool(build: _Builder, call: _Call, operands: list[_Value], *module: Any) -> _Value:
    kernel, stride, padding = _pool_window(call, module)
    options = module[0].__dict__ if module else call.node.kwargs
    if options.get("ceil_mode") or options.get("dilation", 1) not in (1, (1, 1)):
        raise UnsupportedError("has ceil_mode or a dilation", where=call.described)

    def pool(source: _Map) -> _Map:
        shape = build.shapes.get(source.name)
        size = (shape[0], *_window(shape, kernel, stride, padding)) if shape else None
        layer = Maximum(call.name, source.name, kernel, stride, padding)
        return build.add(layer, source.bits, size)

    return _before_or_after(operands[0], pool)


def _dropout(build: _Builder, call: _Call, operands: list[_Value], *module: Any) -> _Value:
    share = module[0].p if module else call.argument(1, "p", 0.5)

    def drop(source: _Map) -> _Map:
        return build.add(
            Drop(call.name, source.name, share), source.bits, build.shapes.get(source.name)
        )

    return _before_or_after(operands[0], drop)


def _before_or_after(value: _Value, step: Callable[[_Map], _Map]) -> _Value:
    if isinstance(value, _Map):
        return step(value)
    return attrs.evolve(value, after=(*value.after, step))


def _average_pool(build: _Builder, call: _Call, operands: list[_Value], *module: Any) -> _Value:
    source = _readable(operands[0], call)
    kernel, stride, padding = _pool_window(call, module)
    options = module[0].__dict__ if module else call.node.kwargs
    if options.get("ceil_mode") or options.get("divisor_override"):
        raise UnsupportedError("has ceil_mode or divisor_override", where=call.described)
    include = options.get("count_include_pad", True)
    return _average(build, call, source, kernel, stride, padding, include)


def _global_pool(build: _Builder, call: _Call, operands: list[_Value], *module: Any) -> _Value:
    size = module[0].output_size if module else call.argument(1, "output_size")
    if size not in (1, (1, 1), [1, 1]):
        raise UnsupportedError(f"adapts to {size}", where=call.described, hint="1x1 is taken")
    return _average(build, call, _readable(operands[0], call), None)


def _mean(build: _Builder, call: _Call, operands: list[_Value]) -> _Value:
    dims = call.argument(1, "dim")
    if not isinstance(dims, tuple | list) or sorted(d % 4 for d in dims) != [2, 3]:
        raise UnsupportedError(
            f"averages over {dims}", where=call.described, hint="(2, 3) is taken"
        )
    return _average(build, call, _readable(operands[0], call), None)


def _average(
    build: _Builder,
    call: _Call,
    source: _Map,
    kernel: tuple[int, int] | None,
    stride: tuple[int, int] | None = None,
    padding: tuple[int, int] = (0, 0),
    include: bool = True,
) -> _Map:
    shape = build.shapes.get(source.name)
    size: Shape | None = None
    if shape:
        assert kernel is None or stride is not None
        rest = (1, 1) if kernel is None else _window(shape, kernel, stride or kernel, padding)
        size = (shape[0], *rest)
    bits = build.bits(call.name, False, False).activation
    layer = Average(
        call.name, source.name, kernel, stride, padding, include, method=build.method, bits=bits
    )
    return build.add(layer, bits, size)


def _pool_window(call: _Call, module: Sequence[Any]) -> tuple[Any, Any, Any]:
    if module:
        given = (module[0].kernel_size, module[0].stride, module[0].padding)
    else:
        names = ("kernel_size", "stride", "padding")
        given = tuple(call.argument(i, name) for i, name in enumerate(names, 1))
    kernel = _pair(given[0])
    return kernel, _pair(given[1]) if given[1] else kernel, _pair(given[2] or 0)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(module: nn.Conv2d, where: str) -> tuple[int, int]:
    if module.padding_mode != "zeros" or module.padding == "same":
        raise UnsupportedError(
            f"padding {module.padding!r} of {module.padding_mode}", where=where, hint="give pixels"
        )
    return (0, 0) if module.padding == "valid" else _pair(module.padding)


def _window(
    shape: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any = (1, 1)
) -> tuple[int, int]:
    height, width = (
        (size + 2 * pad - d * (k - 1) - 1) // s + 1
        for size, k, s, pad, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    )
    return height, width


def _is_shape(node: fx.Node) -> bool:
    """Whether a node computes sizes and no numbers of a map."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target in (getattr, operator.getitem)


_MODULES: dict[type, Callable[..., Any]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _convolution,
    **dict.fromkeys(_NORMS, _normalization),
    nn.ReLU: _relu,
    nn.ReLU6: _relu,  # the clamp at 1 takes its place
    nn.Hardtanh: _clamp,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.Flatten: _flatten,
    nn.Identity: _identity,
    nn.Sequential: _identity,  # an empty one: others are traced through
    **dict.fromkeys(_DROPOUTS, _dropout),
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        [functional.relu, functional.relu6, torch.relu, torch.relu_, "relu", "relu_"], _relu
    ),
    **dict.fromkeys([operator.add, operator.iadd, torch.add, "add", "add_"], _addition),
    functional.max_pool2d: _max_pool,
    functional.avg_pool2d: _average_pool,
    functional.adaptive_avg_pool2d: _global_pool,
    functional.dropout: _dropout,
    **dict.fromkeys([torch.mean, "mean"], _mean),
    **dict.fromkeys([torch.flatten, torch.reshape, "flatten", "view", "reshape"], _flatten),
    "contiguous": _identity,
}
