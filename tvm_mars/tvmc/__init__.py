"""TVM's command line with MARS among its targets: ``tvmc-mars``, ``python -m tvm_mars.tvmc``.

All commands and options are those of the installed TVM's tvmc. Added are the target ``mars`` with
its options ``--target-mars-...``, a report of what is offloaded, and ONNX models as MARS needs them
imported; ``tune`` for MARS is the search of ``mars tune``. A TVM without tvmc has ``mars compile``,
``mars tune`` and ``mars run``.

Exit codes are tvmc's: 0 success, 1 no command, 2 a wrong command line, 4 an error that names what
is wrong and the remedy.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]

NO_TVMC = 5  # as tvmc's own code where a package that it needs is missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    if not _is_there():
        sys.stderr.write(
            "Error: the installed TVM has no tvmc, which needs Relay (use mars compile, mars tune "
            "and mars run, or install tvm-mars[relay] under CPython 3.10)\n"
        )
        return NO_TVMC
    from tvm.driver.tvmc.main import _main

    from .commands import extend

    extend()
    return int(_main(list(sys.argv[1:] if arguments is None else arguments)) or 0)


def _is_there() -> bool:
    """Tell whether the installed TVM has a tvmc."""
    try:
        return importlib.util.find_spec("tvm.driver.tvmc") is not None
    except ModuleNotFoundError as missing:  # finding a module imports those around it
        if missing.name is None or missing.name.partition(".")[0] != "tvm":
            raise
        return False
