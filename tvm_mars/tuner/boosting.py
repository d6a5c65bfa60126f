"""XGBoost's ensemble of trees, in this process or, where that is not safe, in one of its own.

A TVM with Relay makes the symbols of its library global. Among them are instances of the C++
library's templates that are not those of XGBoost's build. XGBoost, loaded after it, calls TVM's,
and crashes.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mars_runtime.errors import MarsError

__all__ = ["Elsewhere", "ModelError", "fit", "predict", "require_xgboost"]

Array = npt.NDArray[Any]

_THREADS = {"nthread": 1}
_PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 4,
    "eta": 0.2,
    "min_child_weight": 0,
    # There are more features than measured points: each tree sees some of both.
    "colsample_bytree": 0.3,
    "subsample": 0.7,
    "tree_method": "exact",
    **_THREADS,
}
_ROUNDS = 60
_SIZE_BYTES = 8


class ModelError(MarsError):
    """The cost model cannot be used."""


def require_xgboost() -> None:
    """Check that XGBoost is installed.

    Raises
    ------
    ModelError
        If it is not.
    """
    if importlib.util.find_spec("xgboost") is None:
        raise ModelError(
            "needs XGBoost",
            where="cost model xgb",
            hint="pip install xgboost-cpu, or search with the cost model none",
        )


def fit(rows: Array, worth: Array, seed: int) -> Array:
    """Learn what each row of features is worth; gives the ensemble, as bytes.

    Raises
    ------
    ModelError
        If the process that does it is lost.
    """
    return _call(_fit, rows=rows, worth=worth, seed=np.array(seed))


def predict(ensemble: Array, rows: Array) -> Array:
    """Give a score for each row, larger for what is worth more; raises as :func:`fit`."""
    return _call(_predict, ensemble=ensemble, rows=rows)


def _fit(rows: Array, worth: Array, seed: Array) -> Array:
    import xgboost

    data = xgboost.DMatrix(rows, label=worth)
    booster = xgboost.train(_PARAMETERS | {"seed": int(seed)}, data, _ROUNDS)
    return np.frombuffer(booster.save_raw("ubj"), np.uint8)


def _predict(ensemble: Array, rows: Array) -> Array:
    import xgboost

    booster = xgboost.Booster(_THREADS)
    booster.load_model(bytearray(ensemble))
    return np.asarray(booster.predict(xgboost.DMatrix(rows)), np.float64)


# -- elsewhere -------------------------------------------------------------------------------------

_elsewhere: list[Elsewhere] = []  # started when it is first needed


def _call(function: Callable[..., Array], **given: Array) -> Array:
    if "tvm.relay" not in sys.modules:
        return function(**given)
    if not _elsewhere:
        _elsewhere.append(Elsewhere())
    try:
        return _elsewhere[0].call(function, **given)
    except ModelError:
        _elsewhere.clear()
        raise


class Elsewhere:
    """A process without TVM that calls functions of this module."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        atexit.register(self.close)

    def call(self, function: Callable[..., Array], **given: Array) -> Array:
        """Call a function there.

        Raises
        ------
        ModelError
            If the process is lost.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            _send(self.process.stdin, function=np.array(function.__name__), **given)
            return _receive(self.process.stdout)["result"]
        except (BrokenPipeError, EOFError):
            raise ModelError(
                f"its process ended with code {self.process.wait()}",
                where="cost model xgb",
                hint="see what it printed; --resume goes on from what was measured",
            ) from None

    def close(self) -> None:
        """End the process, which does so where its input ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _send(file: IO[bytes], **arrays: Array) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    file.write(len(data).to_bytes(_SIZE_BYTES, "little") + data)
    file.flush()


def _receive(file: IO[bytes]) -> dict[str, Array]:
    size = file.read(_SIZE_BYTES)
    if len(size) < _SIZE_BYTES:
        raise EOFError
    data = file.read(int.from_bytes(size, "little"))
    with np.load(io.BytesIO(data)) as arrays:
        return dict(arrays)


def _serve() -> None:
    """Call what an :class:`Elsewhere` asks for, until it asks no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process ends this one
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever is printed is no answer
    functions = {function.__name__: function for function in (_fit, _predict)}
    while True:
        try:
            asked = _receive(given)
        except EOFError:
            return
        _send(answers, result=functions[str(asked.pop("function"))](**asked))


if __name__ == "__main__":
    _serve()
