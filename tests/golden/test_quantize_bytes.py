"""FLUX.1-dev in bf16, quantised, has the published file's length: from its header alone.

The source is a sparse file: 34 GB long, and nothing on the disk but its header.
"""

import pytest
import torch
from test_all_in_one_bytes import REFERENCE_BYTES, clip, t5, transformer, vae

from flux_nf4.formats.allinone import plan_all_in_one
from flux_nf4.formats.header import encode_header, plan_header
from flux_nf4.pipeline.conversion import gather, plan_conversion
from flux_nf4.pipeline.quantizer import ParallelQuantizer, QuantizationSettings, one_thread_each


def save_sparse_flux(path):
    """A file of zeros with every tensor of FLUX.1-dev before quantisation, and both encoders."""
    matrices = {
        name: torch.empty(entry.shape, device="meta", dtype=torch.bfloat16)
        for name, entry in transformer().items()
    }
    components = {"transformer": matrices, "t5": t5(), "clip": clip(), "vae": vae()}
    sources = plan_all_in_one(components, vae_dtype=torch.float32, logit_scales=True)
    wide = {torch.float8_e4m3fn: torch.float16}
    header = plan_header(
        (name, wide.get(source.dtype, source.dtype), source.shape)
        for name, source in sources.items()
    )
    start = encode_header(header)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + header.data_bytes)
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = save_sparse_flux(tmp_path_factory.mktemp("sparse") / "flux1-dev.safetensors")
    with one_thread_each() as pool:
        quantizer = ParallelQuantizer(QuantizationSettings(device="cpu"), pool)
        return plan_conversion(
            gather(str(path), {}), layout="all-in-one", quantizer=quantizer, t5="fp8"
        )


def test_quantised_it_has_the_reference_files_length(plan):
    assert plan.num_bytes == REFERENCE_BYTES


def test_quantised_it_has_the_reference_files_number_of_tensors(plan):
    assert len(plan.files[""].sources) == 2384
