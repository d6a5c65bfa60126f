"""Why a model costs what it costs: where operators run, what bounds layers, what would help.

All cycles are those of the timed machine, with the default schedule or those that were tuned. What
would help is computed the same way, by compiling the changed network, for which nothing was tuned:
there both sides have the default schedule. What no schedule can beat is derived from the work.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime import InputError, MarsArch, Region, simulate
from mars_runtime.timeline import LayerTime
from mars_runtime.timing import fill_cost
from mars_runtime.trace import occupancy

from ..compiler import NamedGraph, build_region, pack, with_channel_order
from ..graph import Conv, ConvTerm, Graph, MapType
from ..pack import PackedConv, blocked, pack_conv
from ..schedule import Schedule, Step, least_macro_cycles, plan
from ..tuner.bound import least_cycles

if TYPE_CHECKING:
    from ..frontend.partition import Partition, Piece
    from ..frontend.report import Decision

__all__ = [
    "BOUNDS",
    "FILLED",
    "SHARES",
    "Explanation",
    "GroupSets",
    "LayerExplanation",
    "WhatIf",
    "explain",
    "pruned",
]

#: What can bound a layer, and what is counted for it.
BOUNDS: Mapping[str, str] = {
    "compute": "the busiest core's macros compute",
    "load": "the busiest core's macros are opened and written with weights",
    "ports": "the busiest port of a feature-map SRAM is read or written",
    "off-chip": "the off-chip port moves weights, index codes, parameters, maps",
}

#: Upper ends of the classes in which stored group-sets are counted by weights that are not zero.
FILLED = (16, 64, 128, 256)

#: Shares of zero group-sets that are tried on a layer.
SHARES = (0.5, 0.75, 0.9, 0.95)

NARROW = 4  # bits of the narrower codes


@attrs.frozen(kw_only=True)
class GroupSets:
    """What a layer stores, and why no less.

    Parameters
    ----------
    dense, stored : int
        Group-sets of the dense layer; those that the machine holds.
    filled : tuple of int
        Stored group-sets with up to 16, 64, 128 and 256 weights that are not zero; those with none,
        which a machine without zero skipping stores as well, count in the first class.
    zero_weights : float
        Share of the layer's weights that are zero, wherever they lie.
    gathered : int
        Group-sets that would be left if the other weights filled whole ones: the least that holds
        as many.
    usable : int
        Most weights of one group-set that the layer has: 256, or fewer where it has fewer kernels
        or inputs than 16, or groups.
    packed : int
        Group-sets that are stored in the order of channels that ``channel_order="packed"`` gives.
    """

    dense: int
    stored: int
    filled: tuple[int, ...]
    zero_weights: float
    gathered: int
    usable: int
    packed: int

    @property
    def zero_share(self) -> float:
        """Share of group-sets that are not stored."""
        return 1 - self.stored / self.dense


@attrs.frozen(kw_only=True)
class WhatIf:
    """A layer with a larger share of zero group-sets.

    Parameters
    ----------
    share : float
        Of zero group-sets in this layer.
    removed : float
        Share of the layer's squared weights in the group-sets that go: the smallest do.
    cycles : int
        Of the layer then.
    saved : int
        Core cycles that the whole region takes less.
    """

    share: float
    removed: float
    cycles: int
    saved: int


@attrs.frozen(kw_only=True)
class LayerExplanation:
    """One layer of the program.

    Parameters
    ----------
    name, kind : str
        As in the program.
    region : int
        The program's region that it belongs to.
    operators : tuple of str
        The model's operators that it comes from.
    cycles : int
        Core cycles of one image.
    busy : mapping of str to int
        For each of :data:`BOUNDS` the core cycles of its busiest unit.
    floor : int
        Core cycles below which no schedule brings the same work. With weights: the macro cycles at
        all pixels whose taps meet the map and, unless macros can be written while they compute, all
        writing of them, shared evenly by the cores. Without: the accesses to the busier bank,
        shared evenly.
    stalls : mapping of str to int
        Core cycles without computing, by cause, summed over cores.
    group_sets : GroupSets or None
        None for a layer without weights.
    narrow_compute : int or None
        The busiest core's macro cycles if all inputs had 4 bits, None if they have.
    what_if : tuple of WhatIf
        The layer with more zero group-sets, the others as they are.
    """

    name: str
    kind: str
    region: int
    operators: tuple[str, ...]
    cycles: int
    busy: Mapping[str, int]
    floor: int
    stalls: Mapping[str, int]
    group_sets: GroupSets | None = None
    narrow_compute: int | None = None
    what_if: tuple[WhatIf, ...] = ()

    @property
    def bound(self) -> str:
        """What is in use longest, of :data:`BOUNDS`."""
        return max(self.busy, key=lambda name: self.busy[name])

    @property
    def schedule_gap(self) -> int:
        """The most core cycles that another schedule of the same work can save."""
        return max(0, self.cycles - self.floor)


@attrs.frozen(kw_only=True)
class Explanation:
    """A model.

    Parameters
    ----------
    arch : MarsArch
        The machine.
    decisions : tuple of Decision
        What became of each operator.
    host_operators : tuple of str
        All kinds of operators left to the CPU.
    layers : tuple of LayerExplanation
        Of all regions, in order.
    least : int
        Core cycles that no schedule of the whole model beats: for each region all layers' floors,
        or the bound of :mod:`tvm_mars.tuner.bound`, which counts opening of arrays, if it is more.
    tuned : bool
        Whether schedules other than the default were asked for.
    share : float
        The share of zero group-sets that :attr:`saved` is for.
    saved : mapping of (int, str) to int
        For each region and layer the core cycles that it takes less if every layer has at least
        that share.
    packed_saved : int
        Core cycles that the regions take less with ``channel_order="packed"``, both with the
        default schedule.
    """

    arch: MarsArch
    decisions: tuple[Decision, ...]
    host_operators: tuple[str, ...]
    layers: tuple[LayerExplanation, ...]
    least: int
    tuned: bool
    share: float
    saved: Mapping[tuple[int, str], int]
    packed_saved: int

    @property
    def cycles(self) -> int:
        """Core cycles of one image on MARS."""
        return sum(layer.cycles for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data for JSON; ``cycles`` and what ends so are core cycles."""
        layers = []
        for layer in self.layers:
            data = attrs.asdict(layer)
            if layer.group_sets is not None:
                data["group_sets"]["zero_share"] = layer.group_sets.zero_share
            data["bound"], data["schedule_gap"] = layer.bound, layer.schedule_gap
            data["saved_at_share"] = self.saved.get((layer.region, layer.name))
            layers.append(data)
        return {
            "arch": self.arch.to_dict(),
            "assumed": [info.name for info in self.arch.describe() if info.assumed],
            "operators": [attrs.asdict(decision) for decision in self.decisions],
            "host_operators": list(self.host_operators),
            "cycles": self.cycles,
            "least_cycles": self.least,
            "tuned": self.tuned,
            "share": self.share,
            "packed_saved_cycles": self.packed_saved,
            "layers": layers,
        }


def explain(
    partition: Partition,
    arch: MarsArch,
    *,
    share: float = 0.9,
    op: str | None = None,
    scheduler: Callable[..., Schedule] = plan,
) -> Explanation:
    """Explain a partitioned model.

    Parameters
    ----------
    share : float
        Of zero group-sets, that the whole network is tried with.
    op : str, optional
        An operator or layer: only what belongs to it is explained, and the layer is tried with
        several shares.
    scheduler : callable
        Gives the schedule of a graph on a machine, packed; the default schedule if not given.

    Raises
    ------
    InputError
        If the model has no such operator or layer.
    CapacityError
        If a layer does not fit the machine.
    """
    layers: list[LayerExplanation] = []
    saved: dict[tuple[int, str], int] = {}
    bound = packed_saved = 0
    for number, piece in enumerate(partition.pieces):
        run = _Run.of(piece.graph.graph, arch, scheduler)
        untuned = run if scheduler is plan else _Run.of(run.graph, arch, plan)
        again = with_channel_order(piece.graph, arch, "packed").graph
        counts = {name: layer.group_sets for name, layer in pack(again, arch).items()}
        reordered = _Run.of(again, arch, plan)
        packed_saved += sum(untuned.cycles.values()) - sum(reordered.cycles.values())
        found = [
            _layer(run, place, lanes, number, piece, counts)
            for place, lanes in enumerate(occupancy(run.region, arch))
        ]
        floors = sum(layer.floor for layer in found)
        bound += max(floors, least_cycles(run.graph, arch, pack(run.graph, arch)))
        if op is None:
            saved.update(_saved(untuned, number, share))
        else:
            found = [_tried(untuned, layer) for layer in found if _concerns(layer, op)]
        layers += found
    decisions = partition.report.decisions
    if op is not None:
        named = {op, *(name for layer in layers for name in layer.operators)}
        decisions = tuple(decision for decision in decisions if decision.name in named)
        if not (decisions or layers):
            raise _unknown(op, partition)
    return Explanation(
        arch=arch,
        decisions=decisions,
        host_operators=partition.report.host_operators,
        layers=tuple(layers),
        least=bound,
        tuned=scheduler is not plan,
        share=share,
        saved=saved,
        packed_saved=packed_saved,
    )


def _concerns(layer: LayerExplanation, op: str) -> bool:
    return op in (layer.name, *_parts(layer.name), *layer.operators)


def _parts(name: str) -> list[str]:
    """Give the graph's layers that a layer of the program is."""
    return name.split("+")


def _unknown(op: str, partition: Partition) -> InputError:
    names = [decision.name for decision in partition.report.decisions]
    names += [layer.name for piece in partition.pieces for layer in piece.graph.graph.layers]
    near = difflib.get_close_matches(op, names, 3, 0.0)
    return InputError("no such operator or layer", where=op, hint=f"did you mean {near[0]}?")


# -- time ------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Run:
    """A graph, compiled and timed."""

    graph: Graph
    arch: MarsArch
    region: Region
    times: Sequence[LayerTime]

    @classmethod
    def of(cls, graph: Graph, arch: MarsArch, scheduler: Callable[..., Schedule]) -> _Run:
        region = build_region(NamedGraph.of(graph), arch, scheduler=scheduler, with_weights=False)
        return cls(graph, arch, region, simulate(region, arch).layers)

    @property
    def cycles(self) -> dict[str, int]:
        """Core cycles by layer of the graph; a pool in a convolution's write belongs to that."""
        return {_parts(time.name)[0]: time.cycles for time in self.times}

    def changed(self, layers: Mapping[str, Conv]) -> _Run:
        """Give the graph with some layers replaced, compiled by default and timed."""
        made = [layers.get(layer.name, layer) for layer in self.graph.layers]
        return _Run.of(attrs.evolve(self.graph, layers=made), self.arch, plan)


def _layer(
    run: _Run,
    place: int,
    lanes: Mapping[str, int],
    number: int,
    piece: Piece,
    reordered: Mapping[str, int],
) -> LayerExplanation:
    info, time = run.region.layers[place], run.times[place]
    parts = _parts(info.name)
    operators = dict.fromkeys(name for part in parts for name in piece.operators.get(part, ()))
    layer = next(one for one in run.graph.layers if one.name == parts[0])
    busy = _busy(lanes)
    group_sets = narrow = None
    if isinstance(layer, Conv):
        packed = pack_conv(layer, run.graph.types, run.arch)
        group_sets = _group_sets(layer, packed, reordered[layer.name], run.arch)
        narrow = _narrow(layer, run.graph.types, run.arch, busy["compute"])
        least = least_macro_cycles(run.arch, Step(layer), packed, run.graph.types)
        floor = int(least.sum()) / run.arch.cores + _writing(packed, run.arch)
    else:
        floor = max(_accesses(lanes).values()) / run.arch.cores
    return LayerExplanation(
        name=info.name,
        kind=info.kind,
        region=number,
        operators=tuple(operators),
        cycles=time.cycles,
        busy=busy,
        floor=math.ceil(floor),
        stalls=dict(time.stalls),
        group_sets=group_sets,
        narrow_compute=narrow,
    )


def _writing(packed: PackedConv, arch: MarsArch) -> float:
    """Give the cycles in which cores write weights and cannot compute, shared evenly."""
    if arch.overlap == "full":
        return 0.0
    cycles = fill_cost(arch, 1, packed.weight_bits).cycles
    return packed.group_sets * cycles / arch.cores


def _accesses(lanes: Mapping[str, int]) -> dict[str, int]:
    """Give the accesses of all cores by bank."""
    found: dict[str, int] = {}
    for lane, accesses in lanes.items():
        if _kind(lane) == "ports":
            bank = lane.partition(" core ")[0]
            found[bank] = found.get(bank, 0) + accesses
    return found


def _busy(lanes: Mapping[str, int]) -> dict[str, int]:
    """Give the cycles of the busiest unit of each kind."""
    found = dict.fromkeys(BOUNDS, 0)
    for lane, cycles in lanes.items():
        kind = _kind(lane)
        if kind:
            found[kind] = max(found[kind], cycles)
    return found


def _kind(lane: str) -> str:
    if lane.startswith("bank"):
        return "ports"
    ends = {"dma": "off-chip", "load": "load", "macros": "compute"}
    return ends.get(lane.rpartition(" ")[2], "")


def _narrow(layer: Conv, types: Mapping[str, MapType], arch: MarsArch, compute: int) -> int | None:
    wide = {types[term.input].bits for term in layer.terms} - {NARROW}
    if len(wide) != 1 or any(types[term.input].bits == NARROW for term in layer.terms):
        return None
    return compute * arch.accesses(NARROW) // arch.accesses(wide.pop())


# -- group-sets ------------------------------------------------------------------------------------


def _group_sets(layer: Conv, packed: PackedConv, reordered: int, arch: MarsArch) -> GroupSets:
    counts = np.concatenate(
        [np.count_nonzero(block.weights, axis=(1, 2)) for block in packed.blocks]
    )
    classes = np.searchsorted(FILLED, counts)
    weights = sum(term.weight.size for term in layer.terms)
    kept = sum(int(np.count_nonzero(term.weight)) for term in layer.terms)
    usable = max(_usable(term, arch) for term in layer.terms)
    return GroupSets(
        dense=packed.dense_group_sets,
        stored=packed.group_sets,
        filled=tuple(int((classes == i).sum()) for i in range(len(FILLED))),
        zero_weights=1 - kept / weights,
        gathered=-(-kept // usable),
        usable=usable,
        packed=reordered,
    )


def _usable(term: ConvTerm, arch: MarsArch) -> int:
    """Give the most weights of the term that one group-set can hold."""
    kernels, inputs = term.weight.shape[:2]
    # In groups a kernel has its own group's inputs alone, of the 16 that a group-set reads.
    width = arch.group_set_weights // arch.kernel_block
    return int(min(kernels, arch.kernel_block) * min(inputs, width))


def _prunable(layer: Any) -> bool:
    return isinstance(layer, Conv) and all(term.groups == 1 for term in layer.terms)


def pruned(layer: Conv, share: float) -> tuple[Conv, float]:
    """Zero a layer's smallest group-sets until a share of all is zero.

    Parameters
    ----------
    layer : Conv
        One without groups.
    share : float
        Of zero group-sets; no group-set comes back if more are zero already.

    Returns
    -------
    (Conv, float)
        The layer, and the share of its squared weights that went.
    """
    grids = [blocked(term.weight).astype(np.int64) for term in layer.terms]
    energies = [(grid**2).sum(axis=(1, 3)) for grid in grids]
    flat = np.concatenate([energy.ravel() for energy in energies])
    gone = np.zeros(len(flat), bool)
    gone[np.argsort(flat, kind="stable")[: int(share * len(flat))]] = True
    terms, at = [], 0
    for term, grid, energy in zip(layer.terms, grids, energies, strict=True):
        kept = ~gone[at : at + energy.size].reshape(energy.shape)
        at += energy.size
        terms.append(attrs.evolve(term, weight=_unblocked(grid * kept[:, None, :, None], term)))
    removed = float(flat[gone].sum() / max(1, flat.sum()))
    return attrs.evolve(layer, terms=terms), removed


def _unblocked(grid: npt.NDArray[Any], term: ConvTerm) -> npt.NDArray[Any]:
    outputs, kernels, inputs, width, taps = grid.shape
    flat = grid.reshape(outputs * kernels, inputs * width, taps)
    return flat[: term.weight.shape[0], : term.weight.shape[1]].reshape(term.weight.shape)


# -- what would help -------------------------------------------------------------------------------


def _saved(run: _Run, number: int, share: float) -> Iterator[tuple[tuple[int, str], int]]:
    layers = [layer for layer in run.graph.layers if isinstance(layer, Conv) and _prunable(layer)]
    after = run.changed({layer.name: pruned(layer, share)[0] for layer in layers}).cycles
    changed = {layer.name for layer in layers}
    for time in run.times:
        name = _parts(time.name)[0]
        if name in changed:
            yield (number, time.name), time.cycles - after[name]


def _tried(run: _Run, found: LayerExplanation) -> LayerExplanation:
    """Try shares that are larger than the layer's."""
    name = _parts(found.name)[0]
    layer = next(one for one in run.graph.layers if one.name == name)
    if not isinstance(layer, Conv) or not _prunable(layer) or found.group_sets is None:
        return found
    tried = []
    for share in SHARES:
        zero = found.group_sets.dense - found.group_sets.stored
        if int(share * found.group_sets.dense) <= zero:
            continue
        smaller, removed = pruned(layer, share)
        after = run.changed({layer.name: smaller}).cycles
        tried.append(
            WhatIf(
                share=share,
                removed=removed,
                cycles=after[name],
                saved=sum(run.cycles.values()) - sum(after.values()),
            )
        )
    return attrs.evolve(found, what_if=tuple(tried))
