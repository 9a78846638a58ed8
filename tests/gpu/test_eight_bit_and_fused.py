"""Fused kernels, 8-bit products and the fast step on a real GPU, against the same in PyTorch."""

from pathlib import Path

import pytest
import torch
from tolerances import (
    BF16_ERROR_RATIO,
    E4M3_ROUNDING_TWICE,
    EIGHT_BIT_EQUAL_SHARE,
    EIGHT_BIT_PRODUCT,
    EIGHT_BIT_STEP,
    FP8_ATTENTION_STEP,
    FUSED_BF16,
    INT8_ATTENTION_STEP,
    relative_error,
)

from flux_nf4.errors import InputError
from flux_nf4.formats.component import Component
from flux_nf4.model import attention, fused
from flux_nf4.model.arithmetic import possible_arithmetic, set_arithmetic
from flux_nf4.model.blocks import QKNorm
from flux_nf4.model.build import build_transformer
from flux_nf4.model.config import FluxConfig
from flux_nf4.model.fast_step import fused_step
from flux_nf4.model.rope import rope_table
from flux_nf4.model.transformer import FluxTransformer
from flux_nf4.nf4 import eight_bit, ops, reference
from flux_nf4.nf4.linear import NF4Linear

pytestmark = pytest.mark.gpu

ARITHMETICS = ["bf16", "fp8", "int8"]
# FLUX.1's widths, and ones that are no powers of two; batches and tokens that fill no tile.
WIDTHS = [(24, 128), (3, 64)]
BATCH, TOKENS = 2, 77


def require(arithmetic: str) -> None:
    if arithmetic not in possible_arithmetic(torch.device("cuda")):
        pytest.skip(f"this device has no {arithmetic}")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(dtype).cuda()


def in_pytorch(monkeypatch: pytest.MonkeyPatch, call):
    """What a function of `fused` gives without its kernel."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "kernels", lambda device_type: None)
        return call()


def assert_same_rows(ours, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        assert relative_error(ours, theirs) < FUSED_BF16
        return
    equal = ours.values.view(torch.uint8) == theirs.values.view(torch.uint8)
    assert equal.float().mean() > EIGHT_BIT_EQUAL_SHARE
    assert torch.allclose(ours.scale, theirs.scale, rtol=FUSED_BF16)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("heads", "channels"), WIDTHS)
@torch.no_grad()
def test_norm_equals_pytorch(monkeypatch, heads, channels, arithmetic):
    require(arithmetic)
    width = heads * channels
    x, y = random(BATCH, TOKENS, width), random(BATCH, TOKENS, width)
    shift, scale, gate = (random(1, 3 * width)).chunk(3, -1)
    given = (shift, scale, arithmetic, (y, gate))
    kept, theirs = in_pytorch(monkeypatch, lambda: fused.norm_modulate(x.clone(), *given))
    changed, ours = fused.norm_modulate(x, *given)
    assert_same_rows(ours, theirs)
    assert relative_error(changed, kept) < FUSED_BF16


@pytest.mark.parametrize(("heads", "channels"), WIDTHS)
@torch.no_grad()
def test_rotation_equals_pytorch(monkeypatch, heads, channels):
    qkv = random(BATCH, TOKENS, 7 * heads * channels)[..., : 3 * heads * channels]
    norm, rope = QKNorm(channels).cuda(), random(2, TOKENS, channels // 2, dtype=torch.float32)
    ours, theirs = torch.zeros(2, 3, BATCH, TOKENS, heads, channels, device="cuda").bfloat16()
    fused.norm_rotate_out(qkv, norm, rope, ours.unbind(0))
    in_pytorch(monkeypatch, lambda: fused.norm_rotate_out(qkv, norm, rope, theirs.unbind(0)))
    assert relative_error(ours, theirs) < FUSED_BF16


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("heads", "channels"), WIDTHS)
@torch.no_grad()
def test_join_equals_pytorch(monkeypatch, heads, channels, arithmetic):
    require(arithmetic)
    attended = random(BATCH, TOKENS, heads, channels)
    inner = random(BATCH, TOKENS, 7 * heads * channels)[..., 3 * heads * channels :]
    for given in ((attended, inner), (None, inner), (attended, None)):
        told = *given, arithmetic, attended.dtype
        theirs = in_pytorch(monkeypatch, lambda told=told: fused.join(*told))
        assert_same_rows(fused.join(*told), theirs)


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3072, 3072), (144, 192)])
@torch.no_grad()
def test_expansion_to_eight_bits_has_the_bytes_of_the_cpu(shape, nested, arithmetic):
    require(arithmetic)
    layer = NF4Linear(reference.quantize(random(*shape).cpu(), nested=nested))
    layer.set_arithmetic(arithmetic)
    dtype, inverse_N = eight_bit.eight_bit_dtype(arithmetic), layer.row_scales()[1]
    expected = layer.expand_for_product(dtype, inverse_N)
    on_gpu = layer.cuda().expand_for_product(dtype, inverse_N.cuda())
    assert torch.equal(on_gpu.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@pytest.mark.parametrize("num_rows", [1, 7, 130, 4608])
@torch.no_grad()
def test_product_equals_the_emulated_one(num_rows, arithmetic):
    require(arithmetic)
    layer = NF4Linear(reference.quantize(random(144, 192).cpu()), random(144).cpu()).cuda()
    layer.set_arithmetic(arithmetic)
    rows = eight_bit.quantize_rows(random(num_rows, 192), arithmetic)
    scale_N, inverse_N = layer.row_scales()
    w_NK = layer.expand_for_product(eight_bit.eight_bit_dtype(arithmetic), inverse_N)
    operands = (w_NK, scale_N, layer.bias)
    expected = eight_bit.multiply(rows.values, rows.scale, *operands, torch.float32)
    assert relative_error(ops.multiply(rows, *operands, torch.bfloat16), expected) < (
        EIGHT_BIT_PRODUCT[arithmetic] / 4
    )


@pytest.fixture(scope="module")
def blocks():
    config = FluxConfig(
        hidden_size=768, num_heads=6, num_double_blocks=2, num_single_blocks=3,
        context_dim=256, pooled_dim=64,
    )  # fmt: skip
    with torch.device("meta"):
        module = FluxTransformer(config)
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) / 16
        entries[name.partition(".")[2]] = reference.quantize(value) if value.ndim == 2 else value
    component = Component(kind="transformer", entries=entries, source=Path("random"))
    return build_transformer(component, device="cuda", dtype=torch.bfloat16).blocks


def inputs(config, dtype=torch.bfloat16):
    img, txt = random(BATCH, 20 * 13, config.in_channels), random(BATCH, 33, config.context_dim)
    row = random(1, config.modulation_width)
    return *(x.to(dtype) for x in (img, txt, row)), rope_table(33, 20, 13, config, "cuda")


@torch.no_grad()
def test_bfloat16_error_is_at_most_twice_that_of_the_plain_step(blocks):
    exact = blocks.plain_step(*inputs(blocks.config, torch.float32))
    given = inputs(blocks.config)
    plain_error = relative_error(blocks.plain_step(*given), exact)
    assert relative_error(fused_step(blocks, *given), exact) <= BF16_ERROR_RATIO * plain_error


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
@torch.no_grad()
def test_eight_bits_move_the_velocity_little(blocks, arithmetic):
    require(arithmetic)
    given = inputs(blocks.config)
    exact = blocks.plain_step(*inputs(blocks.config, torch.float32))
    set_arithmetic(blocks, arithmetic)
    error = relative_error(fused_step(blocks, *given), exact)
    set_arithmetic(blocks, "bf16")
    assert error < EIGHT_BIT_STEP[arithmetic]


def attention_of(wish):
    """A way of attention; skips where its library is not installed or does not serve the GPU."""
    try:
        return attention.choose_attention(wish, torch.device("cuda"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("wish", "tolerance"), [("int8", INT8_ATTENTION_STEP), ("fp8", FP8_ATTENTION_STEP)]
)
@torch.no_grad()
def test_attention_in_eight_bits_moves_the_velocity_little(blocks, wish, tolerance):
    exact = blocks.plain_step(*inputs(blocks.config, torch.float32))
    found = fused_step(blocks, *inputs(blocks.config), attention_of(wish))
    assert relative_error(found, exact) < tolerance


@torch.no_grad()
def test_attention_in_e4m3_joins_products_in_eight_bits(blocks):
    chosen, given = attention_of("fp8"), inputs(blocks.config)
    set_arithmetic(blocks, "fp8")
    exact, found = fused_step(blocks, *given), fused_step(blocks, *given, chosen)
    set_arithmetic(blocks, "bf16")
    assert relative_error(found, exact) < FP8_ATTENTION_STEP


@pytest.mark.parametrize("num_tokens", [1, 33, 4608])
@torch.no_grad()
def test_the_centre_of_keys_equals_pytorch(monkeypatch, num_tokens):
    qkv = random(BATCH, num_tokens, 7 * 3 * 128)[..., : 3 * 3 * 128]
    norm, rope = QKNorm(128).cuda(), random(2, num_tokens, 64, dtype=torch.float32)
    ours = fused.key_centre(qkv, norm, rope)
    theirs = in_pytorch(monkeypatch, lambda: fused.key_centre(qkv, norm, rope))
    assert relative_error(ours, theirs) < FUSED_BF16


@torch.no_grad()
def test_a_captured_step_with_attention_in_e4m3_equals_an_eager_one(blocks):
    chosen = attention_of("fp8")
    given = inputs(blocks.config)
    eager = [fused_step(blocks, *given, chosen) for _ in range(2)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_step(blocks, *given, chosen)
    graph.replay()
    assert torch.equal(captured, eager)


def test_attention_in_e4m3_equals_that_of_the_rounded_heads():
    attend = attention_of("fp8").attend
    heads = [random(2, 333, 5, 128).to(torch.float8_e4m3fn) for _ in range(3)]
    exact = attention.attend(*(each.float() for each in heads))
    assert relative_error(attend(*heads), exact) < E4M3_ROUNDING_TWICE


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@torch.no_grad()
def test_a_captured_step_equals_an_eager_one(blocks, arithmetic):
    require(arithmetic)
    set_arithmetic(blocks, arithmetic)
    given = inputs(blocks.config)
    eager = [fused_step(blocks, *given) for _ in range(2)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_step(blocks, *given)
    graph.replay()
    set_arithmetic(blocks, "bf16")
    assert torch.equal(captured, eager)
