"""Float Relay modules as :class:`tvm_mars.ptq.FloatNetwork`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tvm
from tvm import relay
from tvm.relay.build_module import bind_params_by_name

from mars_runtime.errors import UnsupportedError

from ...ptq import FloatInput, FloatNetwork
from ..floats import Operator, float_network
from .nodes import has_control_flow, op_name, operator, origin, post_order, sizes, tree
from .normal_form import normal_form
from .regions import ports, results

__all__ = ["read_floats"]

_NAMES = {
    "divide": "divide",
    "expand_dims": "reshape",
    "negative": "negative",
    "nn.adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "nn.batch_flatten": "reshape",
    "nn.batch_norm": "batch_norm",
    "rsqrt": "rsqrt",
    "sqrt": "sqrt",
    "squeeze": "reshape",
    "subtract": "subtract",
    "transpose": "permute_dims",
}


def read_floats(
    mod: tvm.IRModule, params: Mapping[str, Any] | None = None
) -> tuple[FloatNetwork, relay.Function]:
    """Read ``main`` of a float module.

    Parameters
    ----------
    params : mapping of str to array, optional
        Parameters of ``main`` that become constants.

    Returns
    -------
    FloatNetwork, relay.Function
        The network, its ports named as the model's; and ``main``, its types inferred.

    Raises
    ------
    UnsupportedError
        If the module holds something that has no place in a quantized network.
    """
    if params:
        mod = tvm.IRModule(mod.functions, mod.type_definitions, attrs=mod.attrs)
        mod["main"] = bind_params_by_name(mod["main"], dict(params))
    if has_control_flow(mod["main"].body):
        raise UnsupportedError("holds control flow or closures", where="the module")
    main = normal_form(mod)["main"]
    names, outputs = ports(main)
    inputs = [FloatInput(name, _image(var)) for var, name in zip(main.params, names, strict=True)]
    values: dict[Any, Any] = dict(zip(main.params, names, strict=True))
    operators = list(_operators(main.body, values))
    leaving = [values[result] for result in results(main)]
    if not all(isinstance(value, str) for value in leaving):
        raise UnsupportedError("is a constant", where="the result")
    return float_network(inputs, operators, list(zip(outputs, leaving, strict=True))), main


def _image(var: Any) -> tuple[int, ...]:
    shape, dtype = sizes(var)[1:], str(getattr(var.checked_type, "dtype", ""))
    if None in shape or len(shape) not in (1, 3) or dtype != "float32":
        raise UnsupportedError(
            f"{dtype} of shape {sizes(var)}",
            where=f"input {var.name_hint}",
            hint="an input is float32 (N, C, H, W) or (N, C); parameters are to be bound",
        )
    return tuple(int(size) for size in shape if size is not None)


def _operators(body: Any, values: dict[Any, Any]) -> Iterator[Operator]:
    """Give the calls in order, and note what each expression is: a value's name, or an array."""
    for part in post_order(body):
        if isinstance(part, relay.Constant):
            values[part] = part.data.numpy()
        elif isinstance(part, relay.TupleGetItem):
            if part.index == 0:  # of a batch norm's results
                values[part] = values[part.tuple_value]
        elif isinstance(part, relay.Call):
            yield _operator(part, values, f"%{len(values)}")


def _operator(call: Any, values: dict[Any, Any], result: str) -> Operator:
    given, name = call.attrs, op_name(call)
    op = operator(call) or _NAMES.get(name, f"relay.{name}")
    inputs = []
    for arg in call.args[:1] if op == "pad" else call.args:
        if arg not in values:
            raise UnsupportedError(f"reads a {type(arg).__name__}", where=origin(call) or name)
        inputs.append(values[arg])
    attributes = dict(tree(call, depth=1).attrs) if operator(call) else {}
    if op == "matmul":
        op = "dense"  # Relay's has weights [O, I]
    elif op == "batch_norm":
        attributes = {key: getattr(given, key) for key in ("axis", "epsilon", "center", "scale")}
    elif op in ("avg_pool2d", "max_pool2d"):
        attributes["ceil_mode"] = given.ceil_mode
    elif op == "conv2d":
        attributes["layout"] = f"{given.data_layout}/{given.kernel_layout}"
    elif op == "permute_dims":
        attributes["axes"] = None if given.axes is None else [int(axis) for axis in given.axes]
    values[call] = result
    shape = sizes(call.args[0]) if op == "batch_norm" else sizes(call)
    return Operator(op, tuple(inputs), result, shape, attributes, origin(call))
