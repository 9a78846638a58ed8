import shutil

import pytest

from flux_nf4.errors import DiskError
from flux_nf4.pipeline.conversion import gather, plan_conversion


def test_a_tokenizer_that_cannot_be_read_is_told_before_any_weight_is_written(
    tiny_folder, tmp_path
):
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    conversion = plan_conversion(gather(str(source), {}), layout="diffusers")
    (source / "tokenizer_2" / "tokenizer.json").unlink()
    told = []

    with pytest.raises(DiskError, match=r"could not read `.*tokenizer\.json`"):
        conversion.write(tmp_path / "result", on_bytes=told.append)
    assert told == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source"]
