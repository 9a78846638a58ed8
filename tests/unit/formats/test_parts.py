import pytest
from checkpoints import PART_FOLDERS
from safetensors.torch import load_file, save_file

from flux_nf4.errors import FormatError
from flux_nf4.formats.parts import open_part, recorded_facts


def test_damaged_facts_are_refused_with_the_file_s_name(bf16_folder, tmp_path):
    source = bf16_folder / PART_FOLDERS["transformer"] / "diffusion_pytorch_model.safetensors"
    save_file(load_file(source), tmp_path / "a.safetensors", metadata={"flux_nf4": "{"})
    with pytest.raises(FormatError, match=r"a\.safetensors`: metadata"):
        recorded_facts(open_part("transformer", tmp_path / "a.safetensors"))
