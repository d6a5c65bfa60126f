"""A partitioned model as the compiler sees it: its regions' graphs, where layers come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from mars_runtime.arch import MarsArch
from mars_runtime.program import Program

from ..compiler import NamedGraph, build
from .interface import Interface
from .report import OffloadReport

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

    @classmethod
    def of(cls, report: OffloadReport, pieces: Iterable[Piece]) -> Partition:
        """Order the regions; of a layer's operators those are kept that the report accounts for."""
        known = {decision.name for decision in report.decisions}
        ordered = sorted(pieces, key=lambda piece: piece.interface.index)
        return cls(
            report,
            tuple(
                attrs.evolve(
                    piece,
                    operators={
                        layer: tuple(name for name in names if name in known)
                        for layer, names in piece.operators.items()
                    },
                )
                for piece in ordered
            ),
        )

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
            host_reasons=interface.host_reasons,
        )
