"""Errors of tvm-mars: each names the place, the limit, the value and the remedy."""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = [
    "ArchError",
    "CapacityError",
    "HazardError",
    "InputError",
    "InstructionError",
    "MachineError",
    "MarsError",
    "MemoryAccessError",
    "OptionError",
    "PoisonError",
    "ProgramError",
    "UnsupportedError",
]


class MarsError(Exception):
    """Base of every error that tvm-mars raises on purpose.

    Parameters
    ----------
    problem : str
        What is wrong, with the value and the limit.
    where : str
        The operator, file, field or instruction concerned.
    hint : str
        What the reader can do about it.
    """

    def __init__(self, problem: str, *, where: str = "", hint: str = "") -> None:
        self.problem = problem
        self.where = where
        self.hint = hint
        super().__init__(problem, where, hint)

    def __reduce__(self) -> tuple[Any, ...]:
        # So that one raised in a worker process arrives: Exception would call __init__ with args.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text} ({self.hint})" if self.hint else text


class ArchError(MarsError, ValueError):
    """An architecture description holds an impossible value."""


class OptionError(MarsError, ValueError):
    """An option is unknown or its value cannot be read."""


class UnsupportedError(MarsError):
    """A network holds something that MARS does not take."""


class CapacityError(UnsupportedError):
    """Something does not fit a memory or a field of the machine.

    Parameters
    ----------
    op : str
        The operator or memory concerned.
    need, have : int
        What is needed and what there is, in ``unit``.
    """

    def __init__(
        self, problem: str, *, op: str, need: int, have: int, unit: str = "", hint: str = ""
    ) -> None:
        self.need = need
        self.have = have
        unit = f" {unit}" if unit else ""
        super().__init__(f"{problem}: needs {need}{unit}, has {have}{unit}", where=op, hint=hint)


class InputError(MarsError, ValueError):
    """An array given at run time has the wrong name, shape, dtype or value."""


class ProgramError(MarsError, ValueError):
    """A program file is corrupt, truncated, foreign or of another version."""


class InstructionError(ProgramError):
    """An instruction or index code cannot be encoded or decoded."""


class MachineError(MarsError, RuntimeError):
    """The machine was asked for something that the hardware cannot do."""


class MemoryAccessError(MachineError):
    """An instruction addresses a memory outside its bounds."""


class PoisonError(MachineError):
    """An instruction reads a memory cell that nothing has written."""


class HazardError(MachineError):
    """An instruction touches a cell that another unit is still using: a wait token is missing."""
