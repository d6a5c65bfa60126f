"""A partitioned model as the compiler sees it: its regions' graphs, where layers come from."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mars_runtime.arch import MarsArch
from mars_runtime.program import Program

from ..compiler import NamedGraph, build
from .interface import Interface
from .report import Decision, OffloadReport

__all__ = ["Partition", "Piece"]


@attrs.frozen(eq=False)
class Piece:
    """A region: its graph, with the names of what it takes and gives.

    Parameters
    ----------
    operators : mapping of str to tuple of str
        For each layer the model's operators that it comes from, by their names in the report.
    """

    graph: NamedGraph
    interface: Interface
    operators: Mapping[str, tuple[str, ...]]


@attrs.frozen(eq=False)
class Partition:
    """What became of a model's operators, and the regions in the order in which they run."""

    report: OffloadReport
    pieces: tuple[Piece, ...]

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """The decisions by their operators' names."""
        return {decision.name: decision for decision in self.report.decisions}

    def build(self, arch: MarsArch) -> Program:
        """Compile the regions into one program, which must not be without any.

        Raises
        ------
        CapacityError
            If a layer does not fit the machine.
        """
        interface = self.pieces[0].interface
        return build(
            [piece.graph for piece in self.pieces],
            arch,
            inputs=interface.model_inputs,
            outputs=interface.model_outputs,
            host_operators=interface.host_operators,
        )
