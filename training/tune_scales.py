"""Tune what NF4 leaves free, by distillation: the scale of each block, while its codes stay.

    python -m training.tune_scales --minutes 35

Training through NF4 ends with codes that flip back and forth from step to step, and the average of
the weights is rounded once more when it is packaged. Afterwards the codes are fixed, and what is
left are numbers that gradients reach as they are: version 2's float32 scales, biases, and the
scales of norms, 2 % of all parameters. The shipped model learns from the bfloat16 one, both with
the guidance input that they have, on the scenes of training. A CPU does enough of it in half an
hour. Written back into the shipped file, in the same bytes.

Shape letters, in this module only:
    G  blocks of 64 values    B  batch    L  image tokens    C  token channels
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from flux_nf4.formats.allinone import write_all_in_one
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.model.build import build_autoencoder, build_clip, build_t5, build_transformer
from flux_nf4.model.transformer import FluxTransformer
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.reference import dequantize
from flux_nf4.pipeline.sampling import pack
from training import WORK
from training.compose import Composer, load_sprites
from training.dataset import load_scenes
from training.demo_tokenizers import load_tokenizer
from training.flow import DISTILLATION_DROPOUT, Captions, Data, draw_guidance
from training.networks import Sizes
from training.package_demo import BF16, SHIPPED
from training.rounding import BLOCK_SIZE
from training.runtime import Log, autocast, decay, default_device, ramp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flux_nf4.formats.component import Component, Entry
    from flux_nf4.model.autoencoder import Autoencoder

# Of a scale's own size, and of the other parameters.
SCALE_RATE, OTHER_RATE = 3e-3, 1e-3
NUM_HELD_OUT, NUM_VALIDATION_BATCHES = 128, 8
ENCODED_AT_ONCE = 32
SECONDS_BETWEEN_NOTES = 120.0


class FreeScales:
    """A transformer's NF4 weights as fixed codes and free scales; what is not NF4 is free, too."""

    def __init__(self, component: Component, device: torch.device) -> None:
        self.component = component
        self.levels_G64: dict[str, Tensor] = {}
        self.scales_G1: dict[str, Tensor] = {}
        self.changes_G1: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        for name, entry in component.entries.items():
            if isinstance(entry, NF4Weight):
                assert isinstance(entry.absmax, Tensor)
                plain = dataclasses.replace(entry, absmax=torch.ones_like(entry.absmax))
                levels = dequantize(plain, torch.float32).reshape(-1, BLOCK_SIZE)
                self.levels_G64[name] = levels.to(device)
                self.scales_G1[name] = entry.absmax.float().reshape(-1, 1).to(device)
                self.changes_G1[name] = torch.zeros_like(self.scales_G1[name]).requires_grad_()
            else:
                self.others[name] = entry.to(device, torch.float32, copy=True).requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        """Every weight as the scales have it now, float32, by its canonical name."""
        weights = dict(self.others)
        for name, levels_G64 in self.levels_G64.items():
            weight = levels_G64 * (self.scales_G1[name] * (1 + self.changes_G1[name]))
            weights[name] = weight.view(self.component.entries[name].shape)
        return weights

    def entries(self) -> dict[str, Entry]:
        """The transformer's entries with what was learned, in the bytes that they had."""
        entries: dict[str, Entry] = {}
        for name, entry in self.component.entries.items():
            if isinstance(entry, NF4Weight):
                scales_G1 = self.scales_G1[name] * (1 + self.changes_G1[name].detach())
                entries[name] = dataclasses.replace(entry, absmax=scales_G1.flatten().cpu())
            else:
                entries[name] = self.others[name].detach().to(entry.dtype).cpu()
        return entries

    def groups(self) -> list[dict[str, object]]:
        """The optimiser's: scales, and everything else."""
        return [
            {"params": list(self.changes_G1.values()), "rate": SCALE_RATE},
            {"params": list(self.others.values()), "rate": OTHER_RATE},
        ]


class Lesson:
    """The shipped model, the bfloat16 one as its teacher, and scenes to compare them on."""

    def __init__(
        self,
        shipped: Path,
        teacher: Path,
        scenes: Path,
        *,
        num_scenes: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        checkpoint, self.device = open_checkpoint(shipped), device
        parts, facts = checkpoint.components, checkpoint.facts
        # Not by `load_model`, which on a GPU keeps networks there only while they are in use.
        self.t5 = build_t5(parts["t5"], device=device, dtype=torch.float32)
        self.clip = build_clip(parts["clip"], facts, device=device, dtype=torch.float32)
        autoencoder = build_autoencoder(parts["vae"], facts, device=device, dtype=torch.float32)
        self.teacher = build_transformer(
            open_checkpoint(teacher).components["transformer"], device=device, dtype=torch.float32
        )
        self.teacher.blocks.fast_step = None  # its kernels are for what is drawn
        self.free = FreeScales(parts["transformer"], device)
        with torch.device("meta"):
            self.student = FluxTransformer(self.teacher.config)
        # The module's names are the file's behind the name of the part that owns them.
        self.names = {n.partition(".")[2]: n for n, _ in self.student.named_parameters()}
        self.train, held_out = load_lessons(autoencoder, scenes, num_scenes, batch_size, device)
        self.validation = [self.draw(held_out) for _ in range(NUM_VALIDATION_BATCHES)]

    @torch.no_grad()
    def draw(self, data: Data) -> tuple[tuple[Tensor, ...], Tensor]:
        """What both models are given, and what the teacher says to it."""
        draw, guidance_B = data.draw(DISTILLATION_DROPOUT), draw_guidance(data)
        text, pooled = self.t5(draw.t5), self.clip(draw.clip)
        given = (draw.mixed, text, pooled, draw.t, guidance_B, data.rope)
        with autocast(self.device):
            return given, self.teacher(*given).float()

    def error(self, given: tuple[Tensor, ...], target_BLC: Tensor) -> Tensor:
        """Mean squared error of the student's velocity."""
        weights = {self.names[name]: weight for name, weight in self.free.weights().items()}
        with autocast(self.device):
            velocity_BLC = functional_call(self.student, weights, given)
        return (velocity_BLC.float() - target_BLC).pow(2).mean()

    @torch.no_grad()
    def validate(self) -> float:
        """The mean error on scenes that are not trained on, always the same."""
        errors = [self.error(given, target).item() for given, target in self.validation]
        return sum(errors) / len(errors)


def load_lessons(
    autoencoder: Autoencoder,
    scenes_path: Path,
    num_scenes: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Data, Data]:
    """Latents and captions of scenes for training, and of some more to validate with."""
    scenes = load_scenes(scenes_path)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(scenes["t5"]), generator=generator)[: num_scenes + NUM_HELD_OUT]
    chosen = order.sort().values.numpy()
    objs, bg, t5, clip = (
        torch.from_numpy(scenes[name][chosen]).to(device) for name in ("objs", "bg", "t5", "clip")
    )
    latents_NLC = torch.cat(list(_encoded(autoencoder, objs, bg)))
    sizes = Sizes(
        t5_vocabulary=load_tokenizer("t5").get_vocab_size(),
        clip_vocabulary=load_tokenizer("clip").get_vocab_size(),
    )

    def data(part: slice) -> Data:
        captions = Captions(
            t5=t5[part],
            clip=clip[part],
            empty_t5=torch.from_numpy(scenes["u5"]).long().to(device),
            empty_clip=torch.from_numpy(scenes["uc"]).long().to(device),
        )
        found = Data(captions, sizes, batch_size)
        found.latents_NLC = latents_NLC[part]
        return found

    return data(slice(num_scenes)), data(slice(num_scenes, None))


@torch.no_grad()
def _encoded(autoencoder: Autoencoder, objs: Tensor, bg: Tensor) -> Iterator[Tensor]:
    composer = Composer(load_sprites(), objs.device)
    for part in zip(objs.split(ENCODED_AT_ONCE), bg.split(ENCODED_AT_ONCE), strict=True):
        mean_BCHW, _ = autoencoder.encode(composer(*part))
        yield pack(mean_BCHW).to(torch.bfloat16)


def train(lesson: Lesson, seconds: float, log: Log) -> None:
    """Adam until the time is over, its rate falling from the start."""
    groups = lesson.free.groups()
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    start, noted, step = time.monotonic(), 0.0, 0
    while (spent := time.monotonic() - start) < seconds:
        factor = ramp(step, 20) * decay(spent / seconds, start=0.0, floor=0.02)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        error = lesson.error(*lesson.draw(lesson.train))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        step += 1
        if spent - noted > SECONDS_BETWEEN_NOTES:
            noted = spent
            log(f"step {step} at {spent:.0f} s: validation error {lesson.validate():.5f}")
    log(f"{step} steps of {lesson.train.batch_size}")


def write_tuned(path: Path, entries: Mapping[str, Entry], out: Path) -> None:
    """The file with another transformer, everything else as it is."""
    checkpoint = open_checkpoint(path)
    components = {kind: part.entries for kind, part in checkpoint.components.items()}
    write_all_in_one(out, {**components, "transformer": entries}, checkpoint.facts)


def main() -> None:
    """Tune, and write the file if it has become better."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", type=Path, default=SHIPPED)
    parser.add_argument("--teacher", type=Path, default=BF16)
    parser.add_argument("--scenes", type=Path, default=WORK / "scenes.npz")
    parser.add_argument("--num-scenes", type=int, default=1536)
    parser.add_argument("--batch-size", type=int, default=16, help="on a GPU, 128")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--out", type=Path, help="another file than the shipped one")
    options = parser.parse_args()
    torch.manual_seed(0)
    log = Log("scales")
    lesson = Lesson(
        options.shipped,
        options.teacher,
        options.scenes,
        num_scenes=options.num_scenes,
        batch_size=options.batch_size,
        device=default_device(),
    )
    before = lesson.validate()
    log(f"validation error {before:.5f}")
    train(lesson, 60 * options.minutes, log)
    after = lesson.validate()
    log(f"validation error {before:.5f} before, {after:.5f} after")
    if after >= before:
        log("not written: it has not become better")
        return
    out = options.out or options.shipped
    write_tuned(options.shipped, lesson.free.entries(), out)
    log(f"written to {out}")


if __name__ == "__main__":
    main()
