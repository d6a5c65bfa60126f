"""How a region is connected: the names of its values, and what else the model consists of."""

from __future__ import annotations

import json

import attrs

from mars_runtime.program import HostReason

__all__ = ["Interface"]


@attrs.frozen
class Interface:
    """Names of a region's parameters and results, and of the whole model's.

    Parameters
    ----------
    index : int
        The region's position among all, in the order in which they run.
    inputs, outputs : tuple of str
        One name for each parameter and result of the region's function. A name is the model's
        where the value enters or leaves the model, else it is made of positions.
    model_inputs, model_outputs, host_operators : tuple of str
        Of the whole model.
    host_reasons : tuple of HostReason
        As the program's.
    """

    index: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    model_inputs: tuple[str, ...] = ()
    model_outputs: tuple[str, ...] = ()
    host_operators: tuple[str, ...] = ()
    host_reasons: tuple[HostReason, ...] = ()

    def to_json(self) -> str:
        """Give the interface as text that :meth:`from_json` reads."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Interface:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        reasons = tuple(HostReason(**reason) for reason in data.pop("host_reasons"))
        index = data.pop("index")
        names = {key: tuple(names) for key, names in data.items()}
        return cls(index, **names, host_reasons=reasons)
