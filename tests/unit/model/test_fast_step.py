"""The fast step against the plain one on the same weights, in every arithmetic, on the CPU."""

from dataclasses import replace

import pytest
import torch
from tolerances import (
    BF16_ERROR_RATIO,
    EIGHT_BIT_STEP,
    FLUX_FP32,
    FP8_ATTENTION_STEP,
    KEYS_CENTRED,
    relative_error,
)

from flux_nf4.model import blocks as plain_blocks
from flux_nf4.model import fused
from flux_nf4.model.arithmetic import set_arithmetic
from flux_nf4.model.attention import Attention, attend
from flux_nf4.model.build import build_transformer
from flux_nf4.model.fast_step import fast_step, fused_step
from flux_nf4.model.rope import rope_table
from flux_nf4.nf4.reference import quantize

BATCH, TXT, ROWS, COLUMNS = 2, 5, 3, 4


@pytest.fixture
def build(make_transformer):
    def build_blocks(dtype=torch.float32):
        component = make_transformer()
        entries = {
            name: quantize(entry, nested="attn" in name) if entry.ndim == 2 else entry
            for name, entry in component.entries.items()
        }
        component = replace(component, entries=entries)
        return build_transformer(component, device="cpu", dtype=dtype).blocks

    return build_blocks


def inputs(config, dtype=torch.float32, *, num_rows=1):
    generator = torch.Generator().manual_seed(1)
    img, txt, row = (
        torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)
        for shape in (
            (BATCH, ROWS * COLUMNS, config.in_channels),
            (BATCH, TXT, config.context_dim),
            (num_rows, config.modulation_width),
        )
    )
    return img, txt, row, rope_table(TXT, ROWS, COLUMNS, config)


@pytest.mark.parametrize("num_rows", [1, BATCH])
@torch.no_grad()
def test_fused_step_equals_the_plain_one_in_float32(build, num_rows):
    blocks = build()
    given = inputs(blocks.config, num_rows=num_rows)
    assert relative_error(fused_step(blocks, *given), blocks.plain_step(*given)) < FLUX_FP32


@torch.no_grad()
def test_bfloat16_error_of_the_fused_step_is_at_most_twice_that_of_the_plain_one(build):
    exact_blocks, blocks = build(), build(torch.bfloat16)
    exact = exact_blocks.plain_step(*inputs(blocks.config))
    given = inputs(blocks.config, torch.bfloat16)
    plain_error = relative_error(blocks.plain_step(*given), exact)
    assert relative_error(fused_step(blocks, *given), exact) <= BF16_ERROR_RATIO * plain_error


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@torch.no_grad()
def test_eight_bits_move_the_velocity_little(build, arithmetic):
    blocks = build()
    given = inputs(blocks.config)
    exact = blocks.plain_step(*given)
    set_arithmetic(blocks, arithmetic)
    for step in (fused_step, type(blocks).plain_step):
        assert 0 < relative_error(step(blocks, *given), exact) < EIGHT_BIT_STEP[arithmetic]


@torch.no_grad()
def test_blocks_say_when_their_weights_are_needed_once_and_in_order(build):
    blocks, calls = build(), []
    for block in (*blocks.double_blocks, *blocks.single_blocks):
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    fused_step(blocks, *inputs(blocks.config))
    assert calls == [*blocks.double_blocks, *blocks.single_blocks]


@torch.no_grad()
def test_inputs_are_left_as_they_were(build):
    blocks = build()
    given = inputs(blocks.config)
    before = [each.clone() for each in given]
    fused_step(blocks, *given)
    assert all(map(torch.equal, before, given))


@torch.no_grad()
def test_weights_that_are_not_nf4_take_the_fused_step_too(make_transformer):
    blocks = build_transformer(make_transformer(), device="cpu", dtype=torch.float32).blocks
    given = inputs(blocks.config)
    assert relative_error(fused_step(blocks, *given), blocks.plain_step(*given)) < FLUX_FP32


def test_a_built_model_takes_the_fast_step_without_gradients_only(build, monkeypatch):
    blocks, calls = build(), []
    assert blocks.fast_step is fast_step
    blocks.fast_step = lambda *given: calls.append(torch.is_grad_enabled())
    given = inputs(blocks.config)
    with torch.no_grad():
        blocks(*given)
    blocks(*given)
    assert calls == [False]


@torch.no_grad()
def test_the_fast_step_is_the_plain_one_where_no_kernels_are(build):
    blocks = build()
    given = inputs(blocks.config)
    assert torch.equal(fast_step(blocks, *given), blocks.plain_step(*given))


def heads_of_a_single_block(blocks, monkeypatch):
    seen = []
    attend = plain_blocks.F.scaled_dot_product_attention

    def watched(q, k, v):
        seen.extend((q, k, v))
        return attend(q, k, v)

    monkeypatch.setattr(plain_blocks.F, "scaled_dot_product_attention", watched)
    fused_step(blocks, *inputs(blocks.config))
    return seen[-3:]


@pytest.mark.parametrize("arithmetic", ["bf16", "int8"])
@torch.no_grad()
def test_attention_reads_what_the_kernel_before_wrote_or_a_view_of_the_product(
    build, monkeypatch, arithmetic
):
    blocks = build()
    set_arithmetic(blocks, arithmetic)
    q, _, v = heads_of_a_single_block(blocks, monkeypatch)
    heads, channels = blocks.config.num_heads, blocks.config.head_dim
    assert q.stride()[1:] == (channels, heads * channels, 1)
    assert v.stride(2) == 7 * blocks.config.hidden_size


def test_fused_functions_write_float32_scales_that_a_token_shares():
    _, rows = fused.norm_modulate(
        torch.randn(2, 3, 64), torch.zeros(1, 64), torch.zeros(1, 64), "int8"
    )
    assert (rows.values.dtype, rows.values.shape) == (torch.int8, (2, 3, 64))
    assert (rows.scale.dtype, rows.scale.shape) == (torch.float32, (2, 3, 1))


@torch.no_grad()
def test_a_step_attends_as_it_is_told_to_in_every_block(build):
    blocks, calls = build(), []

    def zeros(q, k, v):
        calls.append(q.shape)
        return torch.zeros_like(v)

    told = fused_step(blocks, *inputs(blocks.config), Attention(zeros))

    assert len(calls) == len(blocks.double_blocks) + len(blocks.single_blocks)
    assert not torch.equal(told, fused_step(blocks, *inputs(blocks.config)))


@pytest.mark.parametrize("arithmetic", ["bf16", "int8"])
@torch.no_grad()
def test_attention_in_e4m3_gets_and_gives_e4m3_and_moves_the_velocity_little(build, arithmetic):
    blocks, dtypes, keys = build(), set(), []
    set_arithmetic(blocks, arithmetic)

    def in_e4m3(*heads):
        dtypes.update(each.dtype for each in heads)
        keys.append(heads[1].float())
        return attend(*(each.float() for each in heads)).to(torch.float8_e4m3fn)

    given = inputs(blocks.config)
    found = fused_step(blocks, *given, Attention(in_e4m3, torch.float8_e4m3fn))
    exact = fused_step(blocks, *given)

    assert dtypes == {torch.float8_e4m3fn}
    centred = [*(each[:, TXT:] for each in keys[: len(blocks.double_blocks)]), keys[-1]]
    assert all(each.mean(1).abs().max() < KEYS_CENTRED for each in centred)
    assert found.dtype == exact.dtype
    assert 0 < relative_error(found, exact) < FP8_ATTENTION_STEP
