"""Our T5 and CLIP against transformers' own, loaded the normal way from the same files.

CLIP does the same operations in the same order: equal to the bit. T5's GELU is one operation here
and eight there, each of which rounds: equal in float32 but for rounding, and nearer to it in bf16.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import T5_FP32, relative_error
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5EncoderModel

from flux_nf4.formats.component import Component
from flux_nf4.formats.facts import Facts
from flux_nf4.model.build import build_clip, build_t5
from flux_nf4.model.t5 import distance_buckets

VOCABULARY, EOS = 120, 7

T5_CONFIGS = {
    "small": {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 160, "num_layers": 2},
    "narrow heads": {"d_model": 96, "d_kv": 32, "num_heads": 2, "d_ff": 64, "num_layers": 3},
}
CLIP_CONFIGS = {
    "one head": {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3},
    "three heads": {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 1},
}
every_t5 = pytest.mark.parametrize("sizes", T5_CONFIGS.values(), ids=T5_CONFIGS.keys())
every_clip = pytest.mark.parametrize("sizes", CLIP_CONFIGS.values(), ids=CLIP_CONFIGS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
    return model.eval()


def make_t5(sizes) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", is_encoder_decoder=False, **sizes
    )
    return randomise(T5EncoderModel(config))


def make_clip(sizes) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        intermediate_size=4 * sizes["hidden_size"],
        hidden_act="quick_gelu",
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=EOS,
        **sizes,
    )
    return randomise(CLIPTextModel(config))


def t5_component(model) -> Component:
    entries = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    return Component(kind="t5", entries=entries, source=Path("t5"))


def clip_component(model) -> Component:
    entries = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in model.state_dict().items()
    }
    return Component(kind="clip", entries=entries, source=Path("clip"))


def stored_in_fp8(component: Component) -> Component:
    entries = {name: t.to(torch.float8_e4m3fn) for name, t in component.entries.items()}
    return Component(kind=component.kind, entries=entries, source=component.source)


def prompts(length: int) -> torch.Tensor:
    return torch.randint(8, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(2))


def rounded_to_fp8(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    return model


@every_t5
@pytest.mark.parametrize("is_fp8", [False, True])
@torch.no_grad()
def test_t5_equals_transformers_in_float32(sizes, is_fp8):
    model = make_t5(sizes)
    component = t5_component(rounded_to_fp8(model) if is_fp8 else model)
    stored = stored_in_fp8(component) if is_fp8 else component
    ours = build_t5(stored, device="cpu", dtype=torch.float32)
    assert relative_error(ours(prompts(19)), model(prompts(19))[0]) < T5_FP32


@every_t5
@pytest.mark.parametrize("is_fp8", [False, True])
@torch.no_grad()
def test_t5_in_bfloat16_is_no_further_off_than_transformers(sizes, is_fp8, tmp_path):
    model = make_t5(sizes)
    component = t5_component(rounded_to_fp8(model) if is_fp8 else model)
    model.save_pretrained(tmp_path)
    stored = stored_in_fp8(component) if is_fp8 else component
    ours = build_t5(stored, device="cpu", dtype=torch.bfloat16)
    theirs = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact, ids = model(prompts(190))[0], prompts(190)
    assert relative_error(ours(ids), exact) <= 1.05 * relative_error(theirs(ids)[0], exact)


@every_t5
@torch.no_grad()
def test_t5_attends_to_padding_as_transformers_does_without_a_mask(sizes):
    model = make_t5(sizes)
    padded = torch.nn.functional.pad(prompts(5), (0, 11))
    ours = build_t5(t5_component(model), device="cpu", dtype=torch.float32)
    assert relative_error(ours(padded), model(padded, attention_mask=None)[0]) < T5_FP32


@torch.no_grad()
def test_distances_fall_into_transformers_buckets():
    distances = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        distances, bidirectional=True, num_buckets=32, max_distance=128
    )
    assert torch.equal(distance_buckets(distances), theirs)


@every_dtype
@every_clip
def test_clip_pools_what_transformers_pools(sizes, dtype, tmp_path):
    model = make_clip(sizes)
    model.save_pretrained(tmp_path)
    theirs = CLIPTextModel.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = build_clip(
        clip_component(model), Facts(clip_eos_token_id=EOS), device="cpu", dtype=dtype
    )
    ids = prompts(77)
    ids[0, 11:] = EOS  # padded with the end token, as FLUX's CLIP is
    ids[1, 76] = EOS
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(ids).pooler_output)


@every_clip
def test_clip_stored_in_fp16_equals_transformers_on_those_values(sizes):
    model = make_clip(sizes).half()
    ours = build_clip(
        clip_component(model), Facts(clip_eos_token_id=EOS), device="cpu", dtype=torch.float32
    )
    ids = prompts(20)
    ids[:, 9] = EOS
    with torch.no_grad():
        assert torch.equal(ours(ids), model.float()(ids).pooler_output)
