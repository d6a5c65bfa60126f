"""What an ONNX graph calls its operators: TVM 0.27's importer drops their names.

It converts node by node, so the operators of a kind keep their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..matching import Node

__all__ = ["onnx_names"]

_OPERATORS = {
    "Add": "add",
    "AveragePool": "avg_pool2d",
    "Conv": "conv2d",
    "Gemm": "matmul",
    "GlobalAveragePool": "mean",
    "MatMul": "matmul",
    "MaxPool": "max_pool2d",
    "ReduceMean": "mean",
}


def onnx_names(graph: Any, candidates: Mapping[str, Node]) -> dict[str, str]:
    """Name candidate operators of a module by the nodes of the graph that it was imported from.

    A kind of which the module has more or fewer than the graph is left out: there the order does
    not tell which is which.

    Parameters
    ----------
    graph : onnx.GraphProto
        The graph.
    candidates : mapping of str to Node
        The module's candidates by their variables, in order.

    Returns
    -------
    dict of str to str
        Names by variables: the node's, or that of its first output if it has none.
    """
    nodes, variables = defaultdict(list), defaultdict(list)
    constants = {"", *(entry.name for entry in graph.initializer)}  # "": an input that is left out
    for node in graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
        elif node.op_type != "Add" or constants.isdisjoint(node.input):  # else it adds a bias
            nodes[_OPERATORS.get(node.op_type)].append(node.name or node.output[0])
    for variable, candidate in candidates.items():
        variables[candidate.op].append(variable)
    return {
        variable: name
        for op, found in variables.items()
        if len(found) == len(nodes[op])
        for variable, name in zip(found, nodes[op], strict=True)
    }
