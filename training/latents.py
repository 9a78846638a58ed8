"""Every scene of the training set as latents, made beside the process that trains.

On a GPU a child process composes and encodes while its parent's networks compile, which keeps a
processor busy and the GPU idle, and hands the latents over as CUDA memory; where that fails the
parent encodes. Without CUDA the parent does.

Shape letters, in this module only:
    N  scenes    L  image tokens    C  token channels
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, multiprocessing

from flux_nf4.pipeline.sampling import pack
from training.autoencoder import DRY_RUN_SIZES, LATENT_CHANNELS, SIZES, Autoencoder
from training.checkpoint import Journal, load_tensors
from training.compose import Composer, load_sprites
from training.dataset import load_scenes
from training.runtime import Log, compute_dtype, torch_settings
from training.stage import weights_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from training.runtime import StopRequest

SCENES_AT_ONCE = 256
SECONDS_TO_LEAVE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingJob:
    """Which scenes to encode, with what, where."""

    work: Path
    sprites: Path
    num_scenes: int | None
    device: torch.device
    compiled: bool
    is_dry_run: bool

    @property
    def state(self) -> Path:
        """The state folder, where the VAE is or will be."""
        return self.work / "state"


def make_autoencoder(device: torch.device, *, is_dry_run: bool) -> Autoencoder:
    """The VAE as it is used, not trained: frozen."""
    sizes = DRY_RUN_SIZES if is_dry_run else SIZES
    autoencoder = Autoencoder(sizes).to(device, compute_dtype(device)).eval()
    autoencoder.requires_grad_(requires_grad=False)
    return autoencoder.to(memory_format=torch.channels_last)


def autoencoder_facts(state: Path) -> dict[str, float] | None:
    """What was measured of a finished VAE; None where it is still in training."""
    path = state / "autoencoder.json"
    if not path.exists():
        return None
    journal = Journal.open(path, "")
    return journal.facts if journal.progress.stage == "done" else None


class Encoder:
    """The VAE's encoder, compiled where that works, and the scenes that it is for."""

    def __init__(self, job: EncodingJob, log: Log) -> None:
        self.job, self.log = job, log
        self.autoencoder = make_autoencoder(job.device, is_dry_run=job.is_dry_run)
        self.dtype = next(self.autoencoder.parameters()).dtype
        self.composer = Composer(load_sprites(job.sprites), job.device)
        scenes = load_scenes(job.work / "scenes.npz")
        chosen = slice(job.num_scenes)
        self.objs, self.bg = (torch.from_numpy(scenes[name][chosen]) for name in ("objs", "bg"))
        self.at_once = min(SCENES_AT_ONCE, len(self.objs))
        self.run: Callable[[Tensor], Tensor] = self.autoencoder.encoder
        if job.compiled:
            self._compile()

    def _compile(self) -> None:
        compiled = torch.compile(self.autoencoder.encoder, dynamic=False)
        try:
            with torch.no_grad():
                compiled(self._images(slice(self.at_once)))
            self.run = compiled
        except RuntimeError as error:
            self.log(f"warning: compiling the encoder failed: {str(error)[:400]}")

    def _images(self, part: slice) -> Tensor:
        objs, bg = self.objs[part].to(self.job.device), self.bg[part].to(self.job.device)
        images = self.composer(objs, bg).to(self.dtype)
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, facts: dict[str, float]) -> Tensor:
        """Tokens of every scene, (N, L, C) bfloat16 on the device; N is a multiple of a batch."""
        weights = load_tensors(weights_path(self.job.state, "autoencoder"))
        self.autoencoder.load_state_dict(weights)
        num_scenes = len(self.objs) // self.at_once * self.at_once
        latents_NLC = torch.empty(num_scenes, 256, 64, dtype=torch.bfloat16, device=self.job.device)
        scaling, shift = facts["vae_scaling_factor"], facts["vae_shift_factor"]
        started = time.monotonic()
        for start in range(0, num_scenes, self.at_once):
            part = slice(start, start + self.at_once)
            mean = self.run(self._images(part))[:, :LATENT_CHANNELS].float()
            latents_NLC[part] = pack((mean - shift) * scaling).to(torch.bfloat16)
        deviation = latents_NLC[: 10 * self.at_once].float().std().item()
        seconds = time.monotonic() - started
        self.log(f"{num_scenes} latents in {seconds:.0f} s, deviation {deviation:.3f}")
        return latents_NLC


def encode_for(connection: Connection, job: EncodingJob) -> None:
    """What the child process does: encode as soon as there is a VAE, hand over, wait, leave."""
    log = Log("latents", job.state / "transformer.log")
    with torch_settings():
        encoder = Encoder(job, log)
        while (facts := autoencoder_facts(job.state)) is None:
            time.sleep(0.2)
        # The memory is this process's: it must live until the parent has a copy.
        latents_NLC = encoder.encode(facts)
    if latents_NLC.is_cuda:
        torch.cuda.synchronize()
    connection.send(latents_NLC)
    connection.recv()


class Latents:
    """Latents in the making: begins at once, in a child process where there is CUDA."""

    def __init__(self, job: EncodingJob, log: Log, *, in_child: bool) -> None:
        self.job, self.log = job, log
        self._child: SpawnProcess | None = None
        if not in_child:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._child = context.Process(target=encode_for, args=(other, job), daemon=True)
        self._child.start()
        # Only the child holds the other end: when it dies, reading fails instead of waiting.
        other.close()

    def take(self, stop: StopRequest) -> Tensor | None:
        """The latents as soon as they are there, (N, L, C); None where a stop was asked for."""
        if self._child is not None:
            try:
                return self._from_child(self._child, stop)
            except (EOFError, OSError, RuntimeError) as error:
                self.log(f"warning: no latents from the child process: {str(error)[:400]}")
            finally:
                self._leave(self._child)
        while (facts := autoencoder_facts(self.job.state)) is None:
            if stop:
                return None
            time.sleep(0.2)
        return Encoder(self.job, self.log).encode(facts)

    def _from_child(self, child: SpawnProcess, stop: StopRequest) -> Tensor | None:
        while not self._connection.poll(0.2):
            if stop:
                return None
        received_NLC: Tensor = self._connection.recv()
        latents_NLC = received_NLC.clone()
        if latents_NLC.is_cuda:
            torch.cuda.synchronize()
        del received_NLC
        self._connection.send("copied")
        child.join(SECONDS_TO_LEAVE)
        return latents_NLC

    def _leave(self, child: SpawnProcess) -> None:
        self._connection.close()
        if child.is_alive():
            child.terminate()
        child.join()
        self._child = None
