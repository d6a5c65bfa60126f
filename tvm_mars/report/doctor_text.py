"""What `mars doctor` found, as text at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from rich.console import RenderableType
from rich.table import Table

from ..doctor import Findings
from .layout import new_table, print_parts

__all__ = ["print_findings"]


def print_findings(found: Findings, file: IO[str]) -> None:
    """Print it."""
    print_parts(_parts(found), file)


def _parts(found: Findings) -> Iterator[RenderableType]:
    yield f"tvm-mars   {found.tvm_mars or 'not installed, running from its sources'}"
    yield f"Python     {found.python}"
    yield f"system     {found.system}"
    yield f"processor  {found.processor}, {found.cores} cores for this process"
    yield f"features   {', '.join(found.features) or 'none known that matter'}"
    yield f"TVM        {_tvm(found)}"
    yield f"compiler   {found.compiler or 'none: mars compile -o needs g++ or clang++, or CXX'}"
    yield ""
    yield _packages(found)
    yield ""
    if not found.caches:
        yield "caches: MARS_CACHE_DIR is empty, so none are kept on disk"
    for cache in found.caches:
        yield f"cache of {cache.name}: {cache.files:,} files, {cache.bytes / 1024:,.0f} KiB"
        yield f"  {cache.path}"


def _tvm(found: Findings) -> str:
    if found.tvm == "none":
        return (
            "none: mars compile, explain, diff, tune and quantize need it; pip install apache-tvm "
            "(Relax), or hhb-tvm (Relay) with CPython 3.10"
        )
    version = found.tvm_version or "of unknown version"
    broken = f"; it does not import: {found.tvm_problem}" if found.tvm_problem else ""
    return f"{found.tvm}, {version}{broken}"


def _packages(found: Findings) -> Table:
    table = new_table("Packages", "package")
    for name in ("version", "what for", "if missing"):
        table.add_column(name, overflow="fold")
    for package in found.packages:
        remedy = (
            f"pip install '.[{package.extra}]'" if package.extra else f"pip install {package.name}"
        )
        missing = package.version is None
        version = "missing" if missing else str(package.version)
        table.add_row(package.name, version, package.purpose, remedy if missing else "")
    return table
