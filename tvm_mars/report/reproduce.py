"""The paper's tables and figures beside ours, cell by cell.

Speed, energy and storage are of synthetic networks at the published sparsities and of the zoo's,
executed on the timed machine with the default schedule; accuracies are the zoo's, and Fig. 12's
those that its benchmark measured. What was not run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from mars_runtime import MarsArch, isa, simulate

from .. import paper, zoo
from ..compiler import NamedGraph, build, build_region, dense_baseline, pack
from ..graph import Conv, Graph
from ..networks import TABLE_IV, resnet18, vgg16
from ..paper import LayerRow, Workload
from .compression import compression
from .profile import LayerProfile, Profile, profile_program
from .pruning_study import read_study

__all__ = [
    "ARTEFACTS",
    "AS_TABLE_IV",
    "EVEN",
    "NOT_RUN",
    "STATED",
    "Artefact",
    "Cell",
    "Row",
    "Series",
    "reproduce",
    "synthetic",
    "workload_of",
    "zoo_workloads",
]

NOT_RUN = "not run"
STATED = "stated"
KILO, MEGA = 2**10, 2**20
_CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100}


@attrs.frozen
class Cell:
    """A figure of the paper's and ours; None where there is none.

    Parameters
    ----------
    digits : int
        To print behind the point.
    misprint : bool
        Whether the paper's contradicts its others.
    """

    paper: float | None
    ours: float | None
    digits: int = 0
    misprint: bool = False

    @property
    def deviation(self) -> float | None:
        """Ours over the paper's, less one."""
        if self.paper is None or self.ours is None:
            return None
        return self.ours / self.paper - 1


@attrs.frozen
class Row:
    """A row: what it is of, where ours comes from, its cells by the artefact's columns."""

    name: str
    source: str
    cells: Mapping[str, Cell]


@attrs.frozen
class Series:
    """Bars of a plot: a value for each label; series of one panel are drawn beside each other."""

    name: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    panel: str = ""


@attrs.frozen(kw_only=True)
class Artefact:
    """A table or a figure.

    Parameters
    ----------
    key : str
        One of :data:`ARTEFACTS`.
    columns : mapping of str to str
        Names of the cells, each with its unit and ``[A]`` where ours rests on an assumption.
    notes : tuple of str
        What is assumed, and what the paper leaves open.
    series : tuple of Series
        What a plot shows; empty for a table of numbers alone.
    statement : float or None
        A value of the paper's text, drawn as a line.
    """

    key: str
    title: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    series: tuple[Series, ...] = ()
    statement: float | None = None
    axis: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data for JSON; deviations are of 1."""
        data = attrs.asdict(self)
        for row, made in zip(self.rows, data["rows"], strict=True):
            for name, cell in row.cells.items():
                made["cells"][name]["deviation"] = cell.deviation
        return data


# -- what is measured ------------------------------------------------------------------------------


def workload_of(record: zoo.Record) -> Workload | None:
    """Give the row of the paper's tables that a network of the zoo belongs to, if to one."""
    quantized = record.recipe.get("quantization")
    network = {"vgg16": "VGG16", "resnet18": "ResNet18"}.get(str(record.recipe.get("model")))
    if quantized is None or network is None:
        return None
    data = record.data.split(",")[0]
    return Workload(network, data, quantized["weight_bits"], quantized["activation_bits"])


def zoo_workloads() -> dict[Workload, str]:
    """Give the zoo's networks by the rows that they belong to."""
    found = {workload_of(zoo.record(name)): name for name in zoo.names()}
    return {workload: name for workload, name in found.items() if workload is not None}


@attrs.define
class _Bench:
    """Profiles of workloads, each measured once."""

    arch: MarsArch
    on_profile: Callable[[str], None]
    profiles: dict[str, Profile] = attrs.field(factory=dict)

    def synthetic(self, workload: Workload, spread: str) -> Profile:
        """Give the profile of a random network at the published sparsity."""
        return self._profile(f"{workload}, {spread}", lambda: synthetic(workload, spread))

    def trained(self, name: str) -> Profile:
        """Give the profile of a network of the zoo."""
        return self._profile(f"zoo {name}", lambda: zoo.load(name))

    def _profile(self, key: str, graph: Callable[[], Graph]) -> Profile:
        if key not in self.profiles:
            program = build([NamedGraph.of(graph())], self.arch)
            self.profiles[key] = profile_program(program)
            self.on_profile(key)
        return self.profiles[key]


#: How zero group-sets are spread over the layers.
EVEN, AS_TABLE_IV = "spread evenly", "as Table IV"


def _is_table_4(workload: Workload) -> bool:
    return (workload.network, workload.data) == ("VGG16", "CIFAR-10")


def _spreads(workload: Workload) -> tuple[str, ...]:
    """Give the ways in which zero group-sets are spread over a workload's layers."""
    return (AS_TABLE_IV,) if _is_table_4(workload) else (EVEN, AS_TABLE_IV)


def synthetic(workload: Workload, spread: str) -> Graph:
    """Give a network of random weights with the published share of zero group-sets.

    Parameters
    ----------
    workload : Workload
        A row of Table I: VGG16 or ResNet18. VGG16 on CIFAR-10 has Table IV's shares by layer.
    spread : str
        Of the others' share, which Table II gives: :data:`EVEN` or :data:`AS_TABLE_IV`.
    """
    make = {"VGG16": vgg16, "ResNet18": resnet18}[workload.network]
    widths = {
        "weight_bits": workload.weight_bits,
        "activation_bits": workload.activation_bits,
        "classes": _CLASSES[workload.data],
    }
    if _is_table_4(workload):
        return make(TABLE_IV, **widths)
    (row,) = (row for row in paper.TABLE_II if row.workload == workload)
    if spread == EVEN:
        return make(round(1 - row.sparsity / 100, 6), **widths)
    return make(_scaled(make(TABLE_IV, **widths), row.sparsity / 100), **widths)


def _scaled(graph: Graph, zero: float) -> dict[tuple[int, int], float]:
    """Scale Table IV's shares of group-sets that are left, full at most, to a share of zero ones.

    That share is of all layers of Table IV's channels, whatever their kernels.
    """
    sizes = dict.fromkeys(TABLE_IV, 0)
    for layer in graph.layers:
        for term in layer.terms if isinstance(layer, Conv) else ():
            channels = (term.weight.shape[1], term.weight.shape[0])
            if channels in sizes:
                sizes[channels] += term.weight.size
    wanted = (1 - zero) * sum(sizes.values())
    low, high = 0.0, 1 / min(TABLE_IV.values())
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        left = sum(size * min(1, middle * TABLE_IV[key]) for key, size in sizes.items())
        low, high = (middle, high) if left < wanted else (low, middle)
    return {key: min(1.0, high * share) for key, share in TABLE_IV.items()}


def _short(workload: Workload) -> str:
    data = workload.data.replace("CIFAR-", "C")
    widths = f"w{workload.weight_bits}a{workload.activation_bits}"
    return f"{workload.network} {data} {widths}"


_SPARSITIES = (
    "networks of random weights: VGG16 C10 has Table IV's zero group-sets at either width, others "
    "Table II's share of them, spread over the layers evenly or in Table IV's proportions; what "
    "the paper's layers have is not known [A]"
)
_LOADS = "[A] rests on assumed rates of loading weights, and on the energy of a macro access"


# -- tables ----------------------------------------------------------------------------------------


def _table_1(bench: _Bench) -> Artefact:
    def cells(row: paper.SpeedRow, profile: Profile) -> dict[str, Cell]:
        return {
            "fps": Cell(row.fps, profile.fps),
            "gops": Cell(row.gops, profile.paper_gops),
            "tops_per_watt": Cell(row.tops_per_watt, profile.paper_tops_per_watt, 1),
        }

    rows, trained = [], zoo_workloads()
    best, peak = 0.0, 0.0
    for row in paper.TABLE_I:
        for spread in _spreads(row.workload):
            profile = bench.synthetic(row.workload, spread)
            rows.append(Row(_short(row.workload), spread, cells(row, profile)))
            best = max(best, profile.paper_tops_per_watt or 0)
            peak = max([peak, *map(_efficiency, profile.paper_layers)])
        if row.workload in trained:
            name = trained[row.workload]
            rows.append(Row(_short(row.workload), f"zoo {name}", cells(row, bench.trained(name))))
    values = {"best average of a network": best, "peak": peak}
    for stated in _statements("table1"):
        cell = Cell(stated.value, values[stated.what], 1)
        rows.append(Row(stated.what, "random weights", {"tops_per_watt": cell}))
    operations = {
        row.workload.network: bench.synthetic(row.workload, AS_TABLE_IV).paper_operations / 1e6
        for row in paper.TABLE_I
    }
    counted = ", ".join(
        f"{name} {value:,.3f} M (paper {paper.COUNTED_OPERATIONS[name]:,.3f} M)"
        for name, value in operations.items()
    )
    return Artefact(
        key="table1",
        title="Table I: speed and efficiency of one image at a time",
        columns={"fps": "FPS [A]", "gops": "GOPS [A]", "tops_per_watt": "TOPS/W [A]"},
        rows=tuple(rows),
        notes=(
            _SPARSITIES,
            _LOADS,
            f"operations, of 3x3 convolutions with 64 inputs or more: {counted}",
            "TOPS/W: macros alone; ours of FPS includes the first layer, which the paper's "
            "operations leave out",
        ),
        series=(
            Series(
                "the paper",
                tuple(_short(row.workload) for row in paper.TABLE_I),
                tuple(row.fps for row in paper.TABLE_I),
            ),
            *_bars(bench, lambda profile: profile.fps),
        ),
        axis="images a second",
    )


def _bars(bench: _Bench, value: Callable[[Profile], float]) -> Iterator[Series]:
    """Give a value of every workload of Table I, by the spread of its zero group-sets."""
    for spread in (EVEN, AS_TABLE_IV):
        workloads = [row.workload for row in paper.TABLE_I if spread in _spreads(row.workload)]
        values = tuple(value(bench.synthetic(workload, spread)) for workload in workloads)
        yield Series(spread, tuple(map(_short, workloads)), values)


def _efficiency(layer: LayerProfile) -> float:
    return 2 * layer.paper_macs / layer.energy.macros if layer.energy.macros else 0.0


def _table_2(bench: _Bench) -> Artefact:
    trained = zoo_workloads()
    rows = []
    for row in paper.TABLE_II:
        name = trained.get(row.workload)
        ours: tuple[float | None, ...] = (None, None, None)
        if name is not None:
            record, zero = zoo.record(name), compression(zoo.load(name)).zero_share
            ours = (100 * record.dense_accuracy, 100 * record.accuracy, 100 * zero)
        cells = {
            "dense": Cell(row.dense, ours[0], 2),
            "sparse": Cell(row.sparse, ours[1], 2),
            "zero": Cell(row.sparsity, ours[2], 1),
        }
        rows.append(Row(_short(row.workload), f"zoo {name}" if name else NOT_RUN, cells))
    return Artefact(
        key="table2",
        title="Table II: accuracy of dense and of pruned networks",
        columns={"dense": "dense %", "sparse": "pruned %", "zero": "zero %"},
        rows=tuple(rows),
        notes=(
            "zero: share of zero group-sets, ours of all layers with the first and last",
            "the paper trains 400 epochs; `mars zoo info NAME` tells the recipe of ours",
        ),
    )


def _table_3(bench: _Bench) -> Artefact:
    rows = tuple(
        Row(
            _short(row.workload),
            NOT_RUN,
            {"dorefa": Cell(row.dorefa, None, 2), "mars": Cell(row.mars, None, 2)},
        )
        for row in paper.TABLE_III
    )
    return Artefact(
        key="table3",
        title="Table III: accuracy of dense networks, by how batch norm is treated",
        columns={"dorefa": "DoReFa without BN %", "mars": "folded %"},
        rows=rows,
        notes=(
            "the zoo's dense twins are not comparable: they are trained for fewer epochs, in "
            "float; Table II has their accuracies",
        ),
    )


def _table_4(bench: _Bench) -> Artefact:
    graph = vgg16()
    packed = pack(graph, bench.arch)
    rows = []
    for row in paper.TABLE_IV:
        layer = _layer_of(graph, row)
        stored = packed[layer.name].group_sets
        index = stored * 8 * isa.CODE_BYTES / KILO
        weight = stored * bench.arch.group_set_weights * packed[layer.name].weight_bits / KILO
        original = layer.terms[0].weight.size * packed[layer.name].weight_bits / MEGA
        cells = {
            "index": Cell(row.index_kb, index, 2, "index_kb" in row.misprints),
            "weight": Cell(row.weight_kb, weight, 2, "weight_kb" in row.misprints),
            "compression": Cell(
                row.compression,
                original * KILO / (index + weight),
                2,
                "compression" in row.misprints,
            ),
        }
        name = f"{row.inputs}x{row.outputs}"
        rows.append(Row(name, f"{row.zero:g} % zero", cells))
    return Artefact(
        key="table4",
        title="Table IV: what is stored of VGG16's layers, CIFAR-10, 8 bits",
        columns={"index": "index Kb", "weight": "weight Kb", "compression": "compression"},
        rows=tuple(rows),
        notes=(
            "ours stores whole group-sets, the paper's cells follow from fractional counts",
            "!: contradicts the rule that gives all other cells of the paper's, a misprint",
        ),
    )


def _layer_of(graph: Graph, row: LayerRow) -> Conv:
    """Give the first 3x3 layer of a row's channels."""
    shape = (row.outputs, row.inputs, 3, 3)
    for layer in graph.layers:
        if isinstance(layer, Conv) and layer.terms[0].weight.shape == shape:
            return layer
    raise ValueError(f"no layer of {shape}")


# -- figures ---------------------------------------------------------------------------------------


_FIGURES = (
    "of the paper's figures only statements of its text are known here; which of 10 and 11 shows "
    "which is assumed [A]"
)


def _statements(key: str) -> Iterator[paper.Statement]:
    return (stated for stated in paper.STATEMENTS if stated.artefact == key)


def _figure_10(bench: _Bench) -> Artefact:
    gains = {
        (row.workload, spread): bench.synthetic(row.workload, spread).speedup or 0.0
        for row in paper.TABLE_I
        for spread in _spreads(row.workload)
    }
    (stated,) = _statements("fig10")
    most = max(gain for (workload, _), gain in gains.items() if _is_table_4(workload))
    rows = [Row(stated.what, "random weights", {"speedup": Cell(stated.value, most, 1)})]
    rows += [
        Row(_short(workload), spread, {"speedup": Cell(None, gain, 1)})
        for (workload, spread), gain in gains.items()
    ]
    for workload, name in zoo_workloads().items():
        gain = bench.trained(name).speedup
        rows.append(Row(_short(workload), f"zoo {name}", {"speedup": Cell(None, gain, 1)}))
    return Artefact(
        key="fig10",
        title="Fig. 10: speed-up over the same hardware without zero skipping",
        columns={"speedup": "times [A]"},
        rows=tuple(rows),
        notes=(_FIGURES, _SPARSITIES, _LOADS),
        series=tuple(_bars(bench, lambda profile: profile.speedup or 0.0)),
        statement=stated.value,
        axis="times the baseline's speed",
    )


def _figure_11(bench: _Bench) -> Artefact:
    rows, series = [], []
    for stated in _statements("fig11"):
        network = stated.what.partition(":")[0]
        most = 0.0
        own = []
        workloads = [row.workload for row in paper.TABLE_I if row.workload.network == network]
        for workload in workloads:
            ratios = _access_ratios(synthetic(workload, AS_TABLE_IV), bench.arch)
            layer = max(ratios, key=lambda name: ratios[name])
            most = max(most, ratios[layer])
            name = _short(workload)
            own.append(
                Row(f"{name}: {layer}", AS_TABLE_IV, {"accesses": Cell(None, ratios[layer])})
            )
            if workload.data == "CIFAR-10":
                series.append(Series(name, tuple(ratios), tuple(ratios.values()), network))
        rows.append(Row(stated.what, "random weights", {"accesses": Cell(stated.value, most)}))
        rows += own
    return Artefact(
        key="fig11",
        title="Fig. 11: feature-map accesses of the baseline over those of MARS, by layer",
        columns={"accesses": "times"},
        rows=tuple(rows),
        notes=(
            _FIGURES,
            _SPARSITIES,
            "accesses: reads and writes of the cores' bank ports; a layer writes as much in "
            "either, which bounds the ratio",
        ),
        series=tuple(series),
        axis="times fewer accesses",
    )


def _access_ratios(graph: Graph, arch: MarsArch) -> dict[str, float]:
    """Give the baseline's accesses over MARS's, by layer with weights."""
    region = build_region(NamedGraph.of(graph), arch, with_weights=False)
    sparse = simulate(region, arch).layers
    dense = {layer.name: layer for layer in simulate(*dense_baseline(region, arch)).layers}
    found = {}
    for layer in sparse:
        other = dense.get(layer.name)
        accesses = layer.counters.map_reads + layer.counters.map_writes
        if other is not None and layer.macro_cycles and accesses:
            total = other.counters.map_reads + other.counters.map_writes
            found[layer.name] = total / accesses
    return found


def _figure_12(bench: _Bench) -> Artefact:
    study = read_study()
    trials = study.by_channels()
    first = trials[0]
    losses = ", ".join(
        f"{100 * (first.accuracy - trial.accuracy):.2f} at N = {trial.channels}"
        for trial in trials[1:]
    )
    rows = [
        Row(stated.what, STATED, {"points": Cell(stated.value, None)})
        for stated in _statements("fig12")
    ]
    rows += [
        Row(
            f"N = {trial.channels}",
            f"{study.network} w{study.weight_bits}a{study.activation_bits}",
            {
                "pruned": Cell(None, 100 * trial.pruned, 2),
                "accuracy": Cell(None, 100 * trial.accuracy, 2),
                "zero": Cell(None, 100 * trial.zero, 2),
            },
        )
        for trial in trials
    ]
    shown = {
        "zero group-sets of 16 x 16": [100 * trial.zero for trial in trials],
        "accuracy": [100 * trial.accuracy for trial in trials],
    }
    labels = tuple(f"N = {trial.channels}" for trial in trials)
    return Artefact(
        key="fig12",
        title="Fig. 12: pruned together, 16 kernels x N channels",
        columns={
            "points": "points",
            "pruned": "pruned %",
            "accuracy": "test %",
            "zero": "zero %",
        },
        rows=tuple(rows),
        notes=(
            "the paper tells by how much less can be pruned; here the share is the same for each "
            f"N, and the cost is accuracy: in points against N = 1, {losses}",
            "zero: group-sets of 16 x 16, which are what MARS skips, in the layers that are pruned",
            f"measured by {study.benchmark}: {study.data}, {study.dense_epochs} epochs dense "
            f"({100 * study.dense_accuracy:.2f} %), then {study.epochs} quantized and pruned, one "
            "seed; docs/training.md has more",
        ),
        series=tuple(Series(name, labels, tuple(values)) for name, values in shown.items()),
        axis="%",
    )


#: What makes each artefact, by its name.
ARTEFACTS: Mapping[str, Callable[[_Bench], Artefact]] = {
    "table1": _table_1,
    "table2": _table_2,
    "table3": _table_3,
    "table4": _table_4,
    "fig10": _figure_10,
    "fig11": _figure_11,
    "fig12": _figure_12,
}


def reproduce(
    keys: Sequence[str],
    arch: MarsArch,
    *,
    on_profile: Callable[[str], None] = lambda name: None,
) -> tuple[Artefact, ...]:
    """Compute tables and figures of the paper.

    Parameters
    ----------
    keys : sequence of str
        Of :data:`ARTEFACTS`.
    arch : MarsArch
        The machine.
    on_profile : callable
        Told the name of each network that was profiled.

    Examples
    --------
    >>> from mars_runtime import PRESETS
    >>> (table,) = reproduce(["table4"], PRESETS["mars"])
    >>> table.rows[0].cells["index"]
    Cell(paper=2.14, ours=2.140625, digits=2, misprint=False)
    """
    bench = _Bench(arch, on_profile)
    return tuple(ARTEFACTS[key](bench) for key in keys)
