"""What the checks of one partitioning share, whatever the IR."""

from __future__ import annotations

import attrs

from mars_runtime.arch import MarsArch

from .patterns import CANDIDATES, Node

__all__ = ["Session", "sums_maps"]


@attrs.define
class Session:
    """The machine, and why the checks said no."""

    arch: MarsArch
    reasons: dict[str, str] = attrs.field(factory=dict)

    def reject(self, node: Node, reason: str) -> None:
        """Note the first reason for each candidate of a chain."""
        if node.op in CANDIDATES:
            self.reasons.setdefault(node.name, reason)
        for arg in node.args:
            self.reject(arg, reason)


def sums_maps(node: Node) -> bool:
    """Whether an addition is none of a bias."""
    for arg in node.args:
        while arg.op in ("reshape", "dequantize"):
            arg = arg.args[0]
        if arg.op == "const":
            return False
    return True
