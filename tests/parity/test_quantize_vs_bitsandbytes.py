"""What `quantize` writes is what bitsandbytes would have made of the same weights."""

import pytest
import torch
from checkpoints import save_diffusers_folder
from safetensors.torch import load_file

from flux_nf4.cli import main

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
STATE = "quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_diffusers_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module", params=["v2", "v1"])
def quantized(request, source, tmp_path_factory):
    """The tensors of a quantised Diffusers folder, and whether its statistics are nested."""
    folder = tmp_path_factory.mktemp(request.param) / "new"
    options = ("--layout", "diffusers", "--format", request.param, "--quiet")
    assert main(["quantize", str(source), str(folder), *options]) == 0
    return load_file(folder / WEIGHTS), request.param == "v1"


def matrices(source):
    return {name: each for name, each in load_file(source / WEIGHTS).items() if each.dim() == 2}


def test_codes_statistics_and_state_are_theirs_to_the_byte(source, quantized):
    from bitsandbytes.functional import quantize_4bit

    tensors, nested = quantized
    for name, matrix in matrices(source).items():
        codes, state = quantize_4bit(
            matrix, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        theirs = {f"{name}.{key}": each for key, each in state.as_dict(packed=True).items()}
        ours = {key: each for key, each in tensors.items() if key.startswith(f"{name}.")}

        assert torch.equal(tensors[name], codes), name
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_their_reader_decodes_every_weight_to_what_theirs_decodes_to(source, quantized):
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

    tensors, nested = quantized
    for name, matrix in matrices(source).items():
        stats = {key: each for key, each in tensors.items() if key.startswith(f"{name}.")}
        ours = QuantState.from_dict(stats, device=torch.device("cpu"))
        codes, theirs = quantize_4bit(
            matrix, blocksize=64, quant_type="nf4", compress_statistics=nested
        )

        assert torch.equal(dequantize_4bit(tensors[name], ours), dequantize_4bit(codes, theirs))


def test_diffusers_makes_a_quantised_model_of_the_folder(source, quantized):
    """Its own loader refuses 4 bits without a GPU; its model and its parameters do not."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from diffusers import FluxTransformer2DModel

    tensors, _ = quantized
    config = FluxTransformer2DModel.load_config(source / "transformer")
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    for module_name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        name = f"{module_name}.weight"
        stats = {key: each for key, each in tensors.items() if key.startswith(f"{name}.")}
        layer = Linear4bit(module.in_features, module.out_features, compute_dtype=torch.bfloat16)
        layer.weight = Params4bit.from_prequantized(tensors[name], stats, device="cpu")
        layer.bias = torch.nn.Parameter(tensors[f"{module_name}.bias"])
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    vectors = {key: each for key, each in tensors.items() if ".norm_" in key and "_out" not in key}
    vectors = {
        key: each for key, each in vectors.items() if each.dim() == 1 and ".linear" not in key
    }
    model.load_state_dict(vectors, strict=False, assign=True)

    assert [key for key, each in model.named_parameters() if each.is_meta] == []
