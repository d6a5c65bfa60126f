"""Records of measured schedules: two append-only JSON-lines files that survive a crash.

``database_workload.json`` holds a line for each workload (a digest of a graph's structure and of
which group-sets are zero; its name, and its layers'), ``database_tuning_record.json`` one for each
trial, written and synced as soon as it is measured. A last line that a crash has torn is not read,
and the next one replaces it.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import attrs
import cattrs

from mars_runtime.arch import MarsArch
from mars_runtime.errors import MarsError

from ..graph import Graph
from ..pack import PackedConv
from ..schedule import Point, Schedule
from ..schedule.applied import apply_schedules
from ..skeleton import graph_to_json
from .space import Space

__all__ = ["Database", "DatabaseError", "Record", "Workload", "arch_key", "workload_key"]

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
FILES = (WORKLOADS, RECORDS)

_WRITTEN_BY = "mars tune and tvmc-mars tune write them"


class DatabaseError(MarsError, ValueError):
    """A database's files do not hold what they should."""


@attrs.frozen
class Workload:
    """What a workload is called (perhaps nothing), and the names of its layers."""

    name: str
    layers: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Record:
    """One measured schedule.

    ``run`` names the search that measured it and ``trial`` its place there;
    ``layer_cycles`` are the cycles of each layer, a fused pool's with its convolution's;
    ``energy_pj`` rests on the assumptions of the machine's description.
    """

    workload: str
    arch: str
    run: str
    trial: int
    cycles: int
    energy_pj: float
    layer_cycles: tuple[int, ...]
    point: Point

    def cost(self, objective: str) -> float:
        """Give what is to be small: ``cycles``, ``energy`` or ``edp``."""
        return {
            "cycles": float(self.cycles),
            "energy": self.energy_pj,
            "edp": self.cycles * self.energy_pj,
        }[objective]


@attrs.frozen
class _WorkloadLine:
    workload: str
    name: str
    layers: tuple[str, ...]


_Value = TypeVar("_Value", _WorkloadLine, Record)


def workload_key(graph: Graph, packed: Mapping[str, PackedConv]) -> str:
    """Give a digest of all that a graph's time depends on: its structure, its zero group-sets."""
    digest = hashlib.sha256(graph_to_json(graph).encode())
    for layer in graph.layers:
        if layer.name in packed:
            for block in packed[layer.name].blocks:
                for column in (block.terms, block.taps, block.inputs):
                    digest.update(column.astype("<i4").tobytes() + b"|")
    return digest.hexdigest()


def arch_key(arch: MarsArch) -> str:
    """Give a digest of a machine; its name does not matter."""
    fields = {name: value for name, value in arch.to_dict().items() if name != "name"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Database:
    """The records of a directory.

    In a ``with`` block compilations use the best schedule that it holds for their workload and
    machine, by cycles unless ``objective`` says otherwise.

    Raises
    ------
    DatabaseError
        If a line other than a torn last one cannot be read, or a file has the directory's name.
    """

    def __init__(self, directory: str | os.PathLike[str], objective: str = "cycles") -> None:
        self.directory = Path(directory)
        if self.directory.is_file():
            raise DatabaseError(
                "is a file",
                where=str(directory),
                hint=f"records are a directory that holds {' and '.join(FILES)}",
            )
        self.objective = objective
        self.workloads = {
            line.workload: Workload(line.name, line.layers)
            for line in self._values(WORKLOADS, _WorkloadLine)
        }
        self.records = list(self._values(RECORDS, Record))
        self._tokens: list[contextvars.Token[Any]] = []

    @classmethod
    def existing(cls, directory: str | os.PathLike[str], objective: str = "cycles") -> Database:
        """Open a database that has to be there.

        Raises
        ------
        DatabaseError
            As the class does, and if there is no such directory, or none of records.
        """
        if not Path(directory).exists():
            raise DatabaseError("no such directory", where=str(directory), hint=_WRITTEN_BY)
        found = cls(directory, objective)
        if not found.records:
            raise DatabaseError("holds no records", where=str(directory), hint=_WRITTEN_BY)
        return found

    def _values(self, name: str, kind: type[_Value]) -> Iterator[_Value]:
        for line in _lines(self.directory / name):
            try:
                yield _converter().structure(line, kind)
            except (
                cattrs.BaseValidationError,
                KeyError,
                TypeError,
                ValueError,
                AttributeError,
            ) as error:
                raise DatabaseError(
                    f"a record does not make sense: {error}",
                    where=str(self.directory / name),
                    hint="it is of another version, or was edited: tune into another directory",
                ) from None

    def add_workload(self, key: str, workload: Workload) -> None:
        """Note a workload, once."""
        if key in self.workloads:
            return
        line = _WorkloadLine(key, workload.name, workload.layers)
        _append(self.directory / WORKLOADS, _converter().unstructure(line))
        self.workloads[key] = workload

    def add(self, record: Record) -> None:
        """Append a record."""
        _append(self.directory / RECORDS, _converter().unstructure(record))
        self.records.append(record)

    def of(self, workload: str, arch: str) -> list[Record]:
        """Give the records of a workload on a machine, in the order of their writing."""
        return [one for one in self.records if (one.workload, one.arch) == (workload, arch)]

    def best(self, workload: str, arch: str, objective: str | None = None) -> Record | None:
        """Give the best record, the earliest of equals; None if there is none."""
        wanted = objective or self.objective
        return min(self.of(workload, arch), key=lambda one: one.cost(wanted), default=None)

    def best_points(self, workload: str, count: int) -> tuple[Point, ...]:
        """Give the points of the best records of a workload, whatever the machine.

        Costs on different machines say little of each other: each machine gives its best in turn.
        """
        found: list[list[Point]] = []
        for arch in dict.fromkeys(one.arch for one in self.records if one.workload == workload):
            records = sorted(self.of(workload, arch), key=lambda one: one.cost(self.objective))
            found.append(list(dict.fromkeys(one.point for one in records))[:count])
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*found))
        points = dict.fromkeys(point for point in in_turn if point is not None)
        return tuple(points)[:count]

    # -- applied to compilations -----------------------------------------------------------------

    def schedule_for(
        self, graph: Graph, arch: MarsArch, packed: Mapping[str, PackedConv]
    ) -> Schedule | None:
        """Give the best schedule for a graph; None if nothing was recorded for it."""
        best = self.best(workload_key(graph, packed), arch_key(arch))
        return None if best is None else Space(graph, arch, packed, best.point).realize(best.point)

    def __enter__(self) -> Database:
        self._tokens.append(apply_schedules(self.schedule_for))
        return self

    def __exit__(self, *_: object) -> None:
        token = self._tokens.pop()
        token.var.reset(token)


@functools.cache
def _converter() -> Any:
    return cattrs.Converter(forbid_extra_keys=True)


def _lines(path: Path) -> list[Any]:
    """Read a file's whole lines; a last one without its end is torn, or being written."""
    if not path.exists():
        return []
    data = path.read_bytes()
    found = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise DatabaseError(
                f"line {number} is no JSON", where=str(path), hint="tune into another directory"
            ) from None
    return found


def _append(path: Path, value: Any) -> None:
    """Append a line in one write and sync it; a torn line before it is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{json.dumps(value, sort_keys=True)}\n".encode()
    with path.open("a+b") as file:
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(file: IO[bytes]) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
