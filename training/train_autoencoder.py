"""Train the VAE on composed scenes: the ceiling of everything that the demo model draws.

    python -m training.train_autoencoder --seconds 240

Loss: L1, gradients at three scales, squared error, and a weak KL term (a strong one blurs).
AdamW, constant and then linearly falling learning rate, average of the weights. On CUDA the
whole step, composing the pictures included, is one CUDA graph around a compiled loss.

Stopped by SIGTERM it saves its state, and the same command goes on. Its results are
`weights/autoencoder.safetensors` and `autoencoder.json` (scaling, shift, PSNR) in the state folder.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import DATA, WORK
from training.autoencoder import DRY_RUN_SIZES, LATENT_CHANNELS, SIZES, Autoencoder
from training.checkpoint import (
    Journal,
    Progress,
    load_tensors,
    save_state,
    save_tensors,
    state_progress,
)
from training.compose import Composer, load_sprites, save_sheet
from training.dataset import load_scenes
from training.optimizer import Optimizer, as_graph
from training.runtime import (
    Log,
    StopRequest,
    autocast,
    compute_dtype,
    decay,
    default_device,
    ramp,
    torch_settings,
)
from training.stage import Run, weights_path

if TYPE_CHECKING:
    from collections.abc import Callable

KL_WEIGHT = 4e-4
GRADIENT_WEIGHT, SQUARE_WEIGHT = 0.7, 0.5
LEARNING_RATE, WARM_UP_STEPS = 1.5e-3, 200
WEIGHT_DECAY = 1e-3
STATE = "autoencoder.state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of the command; `seconds` is the training time of the whole plan."""

    work: Path
    sprites: Path
    seconds: float
    batch_size: int
    device: torch.device
    compiled: bool
    save_every: float
    is_dry_run: bool


def scene_gradients(error_B3HW: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels' errors, over three scales."""
    total = error_B3HW.new_zeros(())
    for scale in range(3):
        if scale:
            error_B3HW = F.avg_pool2d(error_B3HW, 2)
        total = total + (error_B3HW[..., 1:] - error_B3HW[..., :-1]).abs().mean()
        total = total + (error_B3HW[..., 1:, :] - error_B3HW[..., :-1, :]).abs().mean()
    return total


class Training:
    """Model, data, optimiser and the step of the VAE."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self.settings, self.run = settings, run
        self.device = device = settings.device
        scenes = load_scenes(settings.work / "scenes.npz")
        self.objs = torch.from_numpy(scenes["objs"]).to(device)
        self.bg = torch.from_numpy(scenes["bg"]).to(device)
        self.composer = Composer(load_sprites(settings.sprites), device)
        sizes = DRY_RUN_SIZES if settings.is_dry_run else SIZES
        self.model = Autoencoder(sizes).to(device, memory_format=torch.channels_last)
        self.optimizer = Optimizer(
            [], list(self.model.named_parameters()), adam_weight_decay=WEIGHT_DECAY
        )
        self.kl_weight = torch.zeros((), device=device)
        self.statistics = torch.zeros(4, device=device)
        self.loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._loss

    def _loss(self, x_B3HW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device):
            mean, log_variance = self.model.moments(x_B3HW)
            latents = mean + torch.exp(0.5 * log_variance) * noise_BCHW
            latents = latents.contiguous(memory_format=torch.channels_last)
            error = self.model.decoder(latents).float() - x_B3HW
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
        absolute, square = error.abs().mean(), error.pow(2).mean()
        statistics = torch.stack([absolute, square, kl, mean.std()]).detach()
        shape = GRADIENT_WEIGHT * scene_gradients(error) + SQUARE_WEIGHT * square
        return absolute + shape + self.kl_weight * kl, statistics

    def step(self) -> None:
        """Draw a batch, and train on it."""
        batch_size, device = self.settings.batch_size, self.device
        chosen = torch.randint(len(self.objs), (batch_size,), device=device)
        images = self.composer(self.objs[chosen], self.bg[chosen], static=True)
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch_size, LATENT_CHANNELS, 32, 32, device=device)
        loss, statistics = self.loss(images, noise)
        loss.backward()
        self.statistics.copy_(statistics)
        self.optimizer.step()

    def prepare(self) -> Callable[[], None]:
        """The step as fast as this machine can have it: compiled, captured, or as it is."""
        if self.settings.compiled:
            self.loss = torch.compile(self._loss, dynamic=False)
            self.optimizer.set(0.0, 1.0)
            try:
                self.step()
            except RuntimeError as error:
                self.run.log(
                    f"warning: the loss does not compile, going on without: {str(error)[:400]}"
                )
                self.loss = self._loss
                for parameter in self.model.parameters():
                    parameter.grad = None
        return as_graph(self.step, self.optimizer, self.run.log)

    def train(self) -> bool:
        """Train until the plan's seconds are over or a stop is asked for; True when it is done."""
        step, state_path = self.prepare(), self.run.folder / STATE
        self.run.log("ready")
        if state_progress(state_path) is not None:
            self.optimizer.load(load_tensors(state_path, self.device))
        torch.manual_seed(1000 + self.run.journal.progress.step)
        return self.run.train(
            self.settings.seconds, step, set_rates=self._set_rates, save=self._save, note=self._note
        )

    def _set_rates(self) -> None:
        progress = self.run.journal.progress
        done = progress.seconds / self.settings.seconds
        rate = LEARNING_RATE * ramp(progress.step, WARM_UP_STEPS) * decay(done, floor=0.01)
        self.optimizer.set(rate, min(0.999, (1 + progress.step) / (10 + progress.step)))
        self.kl_weight.fill_(KL_WEIGHT * min(1.0, 0.1 + 5 * done))

    def _save(self) -> None:
        journal = self.run.journal
        save_state(self.run.folder / STATE, self.optimizer.state(), journal.progress)
        journal.save()

    def _note(self) -> None:
        """Add a line to the history.

        Raises:
            RuntimeError: the loss is no longer a number.
        """
        absolute, square, kl, deviation = self.statistics.tolist()
        if not math.isfinite(absolute):
            raise RuntimeError("the VAE's loss is no longer a number")
        psnr, journal = 10 * math.log10(4 / square), self.run.journal
        step, seconds = journal.progress.step, journal.progress.seconds
        line = [step, round(seconds, 1), round(absolute, 4), round(psnr, 2), round(kl, 3)]
        journal.history.setdefault("autoencoder", []).append(line)
        self.run.log(
            f"step {step} at {seconds:.0f} s: l1 {absolute:.4f}, {psnr:.2f} dB, "
            f"kl {kl:.3f}, latent deviation {deviation:.3f}"
        )


@torch.no_grad()
def finish(training: Training) -> None:
    """Round the average to bfloat16, measure it, and write it."""
    run, device = training.run, training.device
    training.optimizer.use_average()
    model = training.model.eval().to(torch.bfloat16)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    dtype = compute_dtype(device)
    model = model.to(dtype)
    num_scenes, batch_size = (512, 64) if device.type == "cuda" else (8, 4)
    psnr, means = [], []
    for start in range(0, num_scenes, batch_size):
        chosen = slice(start, start + batch_size)
        images = training.composer(training.objs[chosen], training.bg[chosen])
        batch = images.to(dtype).contiguous(memory_format=torch.channels_last)
        mean, _ = model.moments(batch)
        decoded = model.decoder(mean.to(dtype)).float().clamp(-1, 1)
        psnr += (10 * torch.log10(4 / (decoded - images).pow(2).mean((1, 2, 3)))).tolist()
        means.append(mean)
        if start == 0:
            (run.folder / "pictures").mkdir(exist_ok=True)
            sheet = torch.cat([images[:8], decoded[:8]])
            save_sheet(sheet, run.folder / "pictures" / "autoencoder.png")
    latents, journal = torch.cat(means), run.journal
    journal.facts = {
        "vae_scaling_factor": 1 / latents.std().item(),
        "vae_shift_factor": latents.mean().item(),
        "vae_norm_num_groups": SIZES.norm_groups,
    }
    journal.results = {"psnr_mean": float(np.mean(psnr)), "psnr_min": min(psnr)}
    save_tensors(weights_path(run.folder, "autoencoder"), weights)
    journal.progress.stage = "done"
    journal.save()
    run.log(f"done after {journal.progress.step} steps: {journal.results} {journal.facts}")


def parse() -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="train the demo model's VAE")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--sprites", type=Path, default=DATA / "sprites.npz")
    parser.add_argument("--seconds", type=float, default=240.0, help="training time of the plan")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between states")
    parser.add_argument(
        "--dry-run", dest="is_dry_run", action="store_true", help="a tiny model, to find mistakes"
    )
    return Settings(**vars(parser.parse_args()))


def run(settings: Settings, log: Log, stop: StopRequest) -> None:
    """Run or continue the plan's VAE stage."""
    state = settings.work / "state"
    journal = Journal.open(state / "autoencoder.json", "autoencoder")
    if journal.progress.stage == "done":
        log("already done")
        return
    # The state file is the truth: without it the training starts anew.
    journal.progress = state_progress(state / STATE) or Progress(stage="autoencoder")
    torch.manual_seed(0)
    plan = Run(
        folder=state,
        journal=journal,
        log=log,
        stop=stop,
        save_every=settings.save_every,
        steps_between_notes=2 if settings.is_dry_run else 500,
    )
    training = Training(settings, plan)
    if training.train():
        finish(training)


def main() -> None:
    """Read the command line and train."""
    settings = parse()
    state = settings.work / "state"
    state.mkdir(parents=True, exist_ok=True)
    with torch_settings():
        run(settings, Log("vae", state / "autoencoder.log"), StopRequest())


if __name__ == "__main__":
    main()
