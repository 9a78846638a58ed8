import pytest
from checkpoints import canonical_entries

from flux_nf4.errors import FormatError
from flux_nf4.formats.layouts import plan_part


@pytest.mark.parametrize("form", ["keep", "bf16"])
@pytest.mark.parametrize("which", ["v2_file", "v1_file", "bf16_folder"])
def test_a_matrix_without_rows_for_q_k_and_v_is_refused_by_name(request, which, form):
    entries = dict(canonical_entries(request.getfixturevalue(which))["transformer"])
    name = "double_blocks.0.img_attn.qkv.weight"
    entries[name] = entries["double_blocks.0.img_attn.proj.weight"]
    with pytest.raises(FormatError, match=f"do not fit each other: `{name}`"):
        plan_part("transformer", entries, naming="diffusers", form=form)
