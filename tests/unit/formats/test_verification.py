import errno
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import save_diffusers_folder
from safetensors.torch import load_file, save_file

from flux_nf4.errors import InputError, ModelNotFoundError
from flux_nf4.formats.verification import verify

TABLE, COPY = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def t5(bf16_folder):
    return load_file(bf16_folder / "text_encoder_2" / "model.safetensors")


def texts_of(found):
    return [fault.text for fault in found.faults]


def test_the_one_file_of_a_folder_is_looked_through(v2_file, tmp_path):
    shutil.copy(v2_file, tmp_path / "model.safetensors")
    found = verify(tmp_path)
    assert texts_of(found) == []
    assert found.parts == ["transformer", "t5", "clip", "vae"]
    assert found.path == tmp_path / "model.safetensors"


def test_a_folder_with_two_files_is_asked_about(v2_file, tmp_path):
    for name in ("a", "b"):
        shutil.copy(v2_file, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="holds 2 files that may be meant"):
        verify(tmp_path)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no \.safetensors file"):
        verify(tmp_path)


def test_a_transformers_folder_in_shards_is_looked_through(tmp_path):
    folder = save_diffusers_folder(tmp_path, max_shard_size=300_000)
    assert texts_of(verify(folder / "transformer")) == []


def test_the_table_of_tokens_may_have_its_other_name_alone(t5, tmp_path):
    tensors = dict(t5)
    tensors[COPY] = tensors.pop(TABLE) if TABLE in tensors else tensors[COPY]
    save_file(tensors, tmp_path / "t5.safetensors")
    found = verify(tmp_path / "t5.safetensors")
    assert (found.parts, texts_of(found)) == (["t5"], [])


def test_two_tables_of_tokens_are_found(t5, tmp_path):
    table = t5[TABLE] if TABLE in t5 else t5[COPY]
    tensors = t5 | {TABLE: table, COPY: torch.zeros_like(table)}
    save_file(tensors, tmp_path / "t5.safetensors")
    (text,) = texts_of(verify(tmp_path / "t5.safetensors"))
    assert f"`{COPY}` differs from `{TABLE}`" in text


def test_a_clip_of_transformers_5_alone_is_looked_through(bf16_folder, tmp_path):
    tensors = load_file(bf16_folder / "text_encoder" / "model.safetensors")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(flat, tmp_path / "clip.safetensors")
    found = verify(tmp_path / "clip.safetensors")
    assert (found.parts, texts_of(found)) == (["clip"], [])


@pytest.mark.parametrize("name", ["x_embedder.bias", "transformer_blocks.0.attn.to_k.weight"])
def test_a_missing_tensor_is_told_once_and_by_the_file_s_own_name(bf16_folder, tmp_path, name):
    tensors = load_file(bf16_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "transformer.safetensors")
    assert texts_of(verify(tmp_path / "transformer.safetensors")) == [f"`{name}` is missing"]


def test_a_part_that_cannot_be_looked_into_is_a_fault(bf16_folder, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    found = verify(bf16_folder)
    assert [fault.part for fault in found.faults] == ["transformer", "t5", "clip", "vae"]
    assert "Permission denied" in texts_of(found)[0]
