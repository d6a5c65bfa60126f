"""``tvmc-mars run``: a package of ``tvmc compile`` in this process, without a server between.

tvmc runs even on this machine through a session of its RPC, which some builds of TVM lack.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from tarfile import ReadError
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm.contrib import graph_executor
from tvm.contrib.debugger import debug_executor
from tvm.driver.tvmc import TVMCException
from tvm.driver.tvmc.model import TVMCPackage, TVMCResult
from tvm.driver.tvmc.result_utils import get_top_results
from tvm.driver.tvmc.runner import make_inputs_dict

from ..cli.base import write_file
from ..frontend.ports import InputSpec, checked, read_arrays, require_known

__all__ = ["drive_run"]

Arrays = Mapping[str, npt.NDArray[Any]]


def drive_run(arguments: argparse.Namespace, original: Callable[[argparse.Namespace], int]) -> int:
    """Run a package as tvmc does.

    Raises
    ------
    TVMCException
        If the package cannot be read.
    InputError
        If the inputs cannot be read, or do not fit the model.
    """
    if arguments.device != "cpu" or arguments.rpc_tracker or arguments.rpc_key:
        return original(arguments)
    package = _package(arguments.PATH)
    inputs = read_arrays(arguments.inputs) if arguments.inputs else {}
    result = _run(package, inputs, arguments)
    # print here is intentional, as it is in tvmc
    if arguments.print_time:
        print(result.format_times())
    if arguments.print_top:
        print(get_top_results(result, arguments.print_top))
    if arguments.outputs:
        _save(result.outputs, arguments.outputs)
    return 0


def _package(path: str) -> TVMCPackage:
    try:
        package = TVMCPackage(package_path=path)
    except IsADirectoryError:
        raise TVMCException(f"File {path} must be an archive, not a directory.") from None
    except FileNotFoundError:
        raise TVMCException(f"File {path} does not exist.") from None
    except ReadError:
        raise TVMCException(
            f"Could not read model from archive {path}! (mars run takes what mars compile wrote)"
        ) from None
    if package.type != "classic":
        raise TVMCException(
            f"File {path} holds a {package.type} package; compile it with --executor graph and "
            "-f so."
        )
    return package


def _run(package: TVMCPackage, inputs: Arrays, arguments: argparse.Namespace) -> TVMCResult:
    library = tvm.runtime.load_module(package.lib_path)
    device = tvm.cpu()
    if arguments.profile:
        executor = debug_executor.create(package.graph, library, device, dump_root="./prof")
    else:
        executor = graph_executor.create(package.graph, library, device)
    executor.load_params(package.params)
    executor.set_input(**_filled(executor, inputs, arguments.fill_mode))
    if arguments.profile:
        print(executor.profile())
    times: Any = []
    if arguments.print_time:
        times = executor.benchmark(
            device,
            number=arguments.number,
            repeat=arguments.repeat,
            end_to_end=arguments.end_to_end,
        )
    else:
        executor.run()
    outputs = {
        f"output_{i}": executor.get_output(i).numpy() for i in range(executor.get_num_outputs())
    }
    return TVMCResult(outputs, times)


def _filled(executor: Any, inputs: Arrays, fill_mode: str) -> Arrays:
    """Give an array for every input: the caller's, or one as ``--fill-mode`` says."""
    shapes, kinds = executor.get_input_info()
    require_known([str(name) for name in shapes], inputs)
    for name in inputs:
        shape = tuple(int(size) for size in shapes[name])
        checked(InputSpec(name, shape, str(kinds[name])), inputs)
    filled: Arrays = make_inputs_dict(shapes, kinds, dict(inputs), fill_mode)
    return filled


def _save(outputs: Arrays, path: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **outputs)  # type: ignore[arg-type]
    # As numpy names it.
    write_file(path if Path(path).suffix == ".npz" else f"{path}.npz", buffer.getvalue())
