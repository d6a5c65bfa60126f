"""``mars diff``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import CommandError, MarsCommand, arch_options, read_arch, write_text
from .compiling import check_model

if TYPE_CHECKING:
    from mars_runtime import MarsArch, Program

    from ..difference import Engine
    from ..frontend.partition import Partition

__all__ = ["diff_command"]

DIFFERENT, TROUBLE = 1, 2  # the exit codes of diff


class _Trouble(CommandError):
    exit_code = TROUBLE


class _DiffCommand(MarsCommand):
    """A command whose errors end it as those of ``diff`` do."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except CommandError as error:
            raise _Trouble(error.message) from None


def _engine_names(_ctx: click.Context, _parameter: click.Parameter, given: str) -> tuple[str, ...]:
    from ..difference import ENGINES

    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        if name not in ENGINES:
            raise click.BadParameter(f"no engine {name!r}: there are {', '.join(ENGINES)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise click.BadParameter("give two or more different engines")
    return names


@click.command("diff", cls=_DiffCommand)
@click.argument("model", metavar="MODEL.onnx")
@click.option(
    "-i", "--inputs", "source", required=True, metavar="X.npz", help="Arrays by input name."
)
@click.option(
    "--engines",
    metavar="A,B,...",
    default="reference,onnxruntime,machine,layers",
    show_default=True,
    callback=_engine_names,
    help="The first is what the others are compared with.",
)
@click.option(
    "--program",
    "program_file",
    metavar="OUT.mars",
    help="What the machine executes; the model compiled anew if not given.",
)
@arch_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead, with all operands.")
def diff_command(
    model: str,
    source: str,
    engines: tuple[str, ...],
    program_file: str | None,
    arch: str,
    changes: dict[str, str],
    as_json: bool,
) -> None:
    """Find the first layer, pixel and channel at which engines give other codes for a model.

    Engines are `onnxruntime` on the model as it is, the integer `reference` in NumPy, the `machine`
    executing the program, and `layers`, the exact engine of `mars run`. Layers are compared in the
    network's order, pixels by image, row, column and channel; with the place come the operands that
    lead to the code: the window of the input, weights, bias, sum, requantization, and the sums that
    would have given the other engine's code. What is left to the CPU is not compared.

    Exit codes are those of diff: 0 no difference, 1 a difference, 2 trouble. For a network that was
    quantized elsewhere one code more or less than onnxruntime is within the specification.

    \b
    Examples:
      mars diff net.onnx --inputs x.npz
      mars diff net.onnx -i x.npz --engines reference,machine --program net.mars
    """
    from ..frontend.ports import read_arrays

    machine = read_arch(arch, changes)
    check_model(model)
    arrays = read_arrays(source)
    from ..difference import compare_engines
    from ..frontend import adapter  # imports TVM
    from ..options import CompileOptions

    ir = adapter()
    # Relay knows no open batch; the graph is that of one image in either.
    shapes = {name: (1, *array.shape[1:]) for name, array in arrays.items()}
    partition = ir.partition_of(
        ir.import_model(model, shapes if ir.IR == "Relay" else {}), CompileOptions(arch=machine)
    )
    if not partition.pieces:
        raise CommandError(f"{model}: nothing of it is on MARS; mars explain says why")
    _check_inputs(partition, arrays)
    made = {
        name: _engine(name, model, partition, arrays, machine, program_file) for name in engines
    }
    found = compare_engines(
        made,
        [piece.graph for piece in partition.pieces],
        arrays,
        operators=[piece.operators for piece in partition.pieces],
    )
    if as_json:
        write_text(json.dumps(found.to_dict(), indent=2), None)
    else:
        from ..report.difference_text import print_comparison

        print_comparison(found, sys.stdout)
    if found.differences:
        sys.exit(DIFFERENT)


def _check_inputs(partition: Partition, arrays: dict[str, Any]) -> None:
    from mars_runtime import InputError

    from ..frontend.ports import require_known

    names = partition.pieces[0].interface.model_inputs
    require_known(names, arrays)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"missing; given are {sorted(arrays)}", where=f"input {missing[0]}")
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"batches of {sorted(sizes)} images", where="inputs")


def _engine(
    name: str,
    model: str,
    partition: Partition,
    arrays: dict[str, Any],
    arch: MarsArch,
    program_file: str | None,
) -> Engine:
    from ..difference import Layers, Machine, OnnxRuntime, Reference

    named = [piece.graph for piece in partition.pieces]
    graphs = [one.graph for one in named]
    if name == "reference":
        return Reference(graphs)
    if name == "layers":
        return Layers(graphs, arch)
    if name == "machine":
        return Machine(_program(partition, arch, program_file), graphs)
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError:
        raise CommandError("needs onnxruntime: pip install onnxruntime") from None
    from ..frontend.onnx_file import read_onnx

    operators = [piece.operators for piece in partition.pieces]
    return OnnxRuntime(read_onnx(Path(model)), named, operators, arrays)


def _program(partition: Partition, arch: MarsArch, path: str | None) -> Program:
    """Give the program of a file, which must be one of this model's graphs, or a new one."""
    from mars_runtime import Program, ProgramError

    from ..skeleton import graph_to_json

    if path is None:
        return partition.build(arch)
    program = Program.load(path)
    networks = [region.network for region in program.regions]
    if networks != [graph_to_json(piece.graph.graph) for piece in partition.pieces]:
        raise ProgramError(
            "is a program of another network than the model",
            where=path,
            hint="compile the model again, or give the model that it was compiled from",
        )
    return program
