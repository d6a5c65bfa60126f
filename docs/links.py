"""Check a built site: every link within it leads to a file, and to a place in that file.

``make site`` runs it. What leads elsewhere is not looked at: ``make linkcheck`` asks the network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """A page's links, and the names that links can lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what an element refers to, and what it is called."""
        for name, value in attributes:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            elif (name == "id" or (tag, name) == ("a", "name")) and value is not None:
                self.names.add(value)


def broken(site: Path) -> Iterator[str]:
    """Give each link within a site that leads nowhere, with its page."""
    pages = {
        path.resolve(): _Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{path.relative_to(site.resolve())}: {link}: no such file"
            elif target in pages and unquote(parts.fragment) not in pages[target].names:
                yield f"{path.relative_to(site.resolve())}: {link}: no such place in the page"


def main() -> None:
    """Print what is broken, and end with 1 if anything is or if there is no site."""
    site = Path(sys.argv[1])
    found = list(broken(site)) if (site / "index.html").is_file() else [f"{site}: no index.html"]
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
