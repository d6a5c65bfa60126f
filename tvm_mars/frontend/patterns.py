"""The operator chains that MARS takes, declared once for every IR, and their parsing into specs.

Operator names are those of :data:`OPERATORS`; an adapter maps its IR's names to them.

Adapters bring a function into the normal form first: one dequantize for each consumer, max pool,
reshape and padding on codes rather than on dequantized numbers, clips as ``maximum`` and
``minimum``.
"""

from __future__ import annotations

from collections.abc import Collection

from mars_runtime.errors import UnsupportedError

from .float_chains import FLOAT_CHAINS
from .integer_chains import INTEGER_CHAINS
from .matching import Composite, Node, match
from .spec import Spec

__all__ = ["CANDIDATES", "COMPOSITES", "OPERATORS", "composites_of", "explain", "parse"]

OPERATORS = (
    "add",
    "avg_pool2d",
    "cast",
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
    "qnn.add",
    "qnn.conv2d",
    "qnn.dense",
    "quantize",
    "relu",
    "requantize",
    "reshape",
)
# Operators that a report accounts for one by one.
CANDIDATES = (
    "conv2d",
    "qnn.conv2d",
    "matmul",
    "qnn.dense",
    "max_pool2d",
    "avg_pool2d",
    "mean",
    "add",
    "qnn.add",
)

#: In order of priority: a longer chain first.
COMPOSITES: tuple[Composite, ...] = (*INTEGER_CHAINS, *FLOAT_CHAINS)
_BY_NAME = {composite.name: composite for composite in COMPOSITES}


def composites_of(operators: Collection[str]) -> tuple[Composite, ...]:
    """Give the chains of an IR that has these operators, in order of priority.

    Parameters
    ----------
    operators : collection of str
        Names of :data:`OPERATORS`.
    """
    return tuple(entry for entry in COMPOSITES if entry.operators <= set(operators))


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
    if node.op in ("qnn.conv2d", "qnn.dense"):
        if len(node.args) > 1 and node.args[1].op != "const":
            return "its weight is no constant"
        return "nothing requantizes its result, or its parts are also used elsewhere"
    if node.op == "qnn.add":
        return "its scales and zero points are not all constants"
    if node.op == "add":
        return "its operands are not both quantized, or nothing quantizes the sum"
    if node.op == "max_pool2d":
        return "its input is not quantized"
    if node.args and node.args[0].op == "cast":
        return "its result is neither cast to codes nor requantized"
    if not node.args or node.args[0].op != "dequantize":
        return "its input is not quantized (no dequantize before it)"
    return "nothing quantizes its result"
