"""Tune the VAE's decoder on latents as the shipped transformer makes them.

    python -m training.tune_decoder --minutes 45

The VAE was trained on what its own encoder gives, and decodes that to 39 dB; the transformer's
latents differ from those (by 7 % of their variance), and what the decoder makes of the difference,
stripes on flat things and ragged outlines, is most of what can be seen of it. So scenes of training
are mixed with noise, the shipped transformer takes the noise out again, and the decoder learns the
scene from that. A quarter of its lessons stays with the encoder's own latents, so that what it
could it still can. The loss is the measure, decibels: each picture counts the same. The encoder and
the transformer stay as they are. The decoder is written back into the shipped file and into the
bfloat16 one.

Shape letters, in this module only:
    B  batch    N  scenes    C  latent channels    H, W  rows and columns    L, D  packed latents
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.model.rope import rope_table
from flux_nf4.pipeline.load import LoadSettings, Model, assemble_model
from flux_nf4.pipeline.sampling import draw_noise, euler_step, make_schedule, pack, unpack
from training import WORK
from training.compose import Composer, load_sprites
from training.dataset import load_scenes
from training.flow import COLUMNS, NEUTRAL_GUIDANCE, ROWS
from training.measures import border_colour
from training.package_demo import BF16, SHIPPED
from training.runtime import Log, decay, default_device, ramp

if TYPE_CHECKING:
    from torch import nn

SIDE = 256
VALIDATED_AT_ONCE = 16
# Of ten steps the first two are left out: from there on the scene's layout stays what it was.
NUM_STEPS, NUM_LEFT_OUT = 10, 2
LEAST_DECIBELS = 18.0  # below, another scene was drawn than the one that was noised
SHARE_OF_ENCODED = 0.25
LEARNING_RATE = 4e-4
LEAST_ERROR = 1e-5  # of a picture in [-1, 1]: what counts as exact
NUM_HELD_OUT = 64
SECONDS_BETWEEN_NOTES = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """Latents (N, C, H, W) bfloat16, and how to compose what they show.

    `bg` is the background of what was encoded, `shade` of what the transformer made of it.
    """

    encoded: Tensor
    drawn: Tensor
    objs: Tensor
    bg: Tensor
    shade: Tensor

    def part(self, rows: slice | Tensor) -> Scenes:
        """Some of them."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@torch.inference_mode()
def draw_again(
    model: Model, composer: Composer, path: Path, num_scenes: int, batch_size: int, log: Log
) -> Scenes:
    """Scenes of training, noised and drawn by the transformer; what became another is left out.

    Their background's shade is measured, as in `training.measures`: it is the seed's to choose.
    """
    scenes, device, facts = load_scenes(path), model.device, model.facts
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(len(scenes["t5"]), generator=generator)[:num_scenes]
    sigmas = make_schedule(NUM_STEPS, ROWS * COLUMNS, facts)[NUM_LEFT_OUT:]
    guidance = torch.full((batch_size,), NEUTRAL_GUIDANCE, device=device)
    parts: list[Scenes] = []
    start, noted, num_seen = time.monotonic(), 0.0, 0
    for chosen in order.split(batch_size):
        objs, bg, t5, clip = (
            torch.from_numpy(scenes[name][chosen.numpy()]).to(device)
            for name in ("objs", "bg", "t5", "clip")
        )
        encoded, _ = model.autoencoder.encode(composer(objs, bg))
        txt, pooled = model.t5(t5.long()).to(model.dtype), model.clip(clip.long()).to(model.dtype)
        table = model.transformer.conditioner.table(
            sigmas[:-1].to(device), guidance[: len(chosen)], pooled
        )
        rope = rope_table(txt.shape[1], ROWS, COLUMNS, model.transformer.config, device)
        noise = pack(draw_noise(chosen.tolist(), SIDE, SIDE)).to(device)
        x = torch.lerp(pack(encoded), noise, float(sigmas[0]))
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas.tolist())):
            velocity = model.transformer.blocks(x.to(model.dtype), txt, table[step], rope)
            x = euler_step(x, velocity, sigma, next_sigma)
        drawn = unpack(x, SIDE, SIDE)
        images = model.autoencoder.decode(drawn).float().clamp(-1, 1)
        shade = border_colour((images + 1) / 2) * 255
        is_same = decibels((images - composer(objs, shade)).pow(2).mean((1, 2, 3))) > LEAST_DECIBELS
        found = Scenes(
            encoded=encoded.bfloat16(), drawn=drawn.bfloat16(), objs=objs, bg=bg, shade=shade
        )
        parts.append(found.part(is_same))
        num_seen += len(chosen)
        spent = time.monotonic() - start
        if spent - noted > SECONDS_BETWEEN_NOTES:
            noted = spent
            log(f"{num_seen} of {num_scenes} scenes drawn again in {spent:.0f} s")
    names = [field.name for field in fields(Scenes)]
    found = Scenes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    log(f"{len(found.bg)} of {num_seen} scenes are what they were")
    return found


def decibels(error_B: Tensor) -> Tensor:
    """Of squared errors of pictures in [-1, 1]: PSNR in dB."""
    return 10 * torch.log10(4 / error_B.clamp(min=LEAST_ERROR))


class Lesson:
    """The decoder in float32, and scenes for it to learn and to be judged by."""

    def __init__(
        self, model: Model, composer: Composer, scenes: Scenes, *, batch_size: int
    ) -> None:
        self.autoencoder = copy.deepcopy(model.autoencoder).float()
        self.decoder = self.autoencoder.model.decoder
        self.decoder.to(memory_format=torch.channels_last).requires_grad_()
        self.composer, self.device, self.batch_size = composer, model.device, batch_size
        self.held_out = scenes.part(slice(NUM_HELD_OUT))
        self.scenes = scenes.part(slice(NUM_HELD_OUT, None))

    def quality(self, scenes: Scenes, is_drawn_B: Tensor) -> Tensor:
        """PSNR of each decoded picture, (B,) in dB, from drawn latents or from encoded ones."""
        latents = torch.where(is_drawn_B.view(-1, 1, 1, 1), scenes.drawn, scenes.encoded).float()
        exact = self.composer(
            scenes.objs, torch.where(is_drawn_B[:, None], scenes.shade, scenes.bg)
        )
        # On a CPU, too: its convolutions take half the time.
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            images = self.autoencoder.decode(latents.contiguous(memory_format=torch.channels_last))
        return decibels((images.float() - exact).pow(2).mean((1, 2, 3)))

    def loss(self) -> Tensor:
        """Of a random batch: the mean quality, negative."""
        chosen = torch.randint(len(self.scenes.bg), (self.batch_size,), device=self.device)
        is_drawn = torch.rand(self.batch_size, device=self.device) >= SHARE_OF_ENCODED
        return -self.quality(self.scenes.part(chosen), is_drawn).mean()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean PSNR in dB of scenes that are not trained on: drawn and encoded latents."""
        found: list[list[float]] = [[], []]
        for rows in torch.arange(NUM_HELD_OUT).split(VALIDATED_AT_ONCE):
            part = self.held_out.part(rows)
            for values, is_drawn in zip(found, (True, False), strict=True):
                kind = torch.full((len(rows),), is_drawn, device=self.device)
                values += self.quality(part, kind).tolist()
        drawn, encoded = (sum(values) / len(values) for values in found)
        return drawn, encoded


def train(lesson: Lesson, seconds: float, log: Log) -> None:
    """Adam until the time is over, its rate falling from the start."""
    optimizer = torch.optim.Adam(lesson.decoder.parameters(), betas=(0.9, 0.98))
    start, noted, step = time.monotonic(), 0.0, 0
    while (spent := time.monotonic() - start) < seconds:
        factor = ramp(step, 20) * decay(spent / seconds, start=0.0, floor=0.02)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        lesson.loss().backward()
        optimizer.step()
        step += 1
        if spent - noted > SECONDS_BETWEEN_NOTES:
            noted = spent
            drawn, encoded = lesson.validate()
            log(f"step {step} at {spent:.0f} s: {drawn:.2f} dB drawn, {encoded:.2f} dB encoded")
    log(f"{step} steps of {lesson.batch_size}")


def write_decoder(path: Path, decoder: nn.Module, out: Path) -> None:
    """The file with another decoder, everything else as it is."""
    checkpoint = open_checkpoint(path)
    components = {kind: dict(part.entries) for kind, part in checkpoint.components.items()}
    entries = components["vae"]
    for name, tensor in decoder.state_dict().items():
        before = entries[f"decoder.{name}"]
        entries[f"decoder.{name}"] = tensor.to(before.dtype, memory_format=torch.contiguous_format)
    write_all_in_one(out, components, checkpoint.facts)


def main() -> None:
    """Tune, and write the files if it has become better."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, nargs="+", default=[SHIPPED, BF16])
    parser.add_argument("--scenes", type=Path, default=WORK / "scenes.npz")
    parser.add_argument("--num-scenes", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=8, help="on a GPU, 64")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training")
    options = parser.parse_args()
    torch.manual_seed(0)
    log, device = Log("decoder"), default_device()
    settings = LoadSettings(device=device.type, dtype=torch.bfloat16)
    model = assemble_model(open_checkpoint(options.files[0]), settings, is_managed=False)
    composer = Composer(load_sprites(), device)
    scenes = draw_again(
        model, composer, options.scenes, options.num_scenes, 2 * options.batch_size, log
    )
    lesson = Lesson(model, composer, scenes, batch_size=options.batch_size)
    before, encoded = lesson.validate()
    log(f"{before:.2f} dB drawn, {encoded:.2f} dB encoded")
    train(lesson, 60 * options.minutes, log)
    after, encoded = lesson.validate()
    log(f"{before:.2f} dB before, {after:.2f} after; {encoded:.2f} encoded")
    if after <= before:
        log("not written: it has not become better")
        return
    for path in options.files:
        write_decoder(path, lesson.decoder, path)
        log(f"written to {path}")


if __name__ == "__main__":
    main()
