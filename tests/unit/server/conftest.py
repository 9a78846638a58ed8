import os

import pytest


@pytest.fixture
def pipe(tmp_path):
    """Where the fake worker waits when it is told to `hold`; `engines.let_go` has it go on."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path
