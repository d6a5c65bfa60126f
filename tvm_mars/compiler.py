"""From integer graphs to a program: pack, schedule, generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from mars_runtime.arch import MarsArch
from mars_runtime.program import ChannelOrder, HostReason, Program, Region

from .channel_order import found_orders, reordered
from .codegen import generate, time_schedule
from .graph import Conv, Graph
from .options import require_channel_order
from .pack import PackedConv, pack_conv
from .schedule import Schedule, plan
from .schedule.applied import schedule_of
from .skeleton import graph_from_json, graph_to_json

__all__ = ["NamedGraph", "build", "build_region", "dense_baseline", "pack", "with_channel_order"]


@attrs.frozen
class NamedGraph:
    """A graph with the model's names of its inputs and outputs.

    ``orders`` are of the layers whose channels are in another order than the model's.
    """

    graph: Graph
    inputs: tuple[str, ...] = attrs.field(converter=tuple[str, ...])
    outputs: tuple[str, ...] = attrs.field(converter=tuple[str, ...])
    orders: tuple[ChannelOrder, ...] = ()

    @classmethod
    def of(cls, graph: Graph) -> NamedGraph:
        """Name the ports by position: ``x0``, ...; ``y0``, ..."""
        return cls(
            graph,
            [entry.name for entry in graph.inputs],
            [f"y{i}" for i in range(len(graph.outputs))],
        )


def pack(graph: Graph, arch: MarsArch) -> dict[str, PackedConv]:
    """Pack every convolution of a graph."""
    return {
        layer.name: pack_conv(layer, graph.types, arch)
        for layer in graph.layers
        if isinstance(layer, Conv)
    }


def with_channel_order(named: NamedGraph, arch: MarsArch, channel_order: str) -> NamedGraph:
    """Give a graph in another order of channels, if that makes it faster.

    Parameters
    ----------
    channel_order : str
        One of :data:`tvm_mars.options.CHANNEL_ORDERS`: ``packed`` gives the order that takes the
        fewest core cycles with the default schedule, and then stores the fewest group-sets, of
        those that were found and the given one. It stores no more than the given one does.

    Raises
    ------
    OptionError
        If it is none of them.
    CapacityError
        If a layer does not fit the machine.
    """
    require_channel_order(channel_order)
    if channel_order == "given":
        return named
    found = found_orders(named.graph, arch)
    if not found:
        return named
    best, least = named, _needs(named.graph, arch)
    for orders in found:
        graph = reordered(named.graph, orders)
        needs = _needs(graph, arch)
        if needs < least:
            kept = tuple(
                ChannelOrder(name, tuple(orders[name].tolist()))
                for name in graph.types
                if name in orders
            )
            best, least = attrs.evolve(named, graph=graph, orders=kept), needs
    return best


def _needs(graph: Graph, arch: MarsArch) -> tuple[int, int]:
    """Give the core cycles with the default schedule, and the stored group-sets."""
    packed = pack(graph, arch)
    cycles = time_schedule(graph, arch, packed, plan(graph, arch, packed)).cycles
    return cycles, sum(layer.group_sets for layer in packed.values())


def build_region(
    named: NamedGraph,
    arch: MarsArch,
    *,
    scheduler: Callable[..., Schedule] = schedule_of,
    with_weights: bool = True,
) -> Region:
    """Compile one graph.

    Raises
    ------
    CapacityError
        If a layer does not fit the machine.
    """
    packed = pack(named.graph, arch)
    schedule = scheduler(named.graph, arch, packed)
    region = generate(
        named.graph,
        arch,
        packed,
        schedule,
        input_names=named.inputs,
        output_names=named.outputs,
        network=graph_to_json(named.graph),
        with_weights=with_weights,
    )
    return attrs.evolve(region, orders=named.orders)


def build(
    graphs: Sequence[NamedGraph],
    arch: MarsArch,
    *,
    channel_order: str = "given",
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    host_operators: Sequence[str] = (),
    host_reasons: Sequence[HostReason] = (),
) -> Program:
    """Compile graphs to the regions of one program, in order.

    Parameters
    ----------
    channel_order : str
        See :func:`with_channel_order`.
    inputs, outputs : sequences of str, optional
        The model's; those of the only graph if not given.
    host_operators : sequence of str
        Operators of the model that are left to the CPU.
    host_reasons : sequence of HostReason
        Why, of those that MARS might have taken.

    Raises
    ------
    CapacityError
        If a layer does not fit the machine.

    Examples
    --------
    >>> from mars_runtime import PRESETS
    >>> from tvm_mars import zoo
    >>> program = build([NamedGraph.of(zoo.load("digits"))], PRESETS["mars"])
    >>> [layer.name for layer in program.regions[0].layers]
    ['conv0', 'conv1', 'conv2', 'conv3', 'conv4+maxpool5', 'conv6', 'avgpool7', 'conv8']
    """
    if inputs is None:
        inputs = graphs[0].inputs if len(graphs) == 1 else ()
    if outputs is None:
        outputs = graphs[0].outputs if len(graphs) == 1 else ()
    regions = tuple(
        build_region(with_channel_order(named, arch, channel_order), arch) for named in graphs
    )
    return Program(
        arch,
        regions,
        tuple(inputs),
        tuple(outputs),
        tuple(host_operators),
        tuple(host_reasons),
    )


def dense_baseline(region: Region, arch: MarsArch) -> tuple[Region, MarsArch]:
    """Compile a region's network for the same hardware without zero skipping, for its timeline.

    Every group-set is stored and computed, as on the paper's baseline; the weights themselves are
    not needed for that.
    """
    dense = attrs.evolve(arch, name=f"{arch.name}, dense", zero_skipping=False)
    graph = graph_from_json(region.network)
    return build_region(NamedGraph.of(graph), dense, with_weights=False), dense
