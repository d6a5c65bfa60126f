"""Find a Chromium or Chrome to test pages in; ``python -m python_tests.browsers`` says which."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["NONE", "find"]

SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NONE = f"no {', '.join(SYSTEM)} on PATH, nor playwright's own (playwright install chromium)"


def find() -> str | None:
    """Give the system's, or else that which Playwright has fetched before."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, SYSTEM)), None)
    if found:
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


if __name__ == "__main__":
    found = find()
    print(found or NONE, file=sys.stdout if found else sys.stderr)
    sys.exit(found is None)
