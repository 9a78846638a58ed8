import pytest
from checkpoints import save_all_in_one, save_all_in_one_v1, save_diffusers_folder


@pytest.fixture(scope="session")
def bf16_folder(tmp_path_factory):
    return save_diffusers_folder(tmp_path_factory.mktemp("bf16") / "tiny")


@pytest.fixture(scope="session")
def v2_file(tmp_path_factory):
    return save_all_in_one(tmp_path_factory.mktemp("v2") / "tiny-v2.safetensors")


@pytest.fixture(scope="session")
def v1_file(tmp_path_factory):
    return save_all_in_one_v1(tmp_path_factory.mktemp("v1") / "tiny-v1.safetensors")
