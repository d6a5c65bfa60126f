"""Float Relax modules as :class:`tvm_mars.ptq.FloatNetwork`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from mars_runtime.errors import UnsupportedError

from ...ptq import FloatInput, FloatNetwork
from ..floats import Operator, float_network
from .modules import all_bindings, attribute
from .nodes import is_constant, operator, sizes
from .normal_form import normal_form
from .partition import OPERATOR_NAMES
from .regions import INPUT_NAMES, OUTPUT_NAMES, name_ports

__all__ = ["read_floats"]

_NAMES = {
    "relax.divide": "divide",
    "relax.expand_dims": "reshape",
    "relax.flatten": "reshape",
    "relax.negative": "negative",
    "relax.nn.adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "relax.nn.batch_norm": "batch_norm",
    "relax.rsqrt": "rsqrt",
    "relax.sqrt": "sqrt",
    "relax.squeeze": "reshape",
    "relax.subtract": "subtract",
}
_POOL = ("pool_size", "strides", "padding", "dilation", "ceil_mode", "count_include_pad", "layout")
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "avg_pool2d": _POOL,
    "batch_norm": ("axis", "epsilon", "center", "scale"),
    "conv2d": ("strides", "padding", "dilation", "groups"),
    "max_pool2d": _POOL,
    "mean": ("axis",),
    "pad": ("pad_width", "pad_value", "pad_mode"),
    "permute_dims": ("axes",),
}
# Arguments that are no tensors, and are read otherwise.
_NO_TENSORS = (relax.ShapeExpr, relax.PrimValue) if hasattr(relax, "PrimValue") else relax.ShapeExpr


def read_floats(
    mod: tvm.IRModule, params: Mapping[str, Any] | None = None
) -> tuple[FloatNetwork, relax.Function]:
    """Read ``main`` of a float module.

    Parameters
    ----------
    params : mapping of str to array, optional
        Parameters of ``main`` that become constants.

    Returns
    -------
    FloatNetwork, relax.Function
        The network, its ports named as the model's; and ``main`` with these names as attributes.

    Raises
    ------
    UnsupportedError
        If the module holds something that has no place in a quantized network.
    """
    if params:
        mod = relax.transform.BindParams("main", dict(params))(mod)
    mod = name_ports(normal_form(mod))
    main = mod["main"]
    names = [str(name) for name in main.attrs[INPUT_NAMES]]
    values = dict(zip(main.params, names, strict=True))
    inputs = [FloatInput(name, _image(var, name)) for var, name in values.items()]
    reader = _Reader(main, values)
    operators = list(reader.operators())
    results = zip((str(name) for name in main.attrs[OUTPUT_NAMES]), reader.results(), strict=True)
    return float_network(inputs, operators, list(results)), main


def _image(var: Any, name: str) -> tuple[int, ...]:
    shape = sizes(var)[1:]
    dtype = str(getattr(getattr(var.ty, "dtype", None), "dtype", ""))
    if None in shape or len(shape) not in (1, 3) or dtype != "float32":
        raise UnsupportedError(
            f"{dtype} of shape {sizes(var)}",
            where=f"input {name}",
            hint="an input is float32 (N, C, H, W) or (N, C); parameters are to be bound",
        )
    return tuple(int(size) for size in shape if size is not None)


class _Reader:
    def __init__(self, main: relax.Function, values: dict[Any, str]) -> None:
        self.main = main
        self.values: dict[Any, Any] = dict(values)  # variables: the name of a value, or an array
        self.tuples: dict[Any, Any] = {}
        self.names = attribute(main, OPERATOR_NAMES) or {}

    def operators(self) -> Iterator[Operator]:
        """Give the calls in order."""
        for binding in all_bindings(self.main):
            value, var = binding.value, binding.var
            if isinstance(binding, relax.MatchCast):
                raise UnsupportedError(
                    "has a shape that is known at run time only", where=str(var.name)
                )
            if isinstance(value, relax.Tuple):
                self.tuples[var] = list(value.fields)
            elif isinstance(value, relax.TupleGetItem):
                self.get_item(var, value)
            elif isinstance(value, relax.Call):
                yield self.call(var, value)
            else:
                self.values[var] = self.operand(value, str(var.name))

    def get_item(self, var: Any, value: Any) -> None:
        """Read a field: of a batch norm's results the first alone."""
        source = value.tuple_value
        if source in self.tuples:
            self.values[var] = self.operand(self.tuples[source][value.index], str(var.name))
        elif value.index == 0:
            self.values[var] = self.values[source]

    def call(self, var: Any, call: Any) -> Operator:
        """Read a call."""
        name = str(var.name)
        known = str(self.names.get(name, name))
        callee = getattr(call.op, "name", "") or str(getattr(call.op, "name_hint", "a function"))
        op = operator(call) or _NAMES.get(callee, callee)
        inputs = tuple(
            self.operand(arg, known) for arg in call.args if not isinstance(arg, _NO_TENSORS)
        )
        attributes = {key: getattr(call.attrs, key) for key in _ATTRIBUTES.get(op, ())}
        if op == "clip":
            attributes = {"min": call.args[1].value, "max": call.args[2].value}
        if op == "conv2d":
            attributes["layout"] = f"{call.attrs.data_layout}/{call.attrs.kernel_layout}"
        if op == "batch_norm" and bool(call.attrs.training):
            raise UnsupportedError(
                "normalizes by the batch, as in training",
                where=f"{known} (batch_norm)",
                hint="import the network in evaluation mode",
            )
        result = f"%{len(self.values)}"  # passes give several variables the same name
        shape = sizes(call)
        if op == "batch_norm":
            shape = sizes(call.args[0])
        self.values[var] = result
        return Operator(op, inputs, result, shape, attributes, known)

    def operand(self, expr: Any, where: str) -> Any:
        """Give an expression as the name of a value, or as an array."""
        if is_constant(expr):
            return np.from_dlpack(expr.value)
        if expr in self.values:
            return self.values[expr]
        raise UnsupportedError(f"reads {type(expr).__name__}", where=where)

    def results(self) -> list[str]:
        """Give the values that leave."""
        body = self.main.body.body
        fields = self.tuples.get(body, list(body.fields) if isinstance(body, relax.Tuple) else None)
        found = [self.operand(field, "the result") for field in (fields or [body])]
        if not all(isinstance(value, str) for value in found):
            raise UnsupportedError("is a constant", where="the result")
        return found
