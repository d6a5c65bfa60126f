"""A comparison of engines as text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from ..difference import Comparison, Difference, Operands, Window
from .layout import new_table, print_parts

__all__ = ["print_comparison"]

PRODUCTS = 8  # of a window, the largest ones


def print_comparison(found: Comparison, file: IO[str]) -> None:
    """Print where engines first differ, with the operands, or that they do not."""
    print_parts(_parts(found), file)


def _parts(found: Comparison) -> Iterator[RenderableType]:
    first, *others = found.engines
    for number, why in found.skipped.items():
        yield f"region {number} is not compared: it {why}"
    for name in others:
        if name in found.differences:
            yield from _difference(found.differences[name], first, name)
        else:
            yield (
                f"{first}, {name}: no difference in {found.compared[name]:,} codes of "
                f"{found.images} images"
            )
        if found.unseen[name]:
            yield f"  not shown by both: {', '.join(found.unseen[name])}"


def _difference(found: Difference, first: str, name: str) -> Iterator[RenderableType]:
    names = f" ({', '.join(found.operators)})" if found.operators else ""
    yield f"{first}, {name}: {found.layer}{names} is the first layer that differs"
    yield f"  in {found.differing:,} of its {found.compared:,} codes; first at image {found.image},"
    codes = ", ".join(f"{engine} {code}" for engine, code in found.codes.items())
    yield f"  row {found.row}, column {found.column}, channel {found.channel}: {codes}"
    for operands in found.operands:
        yield ""
        yield from _operands(operands, found.codes)


def _operands(found: Operands, codes: dict[str, int] | object) -> Iterator[RenderableType]:
    yield f"The integers of {found.layer}, a {found.kind}:"
    for window in found.windows:
        yield from _window(window, found.kind)
    if found.bias is not None:
        yield f"  bias {found.bias:,}"
    if found.accumulator is not None:
        yield f"  sum {found.accumulator:,}"
    if found.divisor is not None and found.accumulator is not None:
        multiplier, divisor = found.divisor
        exact = Fraction(found.accumulator * multiplier, divisor)
        tie = ", an exact half, which rounds to even" if found.tie else ""
        yield f"  sum * {multiplier:,} / {divisor:,} = {float(exact):.9g}{tie}"
        zero = f" + zero {found.zero_point}" if found.zero_point else ""
        yield f"  rounded{zero}, within {found.low}..{found.high}: code {found.code}"
    else:
        yield f"  result {found.code:,}"
    for engine, reaching in found.reaching.items():
        yield f"  {_reaching(engine, reaching, found)}"


def _reaching(engine: str, reaching: tuple[int, int] | None, found: Operands) -> str:
    total = found.accumulator or 0
    if reaching is None:
        return f"{engine}'s code results from no sum"
    low, high = reaching
    if low <= total <= high:
        return f"{engine} gives what these integers give"
    off = low - total if total < low else high - total
    return f"{engine}'s code results from sums {low:,} to {high:,}: {off:+,} from this one"


def _window(window: Window, kind: str) -> Iterator[RenderableType]:
    size = "x".join(map(str, window.codes.shape))
    zero = f", zero {window.zero_point}" if window.zero_point else ""
    if window.weights is None:
        what = "largest" if kind == "maxpool" else "sum"
        shift = f" << {window.shift}" if window.shift else ""
        yield f"  {window.source}, {size} codes{zero}{shift}: {what} {window.total:,}"
        shown = window.codes.reshape(-1)[:16].tolist()
        more = ", ..." if window.codes.size > 16 else ""
        yield f"    codes {', '.join(map(str, shown))}{more}"
        return
    products = (window.codes - window.zero_point) * window.weights
    count = int(np.count_nonzero(products))
    shift = f" << {window.shift}" if window.shift else ""
    yield f"  {window.source}, {size} codes times weights{zero}: {count:,} products are not zero,"
    yield f"    their sum is {int(products.sum()):,}{shift}"
    if count:
        yield _products(window, products)


def _products(window: Window, products: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Table:
    """Give the largest products of a window."""
    weights = window.weights
    assert weights is not None
    order = np.argsort(-np.abs(products), axis=None, kind="stable")[:PRODUCTS]
    title = f"    the {len(order)} largest" if products.size > PRODUCTS else "    all"
    table = new_table(title, "    channel", "  row", " column", "   code", " weight", "  product")
    for flat in order:
        c, r, k = (int(i) for i in np.unravel_index(flat, products.shape))
        table.add_row(
            f"    {c}",
            str(r),
            str(k),
            str(int(window.codes[c, r, k])),
            str(int(weights[c, r, k])),
            f"{int(products[c, r, k]):,}",
        )
    return table
