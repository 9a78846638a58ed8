"""Run by test_fused_kernels.py in a process of its own: TRITON_INTERPRET counts at import only.

Compares the fused kernels with their meaning in PyTorch over awkward shapes, then whole images of
a tiny pipeline, whose folder is the one argument, through all kernels with those of the plain
blocks; exits with what differs.
"""

import itertools
import sys
from unittest.mock import patch

import interpreter
import numpy as np
import torch
from tolerances import (
    EIGHT_BIT_EQUAL_SHARE,
    EIGHT_BIT_PIXEL,
    FUSED_BF16,
    FUSED_FP32,
    PIPELINE_EIGHT_BIT,
)

from flux_nf4.model import fused, fused_kernels
from flux_nf4.model.blocks import FluxBlocks, QKNorm
from flux_nf4.nf4.eight_bit import QuantizedRows
from flux_nf4.pipeline.convert import QuantizationWish
from flux_nf4.pipeline.generate import generate
from flux_nf4.pipeline.load import LoadSettings, load_model
from flux_nf4.pipeline.request import GenerationRequest

DTYPES = {torch.float32: FUSED_FP32, torch.bfloat16: FUSED_BF16}
ARITHMETICS = ("bf16", "fp8", "int8")
# Batch, tokens, heads, channels: no width but the first is a power of two.
SHAPES = [(1, 3, 2, 64), (2, 5, 3, 64), (1, 1, 5, 128)]
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator)


def differs(ours, theirs, tolerance):
    """Whether two results are not the same within what their type allows."""
    if not isinstance(theirs, QuantizedRows):
        return float((ours.float() - theirs.float()).norm() / theirs.float().norm()) > tolerance
    # A value on the border of two steps may fall on either side; then it is one step off.
    equal = ours.values.view(torch.uint8) == theirs.values.view(torch.uint8)
    our_values, their_values = ours.values.float(), theirs.values.float()
    is_near = (our_values - their_values).abs() <= 1 + their_values.abs() / 8
    scales = torch.allclose(ours.scale, theirs.scale, rtol=tolerance)
    return not (scales and is_near.all() and equal.float().mean() >= EIGHT_BIT_EQUAL_SHARE)


def norm_cases(dtype, shape, arithmetic):
    batch, tokens, heads, channels = shape
    width = heads * channels
    # A slice of the tokens, so that samples do not lie side by side; vectors for all or for each.
    stream = random(batch, tokens + 2, width).to(dtype)
    y, gate = random(batch, tokens, width).to(dtype), random(1, width).to(dtype)
    for vectors, update in itertools.product((1, batch), (None, (y, gate))):
        shift, scale = random(vectors, 2 * width).to(dtype).chunk(2, -1)
        kept, rows = fused.norm_modulate(stream[:, 2:], shift, scale, arithmetic, update)
        changed = stream.clone()
        ours = fused_kernels.norm_modulate(changed[:, 2:], shift, scale, arithmetic, update)
        yield ours, rows
        yield changed[:, 2:], kept


def rotate_cases(dtype, shape, arithmetic):
    if arithmetic != "bf16":  # what is rotated is never in 8 bits
        return
    batch, tokens, heads, channels = shape
    qkv = random(batch, tokens, 3 * heads * channels + 64).to(dtype)[..., :-64]
    norm, rope = QKNorm(channels), random(2, tokens + 1, channels // 2)[:, 1:]
    norm.query_norm.scale.copy_(random(channels))
    scales = norm.query_norm.scale, norm.key_norm.scale
    for with_values, heads_first in itertools.product((False, True), (False, True)):
        sizes = (heads, tokens) if heads_first else (tokens, heads)
        ours, theirs = torch.zeros(2, 3, batch, *sizes, channels, dtype=dtype)
        outs = [
            [x.transpose(1, 2) if heads_first else x for x in memory] for memory in (ours, theirs)
        ]
        for out in outs:
            out[2] = out[2] if with_values else None
        fused_kernels.norm_rotate_out(qkv, *scales, rope, outs[0])
        fused.norm_rotate_out(qkv, norm, rope, outs[1])
        yield ours, theirs


def centre_cases(dtype, shape, arithmetic):
    if arithmetic != "bf16":
        return
    batch, tokens, heads, channels = shape
    for num_tokens in (tokens, 40 * tokens):
        qkv = random(batch, num_tokens, 3 * heads * channels + 64).to(dtype)[..., :-64]
        norm, rope = QKNorm(channels), random(2, num_tokens, channels // 2)
        norm.key_norm.scale.copy_(random(channels))
        with patch.object(fused, "CENTRE_TOKENS", 37):
            theirs = fused.key_centre(qkv, norm, rope)
        step = num_tokens // 37 | 1
        yield fused_kernels.key_centre(qkv, norm.key_norm.scale, rope, step), theirs


def e4m3_cases(dtype, shape, arithmetic):
    """What attention in e4m3 reads and what it gives."""
    batch, tokens, heads, channels = shape
    if arithmetic == "bf16":
        qkv, rope = (
            random(batch, tokens, 3 * heads * channels).to(dtype),
            random(2, tokens, channels // 2),
        )
        norm, one = QKNorm(channels), torch.ones(batch, tokens, 1)
        scales = norm.query_norm.scale, norm.key_norm.scale
        centre = fused.key_centre(qkv, norm, rope)
        ours, theirs = torch.zeros(2, 3, batch, tokens, heads, channels, dtype=torch.float8_e4m3fn)
        fused_kernels.norm_rotate_out(qkv, *scales, rope, ours, centre)
        fused.norm_rotate_out(qkv, norm, rope, theirs, centre)
        yield QuantizedRows(values=ours, scale=one), QuantizedRows(values=theirs, scale=one)
    attended = random(*shape[:2], heads, channels).to(torch.float8_e4m3fn)
    inner = random(batch, tokens, 320).to(dtype)
    given = attended, inner, arithmetic, dtype
    yield fused_kernels.join(*given), fused.join(*given)


def join_cases(dtype, shape, arithmetic):
    batch, tokens, heads, channels = shape
    attended = random(batch, heads, tokens, channels).to(dtype).transpose(1, 2)
    inner = random(batch, tokens, 5 * 64 + 2).to(dtype)[..., 2:]
    for parts in ((attended, inner), (None, inner), (attended, None)):
        given = *parts, arithmetic, dtype
        yield fused_kernels.join(*given), fused.join(*given)


def wrong_kernels():
    for cases in (norm_cases, rotate_cases, join_cases, centre_cases, e4m3_cases):
        cases_of = [(torch.float32, shape) for shape in SHAPES] + [(torch.bfloat16, SHAPES[0])]
        for (dtype, shape), arithmetic in itertools.product(cases_of, ARITHMETICS):
            for number, (ours, theirs) in enumerate(cases(dtype, shape, arithmetic)):
                if differs(ours, theirs, DTYPES[dtype]):
                    yield cases.__name__, dtype, shape, arithmetic, number


def nan_passes():
    x = torch.zeros(1, 2, 128)
    x[0, 1, 5] = torch.nan
    for arithmetic in ("fp8", "int8"):
        rows = fused_kernels.join(None, x, arithmetic, x.dtype)
        product = rows.values.float() * rows.scale
        if product[0, 0].isnan().any() or not product[0, 1].isnan().any():
            yield "NaN is lost", arithmetic


def images(folder, arithmetic):
    wish = QuantizationWish(double_quant=True)
    settings = LoadSettings(
        device="cpu", dtype=torch.float32, quantization=wish, arithmetic=arithmetic
    )
    model = load_model(folder, settings)
    request = GenerationRequest(
        prompt="a red cat",
        width=64,
        height=64,
        num_inference_steps=1,
        seed=1,
        max_sequence_length=8,
    )
    done = [event.image for event in generate(model, request) if hasattr(event, "image")]
    return torch.stack([torch.from_numpy(np.array(image)).float() / 255 for image in done])


def wrong_images(folder):
    plain = {arithmetic: images(folder, arithmetic) for arithmetic in ARITHMETICS}
    interpreter.use_kernels_on_the_cpu()
    FluxBlocks.plain_step = None
    for arithmetic, expected in plain.items():
        off = float((images(folder, arithmetic) - expected).abs().max())
        if off > (EIGHT_BIT_PIXEL if arithmetic == "bf16" else PIPELINE_EIGHT_BIT):
            yield arithmetic, off


with torch.no_grad():
    wrong = [*wrong_kernels(), *nan_passes(), *wrong_images(sys.argv[1])]
sys.exit(f"kernels differ: {wrong}" if wrong else 0)
