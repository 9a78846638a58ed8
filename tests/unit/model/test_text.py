"""T5 and CLIP: what is stored, and what a wrong tokenizer or file leads to."""

from dataclasses import replace

import pytest
import torch

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.facts import Facts
from flux_nf4.model.build import build_clip, build_t5
from flux_nf4.model.fp8 import Fp8Embedding, Fp8Linear

FACTS = Facts(clip_eos_token_id=1)


def in_fp8(component):
    entries = {name: entry.to(torch.float8_e4m3fn) for name, entry in component.entries.items()}
    return replace(component, entries=entries)


def test_t5_in_8_bits_holds_no_wide_matrix(t5):
    built = build_t5(in_fp8(t5), device="cpu", dtype=torch.bfloat16)
    assert isinstance(built.model.shared, Fp8Embedding)
    wide = [name for name, value in built.named_parameters() if value.ndim == 2]
    assert wide == []


def test_t5_in_8_bits_takes_the_bytes_of_the_file_and_its_norms(t5):
    built = build_t5(in_fp8(t5), device="cpu", dtype=torch.bfloat16)
    num_bytes = sum(tensor.nbytes for tensor in built.state_dict(keep_vars=True).values())
    norms = sum(entry.numel() for entry in t5.entries.values() if entry.ndim == 1)
    assert num_bytes == sum(e.numel() for e in t5.entries.values()) + norms


def test_t5_projections_stay_in_8_bits(t5):
    built = build_t5(in_fp8(t5), device="cpu", dtype=torch.bfloat16)
    linears = [module for module in built.modules() if isinstance(module, Fp8Linear)]
    assert len(linears) == 2 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_t5_answers_in_the_dtype_it_computes_in(t5, dtype):
    built = build_t5(in_fp8(t5), device="cpu", dtype=dtype)
    with torch.no_grad():
        hidden = built(torch.tensor([[3, 4, 1], [5, 1, 0]]))
    assert (hidden.shape, hidden.dtype) == ((2, 3, 64), dtype)


def test_t5_heads_that_do_not_divide_are_refused(t5):
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    entries = {**t5.entries, name: torch.zeros(32, 5)}
    with pytest.raises(
        FormatError, match="32 buckets of relative distance, 5 heads and 32 channels"
    ):
        build_t5(replace(t5, entries=entries), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("num_buckets", [1, 2, 33, 512])
def test_t5_with_another_number_of_buckets_is_refused(t5, num_buckets):
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    entries = {**t5.entries, name: torch.zeros(num_buckets, 2)}
    with pytest.raises(FormatError, match=f"{num_buckets} buckets.* must have 32 buckets"):
        build_t5(replace(t5, entries=entries), device="cpu", dtype=torch.float32)


def test_t5_token_outside_the_vocabulary_is_refused(t5):
    built = build_t5(t5, device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match="token 50 is outside the text encoder's vocabulary of 50"):
        built(torch.tensor([[3, 50, 1]]))


def test_clip_pools_at_the_first_end_token(clip):
    built = build_clip(clip, FACTS, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        short = built(torch.tensor([[0, 9, 8, 1]]))
        padded = built(torch.tensor([[0, 9, 8, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(padded, short)


def test_clip_projection_is_left_out(clip):
    built = build_clip(clip, FACTS, device="cpu", dtype=torch.float32)
    assert not any("projection" in name for name, _ in built.named_parameters())


def test_clip_without_a_projection_is_the_same(clip):
    entries = {k: v for k, v in clip.entries.items() if k != "text_projection.weight"}
    ids = torch.tensor([[0, 9, 1]])
    with torch.no_grad():
        outputs = [
            build_clip(held, FACTS, device="cpu", dtype=torch.float32)(ids)
            for held in (clip, replace(clip, entries=entries))
        ]
    assert torch.equal(*outputs)


def test_clip_prompt_without_an_end_is_refused(clip):
    built = build_clip(clip, FACTS, device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match=r"hold no end token \(1\)"):
        built(torch.tensor([[0, 9, 1], [0, 9, 8]]))


def test_clip_token_outside_the_vocabulary_is_refused(clip):
    built = build_clip(clip, FACTS, device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match="token 49407 is outside"):
        built(torch.tensor([[0, 9, 49407]]))


def test_clip_prompt_that_is_too_long_is_refused(clip):
    built = build_clip(clip, FACTS, device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match="at most 77 tokens, got 78"):
        built(torch.ones(1, 78, dtype=torch.long))


def test_clip_that_ends_prompts_outside_its_vocabulary_is_refused(clip):
    with pytest.raises(FormatError, match="50 tokens, and prompts would end in token 49407"):
        build_clip(clip, Facts(), device="cpu", dtype=torch.float32)


def test_clip_of_a_width_that_heads_do_not_divide_is_refused(clip):
    name = "text_model.embeddings.token_embedding.weight"
    entries = {**clip.entries, name: torch.zeros(50, 100)}
    with pytest.raises(FormatError, match="does not divide into heads of 64"):
        build_clip(replace(clip, entries=entries), FACTS, device="cpu", dtype=torch.float32)
