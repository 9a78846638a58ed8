import pytest
import torch
from tiny_pipeline import save_tiny_folder

from flux_nf4.pipeline.load import LoadSettings, load_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Diffusers folder in float32, tokenizers included."""
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    return load_model(tiny_folder, LoadSettings(device="cpu", dtype=torch.float32))


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory):
    folder = save_tiny_folder(tmp_path_factory.mktemp("schnell") / "model", guidance=False)
    return load_model(folder, LoadSettings(device="cpu", dtype=torch.float32))
