"""FLUX.1-dev's real key set: written at a small width, and at the real length, with holes."""

import json
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from test_all_in_one_bytes import REFERENCE_BYTES, clip, t5, transformer, vae
from tolerances import INFO_CPU_SECONDS

from flux_nf4.cli import main
from flux_nf4.formats.allinone import plan_all_in_one, write_all_in_one
from flux_nf4.formats.bnb import tensors_from_weight
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.formats.dtypes import DTYPE_NAMES, DTYPES
from flux_nf4.formats.header import encode_header, plan_header
from flux_nf4.formats.tensorfile import TensorFile
from flux_nf4.nf4 import reference
from flux_nf4.nf4.codec import NF4Weight

V1_REFERENCE_BYTES = 11_489_884_113
PREFIX = "model.diffusion_model."
SMALL, SHRINK = 64, 48  # 3072 / 48 = 64


def real_parts(*, nested=False):
    """FLUX.1-dev's tensors without values."""
    return {"transformer": transformer(nested=nested), "t5": t5(), "clip": clip(), "vae": vae()}


def planned_header(parts):
    sources = plan_all_in_one(parts, vae_dtype=torch.float32, logit_scales=True)
    return plan_header((name, each.dtype, each.shape) for name, each in sources.items())


def transformer_specs(*, nested):
    """Name, dtype and shape of every tensor of the transformer, as a file has them."""
    specs = []
    for name, entry in transformer(nested=nested).items():
        dtype = torch.float32 if name.endswith(".scale") else torch.bfloat16
        tensors = (
            tensors_from_weight(PREFIX + name, entry)
            if isinstance(entry, NF4Weight)
            else {PREFIX + name: entry.to(dtype)}
        )
        specs += [(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
    return specs


def small(size):
    """A width of the real model -> the same in a model that is 64 wide."""
    return size if size <= 256 else max(SMALL, round(size / SHRINK / SMALL) * SMALL)


def small_entry(entry):
    shape = [small(size) for size in entry.shape]
    values = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).view(shape).bfloat16()
    return reference.quantize(values) if isinstance(entry, NF4Weight) else values


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """All parts of FLUX.1-dev at a small width, every block of it, as an all-in-one v2 file."""
    parts = {
        kind: {name: small_entry(each) for name, each in entries.items()}
        for kind, entries in real_parts().items()
    }
    path = tmp_path_factory.mktemp("small") / "flux1-small.safetensors"
    write_all_in_one(path, parts, None, vae_dtype=torch.float32, logit_scales=True)
    return path


def test_a_narrow_model_has_the_real_names_dtypes_and_order(small_file):
    written = TensorFile(small_file).infos.values()
    real = planned_header(real_parts()).infos.values()

    assert [(each.name, each.dtype_name) for each in written] == [
        (each.name, each.dtype_name) for each in real
    ]


def test_a_narrow_model_of_the_real_names_is_told_from_its_file(small_file):
    checkpoint = open_checkpoint(small_file)

    assert (checkpoint.layout, checkpoint.variant, checkpoint.quantization) == (
        "all-in-one",
        "dev",
        "nf4 v2",
    )


@pytest.mark.parametrize(("form", "num_tensors"), [("v1", 2_350), ("v2", 1_722)])
def test_quantising_a_narrow_model_gives_the_real_names_and_dtypes(tmp_path, form, num_tensors):
    entries = {
        name: torch.ones([small(size) for size in each.shape], dtype=torch.bfloat16)
        for name, each in transformer().items()
    }
    source, result = tmp_path / "bf16.safetensors", tmp_path / "nf4.safetensors"
    write_all_in_one(source, {"transformer": entries}, None)
    options = f"--format {form} --layout transformer-only --quiet".split()
    assert main(["quantize", str(source), str(result), *options]) == 0
    written = {each.name: each.dtype_name for each in TensorFile(result).infos.values()}

    assert len(written) == num_tensors
    assert written == {
        name: DTYPE_NAMES[dtype] for name, dtype, _ in transformer_specs(nested=form == "v1")
    }


def order_of_the_library(dtype_names):
    """Names in the order in which the safetensors library writes tensors of these dtypes."""
    tensors = {name: torch.empty(1, dtype=DTYPES[dtype]) for name, dtype in dtype_names.items()}
    data = safetensors.torch.save(tensors)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sorted(header, key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize(("form", "num_tensors"), [("v1", 3_012 - 2), ("v2", 2_384 - 2)])
def test_quantised_whole_a_narrow_model_has_the_real_names_dtypes_and_order(
    tmp_path, form, num_tensors
):
    parts = {
        kind: {
            name: torch.ones([small(size) for size in each.shape], dtype=torch.bfloat16)
            for name, each in entries.items()
        }
        for kind, entries in real_parts().items()
    }
    source, result = tmp_path / "bf16.safetensors", tmp_path / "nf4.safetensors"
    write_all_in_one(source, parts, None, vae_dtype=torch.float32)
    assert main(["quantize", str(source), str(result), "--format", form, "--quiet"]) == 0
    infos = TensorFile(result).infos.values()
    # The two logit scales, of no use, are the reference's own.
    others = plan_all_in_one(real_parts(), vae_dtype=torch.float32)
    real = {
        name: DTYPE_NAMES[each.dtype]
        for name, each in others.items()
        if not name.startswith(PREFIX)
    }
    real |= {name: DTYPE_NAMES[dtype] for name, dtype, _ in transformer_specs(nested=form == "v1")}

    assert len(infos) == num_tensors
    assert {each.name: each.dtype_name for each in infos} == real
    assert [each.name for each in infos] == order_of_the_library(real)


def test_v1_has_the_published_length_but_for_the_digits_of_its_314_offsets():
    sources = plan_all_in_one(real_parts(), vae_dtype=torch.float32, logit_scales=True)
    specs = [
        (name, each.dtype, each.shape)
        for name, each in sources.items()
        if not name.startswith(PREFIX)
    ]
    specs += transformer_specs(nested=True)
    header = plan_header(specs)
    missing = V1_REFERENCE_BYTES - len(encode_header(header)) - header.data_bytes

    # Every offset here is `0.5`; a real one is a float32 printed as a float64: 17 to 20 characters.
    assert 17 <= 3 + missing / 314 <= 20


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory):
    """A file of the reference's length and header, with holes where its weights would be."""
    parts = real_parts()
    sources = plan_all_in_one(parts, vae_dtype=torch.float32, logit_scales=True)
    header = planned_header(parts)
    path = tmp_path_factory.mktemp("sparse") / "flux1-dev-bnb-nf4-v2.safetensors"
    with path.open("wb") as file:
        start = encode_header(header)
        file.write(start)
        for name, info in header.infos.items():
            if "quant_state" in name or name.endswith("quant_map"):
                file.seek(len(start) + info.start)
                file.write(sources[name].make().numpy().tobytes())
        file.truncate(len(start) + header.data_bytes)
    return path


def test_the_sparse_file_is_of_the_published_length(sparse_file):
    assert sparse_file.stat().st_size == REFERENCE_BYTES
    assert sparse_file.stat().st_blocks * 512 < 20_000_000


def test_info_of_12_gb_takes_less_than_a_second(sparse_file):
    command = [sys.executable, "-m", "flux_nf4", "info", str(sparse_file), "--json"]
    times_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert json.loads(done.stdout)["variant"] == "dev"
    assert min(times_s) < INFO_CPU_SECONDS
