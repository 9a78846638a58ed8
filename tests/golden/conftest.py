"""Golden files: texts under `data/` that a test compares, and rewrites with `--update-golden`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files (`pytest tests/golden --update-golden`); review the diff",
    )


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare `text` with the golden file `name`, or write it there where that is asked for."""
    # The option is unknown where pytest was not pointed at this folder: then it was not given.
    is_updating = request.config.getoption("--update-golden", default=False)

    def check(name: str, text: str) -> None:
        path = DATA / name
        if is_updating:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text

    return check
