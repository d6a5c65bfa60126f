"""MARS as a target of this process's tvmc, whichever way that was started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tvm
from tvm.driver.tvmc import TVMCException, frontends
from tvm.driver.tvmc.composite_target import REGISTERED_CODEGEN

from mars_runtime import load_arch
from mars_runtime.errors import MarsError

from ..cli.base import write_text
from ..frontend.relay import import_model, offload_report, partition_for_mars

__all__ = ["NAME", "mars_options", "partition", "register"]

NAME = "mars"

# Options of the target beside the fields of CompileOptions.
CHANGES = "set"  # pairs of a field of the machine and its value
DUMP = "dump_offloads"  # where to write what became of every operator: a path, or - for stdout

_OPTIONS: ContextVar[Mapping[str, Any]] = ContextVar("mars_tvmc_options")


@contextmanager
def mars_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Give the target options, beside those that the text of the target holds."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def register() -> None:
    """Make MARS a target of this process's tvmc, and let it import ONNX models for MARS."""
    REGISTERED_CODEGEN[NAME] = {"config_key": None, "pass_pipeline": partition}
    known = frontends.ALL_FRONTENDS
    known[:] = [_OnnxFrontend if entry.name() == "onnx" else entry for entry in known]


def partition(
    mod: tvm.IRModule,
    params: Mapping[str, Any] | None = None,
    mod_name: str = "default",
    **given: Any,
) -> tvm.IRModule:
    """Partition a module for MARS, as tvmc calls it with the options of the target.

    Raises
    ------
    TVMCException
        If an option is unknown or bad.
    """
    options = {name.replace("-", "_"): value for name, value in given.items()}
    options |= _OPTIONS.get({})
    dump = options.pop(DUMP, None)
    changes = options.pop(CHANGES, None)
    try:
        if changes:
            options["arch"] = load_arch(options.get("arch", NAME), dict(changes))
        mod = partition_for_mars(mod, params, mod_name, **options)
    except MarsError as error:
        raise TVMCException(str(error)) from error
    if dump:
        write_text(str(offload_report(mod)), dump)
    return mod


class _OnnxFrontend:
    """ONNX models, with what TVM's importer needs and ONNX lets one leave out."""

    @staticmethod
    def name() -> str:
        """Name of the format."""
        return "onnx"

    @staticmethod
    def suffixes() -> list[str]:
        """Suffixes of its files."""
        return ["onnx"]

    def load(
        self, path: str, shape_dict: Mapping[str, Sequence[Any]] | None = None, **options: Any
    ) -> tuple[tvm.IRModule, dict[str, Any]]:
        """Import a model; its parameters are constants of the module."""
        if options:  # of a caller who wants something else of TVM's importer
            plain: tuple[tvm.IRModule, dict[str, Any]] = frontends.OnnxFrontend().load(
                path, shape_dict, **options
            )
            return plain
        for name, shape in (shape_dict or {}).items():
            if not all(isinstance(size, int) for size in shape):
                raise TVMCException(
                    f"input {name}: a size is open (Relay compiles for one shape: give the batch "
                    "in --input-shapes)"
                )
        try:
            return import_model(path, shape_dict), {}
        except MarsError as error:
            raise TVMCException(str(error)) from error
