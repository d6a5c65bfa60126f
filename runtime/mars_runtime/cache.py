"""Files that take long to make, kept for the next process: machine code and lifted layers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .program import write_atomically

__all__ = ["cache_folder", "code_digest", "kept"]


def cache_folder() -> Path | None:
    """Give where machine code and lifted layers are kept: ``MARS_CACHE_DIR``, or the user's cache.

    None if that variable is empty: then nothing is kept.
    """
    wanted = os.environ.get("MARS_CACHE_DIR")
    if wanted is not None:
        return Path(wanted) if wanted else None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tvm-mars"


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """Give a file's content from the cache, or make it and keep it there.

    Names hold a digest of all that the content depends on. Files are renamed into place whole, so
    that two processes at work on the same one do each other no harm; where the folder cannot be
    written, nothing is kept. What was damaged is made again.
    """
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            found = (folder / name).read_bytes()
            if hashlib.sha256(found[_DIGEST:]).digest() == found[:_DIGEST]:
                return found[_DIGEST:]
    content = make()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(folder / name, hashlib.sha256(content).digest() + content)
    return content


_DIGEST = hashlib.sha256().digest_size


@functools.cache
def code_digest() -> str:
    """Digest this package's source, which all that is cached depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
