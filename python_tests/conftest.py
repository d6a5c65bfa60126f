"""Options and fixtures of all tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that these tests take."""
    group = parser.getgroup("mars")
    group.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )
    group.addoption(
        "--seed",
        type=int,
        default=0,
        help="first seed of the random networks (default 0, so that runs repeat)",
    )
    group.addoption(
        "--kills",
        type=int,
        default=3,
        help="how often each search of the tests is killed at random moments (default 3)",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Print what repeats this run's random networks."""
    return f"mars: random networks from --seed {config.getoption('--seed')}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Number the seeds of tests marked ``@pytest.mark.random(count)``."""
    marker = metafunc.definition.get_closest_marker("random")
    if marker is not None:
        first = metafunc.config.getoption("--seed")
        metafunc.parametrize("seed", range(first, first + marker.args[0]))


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "random(count): run with `count` seeds from --seed on")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what the runtime caches away from the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARS_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often a search is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    """First seed of the random networks of this run."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a text with ``golden/<name>``, or write it under ``--update-golden``.

    With ``entry``, the text is one of many of a JSON file.
    """

    def compare(name: str, text: str, entry: str | None = None) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text if entry is None else _with_entry(path, entry, text))
        assert path.exists(), f"{path} is missing: run pytest --update-golden and review it"
        found = path.read_text(encoding="utf-8")
        assert text == (found if entry is None else json.loads(found).get(entry))

    return compare


def _with_entry(path: Path, entry: str, text: str) -> str:
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return json.dumps({**entries, entry: text}, indent=1, sort_keys=True) + "\n"
