"""Links of the pages, as a reader of the repository follows them: to files, and to headings."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OWN = re.compile(r"(?:tvm_mars|runtime|docs|tutorials|benchmarks|python_tests)/[\w./-]*")


def tokens(page: Path) -> Iterator[Token]:
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    for token in parsed:
        yield token
        yield from token.children or ()


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for name in ("href", "src"):
            if token.attrGet(name) is not None:
                yield str(token.attrGet(name))


def headings(page: Path) -> set[str]:
    """Give the anchors that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    seen = list(tokens(page))
    for opening, content in pairwise(seen):
        if opening.type != "heading_open":
            continue
        text = "".join(child.content for child in content.children or ())
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    for token in tokens(page):
        if token.type == "code_inline" and OWN.fullmatch(token.content):
            assert (ROOT / token.content).exists(), token.content


def test_a_page_links_and_names() -> None:
    readme = ROOT / "README.md"
    assert {"docs/tuning.md", "#tuning-a-schedule"} <= set(links(readme))
    assert {"tuning-a-schedule", "tvm-mars", "with-relay"} <= headings(readme)


def test_the_check_of_the_site_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    index = '<a href="a/b.html#here">1</a> <a href="#no">2</a> <a href="https://x.org/#y">3</a>'
    (tmp_path / "index.html").write_text(index)
    other = '<p id="here"><a href="../index.html">1</a> <img src="no.png"> <a href="../#">2</a>'
    (tmp_path / "a" / "b.html").write_text(other)
    command = [sys.executable, str(ROOT / "docs" / "links.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "a/b.html: no.png: no such file",
        "a/b.html: ../#: no such file",
        "index.html: #no: no such place in the page",
    ]
    (tmp_path / "index.html").write_text('<a href="a/b.html#here">1</a>')
    (tmp_path / "a" / "b.html").write_text('<p id="here"><a href="../index.html#top">1</a>')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
