"""What the checks of one partitioning share, whatever the IR."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from mars_runtime.arch import MarsArch
from mars_runtime.errors import UnsupportedError

from .lower import check
from .matching import Composite, Node, match
from .patterns import CANDIDATES, parse

__all__ = ["Session", "sums_maps"]


@attrs.define
class Session:
    """The machine, and why the checks said no."""

    arch: MarsArch
    reasons: dict[str, str] = attrs.field(factory=dict)

    def takes(self, entry: Composite, node: Node) -> bool:
        """Tell whether MARS takes a matched chain; if not, its candidates carry the reason."""
        try:
            spec, _ = parse(entry.name, node)
            check(spec, self.arch, node.name)
        except UnsupportedError as error:
            found = match(entry.pattern, node) or {}
            self.reject(node, error.problem, [found[x] for x in entry.operands if x in found])
            return False
        return True

    def reject(self, node: Node, reason: str, operands: Sequence[Node] = ()) -> None:
        """Note the first reason for each candidate of a chain, down to its operands."""
        if any(node is operand for operand in operands):
            return
        if node.op in CANDIDATES:
            self.reasons.setdefault(node.name, reason)
        for arg in node.args:
            self.reject(arg, reason, operands)


def sums_maps(node: Node) -> bool:
    """Whether an addition is none of a bias."""
    for arg in node.args:
        while arg.op in ("reshape", "dequantize"):
            arg = arg.args[0]
        if arg.op == "const":
            return False
    return True
