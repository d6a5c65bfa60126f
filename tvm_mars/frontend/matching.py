"""A language for chains of operators, and the matching of trees against it.

A pattern is data: :class:`Op`, :class:`Const`, :class:`Value` and :class:`Either`. An IR's adapter
translates it into the IR's own pattern language to find chains, and hands each match back as a
tree of :class:`Node`, which :func:`match` reads with the same pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import numpy.typing as npt

from .spec import Spec

__all__ = [
    "Captures",
    "Composite",
    "Const",
    "Either",
    "Node",
    "Op",
    "Pattern",
    "Value",
    "commute",
    "constants",
    "either",
    "match",
    "op",
]

Array: TypeAlias = npt.NDArray[Any]


@attrs.frozen(eq=False)
class Value:
    """A value that is no constant."""

    name: str


@attrs.frozen(eq=False)
class Const:
    """A constant."""

    name: str


@attrs.frozen(eq=False)
class Op:
    """A call of an operator."""

    op: str
    args: tuple[Pattern, ...]
    name: str = ""


@attrs.frozen(eq=False)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Pattern, ...]


Pattern: TypeAlias = Value | Const | Op | Either


@attrs.frozen(eq=False)
class Node:
    """A matched expression: a call, a constant (``op`` is ``const``) or an outer value.

    Parameters
    ----------
    op : str
        One of :data:`OPERATORS`, ``const`` or ``value``.
    shape : tuple of (int or None)
        None where a size is known at run time only.
    attrs : mapping
        The call's attributes.
    value : array, optional
        A constant's elements.
    index : int
        Which operand of the composite an outer value is.
    name : str
        The IR's name of the result, for reports.
    """

    op: str
    args: tuple[Node, ...] = ()
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    attrs: Mapping[str, Any] = attrs.field(factory=dict)
    value: Array | None = None
    index: int = -1
    name: str = ""


Captures: TypeAlias = dict[str, Node]


def op(name: str, *args: Pattern, capture: str = "") -> Op:
    return Op(name, args, capture)


def either(*options: Pattern) -> Either:
    return Either(options)


def commute(name: str, left: Pattern, right: Pattern) -> Either:
    return either(op(name, left, right), op(name, right, left))


def constants(*names: str) -> tuple[Const, ...]:
    return tuple(Const(name) for name in names)


def match(pattern: Pattern, node: Node) -> Captures | None:
    """Match a tree; give its named parts, or None."""
    return next(_solutions(pattern, node, {}), None)


def _solutions(pattern: Pattern, node: Node, found: Captures) -> Iterator[Captures]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _solutions(option, node, found)
        return
    if isinstance(pattern, Op):
        if node.op != pattern.op or len(node.args) < len(pattern.args):
            return
        found = {**found, pattern.name: node} if pattern.name else found
        yield from _all_solutions(pattern.args, node.args, found)
        return
    if isinstance(pattern, Const) != (node.op == "const"):
        return
    yield {**found, pattern.name: node}


def _all_solutions(
    patterns: tuple[Pattern, ...], nodes: tuple[Node, ...], found: Captures
) -> Iterator[Captures]:
    if not patterns:
        yield found
        return
    for first in _solutions(patterns[0], nodes[0], found):
        yield from _all_solutions(patterns[1:], nodes[1:], first)


@attrs.frozen(eq=False)
class Composite:
    """A chain that MARS takes as one.

    Parameters
    ----------
    name : str
        With the compiler's prefix, as in ``mars.qconv2d``.
    pattern : Pattern
        What to look for.
    parse : callable
        From the parts of a match to a spec; ``UnsupportedError`` if MARS does not take it.
    operands : tuple of str
        The captured values that become operands of the spec, in its order.
    doc : str
        What it is, for the list of supported operators.
    border : bool
        Whether it is worth nothing by itself: a conversion at the border of a region.
    """

    name: str
    pattern: Pattern
    parse: Callable[[Captures], Spec]
    operands: tuple[str, ...]
    doc: str
    border: bool = False

    @property
    def operators(self) -> frozenset[str]:
        """The operators that it mentions."""
        return frozenset(_mentioned(self.pattern))


def _mentioned(pattern: Pattern) -> Iterator[str]:
    if isinstance(pattern, Op):
        yield pattern.op
    parts = pattern.args if isinstance(pattern, Op) else getattr(pattern, "options", ())
    for part in parts:
        yield from _mentioned(part)
