"""The command line ``mars``.

Commands live in modules of their own, imported when they are called: ``mars --help`` needs nothing
but this file and click.

Exit codes: 0 success; 1 an error in the input, with the remedy on stderr; 2 a wrong command line;
130 an interrupt; 141 a reader of stdout that went away. stdout carries data, stderr what is said
about it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

import click

__all__ = ["main", "mars"]

# Name: the module that holds the command of that name, and what the overview says.
_COMMANDS = {
    "compile": ("compiling", "Compile an ONNX model for MARS."),
    "quantize": ("quantizing", "Quantize a float ONNX model, without training it."),
    "reproduce": ("reproducing", "Compute the paper's tables and figures beside the paper's."),
    "tune": ("tuning", "Search for faster schedules of a model."),
    "run": ("running", "Run a compiled model on the simulated MARS."),
    "eval": ("evaluating", "Run a test set: accuracy and images per second."),
    "explain": ("explaining", "Say why a model costs what it costs, and what could change it."),
    "diff": ("differing", "Find the first code at which engines differ, with its operands."),
    "profile": ("profiling", "Say what an image costs: cycles, stalls, accesses, energy."),
    "report": ("reporting", "The same with pictures, as one HTML page."),
    "disasm": ("assembly", "Print a program as assembly."),
    "asm": ("assembly", "Assemble a text, on its own or into a program."),
    "arch": ("architecture", "Print the machine: every field, its unit, source, meaning."),
    "train": ("training", "Train a network: quantization-aware, pruned by group-sets."),
    "zoo": ("zoo", "Trained networks: list, describe, export, evaluate."),
    "doctor": ("doctoring", "Say what is installed, and what each part is for."),
    "ops": ("operators", "Print which operators MARS takes, and their limits."),
}

INTERRUPTED = 130


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[cmd_name][0]}", __name__)
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], _COMMANDS, 1)
        if args[0] not in _COMMANDS and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"mars {version('tvm-mars')}")
    except PackageNotFoundError:
        click.echo("mars, not installed (running from its sources)")
    ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and leave.",
)
def mars() -> None:
    """Compile CNNs for MARS, an SRAM compute-in-memory accelerator, and simulate them.

    \b
    From a quantized ONNX model to its cost:
      mars compile net.onnx -o net.so --program net.mars
      mars run net.so --inputs images.npz -o results.npz
      mars profile net.mars

    `mars COMMAND --help` explains a command, with an example.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    try:
        code = mars.main(args, prog_name="mars", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("error: interrupted", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0
