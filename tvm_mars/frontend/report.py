"""The offload report: what became of every candidate operator, and why."""

from __future__ import annotations

import json
import logging

import attrs

from mars_runtime.program import HostReason

__all__ = ["Decision", "OffloadReport"]

_LOG = logging.getLogger("tvm_mars")
_QUANTIZE = (
    "quantize the model by `mars quantize` or onnxruntime.quantization.quantize_static, "
    "or train it quantized by tvm_mars.qat"
)


@attrs.frozen
class Decision:
    """What became of one operator, and the reason if the CPU keeps it.

    ``name`` is that of the ONNX node, or of the variable in the IR where that is not known.
    """

    name: str
    op: str
    offloaded: bool
    reason: str = ""

    def __str__(self) -> str:
        where = "MARS" if self.offloaded else "CPU "
        return f"{where}  {self.op:<12} {self.name}" + (f": {self.reason}" if self.reason else "")


@attrs.frozen
class OffloadReport:
    """Decisions in the order of the function, and the operators of any kind left to the CPU.

    ``regions`` is the number of functions that MARS runs.
    """

    decisions: tuple[Decision, ...]
    host_operators: tuple[str, ...] = ()
    regions: int = 0

    @property
    def offloaded(self) -> tuple[Decision, ...]:
        """The decisions for MARS."""
        return tuple(decision for decision in self.decisions if decision.offloaded)

    @property
    def rejected(self) -> tuple[Decision, ...]:
        """The decisions for the CPU."""
        return tuple(decision for decision in self.decisions if not decision.offloaded)

    @property
    def host_reasons(self) -> tuple[HostReason, ...]:
        """Each reason for the CPU once, without the names of operators, which importers choose."""
        found = {HostReason(decision.op, decision.reason) for decision in self.rejected}
        return tuple(sorted(found, key=attrs.astuple))

    @property
    def summary(self) -> str:
        """How many operators are on MARS, of how many."""
        return f"{len(self.offloaded)} of {len(self.decisions)} operators on MARS"

    def log(self) -> None:
        """Log each rejection, and a warning with the remedy if nothing was offloaded."""
        for decision in self.rejected:
            _LOG.info("%s %s stays on the CPU: %s", decision.op, decision.name, decision.reason)
        if not self.offloaded:
            why = self.rejected[0].reason if self.decisions else "there is no candidate operator"
            if self.decisions and not {"quantize", "dequantize"} & set(self.host_operators):
                why += f"; {_QUANTIZE}"
            _LOG.warning("nothing was offloaded to MARS: %s", why)

    def __str__(self) -> str:
        lines = [*map(str, self.decisions), f"{self.summary}, in {self.regions} region(s)"]
        if self.host_operators:
            lines.append(f"on the CPU: {', '.join(self.host_operators)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Give the report as text that :meth:`from_json` reads."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> OffloadReport:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        decisions = tuple(Decision(**decision) for decision in data["decisions"])
        return cls(decisions, tuple(data["host_operators"]), data["regions"])
