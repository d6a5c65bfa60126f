"""``mars disasm`` and ``mars asm``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from mars_runtime import InputError, Program, ProgramError, isa

from .base import MarsCommand, write_file, write_text

if TYPE_CHECKING:
    from mars_runtime import Region

__all__ = ["asm_command", "disasm_command"]


@click.command("disasm", cls=MarsCommand)
@click.argument("program", metavar="OUT.mars")
@click.option("-o", "--output", metavar="OUT.s", help="File to write; stdout if not given.")
@click.option("--region", type=click.IntRange(0), help="The only region to print.")
def disasm_command(program: str, output: str | None, region: int | None) -> None:
    """Print the instructions of a program as assembly.

    A line is `NAME field=value ...`; fields at their default are left out; `#` starts a comment.
    The instruction set is described in docs/isa.md, and `mars asm` reads the text back.

    \b
    Example:
      mars disasm net.mars -o net.s
    """
    loaded = Program.load(program)
    numbers = range(len(loaded.regions)) if region is None else [region]
    lines = [line for n in numbers for line in _region_lines(n, _region(loaded, n, program))]
    write_text("\n".join(lines), output)


def _region(program: Program, number: int, where: str) -> Region:
    if number >= len(program.regions):
        raise InputError(
            f"has no region {number}", where=where, hint=f"it has {len(program.regions)}"
        )
    return program.regions[number]


def _region_lines(number: int, region: Region) -> Iterator[str]:
    yield f"# region {number}: {', '.join(port.name for port in region.inputs)} -> " + ", ".join(
        port.name for port in region.outputs
    )
    text = list(isa.disassemble(region.instructions))
    at = 0
    for layer in region.layers:
        stored = f", {layer.group_sets} of {layer.dense_group_sets} group-sets"
        yield ""
        yield f"# {layer.name} ({layer.kind}{stored if layer.dense_group_sets else ''})"
        yield from text[layer.start : layer.stop]
        at = layer.stop
    if text[at:]:
        yield ""
        yield from text[at:]


@click.command("asm", cls=MarsCommand)
@click.argument("source", metavar="IN.s")
@click.option("-o", "--output", required=True, metavar="OUT", help="File to write.")
@click.option(
    "--program",
    metavar="OUT.mars",
    help="Program whose instructions are replaced; without it, OUT holds the bare instructions.",
)
@click.option(
    "--region", type=click.IntRange(0), help="Region that is replaced; needed if there are several."
)
def asm_command(source: str, output: str, program: str | None, region: int | None) -> None:
    """Assemble a text.

    Without --program the output is the encoded instructions, 40 bytes each. With it, the output is
    the program with the instructions of one region replaced; weights, index codes and ports stay.

    \b
    Example: look at a program, change it, see what that does to its time:
      mars disasm net.mars -o net.s
      mars asm net.s --program net.mars -o changed.mars
      mars profile changed.mars
    """
    if region is not None and program is None:
        raise click.UsageError("--region needs --program")
    code = isa.encode_all(_assemble(source))
    if program is None:
        write_file(output, code)
        return
    loaded = Program.load(program)
    if region is None and len(loaded.regions) != 1:
        raise click.UsageError(f"{program} has {len(loaded.regions)} regions: name one by --region")
    number = region or 0
    old = _region(loaded, number, program)
    regions = list(loaded.regions)
    regions[number] = _with_code(old, code)
    data = attrs.evolve(loaded, regions=tuple(regions)).to_bytes()
    Program.from_bytes(data, source)  # what does not make a good program is not written
    write_file(output, data)


def _assemble(source: str) -> tuple[isa.Instruction, ...]:
    try:
        text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"is no text: {error.reason}", where=source) from None
    return isa.assemble(text)


def _with_code(region: Region, code: bytes) -> Region:
    if len(code) == len(region.code):
        return attrs.evolve(region, code=code)
    click.echo(
        "note: the number of instructions changed, so that they no longer divide into the "
        "program's layers; its profile has one row",
        err=True,
    )
    return attrs.evolve(region, code=code, layers=())
