"""The published length of the reference file follows from our plan, to the byte.

Nothing of 12 GB is made: the tensors live on the meta device, with FLUX.1-dev's real shapes.
"""

import pytest
import torch

from flux_nf4.formats.allinone import plan_all_in_one
from flux_nf4.formats.bnb import tensors_from_weight
from flux_nf4.formats.header import encode_header, plan_header
from flux_nf4.formats.keymap import clip_table, t5_table, transformer_table, vae_table
from flux_nf4.nf4.codec import NestedAbsmax, NF4Weight

REFERENCE_BYTES = 12_044_280_207
HIDDEN = 3072
OUTPUT_INPUT = {
    "img_in": (HIDDEN, 64),
    "txt_in": (HIDDEN, 4096),
    "time_in.in_layer": (HIDDEN, 256),
    "guidance_in.in_layer": (HIDDEN, 256),
    "vector_in.in_layer": (HIDDEN, 768),
    "final_layer.linear": (64, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
    "_mod.lin": (6 * HIDDEN, HIDDEN),
    "attn.qkv": (3 * HIDDEN, HIDDEN),
    "attn.proj": (HIDDEN, HIDDEN),
    "mlp.0": (4 * HIDDEN, HIDDEN),
    "mlp.2": (HIDDEN, 4 * HIDDEN),
    "linear1": (7 * HIDDEN, HIDDEN),
    "linear2": (HIDDEN, 5 * HIDDEN),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
    "out_layer": (HIDDEN, HIDDEN),
}
LEVEL_CHANNELS = (128, 256, 512, 512)


def empty(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def quantized(shape, *, nested):
    num_blocks = shape[0] * shape[1] // 64
    absmax = torch.empty(num_blocks, device="meta")
    if nested:
        absmax = NestedAbsmax(
            codes=torch.empty(num_blocks, device="meta", dtype=torch.uint8),
            absmax=torch.empty(-(-num_blocks // 256), device="meta"),
            levels=torch.empty(256, device="meta"),
            offset=0.5,
        )
    codes = torch.empty(shape[0] * shape[1] // 2, device="meta", dtype=torch.uint8)
    return NF4Weight(codes=codes, absmax=absmax, shape=shape)


def transformer(*, nested=False):
    entries = {}
    for name in transformer_table(19, 38, "bfl").names:
        if name.endswith(".scale"):
            entries[name] = empty(128)
            continue
        module, end = name.rsplit(".", 1)
        shape = next(shape for key, shape in OUTPUT_INPUT.items() if module.endswith(key))
        entries[name] = quantized(shape, nested=nested) if end == "weight" else empty(shape[0])
    return entries


def t5():
    shapes = {
        "shared": (32128, 4096),
        "relative_attention_bias": (32, 64),
        "wi_0": (10240, 4096),
        "wi_1": (10240, 4096),
        "wo": (4096, 10240),
        "layer_norm": (4096,),
    }
    return {
        name: empty(
            *next((s for key, s in shapes.items() if f"{key}.weight" in name), (4096, 4096))
        )
        for name in t5_table(24).names
    }


def clip():
    shapes = {
        "token_embedding.weight": (49408, 768),
        "position_embedding.weight": (77, 768),
        "fc1.weight": (3072, 768),
        "fc1.bias": (3072,),
        "fc2.weight": (768, 3072),
        "proj.weight": (768, 768),
        "projection.weight": (768, 768),
    }
    return {
        name: empty(*next((s for key, s in shapes.items() if name.endswith(key)), (768,)))
        for name in clip_table(12).names
    }


def vae():
    entries = {}
    for name, (bfl_name,) in vae_table(4, 2).names.items():
        shape = vae_shape(bfl_name)
        if shape is not None:
            entries[name] = empty(*shape)
    return entries


def vae_shape(name):
    """The shape of one tensor under its BFL name; None for a shortcut that the VAE lacks."""
    side, *path, end = name.split(".")
    if path[0] in ("conv_in", "conv_out"):
        channels = {
            ("encoder", "conv_in"): (128, 3),
            ("encoder", "conv_out"): (32, 512),
            ("decoder", "conv_in"): (512, 16),
            ("decoder", "conv_out"): (3, 128),
        }[side, path[0]]
        return (*channels, 3, 3) if end == "weight" else channels[:1]
    if path[0] == "norm_out":
        return (512 if side == "encoder" else 128,)
    if path[0] == "mid":
        shapes = {"conv1": (512, 512, 3, 3), "conv2": (512, 512, 3, 3), "norm": (512,)}
        if path[-1].startswith("norm") or end == "bias":
            return (512,)
        return shapes.get(path[-1], (512, 512))
    level = int(path[1])
    width = LEVEL_CHANNELS[level]
    neighbour = level - 1 if side == "encoder" else level + 1
    before = LEVEL_CHANNELS[max(neighbour, 0)] if neighbour < 4 else width
    narrow = before if path[3:4] == ["0"] else width
    return resnet_shape(path[-1], end, narrow, width)


def resnet_shape(module, end, before, width):
    if module == "nin_shortcut" and before == width:
        return None
    if module == "norm1":
        return (before,)
    if module == "norm2" or end == "bias":
        return (width,)
    kernel = 1 if module == "nin_shortcut" else 3
    return (width, width if module in ("conv", "conv2") else before, kernel, kernel)


@pytest.fixture(scope="module")
def plan():
    components = {"transformer": transformer(), "t5": t5(), "clip": clip(), "vae": vae()}
    return plan_all_in_one(components, vae_dtype=torch.float32, logit_scales=True)


def test_the_plan_has_the_reference_files_length(plan):
    header = plan_header((name, source.dtype, source.shape) for name, source in plan.items())
    assert len(encode_header(header)) + header.data_bytes == REFERENCE_BYTES


def test_the_plan_has_the_reference_files_number_of_tensors(plan):
    assert len(plan) == 2_384


@pytest.mark.parametrize(
    ("prefix", "num_tensors"),
    [
        ("model.diffusion_model.", 1_722),
        ("text_encoders.t5xxl.transformer.", 219),
        ("text_encoders.clip_l.transformer.", 197),
        ("vae.", 244),
    ],
)
def test_each_part_has_the_reference_files_number_of_tensors(plan, prefix, num_tensors):
    assert sum(name.startswith(prefix) for name in plan) == num_tensors


def test_a_nested_transformer_has_the_number_of_tensors_of_v1():
    entries = transformer(nested=True)
    names = set()
    for name, entry in entries.items():
        names |= (
            {name} if isinstance(entry, torch.Tensor) else set(tensors_from_weight(name, entry))
        )
    assert len(names) == 2_350


def test_planning_a_nested_transformer_gives_the_tensors_of_v2():
    assert len(plan_all_in_one({"transformer": transformer(nested=True)})) == 1_722
