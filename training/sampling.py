"""Pictures from the networks in training, many prompts at a time.

The schedule, the noise and the Euler step are the package's own, and prompt number i of a set
takes seed `first_seed + i`, so `flux-nf4 generate --seed` draws the same picture.

Shape letters, in this module only:
    B  batch    L  image tokens    C  token channels    N  prompts
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.formats.facts import Facts
from flux_nf4.pipeline.sampling import draw_noise, euler_step, make_schedule, pack, unpack
from training.runtime import autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.autoencoder import Autoencoder
    from training.flow import Data, GuidanceRule
    from training.networks import Networks

SIZE = 256
DECODED_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How to sample; with `rule` the teacher is guided in two passes, as distillation sees it."""

    num_steps: int = 20
    guidance: float = 3.5
    first_seed: int = 0
    rule: GuidanceRule | None = None


class Sampler:
    """Draws with whatever weights `networks` holds; all its batches have the training's size."""

    def __init__(
        self, networks: Networks, autoencoder: Autoencoder, data: Data, facts: dict[str, float]
    ) -> None:
        self.networks, self.autoencoder, self.data = networks, autoencoder, data
        self.scaling, self.shift = facts["vae_scaling_factor"], facts["vae_shift_factor"]

    @torch.no_grad()
    def sample(
        self,
        t5_NT: Tensor,
        clip_NT: Tensor,
        settings: SamplingSettings,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Token ids (N, T) of both encoders -> pictures uint8 (N, 3, 256, 256) on the CPU."""
        device, batch_size, num_prompts = self.data.device, self.data.batch_size, len(t5_NT)
        if seeds is None:
            seeds = range(settings.first_seed, settings.first_seed + num_prompts)
        pictures = []
        for start in range(0, num_prompts, batch_size):
            used = min(batch_size, num_prompts - start)
            # The compiled networks know one batch size: the last batch repeats itself.
            rows = [start + index % used for index in range(batch_size)]
            noise = pack(draw_noise([seeds[row] for row in rows[:used]], SIZE, SIZE)).to(device)
            noise = noise[[row - start for row in rows]]
            ids = (tensor[rows].long().to(device) for tensor in (t5_NT, clip_NT))
            tokens_BLC = self._integrate(noise, *ids, settings)
            pictures.append(self.decode(tokens_BLC[:used]))
        return torch.cat(pictures)

    def _integrate(
        self, x_BLC: Tensor, t5_BT: Tensor, clip_BT: Tensor, settings: SamplingSettings
    ) -> Tensor:
        data, transformer, rule = self.data, self.networks.transformer, settings.rule
        schedule = make_schedule(settings.num_steps, x_BLC.shape[1], Facts()).tolist()
        guidance = settings.guidance if rule is None else 1.0
        guidance_B = data.ones_B * guidance
        with autocast(data.device):
            text = self.networks.encode(t5_BT, clip_BT)
            empty = self.networks.encode(*data.captions.empty(len(t5_BT)))
            for sigma, next_sigma in itertools.pairwise(schedule):
                t_B = data.ones_B * sigma
                v_BLC = transformer(x_BLC, *text, t_B, guidance_B, data.rope).float()
                if rule is not None:
                    without = transformer(x_BLC, *empty, t_B, guidance_B, data.rope).float()
                    strength = rule.strength(data.ones_B * settings.guidance)
                    v_BLC = torch.lerp(without, v_BLC, strength[:, None, None])
                x_BLC = euler_step(x_BLC, v_BLC, sigma, next_sigma)
        return x_BLC

    def decode(self, tokens_BLC: Tensor) -> Tensor:
        """Tokens -> pictures uint8 (B, 3, 256, 256) on the CPU."""
        latents = unpack(tokens_BLC, SIZE, SIZE) / self.scaling + self.shift
        return self.decode_latents(latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Unscaled latents -> pictures uint8 on the CPU."""
        dtype = self.autoencoder.decoder.conv_in.weight.dtype
        pictures = []
        for part in latents.split(DECODED_AT_ONCE):
            part = part.to(dtype).contiguous(memory_format=torch.channels_last)
            image = self.autoencoder.decoder(part).float().clamp(-1, 1)
            pictures.append(((image + 1) * 127.5).round().to(torch.uint8).cpu())
        return torch.cat(pictures)


def as_images(pictures: Tensor) -> Tensor:
    """uint8 pictures -> float32 in [-1, 1], as the measures take them."""
    return pictures.float() / 127.5 - 1
