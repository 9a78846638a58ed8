"""The VAE in strips of rows: the same network with a quarter of the memory, and no seams.

At its finest levels one map of an image is larger than all weights. So maps are worked out a few
rows at a time: a convolution sees the rows above and below as well, a norm has the statistics of
the whole map, which are gathered first. What comes out differs from the whole at once by rounding
alone. At most two maps of a level are held; one that is enlarged is never held at all, but worked
out again each time it is read, three times in all.

Shape letters, in this module only:
    C  channels    H, W  rows and columns    R  some of the rows    G  groups of a norm
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP_PIXELS = 2**15  # of the level, in one strip; `memory.activations` plans with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A map (1, C, H, W) that is read by rows: `read(first, last)` -> (1, C, R, W)."""

    read: Callable[[int, int], Tensor]
    height: int
    width: int

    def strips(self) -> Iterator[tuple[int, int]]:
        """The first row of each strip, and the one after its last."""
        num_rows = max(1, STRIP_PIXELS // self.width)
        for first in range(0, self.height, num_rows):
            yield first, min(first + num_rows, self.height)


def decode_in_strips(model: Any, latents_1CHW: Tensor) -> Tensor:
    """As `AutoencoderKL.decode`: (1, C, H, W) -> (1, 3, 8 * H, 8 * W)."""
    decoder = model.decoder
    current = _held(decoder.mid_block(decoder.conv_in(latents_1CHW)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            current = _held(_resnet(resnet, current))
        for upsampler in block.upsamplers or ():
            current = _enlarged(current, upsampler.conv)
    return _filled(_convolved(_normed(current, decoder.conv_norm_out), decoder.conv_out))


def encode_in_strips(model: Any, image_13HW: Tensor) -> Tensor:
    """As what `AutoencoderKL.encode` takes mean and deviation from: -> (1, 2 * C, H / 8, W / 8)."""
    encoder = model.encoder
    current = _convolved(_held(image_13HW), encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            current = _held(_resnet(resnet, current))
        for downsampler in block.downsamplers or ():
            current = _held(_filled(_halved(current, downsampler.conv)))
    mixed = encoder.mid_block(current.read(0, current.height))
    return encoder.conv_out(F.silu(encoder.conv_norm_out(mixed)))


def _held(x_1CHW: Tensor) -> Map:
    return Map(
        read=lambda first, last: x_1CHW[:, :, first:last],
        height=x_1CHW.shape[2],
        width=x_1CHW.shape[3],
    )


def _convolved(source: Map, conv: nn.Conv2d) -> Map:
    """After a convolution of 3 x 3 that keeps the size."""

    def read(first: int, last: int) -> Tensor:
        above, below = int(first == 0), int(last == source.height)
        rows = source.read(first - 1 + above, last + 1 - below)
        return F.conv2d(_padded(rows, above, below), conv.weight, conv.bias, padding=(0, 1))

    return Map(read=read, height=source.height, width=source.width)


def _padded(x_1CRW: Tensor, above: int, below: int) -> Tensor:
    return F.pad(x_1CRW, (0, 0, above, below)) if above or below else x_1CRW


def _enlarged(source: Map, conv: nn.Conv2d) -> Map:
    """Every pixel four times, then a convolution."""

    def read(first: int, last: int) -> Tensor:
        rows = source.read(first // 2, -(-last // 2))
        doubled = F.interpolate(rows, scale_factor=2.0, mode="nearest")
        return doubled[:, :, first % 2 : first % 2 + last - first]

    doubled = Map(read=read, height=2 * source.height, width=2 * source.width)
    return _convolved(doubled, conv)


def _halved(source: Map, conv: nn.Conv2d) -> Map:
    """A convolution in steps of two, which pads the map at its end alone."""

    def read(first: int, last: int) -> Tensor:
        end = min(2 * last + 1, source.height)
        rows = source.read(2 * first, end)
        padded = F.pad(rows, (0, 1, 0, 2 * last + 1 - end))
        return F.conv2d(padded, conv.weight, conv.bias, stride=2)

    return Map(read=read, height=source.height // 2, width=source.width // 2)


def _normed(source: Map, norm: nn.GroupNorm) -> Map:
    """After a norm with the statistics of the whole map, and SiLU."""
    means, variances, shares = [], [], []
    for first, last in source.strips():
        groups = source.read(first, last).reshape(norm.num_groups, -1)
        variance_G, mean_G = torch.var_mean(groups.float(), dim=1, correction=0)
        means.append(mean_G)
        variances.append(variance_G)
        shares.append((last - first) / source.height)
    share_S = torch.tensor(shares, device=means[0].device)[:, None]
    mean_SG, variance_SG = torch.stack(means), torch.stack(variances)
    mean_G = (share_S * mean_SG).sum(0)
    variance_G = (share_S * (variance_SG + (mean_SG - mean_G) ** 2)).sum(0)
    per_group = norm.num_channels // norm.num_groups
    # With given statistics this is the whole norm in one kernel, and rounds once.
    mean_C, variance_C = (x.repeat_interleave(per_group) for x in (mean_G, variance_G))
    weight, bias = norm.weight.float(), norm.bias.float()

    def read(first: int, last: int) -> Tensor:
        rows = source.read(first, last)
        normed = F.batch_norm(rows, mean_C, variance_C, weight, bias, eps=norm.eps)
        return F.silu(normed, inplace=True)

    return Map(read=read, height=source.height, width=source.width)


def _resnet(block: Any, source: Map) -> Tensor:
    """A residual block. Its result takes the place of its inner map, strip by strip."""
    inner = _filled(_convolved(_normed(source, block.norm1), block.conv1))
    update = _convolved(_normed(_held(inner), block.norm2), block.conv2)
    waiting: tuple[int, int, Tensor] | None = None
    for first, last in source.strips():
        rows = update.read(first, last)
        shortcut = source.read(first, last)
        if block.conv_shortcut is not None:
            shortcut = block.conv_shortcut(shortcut)
        rows += shortcut
        if waiting is not None:
            inner[:, :, waiting[0] : waiting[1]] = waiting[2]
        # The next strip still reads this one's last row as it was.
        waiting = first, last, rows
    assert waiting is not None
    inner[:, :, waiting[0] : waiting[1]] = waiting[2]
    return inner


def _filled(source: Map) -> Tensor:
    """The whole map."""
    result: Tensor | None = None
    for first, last in source.strips():
        rows = source.read(first, last)
        if result is None:
            result = rows.new_empty((1, rows.shape[1], source.height, source.width))
        result[:, :, first:last] = rows
    assert result is not None
    return result
