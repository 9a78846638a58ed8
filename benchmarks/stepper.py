"""One step of a model with random weights, apart from the loop: what `step_sections` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flux_nf4.memory.activations import Workload
from flux_nf4.model.arithmetic import set_arithmetic
from flux_nf4.model.rope import rope_table
from flux_nf4.model.step_graph import StepGraph
from flux_nf4.pipeline.benchmark import MemoryPeak, spread
from flux_nf4.pipeline.ceilings import timed_calls
from flux_nf4.pipeline.load import LoadSettings, assemble_model
from flux_nf4.pipeline.peers import StepInputs, random_inputs
from flux_nf4.pipeline.random_model import random_checkpoint
from flux_nf4.pipeline.sampling import token_grid

_BUDGET_S = {"flux1-dev": 1.5, "tiny": 0.05}  # for the steps of one variant
# Pixels and images at once; the first is the one that most is said about.
_SHAPES = {
    "flux1-dev": ((1024, 1), (512, 1), (1024, 4), (2048, 1)),
    "tiny": ((128, 1), (64, 1), (128, 2)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Which sizes of random weights, on which device; `shared` is a folder between sections."""

    sizes: Any
    device: str
    shared: Path

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Pixels of a side, and images at once."""
        return _SHAPES[self.sizes]

    def load(self, **options: Any) -> Any:
        """The model with random weights."""
        settings = LoadSettings(device=self.device, **options)
        return assemble_model(random_checkpoint(self.sizes), settings)

    def inputs(self, model: Any, side: int, batch: int) -> StepInputs:
        """The same for every variant and peer."""
        return random_inputs(
            model.transformer.config,
            size=(side, side),
            num_text_tokens=model.facts.max_sequence_length,
            batch_size=batch,
            device=model.device,
            dtype=model.dtype,
        )


class Stepper:
    """One step of a model on given inputs, apart from the loop."""

    def __init__(self, setting: Setting, model: Any, side: int, batch: int) -> None:
        self.model, self.inputs = model, setting.inputs(model, side, batch)
        self.budget_s, inputs = _BUDGET_S[setting.sizes], self.inputs
        self.guidance = (
            torch.tensor([inputs.guidance], device=model.device) if model.embeds_guidance else None
        )
        self.time = torch.tensor([inputs.time], device=model.device)
        self.rope = rope_table(
            inputs.txt.shape[1],
            *token_grid(side, side),
            model.transformer.config,
            model.device,
        )
        model.memory.begin(
            Workload(
                width=side,
                height=side,
                num_images=batch,
                num_text_tokens=inputs.txt.shape[1],
            )
        )
        with torch.inference_mode(), model.memory.phase("modulation", num_passes=2):
            self.row = self.condition(model.dtype)
            self.exact_row = self.condition(torch.float32)
        self.predict: Callable[..., torch.Tensor] = model.transformer.blocks

    def condition(self, dtype: torch.dtype) -> torch.Tensor:
        """The modulation of this step, of the first image's text."""
        pooled = self.inputs.pooled[:1].to(dtype)
        return self.model.transformer.conditioner.table(self.time, self.guidance, pooled)[0]

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """The velocity."""
        inputs = self.inputs
        return self.predict(inputs.img, inputs.txt, self.row, self.rope)

    @torch.inference_mode()
    def conditioned_step(self) -> torch.Tensor:
        """The velocity, with its modulation computed each time."""
        self.row = self.condition(self.model.dtype)
        return self.step()

    @torch.inference_mode()
    def exact(self) -> torch.Tensor:
        """The velocity in float32, modulation included: the oracle of all variants."""
        inputs = self.inputs
        tensors = (inputs.img.float(), inputs.txt.float(), self.exact_row, self.rope)
        arithmetic = self.model.arithmetic
        set_arithmetic(self.model.transformer.blocks, "bf16")
        try:
            return self.model.transformer.blocks.plain_step(*tensors)
        finally:
            set_arithmetic(self.model.transformer.blocks, arithmetic)

    def measured(
        self, call: Callable[[], torch.Tensor] | None = None, *, is_graph: bool = True
    ) -> dict[str, Any]:
        """Seconds of a step, and its peak of memory."""
        call = call or self.step
        device, blocks = self.model.device, self.model.transformer.blocks
        with self.model.memory.phase("denoise"):
            if is_graph and StepGraph.is_possible(device):
                self.predict = StepGraph(blocks, device)
                call()
            call()  # compiles, and measures attention
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step = asdict(spread(timed_calls(call, device, self.budget_s)))
            self.predict = blocks
        peak = asdict(MemoryPeak.now(device)) if device.type == "cuda" else None
        return {"step": step, "peak": peak, "error": None}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the whole velocity, in the 2-norm."""
    return float((found.float() - exact).norm() / exact.norm())
