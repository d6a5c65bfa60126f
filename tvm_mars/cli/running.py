"""``mars run``."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from mars_runtime import InputError, Program, run

from ..frontend.ports import read_arrays
from .base import MarsCommand, engine_option, progress_bar, write_file

__all__ = ["run_command"]

Arrays = dict[str, npt.NDArray[Any]]

# Images that are run between two updates of the progress bar.
CHUNK = 128


@click.command("run", cls=MarsCommand)
@click.argument("model", metavar="OUT.so|OUT.mars")
@click.option(
    "-i", "--inputs", "source", required=True, metavar="X.npz", help="Arrays by input name."
)
@click.option(
    "-o", "--output", required=True, metavar="Y.npz", help="File to write: arrays by output name."
)
@engine_option
def run_command(model: str, source: str, output: str, engine: str | None) -> None:
    """Run a model on a batch of images, on the simulated MARS.

    X.npz holds an array [N, ...] for each input of the model, under the name that it has in the
    ONNX model; Y.npz will hold the outputs likewise. A program (.mars) runs if all of the model is
    on MARS, a library (.so) always.

    \b
    Example, from images in Python to results:
      python -c "import numpy; numpy.savez('x.npz', x0=images)"
      mars run net.so --inputs x.npz -o y.npz
      python -c "import numpy; print(numpy.load('y.npz')['y0'].argmax(1))"
    """
    arrays = read_arrays(source)
    if model.endswith(".mars"):
        results = _run_program(model, arrays, engine)
    else:
        results = _run_library(model, arrays, engine)
    buffer = io.BytesIO()
    np.savez(buffer, **results)  # type: ignore[arg-type]
    write_file(output, buffer.getvalue())
    shapes = ", ".join(f"{name} {array.shape}" for name, array in results.items())
    click.echo(f"wrote {output}: {shapes}", err=True)


def _run_program(path: str, arrays: Arrays, engine: str | None) -> Mapping[str, npt.NDArray[Any]]:
    program = Program.load(path)
    batches = {len(array) for array in arrays.values() if array.ndim}
    if len(batches) != 1 or max(batches) <= CHUNK:
        return run(program, arrays, engine=engine)
    count = max(batches)
    parts = []
    with progress_bar(count) as progress:
        for at in range(0, count, CHUNK):
            chunk = {name: array[at : at + CHUNK] for name, array in arrays.items()}
            parts.append(run(program, chunk, engine=engine))
            progress(min(count, at + CHUNK))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _run_library(path: str, arrays: Arrays, engine: str | None) -> Mapping[str, npt.NDArray[Any]]:
    if not Path(path).is_file():
        raise InputError("no such file", where=path)
    if path.endswith(".onnx"):
        raise InputError("is not compiled", where=path, hint=f"mars compile {path} -o net.so")
    from ..frontend import adapter  # imports TVM

    if engine:  # a library calls the runtime by itself
        os.environ["MARS_ENGINE"] = engine
    loaded: Mapping[str, npt.NDArray[Any]] = adapter().load_library(path).run(arrays)
    return loaded
