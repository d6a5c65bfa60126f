"""``mars arch``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from .base import MarsCommand, read_arch, set_option, write_text

if TYPE_CHECKING:
    from mars_runtime import MarsArch

__all__ = ["arch_command"]

PAPER = "Sie et al., TCAD 2022"
WIDTH = 80


@click.command("arch", cls=MarsCommand)
@click.argument("source", metavar="[PRESET|FILE.toml]", default="mars")
@set_option
@click.option("--list", "as_list", is_flag=True, help="List the presets instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields as JSON.")
@click.option("--toml", "as_toml", is_flag=True, help="Print a file that --arch takes.")
def arch_command(
    source: str, changes: dict[str, str], as_list: bool, as_json: bool, as_toml: bool
) -> None:
    """Print a machine: every field, its value, unit, source and meaning.

    A field's source is the paper that describes MARS, or an assumption of this project. Any of
    them can be changed, for every command, by --set or in a file.

    \b
    Examples:
      mars arch
      mars arch mars-80b --set cores=2
      mars arch --toml --set bank_bits=1048576 > big.toml
      mars compile net.onnx -o net.so --arch big.toml
    """
    if as_list + as_json + as_toml > 1:
        raise click.UsageError("--list, --json and --toml exclude each other")
    if as_list:
        write_text("\n".join(_presets()), None)
        return
    arch = read_arch(source, changes)
    if as_json:
        write_text(json.dumps(_data(arch), indent=2), None)
    elif as_toml:
        write_text("\n".join(_toml(arch)), None)
    else:
        write_text("\n".join(_description(arch)), None)


def _presets() -> Iterator[str]:
    from mars_runtime import PRESETS

    default = PRESETS["mars"].to_dict()
    for name, arch in PRESETS.items():
        changed = {
            field: value
            for field, value in arch.to_dict().items()
            if field != "name" and value != default[field]
        }
        text = ", ".join(f"{field}={_literal(value)}" for field, value in changed.items())
        yield f"{name:<12} {text or 'the default: the machine of the paper, as fitted'}"


def _data(arch: MarsArch) -> dict[str, dict[str, object]]:
    values = arch.to_dict()
    return {
        info.name: {
            "value": values[info.name],
            "unit": info.unit,
            "source": info.source,
            "assumed": info.assumed,
            "meaning": info.doc,
        }
        for info in arch.describe()
    }


def _literal(value: object) -> str:
    """Give a value as TOML writes it, and JSON too."""
    return json.dumps(value)


def _toml(arch: MarsArch) -> Iterator[str]:
    values = arch.to_dict()
    for info in arch.describe():
        unit = f" [{info.unit}]" if info.unit else ""
        yield f"# {info.doc}{unit} {info.source}".rstrip()
        yield f"{info.name} = {_literal(values[info.name])}"


def _description(arch: MarsArch) -> Iterator[str]:
    values = arch.to_dict()
    for info in arch.describe():
        value = values[info.name]
        text = value if isinstance(value, str) else _literal(value)
        # A choice's unit lists the choices; they are no unit.
        unit = "" if isinstance(value, (str, bool)) else info.unit
        yield f"{info.name:<28} {text} {unit}".rstrip()
        yield from textwrap.wrap(info.doc, WIDTH, initial_indent="    ", subsequent_indent="    ")
        if info.source:
            yield f"    {_source(info.source)}"
    yield ""
    yield f"paper: {PAPER}"
    yield "assumed: the paper does not say, and this project chose"


def _source(source: str) -> str:
    """Spell out ``[P]`` and ``[A]``."""
    mark, _, detail = source.partition(" ")
    word = {"[P]": "paper", "[A]": "assumed"}[mark]
    return f"{word}: {detail}" if detail else word
