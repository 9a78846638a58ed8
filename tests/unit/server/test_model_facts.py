import hashlib

import pytest
import torch
from safetensors.torch import save_file

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.load import demo_path
from flux_nf4.server.model_facts import fingerprint


def save(path, *, value=0.0, name="weight", metadata=None):
    path.parent.mkdir(exist_ok=True)
    save_file({name: torch.full((300_000,), value)}, path, metadata=metadata)
    return path


def test_a_fingerprint_is_a_sha256_that_stays(tmp_path):
    path = save(tmp_path / "model.safetensors")

    assert len(fingerprint(path)) == hashlib.sha256().digest_size * 2
    assert fingerprint(path) == fingerprint(path)


def test_a_copy_under_another_name_has_the_same(tmp_path):
    first, second = (save(tmp_path / f"{name}.safetensors") for name in "ab")

    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("change", [{"value": 1.0}, {"name": "bias"}, {"metadata": {"by": "me"}}])
def test_models_that_differ_are_told_apart(tmp_path, change):
    one, other = save(tmp_path / "a.safetensors"), save(tmp_path / "b.safetensors", **change)

    assert fingerprint(one) != fingerprint(other)


def test_every_part_of_a_diffusers_folder_counts(tmp_path):
    for part in ("transformer", "vae"):
        save(tmp_path / part / "model.safetensors")
    before = fingerprint(tmp_path)
    save(tmp_path / "vae" / "model.safetensors", value=1.0)

    assert fingerprint(tmp_path) != before


def test_a_file_that_was_damaged_meanwhile_is_told_of(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no more")

    with pytest.raises(FormatError, match=r"model\.safetensors"):
        fingerprint(path)


def test_the_demo_model_has_one():
    assert fingerprint(demo_path())
