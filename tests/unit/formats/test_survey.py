import subprocess
import sys

import pytest
import torch
from checkpoints import (
    canonical_entries,
    cast,
    quantized,
    save_all_in_one,
    save_all_in_one_v1,
    save_diffusers_folder,
    save_transformer_only,
)
from safetensors.torch import load_file, save_file

from flux_nf4.errors import FormatError, ModelNotFoundError
from flux_nf4.formats import survey as surveys
from flux_nf4.formats.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of many kinds, by name."""
    folder = tmp_path_factory.mktemp("models")
    save_all_in_one(folder / "v2")
    save_all_in_one_v1(folder / "v1")
    save_all_in_one(folder / "bf16", transformer=torch.bfloat16)
    save_all_in_one(folder / "fp4", transformer="fp4", facts=None)
    for name, sizes in (("schnell", {"guidance": False}), ("fill", {"in_channels": 384})):
        source = save_diffusers_folder(folder / f"{name}-source", **sizes)
        entries = canonical_entries(source)["transformer"]
        save_transformer_only(folder / name, quantized(entries))
        save_transformer_only(folder / f"{name}-bare", cast(entries, torch.float16), prefix="")
    return folder


FILES = ("v2", "v1", "bf16", "fp4", "schnell", "schnell-bare", "fill", "fill-bare")


@pytest.mark.parametrize("name", FILES)
def test_the_quick_way_tells_the_same_as_the_thorough_one(models, name):
    quick = surveys._survey_file(models / name)

    assert quick == surveys._from_checkpoint(open_checkpoint(models / name))
    assert [list(part.stored) for part in quick.parts.values()] == [
        list(part.summary()) for part in open_checkpoint(models / name).components.values()
    ]


def test_a_folder_is_surveyed_too(models):
    found = surveys.survey(models / "fill-source")

    assert (found.layout, found.variant, found.missing) == ("diffusers", "fill", ())


def test_what_is_wrong_gets_the_thorough_way_s_error(models, tmp_path):
    tensors = load_file(models / "v2")
    del tensors["model.diffusion_model.img_in.bias"]
    save_file(tensors, tmp_path / "broken")

    with pytest.raises(FormatError, match=r"lacks `img_in\.bias`"):
        surveys.survey(tmp_path / "broken")
    with pytest.raises(ModelNotFoundError):
        surveys.survey(tmp_path / "nowhere")


def test_a_weight_without_axes_gets_the_thorough_way_s_error(models, tmp_path):
    tensors = load_file(models / "bf16") | {"model.diffusion_model.img_in.weight": torch.ones(())}
    save_file(tensors, tmp_path / "broken")

    with pytest.raises(FormatError, match=r"`img_in\.weight`"):
        surveys.survey(tmp_path / "broken")


@pytest.mark.parametrize("state", [b"{}", b"[]", b'{"shape": [1, true], "blocksize": 64}', b"x"])
def test_a_broken_state_gets_the_thorough_way_s_error(models, tmp_path, state):
    tensors = load_file(models / "v2")
    name = "model.diffusion_model.txt_in.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    save_file(tensors, tmp_path / "broken")

    with pytest.raises(FormatError, match=r"txt_in\.weight"):
        surveys.survey(tmp_path / "broken")


def test_info_of_a_file_needs_no_torch(models):
    code = (
        "import sys; from flux_nf4.cli import main; "
        f"assert main(['info', {str(models / 'v2')!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
