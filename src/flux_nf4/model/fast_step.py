"""A step through the blocks with the functions of `fused` between the products: no gradients.

The same layers in the same order as `blocks`, cut at other places: a block's last product is not
added to the residual stream by the block itself but by the norm that reads the stream next, in
one kernel. So a stream is its tokens, and an update that is still to come.

Every product goes through `project`. Nothing here waits for a compiler of whole graphs.

Shape letters, in this module only:
    B  batch    L  image tokens    T  text tokens    S  T + L    H  hidden size
    C  channels of a packed image token              M  modulation width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn

from flux_nf4.model import fused
from flux_nf4.model.attention import EXACT, Attention
from flux_nf4.nf4.linear import NF4Linear

if TYPE_CHECKING:
    from flux_nf4.model.blocks import (
        DoubleStreamBlock,
        FluxBlocks,
        SingleStreamBlock,
    )
    from flux_nf4.model.fused import Rows
    from flux_nf4.nf4.eight_bit import Arithmetic


def fast_step(
    blocks: FluxBlocks,
    img_BLC: Tensor,
    txt_BTD: Tensor,
    modulation_BM: Tensor,
    rope_2SF: Tensor,
    attention: Attention = EXACT,
) -> Tensor:
    """As `FluxBlocks.forward`; where there are no kernels for it, `FluxBlocks.plain_step`.

    Measured on a CPU, the functions of `fused` are no faster in PyTorch than the plain blocks.
    """
    is_traced = torch.compiler.is_compiling()
    if is_traced or fused.kernels(img_BLC.device.type) is None:
        return blocks.plain_step(img_BLC, txt_BTD, modulation_BM, rope_2SF)
    return fused_step(blocks, img_BLC, txt_BTD, modulation_BM, rope_2SF, attention)


def fused_step(
    blocks: FluxBlocks,
    img_BLC: Tensor,
    txt_BTD: Tensor,
    modulation_BM: Tensor,
    rope_2SF: Tensor,
    attention: Attention = EXACT,
) -> Tensor:
    """(B, L, C), (B, T, context), (B or 1, M), (2, S, F) -> velocity (B, L, C)."""
    double, single, final = blocks.vectors(modulation_BM)
    num_txt = txt_BTD.shape[1]
    img, txt = _Stream(blocks.img_in(img_BLC)), _Stream(blocks.txt_in(txt_BTD))
    for i, block in enumerate(blocks.double_blocks):
        blocks.on_block(block)
        _double(cast("DoubleStreamBlock", block), img, txt, double[i], rope_2SF, attention)
    joined = _Stream(torch.cat((txt.updated(), img.updated()), dim=1))
    for i, block in enumerate(blocks.single_blocks):
        blocks.on_block(block)
        _single(cast("SingleStreamBlock", block), joined, single[i], rope_2SF, attention)
    shift_BH, scale_BH = final.chunk(2, dim=-1)
    rows = joined.tokens(num_txt).norm_modulate(shift_BH, scale_BH, blocks.final_layer.linear)
    return project(blocks.final_layer.linear, rows, img_BLC.dtype)


def project(layer: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
    """A layer's product with rows in its arithmetic: (B, S, in) -> (B, S, out) `dtype`."""
    if isinstance(rows, Tensor):
        return layer(rows)
    assert isinstance(layer, NF4Linear)
    return layer.multiply(rows, dtype)


def has_gelu(rows: Rows, *layers: nn.Module) -> TypeGuard[Tensor]:
    """Whether the product of the first layer's rows can end in GELU, as the next one's input."""
    return (
        isinstance(rows, Tensor)
        and rows.is_cuda
        and all(isinstance(layer, NF4Linear) and layer.bias is not None for layer in layers)
        and all(arithmetic_of(layer) == "bf16" for layer in layers)
    )


def project_gelu(layer: nn.Module, x_BSH: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """A product in two: columns up to `start`, and GELU of the others in the product's own float32.

    (B, S, H) -> (B, S, start), (B, S, out - start). No kernel of ours reads 100 MB to do it.
    """
    layer = cast("NF4Linear", layer)
    x_MH, bias = x_BSH.flatten(0, 1), cast("Tensor", layer.bias).to(x_BSH.dtype)
    w_NH = layer.expand_for_product(x_BSH.dtype)
    plain = torch.addmm(bias[:start], x_MH, w_NH[:start].t()) if start else x_MH[:, :0]
    gelu = torch._addmm_activation(bias[start:], x_MH, w_NH[start:].t(), use_gelu=True)
    batch = x_BSH.shape[:1]
    return plain.unflatten(0, (*batch, -1)), gelu.unflatten(0, (*batch, -1))


def project_both(layer: nn.Module, first_BSX: Tensor, second_BSY: Tensor) -> Tensor:
    """The product with two tensors side by side, which are not copied there: -> (B, S, out)."""
    layer = cast("NF4Linear", layer)
    first, second = first_BSX.flatten(0, 1), second_BSY.flatten(0, 1)
    w_NK = layer.expand_for_product(first.dtype)
    width = first.shape[1]
    out = torch.addmm(cast("Tensor", layer.bias).to(first.dtype), first, w_NK[:, :width].t())
    return out.addmm_(second, w_NK[:, width:].t()).view(*first_BSX.shape[:2], -1)


def arithmetic_of(layer: nn.Module) -> Arithmetic:
    """What rows for `layer` must be in."""
    return layer.arithmetic if isinstance(layer, NF4Linear) else "bf16"


@dataclass(slots=True)
class _Stream:
    """Tokens (B, S, H), and what is to be added to them: an update (B, S, H), its gate (B, H)."""

    x: Tensor
    update: tuple[Tensor, Tensor] | None = None

    def norm_modulate(self, shift_BH: Tensor, scale_BH: Tensor, reader: nn.Module) -> Rows:
        """The rows for `reader`; what was to be added now is."""
        arithmetic = arithmetic_of(reader)
        self.x, rows = fused.norm_modulate(self.x, shift_BH, scale_BH, arithmetic, self.update)
        self.update = None
        return rows

    def updated(self) -> Tensor:
        """The tokens, up to date."""
        if self.update is not None:
            y_BSH, gate_BH = self.update
            self.x, self.update = torch.addcmul(self.x, gate_BH[:, None], y_BSH), None
        return self.x

    def tokens(self, start: int) -> _Stream:
        """Those from `start` on."""
        update = self.update and (self.update[0][:, start:], self.update[1])
        return _Stream(self.x[:, start:], update)


def _double(
    block: DoubleStreamBlock,
    img: _Stream,
    txt: _Stream,
    modulation_B12H: Tensor,
    rope_2SF: Tensor,
    attention: Attention,
) -> None:
    num_txt, dtype = txt.x.shape[1], img.x.dtype
    img_vectors, txt_vectors = (half.chunk(6, -1) for half in modulation_B12H.chunk(2, -1))
    sides = (
        (img, block.img_attn, block.img_mlp, img_vectors, slice(num_txt, None)),
        (txt, block.txt_attn, block.txt_mlp, txt_vectors, slice(0, num_txt)),
    )
    shape = len(img.x), rope_2SF.shape[1], block.img_attn.num_heads, 2 * rope_2SF.shape[2]
    q, k, v = (img.x.new_empty(shape, dtype=attention.dtype) for _ in range(3))
    centre: Tensor | None = None
    for stream, layers, _, (shift, scale, *_), place in sides:
        rows = stream.norm_modulate(shift, scale, layers.qkv)
        qkv, rope = project(layers.qkv, rows, dtype), rope_2SF[:, place]
        if attention.dtype is not None and centre is None:
            centre = fused.key_centre(qkv, layers.norm, rope)  # the image's, for both sides
        heads = q[:, place], k[:, place], v[:, place]
        fused.norm_rotate_out(qkv, layers.norm, rope, heads, centre)
    mixed_BSND = attention.attend(q, k, v)
    for stream, layers, mlp, (_, _, gate1, shift2, scale2, gate2), place in sides:
        rows = fused.join(mixed_BSND[:, place], None, arithmetic_of(layers.proj), dtype)
        stream.update = project(layers.proj, rows, dtype), gate1
        rows = stream.norm_modulate(shift2, scale2, mlp[0])
        if has_gelu(rows, mlp[0], mlp[2]):
            rows = project_gelu(mlp[0], rows)[1]
        else:
            rows = fused.join(None, project(mlp[0], rows, dtype), arithmetic_of(mlp[2]), dtype)
        stream.update = project(mlp[2], rows, dtype), gate2


def _single(
    block: SingleStreamBlock,
    stream: _Stream,
    modulation_B3H: Tensor,
    rope_2SF: Tensor,
    attention: Attention,
) -> None:
    shift_BH, scale_BH, gate_BH = modulation_B3H.chunk(3, dim=-1)
    dtype = stream.x.dtype
    rows = stream.norm_modulate(shift_BH, scale_BH, block.linear1)
    if has_gelu(rows, block.linear1, block.linear2):
        qkv, inner = project_gelu(block.linear1, rows, block.widths[0])
        attended = attention.attend(*_heads(block, qkv, rope_2SF, attention.dtype))
        update = project_both(block.linear2, attended.flatten(2).to(dtype), inner)
    else:
        qkv, inner = project(block.linear1, rows, dtype).split(block.widths, dim=-1)
        attended = attention.attend(*_heads(block, qkv, rope_2SF, attention.dtype))
        rows = fused.join(attended, inner, arithmetic_of(block.linear2), dtype)
        update = project(block.linear2, rows, dtype)
    stream.update = update, gate_BH


def _heads(
    block: SingleStreamBlock, qkv_BSX: Tensor, rope_2SF: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `dtype`; None: the product's, and values as they lie there."""
    shape = *qkv_BSX.shape[:2], block.num_heads, 2 * rope_2SF.shape[2]
    q, k = (qkv_BSX.new_empty(shape, dtype=dtype) for _ in range(2))
    if dtype is None:
        fused.norm_rotate_out(qkv_BSX, block.norm, rope_2SF, (q, k, None))
        return q, k, qkv_BSX.unflatten(-1, (3, *shape[2:]))[:, :, 2]
    v, centre_BND = torch.empty_like(q), fused.key_centre(qkv_BSX, block.norm, rope_2SF)
    fused.norm_rotate_out(qkv_BSX, block.norm, rope_2SF, (q, k, v), centre_BND)
    return q, k, v
