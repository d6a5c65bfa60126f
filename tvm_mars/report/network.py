"""The network of a region, as a page shows it: rows, and the maps that go from one to another."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from mars_runtime import Region

from ..graph import Conv, Graph, Layer, Pool
from ..skeleton import graph_from_json
from .drawings import Edge, route

__all__ = ["Network", "NetworkRow", "network"]


@attrs.frozen
class NetworkRow:
    """An input, a layer or an output of a region."""

    kind: str
    name: str
    what: str


@attrs.frozen
class Network:
    """A region's rows, and the maps that go from one to another."""

    rows: tuple[NetworkRow, ...]
    edges: tuple[Edge, ...]

    @property
    def lanes(self) -> int:
        """Lanes beside the rows."""
        return max((edge.lane for edge in self.edges), default=0)


def network(region: Region, names: Sequence[str]) -> Network:
    """Draw up a region's network; the layers alone where the program does not describe it."""
    layers = region.layers
    if not region.network or not layers:
        found = [NetworkRow("layer", name, "") for name in names]
        return Network(tuple(found), route([(i, i + 1) for i in range(len(found) - 1)]))
    graph = graph_from_json(region.network)
    parts = {layer.name: layer for layer in graph.layers}
    rows = [NetworkRow("input", port.name, str(port.type)) for port in region.inputs]
    place = {entry.name: number for number, entry in enumerate(graph.inputs)}
    edges: list[tuple[int, int]] = []
    for info, name in zip(layers, names, strict=True):
        number = len(rows)
        members = info.name.split("+")
        for part in members:
            edges += [
                (place[source], number) for source in parts[part].inputs if source not in members
            ]
            place[part] = number
        rows.append(
            NetworkRow("layer", name, "; ".join(_what(parts[part], graph) for part in members))
        )
    for port, out in zip(region.outputs, graph.outputs, strict=True):
        edges.append((place[out.value], len(rows)))
        rows.append(NetworkRow("output", port.name, str(port.type)))
    return Network(tuple(rows), route(edges))


def _what(layer: Layer, graph: Graph) -> str:
    """Say what a layer computes."""
    out = graph.types[layer.name]
    if isinstance(layer, Conv):
        terms = " + ".join(
            f"{term.kernel[0]}x{term.kernel[1]}"
            + (f" / {term.stride[0]}" if max(term.stride) > 1 else "")
            + (f", {term.groups} groups" if term.groups > 1 else "")
            + f" w{term.weight_bits}"
            for term in layer.terms
        )
        residual = f" + {layer.residual.input}" if layer.residual else ""
        return f"convolution {terms}{residual}, gives {out}"
    window = f" {layer.kernel[0]}x{layer.kernel[1]}" if isinstance(layer, Pool) else ""
    return f"{layer.kind}{window}, gives {out}"
