import os

import pytest


@pytest.fixture(scope="session")
def managed_folder(tmp_path_factory):
    """A tiny model with several blocks, for workers that plan their memory."""
    from tiny_pipeline import save_tiny_folder, tiny_parts

    parts = tiny_parts(num_double_blocks=3, num_single_blocks=4)
    return save_tiny_folder(tmp_path_factory.mktemp("managed") / "model", models=parts)


@pytest.fixture
def device():
    """One that counts its bytes."""
    from fake_device import FakeDevice

    return FakeDevice()


@pytest.fixture
def pipe(tmp_path):
    """Where the fake worker waits when it is told to `hold`; `engines.let_go` has it go on."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path
