"""Quantising a checkpoint on a GPU gives the bytes that a CPU gives."""

import pytest
import torch
from checkpoints import save_all_in_one

from flux_nf4.cli import main

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [(), ("--format", "v1"), ("--block-size", "128")])
def test_every_byte_is_that_of_the_cpu(tmp_path, options):
    source = save_all_in_one(tmp_path / "source.safetensors", transformer=torch.bfloat16)
    results = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.safetensors"
        assert main(["quantize", str(source), str(path), "--device", device, *options]) == 0
        results.append(path.read_bytes())

    assert results[0] == results[1]
