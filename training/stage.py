"""A training from wherever it stopped to its end, and the stages of the transformer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.checkpoint import (
    Journal,
    Progress,
    load_tensors,
    save_state,
    save_tensors,
    state_progress,
)
from training.optimizer import as_graph
from training.runtime import Log, StageClock, StopRequest, decay, ramp, slowest_kernels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from training.flow import Data, DistillationStep, FlowStep

STEPS_BETWEEN_CHECKS = 10
MAX_RESTORES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Length and schedule of a stage. `decay_start` is the share at which the rate begins to fall.

    `average` is what the average of the weights keeps of itself at each step, at most.
    """

    name: str
    seconds: float
    learning_rate: float
    warm_up_steps: int
    decay_start: float
    average: float


@dataclass(slots=True, kw_only=True)
class Run:
    """What all stages of one process share."""

    folder: Path
    journal: Journal
    log: Log
    stop: StopRequest
    save_every: float
    steps_between_notes: int
    profiles: bool = False

    def train(
        self,
        seconds: float,
        step: Callable[[], None],
        *,
        set_rates: Callable[[], None],
        save: Callable[[], None],
        note: Callable[[], None],
    ) -> bool:
        """Go on until the stage's seconds are over (True) or a stop is asked for (False)."""
        progress = self.journal.progress
        clock, saved_at = StageClock(progress.seconds), progress.seconds
        while True:
            if progress.step % STEPS_BETWEEN_CHECKS == 0:
                progress.seconds = clock.read()
                is_done = progress.seconds >= seconds
                is_over = is_done or bool(self.stop)
                if is_over or progress.seconds - saved_at > self.save_every:
                    saved_at = progress.seconds
                    save()
                if is_over:
                    return is_done
                set_rates()
            step()
            progress.step += 1
            if progress.step % self.steps_between_notes == 0:
                note()


class Stage:
    """Trains `step` by `plan`; saves as it goes."""

    def __init__(
        self, plan: StagePlan, step: FlowStep | DistillationStep, data: Data, run: Run
    ) -> None:
        self.plan, self.step, self.data, self.run = plan, step, data, run
        self.optimizer = step.optimizer
        self.state_path = run.folder / "transformer.state"
        self.fresh_since = 0
        self.rate_factor = 1.0
        self.num_restores = 0

    @property
    def progress(self) -> Progress:
        """Where the stage stands."""
        return self.run.journal.progress

    def train(self) -> bool:
        """Go on until the plan's seconds are over (True) or a stop is asked for (False)."""
        replay = as_graph(self.step, self.optimizer, self.run.log)
        if self.run.profiles:
            # Still at learning rate 0, and an average that keeps all of itself.
            self.run.log(slowest_kernels(replay))
            self.optimizer.reset()
        self.data.loss_sums.zero_()
        self._restore()
        torch.manual_seed(10_000 + self.progress.step)
        self.run.log(f"{self.plan.name}: from step {self.progress.step}")
        return self.run.train(
            self.plan.seconds, replay, set_rates=self._set_rates, save=self.save, note=self._note
        )

    def save(self) -> None:
        """Write state, averages as they ship, and journal, in this order."""
        save_state(self.state_path, self.optimizer.state(), self.progress)
        self.save_averages()
        self.run.journal.save()

    def save_averages(self) -> None:
        """Write the average of every network in training, for other stages."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in zip(self.optimizer.names, self.optimizer.average, strict=True):
            part, inner = name.split("/", 1)
            # The scales of QK norms ship in float32, everything else in bfloat16 or less.
            dtype = torch.float32 if name.endswith(".scale") else torch.bfloat16
            parts.setdefault(part, {})[inner] = tensor.to(dtype)
        for part, tensors in parts.items():
            if part == "transformer":
                # BFL's names, without the name of the part that owns them.
                tensors = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}
                part = self.plan.name
            save_tensors(weights_path(self.run.folder, part), tensors)

    def _restore(self) -> None:
        """Take over the saved state, where it is one of this stage."""
        saved = state_progress(self.state_path)
        if saved is not None and saved.stage == self.plan.name:
            self.optimizer.load(load_tensors(self.state_path, self.data.device))
            self.run.journal.progress = saved
        else:
            self.fresh_since = self.progress.step

    def _set_rates(self) -> None:
        plan, progress = self.plan, self.progress
        rate = plan.learning_rate * self.rate_factor
        rate *= ramp(progress.step - self.fresh_since, plan.warm_up_steps)
        rate *= decay(progress.seconds / plan.seconds, start=plan.decay_start)
        self.optimizer.set(rate, min(plan.average, (1 + progress.step) / (20 + progress.step)))

    def _note(self) -> None:
        """Add losses to the history; where they are no numbers, go back and slow down."""
        losses = self.data.read_losses()
        progress = self.progress
        line = [progress.step, round(progress.seconds, 1), *losses]
        self.run.log(
            f"{self.plan.name} step {progress.step} at {progress.seconds:.0f} s: loss {losses[0]}, "
            f"by time {losses[1:]}, rate {self.optimizer.learning_rate.item():.1e}"
        )
        if all(math.isfinite(loss) for loss in losses):
            self.run.journal.history.setdefault(self.plan.name, []).append(line)
            return
        saved = state_progress(self.state_path)
        if saved is None or saved.stage != self.plan.name or self.num_restores == MAX_RESTORES:
            raise RuntimeError("the loss is no longer a number, and there is nothing to go back to")
        self.num_restores += 1
        self.rate_factor /= 2
        self.optimizer.load(load_tensors(self.state_path, self.data.device))
        self.run.log("warning: the loss is no number: back to the saved state, at half the rate")


def weights_path(folder: Path, name: str) -> Path:
    """Where the weights of one part or stage lie."""
    return folder / "weights" / f"{name}.safetensors"
