"""What a program costs on the machine, layer by layer: values, computed from its timeline.

All of time and counts comes from :func:`mars_runtime.simulate`; this module relates them to each
other, to the network and to the dense baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from mars_runtime import (
    Energy,
    MarsArch,
    Program,
    ProgramError,
    Region,
    energy_of,
    isa,
    simulate,
)
from mars_runtime.program import LayerInfo
from mars_runtime.timeline import STALLS, Counters, LayerTime, Timeline

from ..compiler import dense_baseline
from ..graph import Conv, MapType
from ..skeleton import graph_from_json

__all__ = ["LayerProfile", "Profile", "profile_program", "repeated"]

# What Table I of the paper counts as operations: its GOPS are FPS times the operations of these.
PAPER_KERNEL = (3, 3)
PAPER_MIN_INPUTS = 64


@attrs.frozen(kw_only=True)
class LayerProfile:
    """What one layer costs for one image.

    Parameters
    ----------
    name, kind : str
        As in the program; ``conv1+maxpool2`` is a convolution with a pool in its write.
    region : int
        The program's region that it belongs to.
    cycles : int
        Core cycles from the end of the layer before to the end of this one.
    macro_cycles : int
        Core cycles in which macros compute, summed over cores.
    stalls : mapping of str to int
        Core cycles in which they do not, by cause (:data:`mars_runtime.timeline.STALLS`), summed
        over cores.
    macs, paper_macs : int
        Multiply-accumulates of the dense layer; of them, those that the paper's Table I counts.
    group_sets, dense_group_sets : int
        Group-sets that are stored; that the dense layer has.
    counters : Counters
        Accesses and transfers.
    energy : Energy
        In picojoule.
    dense_cycles : int or None
        Core cycles on the dense baseline; None if it was not run.
    """

    name: str
    kind: str
    region: int
    cycles: int
    macro_cycles: int
    stalls: Mapping[str, int]
    macs: int
    paper_macs: int
    group_sets: int
    dense_group_sets: int
    counters: Counters
    energy: Energy
    dense_cycles: int | None = None

    @property
    def core_cycles(self) -> int:
        """Core cycles booked to the layer, summed over cores: computing and stalled."""
        return self.macro_cycles + sum(self.stalls.values())

    @property
    def utilisation(self) -> float:
        """Share of the layer's core cycles in which macros compute."""
        return _ratio(self.macro_cycles, self.core_cycles) or 0.0

    @property
    def speedup(self) -> float | None:
        """How many times faster than on the dense baseline; None if that was not run."""
        return None if self.dense_cycles is None else _ratio(self.dense_cycles, self.cycles)

    def filled(self, arch: MarsArch) -> float | None:
        """Share of the multiplications whose weight the layer has, those passed over included.

        The others pad channels to 16, a depthwise layer's group-sets beside their diagonal, or
        are done twice where tiles overlap. None for a layer that multiplies nothing.
        """
        needed = self.macs * self.group_sets
        pairs = self.counters.group_sets + self.counters.passed_over
        return _ratio(needed, self.dense_group_sets * pairs * arch.group_set_weights)


@attrs.frozen(kw_only=True)
class Profile:
    """What one image costs on a program's machine.

    Parameters
    ----------
    arch : MarsArch
        The machine.
    layers : tuple of LayerProfile
        Of all regions, in order.
    regions : int
        Pieces of the network on MARS. They follow each other; the CPU's time between is not in.
    host_operators : tuple of str
        Operators left to the CPU.
    reordered : int
        Layers whose map has its channels in another order than the model's.
    cycles : int
        Latency of one image in core cycles, with cold macros and weight SRAMs.
    steady_cycles : int
        Core cycles for each further image of a batch that runs back to back.
    dense_cycles : int or None
        Latency on the dense baseline: the same hardware, no group-set skipped.
    dense_layers : tuple of LayerProfile
        The layers on the dense baseline, in their order there; empty if it was not run.
    """

    arch: MarsArch
    layers: tuple[LayerProfile, ...]
    regions: int
    host_operators: tuple[str, ...]
    reordered: int
    cycles: int
    steady_cycles: int
    dense_cycles: int | None
    dense_layers: tuple[LayerProfile, ...] = ()

    # -- time --------------------------------------------------------------------------------------

    @property
    def latency_us(self) -> float:
        """Latency of one image, in microseconds."""
        return self.cycles / self.arch.core_clock_mhz

    @property
    def fps(self) -> float:
        """Images per second, one at a time: 1 / latency."""
        return _fps(self.arch, self.cycles)

    @property
    def steady_fps(self) -> float:
        """Images per second, back to back."""
        return _fps(self.arch, self.steady_cycles)

    @property
    def dense_fps(self) -> float | None:
        """Images per second on the dense baseline, one at a time."""
        return None if self.dense_cycles is None else _fps(self.arch, self.dense_cycles)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the dense baseline."""
        return None if self.dense_cycles is None else _ratio(self.dense_cycles, self.cycles)

    @property
    def utilisation(self) -> float:
        """Share of all core cycles in which macros compute."""
        return _ratio(sum(layer.macro_cycles for layer in self.layers), self.core_cycles) or 0.0

    @property
    def core_cycles(self) -> int:
        """Core cycles, summed over cores."""
        return sum(layer.core_cycles for layer in self.layers)

    @property
    def stalls(self) -> dict[str, int]:
        """Core cycles without computing, by cause, summed over cores."""
        return {cause: sum(layer.stalls[cause] for layer in self.layers) for cause in STALLS}

    # -- work --------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """Accesses and transfers of all layers."""
        return _total(layer.counters for layer in self.layers)

    @property
    def energy(self) -> Energy:
        """Energy of all layers, in picojoule."""
        return energy_of(self.counters, self.arch)

    @property
    def operations(self) -> int:
        """Operations of the dense network: two for each multiply-accumulate."""
        return 2 * sum(layer.macs for layer in self.layers)

    @property
    def paper_operations(self) -> int:
        """Operations as the paper's Table I counts them: 3x3 convolutions with 64 or more inputs.

        No stem, no 1x1 shortcut, no dense layer.
        """
        return 2 * sum(layer.paper_macs for layer in self.layers)

    @property
    def paper_layers(self) -> tuple[LayerProfile, ...]:
        """The layers with operations that the paper counts."""
        return tuple(layer for layer in self.layers if layer.paper_macs)

    @property
    def gops(self) -> float:
        """Dense-equivalent speed in 10**9 operations per second."""
        return self.operations * self.fps / 1e9

    @property
    def paper_gops(self) -> float:
        """The same in the paper's counting."""
        return self.paper_operations * self.fps / 1e9

    # One operation per picojoule is one TOPS/W.

    @property
    def tops_per_watt_macros(self) -> float | None:
        """Dense-equivalent efficiency of the macros alone, without memories and transfers."""
        return _ratio(self.operations, self.energy.macros)

    @property
    def paper_tops_per_watt(self) -> float | None:
        """The same in the paper's counting: operations and macro energy of its layers."""
        return _ratio(
            self.paper_operations, sum(layer.energy.macros for layer in self.paper_layers)
        )

    @property
    def tops_per_watt(self) -> float | None:
        """Dense-equivalent efficiency with everything that has an energy in the architecture."""
        return _ratio(self.operations, self.energy.total)

    def to_dict(self) -> dict[str, Any]:
        """Give the profile as plain data for JSON.

        Keys carry their unit: ``_cycles`` are core cycles, ``_us`` microseconds, ``_pj``
        picojoule, ``_bits`` bits; ``utilisation``, ``filled`` and ``assumed_share`` are shares of
        1; other counts are numbers of events. ``macro_cycles`` and ``stalls`` are summed over
        cores. Keys that need the dense baseline are null without it. ``assumed`` names the fields
        of ``arch`` that the paper does not give.
        """
        return {
            "arch": self.arch.to_dict(),
            "assumed": [info.name for info in self.arch.describe() if info.assumed],
            "regions": self.regions,
            "host_operators": list(self.host_operators),
            "reordered": self.reordered,
            "total": {
                "cycles": self.cycles,
                "steady_cycles": self.steady_cycles,
                "dense_cycles": self.dense_cycles,
                "latency_us": self.latency_us,
                "fps": self.fps,
                "steady_fps": self.steady_fps,
                "dense_fps": self.dense_fps,
                "speedup": self.speedup,
                "utilisation": self.utilisation,
                "stalls": self.stalls,
                "operations": self.operations,
                "paper_operations": self.paper_operations,
                "gops": self.gops,
                "paper_gops": self.paper_gops,
                "tops_per_watt": self.tops_per_watt,
                "tops_per_watt_macros": self.tops_per_watt_macros,
                "paper_tops_per_watt": self.paper_tops_per_watt,
                "counters": attrs.asdict(self.counters),
                "energy_pj": _energy_data(self.energy),
            },
            "layers": [self._layer_data(layer) for layer in self.layers],
        }

    def _layer_data(self, layer: LayerProfile) -> dict[str, Any]:
        return {
            "name": layer.name,
            "kind": layer.kind,
            "region": layer.region,
            "cycles": layer.cycles,
            "dense_cycles": layer.dense_cycles,
            "speedup": layer.speedup,
            "macro_cycles": layer.macro_cycles,
            "utilisation": layer.utilisation,
            "stalls": dict(layer.stalls),
            "macs": layer.macs,
            "paper_macs": layer.paper_macs,
            "group_sets": layer.group_sets,
            "dense_group_sets": layer.dense_group_sets,
            "filled": layer.filled(self.arch),
            "counters": attrs.asdict(layer.counters),
            "energy_pj": _energy_data(layer.energy),
        }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _fps(arch: MarsArch, cycles: int) -> float:
    return arch.core_clock_mhz * 1e6 / cycles


def _total(counters: Iterable[Counters]) -> Counters:
    total = Counters()
    for one in counters:
        total.add(one)
    return total


def _energy_data(energy: Energy) -> dict[str, float]:
    return {**attrs.asdict(energy), "total": energy.total, "assumed_share": energy.assumed_share}


# -- making one ------------------------------------------------------------------------------------


def profile_program(program: Program, *, baseline: bool = True) -> Profile:
    """Profile a program on its machine.

    Parameters
    ----------
    program : Program
        As compiled or loaded.
    baseline : bool
        Whether to compile and time the dense network too.

    Raises
    ------
    MachineError
        If an instruction does what the hardware cannot.
    ProgramError
        If the program has no region, or does not describe its network, which the baseline needs.

    Examples
    --------
    >>> from mars_runtime import Program
    >>> from tvm_mars.report import profile_program
    >>> profile_program(Program.load("net.mars")).fps  # doctest: +SKIP
    """
    if not program.regions:
        raise ProgramError("has no region: nothing of it runs on MARS", where="program")
    arch = program.arch
    timelines = [simulate(region, arch) for region in program.regions]
    steady = sum(
        simulate(repeated(region, 2), arch).cycles - timeline.cycles
        for region, timeline in zip(program.regions, timelines, strict=True)
    )
    layers: list[LayerProfile] = []
    dense_layers: list[LayerProfile] = []
    dense_cycles = 0
    for number, (region, timeline) in enumerate(zip(program.regions, timelines, strict=True)):
        dense: list[LayerProfile] = []
        if baseline:
            dense_region, dense_arch = dense_baseline(region, arch)
            dense_timeline = simulate(dense_region, dense_arch)
            dense = [*_layers(dense_region, number, dense_arch, dense_timeline)]
            dense_cycles += dense_timeline.cycles
        layers += _layers(region, number, arch, timeline, dense)
        dense_layers += dense
    return Profile(
        arch=arch,
        layers=tuple(layers),
        regions=len(program.regions),
        host_operators=program.host_operators,
        reordered=sum(len(region.orders) for region in program.regions),
        cycles=sum(timeline.cycles for timeline in timelines),
        steady_cycles=steady,
        dense_cycles=dense_cycles if baseline else None,
        dense_layers=tuple(dense_layers),
    )


def repeated(region: Region, times: int) -> Region:
    """Give a region that runs its instructions several times and halts once.

    The images follow each other on the machine as layers do: by the same units and tokens.
    """
    halt = isa.INSTRUCTION_BYTES
    body, end = region.code[:-halt], region.code[-halt:]
    return attrs.evolve(region, code=body * times + end, layers=())


def _layers(
    region: Region,
    number: int,
    arch: MarsArch,
    timeline: Timeline,
    dense: Iterable[LayerProfile] = (),
) -> Iterable[LayerProfile]:
    counted = _paper_macs(region)
    baseline = {layer.name: layer.cycles for layer in dense}
    for info, time in zip(_infos(region), timeline.layers, strict=True):
        yield _layer(info, time, number, arch, counted.get(info.name.split("+")[0], 0), baseline)


def _infos(region: Region) -> tuple[LayerInfo, ...]:
    """Give the layers, or the whole as one where a program does not divide into them."""
    return region.layers or (LayerInfo("region", "region", 0, 0, 0, 0, 0),)


def _layer(
    info: LayerInfo,
    time: LayerTime,
    region: int,
    arch: MarsArch,
    paper_macs: int,
    baseline: Mapping[str, int],
) -> LayerProfile:
    return LayerProfile(
        name=info.name,
        kind=info.kind,
        region=region,
        cycles=time.cycles,
        macro_cycles=time.macro_cycles,
        stalls=dict(time.stalls),
        macs=info.macs,
        paper_macs=paper_macs,
        group_sets=info.group_sets,
        dense_group_sets=info.dense_group_sets,
        counters=time.counters,
        energy=energy_of(time.counters, arch),
        dense_cycles=baseline.get(info.name),
    )


def _paper_macs(region: Region) -> dict[str, int]:
    """Give the multiply-accumulates that the paper counts, by layer."""
    if not region.network:
        return {}
    graph = graph_from_json(region.network)
    return {
        layer.name: _counted(layer, graph.types)
        for layer in graph.layers
        if isinstance(layer, Conv)
    }


def _counted(layer: Conv, types: Mapping[str, MapType]) -> int:
    out = types[layer.name]
    return sum(
        term.weight.size * out.height * out.width
        for term in layer.terms
        if term.kernel == PAPER_KERNEL and term.weight.shape[1] >= PAPER_MIN_INPUTS
    )
