"""The generated pages are those that the code gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvm_mars.docs import pages

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], "run `make docs`"
