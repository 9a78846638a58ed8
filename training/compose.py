"""Scenes as numbers to exact pictures: sprites placed by whole pixels, on any device.

Each sprite is resized once to the four sizes of the grammar and kept as packed 8-bit RGBA, so
that composing a batch is one gather for each of the four layers.

Shape letters, in this module only:
    B  pictures     N  things     H, W  the 256 x 256 canvas
"""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from training import DATA
from training.grammar import CANVAS, SIZES, TINTS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# Luminance above which a tinted sprite goes from the tint towards white instead of from black.
TINT_KNEE = 0.62
LUMINANCE = (0.30, 0.55, 0.15)
TINT_WHITENING = 0.85


def load_sprites(path: Path = DATA / "sprites.npz") -> Tensor:
    """The sprites of all things: uint8 [N, 256, 256, 4], straight (not premultiplied) RGBA."""
    from PIL import Image

    with np.load(path) as archive:
        webp, offsets = archive["webp"].tobytes(), archive["offsets"].tolist()
    pictures = []
    for start, stop in itertools.pairwise(offsets):
        with Image.open(io.BytesIO(webp[start:stop])) as image:
            # A few of the files are a pixel or two smaller.
            pictures.append(np.asarray(image.convert("RGBA").resize((CANVAS, CANVAS))))
    return torch.from_numpy(np.stack(pictures))


def _resize(sprites: Tensor, size: int) -> Tensor:
    """Straight RGBA float [n, 4, 256, 256] -> packed RGBA int32 [n, size, size]."""
    colour, alpha = sprites[:, :3], sprites[:, 3:]
    premultiplied = torch.cat([colour * alpha, alpha], dim=1)
    if size != CANVAS:
        # Premultiplied, so that what lies behind full transparency does not bleed into outlines.
        premultiplied = F.interpolate(
            premultiplied, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    alpha = premultiplied[:, 3:]
    straight = torch.cat([(premultiplied[:, :3] / alpha.clamp(min=1e-3)).clamp(0, 1), alpha], 1)
    pixels = (straight * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels.view(torch.int32)[..., 0]


class Composer:
    """Draws scenes; `num_things` things, on `device`."""

    def __init__(self, sprites: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.num_things = sprites.shape[0]
        packed = []
        starts = torch.zeros(CANVAS + 1, dtype=torch.long)
        for size in SIZES:
            starts[size] = sum(part.numel() for part in packed)
            for chunk in sprites.split(64):
                straight = chunk.to(self.device).permute(0, 3, 1, 2).float() / 255
                packed.append(_resize(straight, size).reshape(-1))
        self._pixels = torch.cat(packed)
        self._starts = starts.to(self.device)
        self._tints = torch.tensor(list(TINTS.values()), device=self.device).float() / 255
        self._luminance = torch.tensor(LUMINANCE, device=self.device).view(1, 3, 1, 1)
        self._rows = torch.arange(CANVAS, device=self.device).view(1, CANVAS, 1)
        self._columns = torch.arange(CANVAS, device=self.device).view(1, 1, CANVAS)

    def layer(self, objs: Tensor) -> tuple[Tensor, Tensor]:
        """One placed sprite each: objs [B, 5] -> colour [B, 3, H, W], alpha [B, 1, H, W].

        Values are in [0, 1]; alpha is zero where the concept is negative.
        """
        concept, x, y, size, tint = objs.long().unbind(dim=1)
        side = size.clamp(min=1).view(-1, 1, 1)
        row = self._rows - (y - size // 2).view(-1, 1, 1)
        column = self._columns - (x - size // 2).view(-1, 1, 1)
        inside = (row >= 0) & (column >= 0) & (row < side) & (column < side)
        inside &= (concept >= 0).view(-1, 1, 1)
        start = self._starts[size.clamp(min=0)].view(-1, 1, 1)
        index = start + (concept.view(-1, 1, 1) * side + row) * side + column
        pixels = self._pixels[torch.where(inside, index, 0)]
        rgba = pixels.view(torch.uint8).view(*pixels.shape, 4).permute(0, 3, 1, 2).float() / 255
        colour = self.tinted(rgba[:, :3], tint)
        return colour, rgba[:, 3:] * inside[:, None]

    def tinted(self, colour: Tensor, tint: Tensor) -> Tensor:
        """Recolour by luminance: dark parts are a darker tint, light parts go towards white.

        colour [B, 3, h, w] in [0, 1], tint [B] (negative: none) -> the same shape as `colour`.
        """
        light = (colour * self._luminance).sum(dim=1, keepdim=True)
        hue = self._tints[tint.clamp(min=0)][:, :, None, None]
        above = (light - TINT_KNEE) / (1 - TINT_KNEE) * TINT_WHITENING
        recoloured = torch.where(
            light < TINT_KNEE, hue * (light / TINT_KNEE), hue + (1 - hue) * above
        )
        return torch.where((tint >= 0).view(-1, 1, 1, 1), recoloured, colour)

    @torch.no_grad()
    def __call__(self, objs: Tensor, bg: Tensor, *, static: bool = False) -> Tensor:
        """Draw: objs [B, 4, 5], bg [B, 3] in 0..255 -> images [B, 3, H, W] float32 in [-1, 1].

        Later sprites lie over earlier ones. With `static` nothing depends on the values of
        `objs` (all four layers are drawn for every picture) and nothing waits for the device, as
        a CUDA graph needs it; the result is the same.
        """
        num_pictures = objs.shape[0]
        image = (bg.to(self.device).float() / 255)[:, :, None, None]
        image = image.expand(num_pictures, 3, CANVAS, CANVAS).contiguous()
        objs = objs.to(self.device)
        for index in range(objs.shape[1]):
            if static:
                colour, alpha = self.layer(objs[:, index])
                image = image + (colour - image) * alpha
                continue
            (used,) = (objs[:, index, 0] >= 0).nonzero(as_tuple=True)
            if used.numel() == 0:
                break
            colour, alpha = self.layer(objs[used, index])
            image[used] += (colour - image[used]) * alpha
        return image * 2 - 1


def save_sheet(images: Tensor, path: Path, *, num_columns: int = 8) -> None:
    """Write images [n, 3, H, W] in [-1, 1] as one picture, row by row; the suffix is the format."""
    from PIL import Image

    num_images, channels, height, width = images.shape
    num_rows = -(-num_images // num_columns)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    sheet = torch.full((num_rows * num_columns, channels, height, width), 255, dtype=torch.uint8)
    sheet[:num_images] = pixels
    sheet = sheet.view(num_rows, num_columns, channels, height, width).permute(0, 3, 1, 4, 2)
    array = sheet.reshape(num_rows * height, num_columns * width, channels).numpy()
    Image.fromarray(array).save(path)
