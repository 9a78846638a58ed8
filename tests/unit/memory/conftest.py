import pytest
import torch
from managed_models import PLENTY
from tiny_pipeline import save_tiny_folder, tiny_parts

from flux_nf4.pipeline import load
from flux_nf4.pipeline.load import LoadSettings, load_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model whose blocks weigh more than all the rest: what is short of memory streams them."""
    parts = tiny_parts(num_double_blocks=5, num_single_blocks=8)
    return save_tiny_folder(tmp_path_factory.mktemp("residency") / "model", models=parts)


@pytest.fixture
def open_on(monkeypatch, folder):
    """Load a model on a fake device, under a budget of so many bytes."""

    def open_on(device, vram=PLENTY, path=folder, **settings):
        monkeypatch.setattr(load, "managed_device", lambda _device, _vram: device)
        settings = LoadSettings(device="cpu", dtype=torch.float32, vram=vram, **settings)
        return load_model(path, settings)

    return open_on
