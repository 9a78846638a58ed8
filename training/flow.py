"""The two training steps of the transformer: rectified flow, and distillation of guidance.

Flow: a latent and noise are mixed at time t, the networks learn the velocity noise - latent. The
first steps of the sampler decide background and layout, so a quarter of the times is drawn near 1.
T5 runs with its weights rounded to float8_e4m3, as it ships, and the step goes to the masters.

Distillation: the student learns, from its guidance input w alone, what the frozen teacher does in
two passes: v0 + s(w) (v1 - v0), v1 with the caption and v0 without. In the NF4-aware phase the
student also runs on its rounded weights.

Shape letters, in this module only:
    B  batch    L  image tokens    C  token channels    T  text tokens    D, P  text widths
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.model.rope import rope_table
from training.networks import Networks, Sizes, matrix_pieces
from training.optimizer import Optimizer
from training.rounding import Rounding, to_e4m3
from training.runtime import autocast

if TYPE_CHECKING:
    from torch import nn

TIME_SHIFT = 1.6487212707  # e^0.5: the sampler's own shift at 256 x 256
SHARE_OF_ONE, SHARE_OF_HIGH, HIGH = 0.05, 0.20, 0.85
# Of the transformer's learning rate: at 2e-3 neither encoder learns the order of words (LOG.md).
TEXT_RATE = 0.15
CAPTION_DROPOUT, DISTILLATION_DROPOUT = 0.10, 0.08
NEUTRAL_GUIDANCE, GUIDANCE_SLOPE = 3.5, 0.3
GUIDANCE_RANGE, SHARE_OF_NEUTRAL = (1.0, 7.0), 0.30
ROWS = COLUMNS = 16
TIME_BINS = (0.0, 0.3, 0.6, 0.85, 1.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceRule:
    """How strongly the teacher is guided where the student's guidance input is w.

    `neutral` is the strength at w = 3.5, the default; it changes by 0.3 for each 1 of w.
    """

    neutral: float

    def strength(self, w_B: Tensor) -> Tensor:
        """Weight of the captioned velocity against the uncaptioned one: (B,) -> (B,)."""
        return self.neutral + GUIDANCE_SLOPE * (w_B - NEUTRAL_GUIDANCE)


@dataclass(slots=True, kw_only=True)
class Captions:
    """Token ids of every scene (N, T) and of the empty caption (1, T), on the device."""

    t5: Tensor
    clip: Tensor
    empty_t5: Tensor
    empty_clip: Tensor

    def draw(self, chosen_B: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Ids of the chosen scenes, a share of them replaced by the empty caption."""
        drop_B1 = torch.rand(len(chosen_B), 1, device=chosen_B.device) < dropout
        t5_BT = torch.where(drop_B1, self.empty_t5, self.t5[chosen_B].long())
        clip_BT = torch.where(drop_B1, self.empty_clip, self.clip[chosen_B].long())
        return t5_BT, clip_BT

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch of the empty caption."""
        repeated = (ids.expand(batch, -1) for ids in (self.empty_t5, self.empty_clip))
        t5_BT, clip_BT = (ids.contiguous() for ids in repeated)
        return t5_BT, clip_BT


@dataclass(slots=True, kw_only=True)
class Draw:
    """One random batch: where on the way from latent (t = 0) to noise (t = 1).

    Ids (B, T), times and their kind (B,), mixture and velocity (B, L, C).
    """

    t5: Tensor
    clip: Tensor
    t: Tensor
    is_plain: Tensor
    mixed: Tensor
    velocity: Tensor


class Data:
    """Latents of all scenes as tokens, their captions, and what every step shares."""

    def __init__(self, captions: Captions, sizes: Sizes, batch_size: int) -> None:
        self.captions, self.batch_size = captions, batch_size
        self.device = device = captions.t5.device
        # Stands in for the real latents until the VAE is there.
        self.latents_NLC = torch.randn(
            2 * batch_size, ROWS * COLUMNS, 64, device=device, dtype=torch.bfloat16
        )
        self.rope = rope_table(sizes.text_length, ROWS, COLUMNS, sizes.flux, device)
        self.ones_B = torch.ones(batch_size, device=device)
        self.loss_sums = torch.zeros(len(TIME_BINS), 2, device=device)

    def draw_times(self) -> tuple[Tensor, Tensor]:
        """Times (B,), and which of them are of the plain logit-normal share."""
        plain_B = torch.sigmoid(torch.randn(self.batch_size, device=self.device))
        plain_B = TIME_SHIFT * plain_B / (1 + (TIME_SHIFT - 1) * plain_B)
        kind_B, place_B = torch.rand(2, self.batch_size, device=self.device)
        high_B = HIGH + (1 - HIGH) * place_B
        is_plain_B = kind_B >= SHARE_OF_ONE + SHARE_OF_HIGH
        t_B = torch.where(is_plain_B, plain_B, high_B)
        return torch.where(kind_B < SHARE_OF_ONE, torch.ones_like(t_B), t_B), is_plain_B

    def draw(self, dropout: float) -> Draw:
        """A batch; nothing here waits for the device."""
        num_scenes = len(self.latents_NLC)
        chosen_B = torch.randint(num_scenes, (self.batch_size,), device=self.device)
        latent_BLC = self.latents_NLC[chosen_B].float()
        noise_BLC = torch.randn_like(latent_BLC)
        t_B, is_plain_B = self.draw_times()
        t5_BT, clip_BT = self.captions.draw(chosen_B, dropout)
        return Draw(
            t5=t5_BT,
            clip=clip_BT,
            t=t_B,
            is_plain=is_plain_B,
            mixed=torch.lerp(latent_BLC, noise_BLC, t_B[:, None, None]),
            velocity=noise_BLC - latent_BLC,
        )

    def note_loss(self, loss_B: Tensor, draw: Draw) -> None:
        """Add to the sums: of the plain share, and by time."""
        masks = [draw.is_plain]
        masks += [(draw.t >= low) & (draw.t < high) for low, high in itertools.pairwise(TIME_BINS)]
        masks_KB = torch.stack(masks).float()
        self.loss_sums[:, 0] += masks_KB @ loss_B.detach()
        self.loss_sums[:, 1] += masks_KB.sum(dim=1)

    def read_losses(self) -> list[float]:
        """Mean losses since the last call: the plain share's, then by time, low to high."""
        losses = (self.loss_sums[:, 0] / self.loss_sums[:, 1].clamp(min=1)).tolist()
        self.loss_sums.zero_()
        return [round(loss, 5) for loss in losses]


def make_optimizer(parts: dict[str, nn.Module], *, weight_decay: float) -> Optimizer:
    """Muon on the matrices of the transformer's blocks, AdamW on the rest, slow on the encoders."""
    matrices, others, slow = [], [], []
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            pieces = matrix_pieces(name, parameter) if part == "transformer" else None
            if pieces is not None:
                matrices.append((f"{part}/{name}", parameter, pieces))
            else:
                (others if part == "transformer" else slow).append((f"{part}/{name}", parameter))
    return Optimizer(matrices, others, slow, slow_factor=TEXT_RATE, weight_decay=weight_decay)


class FlowStep:
    """Rectified flow: transformer and text encoders together, the guidance input held at 1.

    Also from a student, after `warm_start`: its embedding of guidance is then one more trained
    bias at 1, where the student is nearest to no guidance, and distillation teaches the rest anew.
    """

    def __init__(self, networks: Networks, data: Data) -> None:
        self.networks, self.data = networks, data
        parts = {"transformer": networks.transformer, "t5": networks.t5, "clip": networks.clip}
        self.optimizer = make_optimizer(parts, weight_decay=0.02)
        self._rounding = Rounding().add(networks.t5.parameters(), to_e4m3)

    def __call__(self) -> None:
        """One training step."""
        data, networks = self.data, self.networks
        draw = data.draw(CAPTION_DROPOUT)
        with self._rounding:
            with autocast(data.device):
                txt_BTD, pooled_BP = networks.encode(draw.t5, draw.clip)
                predicted_BLC = networks.transformer(
                    draw.mixed, txt_BTD, pooled_BP, draw.t, data.ones_B, data.rope
                )
            loss_B = (predicted_BLC.float() - draw.velocity).pow(2).mean((1, 2))
            loss_B.mean().backward()
        data.note_loss(loss_B, draw)
        self.optimizer.step()


class DistillationStep:
    """The student learns the guided velocity of the teacher; with `rounding`, on rounded weights.

    `frozen` holds the teacher and the text encoders as they ship.
    """

    def __init__(
        self,
        student: nn.Module,
        frozen: Networks,
        data: Data,
        rule: GuidanceRule,
        rounding: Rounding | None = None,
    ) -> None:
        self.student, self.frozen, self.data, self.rule = student, frozen, data, rule
        self.optimizer = make_optimizer({"transformer": student}, weight_decay=0.0)
        self._rounding = rounding or nullcontext()
        with torch.no_grad(), autocast(data.device):
            empty = frozen.encode(*data.captions.empty(data.batch_size))
        self._empty = tuple(tensor.clone() for tensor in empty)

    def target(self, draw: Draw, w_B: Tensor, txt_BTD: Tensor, pooled_BP: Tensor) -> Tensor:
        """The teacher's guided velocity, (B, L, C) float32; runs under autocast, no gradients."""
        teacher, ones_B, rope = self.frozen.transformer, self.data.ones_B, self.data.rope
        with_B = teacher(draw.mixed, txt_BTD, pooled_BP, draw.t, ones_B, rope).float()
        without_B = teacher(draw.mixed, *self._empty, draw.t, ones_B, rope).float()
        strength_B = self.rule.strength(w_B)
        return torch.lerp(without_B, with_B, strength_B[:, None, None])

    def __call__(self) -> None:
        """One training step."""
        data = self.data
        draw = data.draw(DISTILLATION_DROPOUT)
        w_B = draw_guidance(data)
        with torch.no_grad(), autocast(data.device):
            txt_BTD, pooled_BP = self.frozen.encode(draw.t5, draw.clip)
            target_BLC = self.target(draw, w_B, txt_BTD, pooled_BP)
        with self._rounding:
            # As in the flow step both ask for gradients: otherwise the transformer is compiled
            # a second time.
            txt_BTD, pooled_BP = as_leaf(txt_BTD), as_leaf(pooled_BP)
            with autocast(data.device):
                predicted_BLC = self.student(draw.mixed, txt_BTD, pooled_BP, draw.t, w_B, data.rope)
            loss_B = (predicted_BLC.float() - target_BLC).pow(2).mean((1, 2))
            loss_B.mean().backward()
        data.note_loss(loss_B, draw)
        self.optimizer.step()


def draw_guidance(data: Data) -> Tensor:
    """Guidance inputs of a batch, (B,): many at the default, the others anywhere in the range."""
    is_neutral_B, place_B = torch.rand(2, data.batch_size, device=data.device)
    low, high = GUIDANCE_RANGE
    w_B = low + (high - low) * place_B
    return torch.where(is_neutral_B < SHARE_OF_NEUTRAL, NEUTRAL_GUIDANCE, w_B)


def as_leaf(tensor: Tensor) -> Tensor:
    """The same values as a new input that asks for a gradient."""
    return tensor.detach().requires_grad_()
