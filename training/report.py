"""Judge weights on the GPU: the guidance rule on validation prompts, then all measures and sheets.

Everything found goes into the journal under `results`, one entry for each tag, as soon as it is
known: a run that is stopped goes on with what is missing.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.checkpoint import load_tensors
from training.compose import save_sheet
from training.flow import NEUTRAL_GUIDANCE, GuidanceRule
from training.measures import Measures, summary
from training.networks import load_transformer_weights
from training.prompts import exact_scenes
from training.rounding import Rounding, linear_weights, shipped_transformer, to_bfloat16
from training.sampling import Sampler, SamplingSettings, as_images
from training.stage import Run, weights_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from training.compose import Composer

NEUTRAL_STRENGTHS = (1.0, 1.25, 1.5)
STEP_COUNTS = (1, 2, 4, 8, 20)
GUIDANCE_SCALES = (1.0, 2.0, NEUTRAL_GUIDANCE, 6.0)
NUM_SEEDS = 4
MAX_FAILURES = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One measurement: which weights, which prompts, how sampled."""

    weights: str
    prompts: str
    num_steps: int = 20
    guidance: float = NEUTRAL_GUIDANCE

    @property
    def tag(self) -> str:
        """Its name in the results."""
        return f"{self.weights}/{self.prompts}/{self.num_steps} steps/guidance {self.guidance}"


# What decides whether the model ships, in the order of its worth.
DECIDING = (
    Task(weights="aware-nf4", prompts="test"),
    Task(weights="aware-nf4", prompts="unknown"),
    Task(weights="distil", prompts="test"),
    Task(weights="distil", prompts="unknown"),
)
# What else is worth knowing. `distil-nf4` is the student quantised as it is: what the NF4-aware
# phase has to beat on the same prompts.
FURTHER = (
    *(Task(weights=weights, prompts="val") for weights in ("aware-nf4", "distil-nf4", "distil")),
    *(Task(weights="aware-nf4", prompts="val", num_steps=steps) for steps in (1, 4, 8)),
    *(Task(weights="aware-nf4", prompts="val", guidance=scale) for scale in (1.0, 2.0, 6.0)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Where the prompts and their token ids are; limits to try things out."""

    prompts: Path
    tokens: Path
    num_judged: int | None = None
    max_steps: int | None = None


class Report:
    """Samples with the networks of `sampler` and measures the pictures."""

    def __init__(
        self, sampler: Sampler, composer: Composer, run: Run, options: ReportOptions
    ) -> None:
        self.sampler, self.run, self.composer = sampler, run, composer
        self.measures = Measures(composer)
        self.prompts = json.loads(gzip.decompress(options.prompts.read_bytes()))
        self.limit, self.max_steps = options.num_judged, options.max_steps
        with np.load(options.tokens) as arrays:
            self.ids = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self._loaded = ""

    def load(self, name: str) -> None:
        """Put weights into the sampler's networks: a stage's, or `-nf4`, rounded as they ship."""
        if name == self._loaded:
            return
        transformer = self.sampler.networks.transformer
        stage = name.removesuffix("-nf4")
        load_transformer_weights(transformer, load_tensors(weights_path(self.run.folder, stage)))
        if name.endswith("-nf4"):
            shipped_transformer(transformer, self.sampler.data.device).apply()
        else:
            Rounding().add(linear_weights(transformer), to_bfloat16).apply()
        self._loaded = name

    def draw(self, prompts: str, settings: SamplingSettings) -> Tensor:
        """Pictures of a set of prompts."""
        ids = (self.ids[f"{prompts}_{kind}"][: self.limit] for kind in ("t5", "clip"))
        return self.sampler.sample(*ids, self._limited(settings))

    def _limited(self, settings: SamplingSettings) -> SamplingSettings:
        if self.max_steps is None:
            return settings
        return replace(settings, num_steps=min(settings.num_steps, self.max_steps))

    def judge(self, tag: str, prompts: str, pictures: Tensor) -> dict[str, Any]:
        """Measure pictures of a set and write what was found into the journal."""
        specs = self.prompts[prompts][: self.limit]
        results = self.measures(as_images(pictures), specs)
        found: dict[str, Any] = summary(specs, results)
        self.run.log(f"{tag}: {found}")
        found["failures"] = [
            [spec["set"], spec["caption"], result["psnr"]]
            for spec, result in zip(specs, results, strict=True)
            if not result["right" if spec["set"] != "background" else "right_background"]
        ][:MAX_FAILURES]
        self.run.journal.results[tag] = found
        self.run.journal.save()
        return found

    def choose_rule(self) -> GuidanceRule:
        """The teacher's best guidance at the default scale, on prompts kept for such choices."""
        best = GuidanceRule(neutral=NEUTRAL_STRENGTHS[0])
        best_score = -math.inf
        for neutral in NEUTRAL_STRENGTHS:
            rule = GuidanceRule(neutral=neutral)
            pictures = self.draw("val", SamplingSettings(rule=rule))
            score = rule_score(self.judge(f"flow/val/strength {neutral}", "val", pictures))
            # A stronger guidance must earn its place: it costs the pictures their softness.
            if score > best_score + 1.0:
                best, best_score = rule, score
        return best

    def measure(self, tasks: Sequence[Task]) -> bool:
        """Every task that has no result yet; False where a stop was asked for."""
        for task in tasks:
            if self.run.stop:
                return False
            if task.tag in self.run.journal.results:
                continue
            self.load(task.weights)
            settings = SamplingSettings(num_steps=task.num_steps, guidance=task.guidance)
            self.judge(task.tag, task.prompts, self.draw(task.prompts, settings))
        return True

    def measure_ceiling(self) -> None:
        """What the VAE alone costs: exact scenes through it and back."""
        tag = "autoencoder/val"
        if tag in self.run.journal.results:
            return
        objs, bg = exact_scenes(self.prompts["val"][: self.limit], Random(0))
        autoencoder, device = self.sampler.autoencoder, self.sampler.data.device
        dtype = autoencoder.encoder.conv_in.weight.dtype
        pictures = []
        with torch.no_grad():
            for objs_part, bg_part in zip(objs.split(64), bg.split(64), strict=True):
                images = self.composer(objs_part.to(device), bg_part.to(device)).to(dtype)
                images = images.contiguous(memory_format=torch.channels_last)
                mean, _ = autoencoder.moments(images)
                pictures.append(self.sampler.decode_latents(mean))
        self.judge(tag, "val", torch.cat(pictures))

    def draw_sheets(self, weights: str) -> None:
        """Pictures for the eye: the prompt sheets, and seeds, steps and guidance varied."""
        if f"sheets/{weights}" in self.run.journal.results or self.run.stop:
            return
        self.load(weights)
        folder = self.run.folder / "pictures"
        folder.mkdir(exist_ok=True)
        for prompts in ("grid", "free"):
            path = folder / f"{weights}_{prompts}.jpg"
            save_sheet(as_images(self.draw(prompts, SamplingSettings(first_seed=1))), path)
        self._sheet(
            folder / f"{weights}_seeds.jpg",
            [SamplingSettings(first_seed=seed) for seed in range(1, NUM_SEEDS + 1)],
        )
        self._sheet(
            folder / f"{weights}_steps.jpg",
            [SamplingSettings(num_steps=steps, first_seed=1) for steps in STEP_COUNTS],
        )
        self._sheet(
            folder / f"{weights}_guidance.jpg",
            [SamplingSettings(guidance=scale, first_seed=1) for scale in GUIDANCE_SCALES],
        )
        self.run.journal.results[f"sheets/{weights}"] = True
        self.run.journal.save()

    def _sheet(self, path: Path, columns: list[SamplingSettings]) -> None:
        """One row a prompt, one column a setting; each row has one seed unless that is varied."""
        rows = [1, 12, 14, 27]  # prompts of `grid` that leave place, size or background open
        ids = [self.ids[f"grid_{kind}"][rows] for kind in ("t5", "clip")]
        drawn = [
            self.sampler.sample(*ids, self._limited(settings), [settings.first_seed] * len(rows))
            for settings in columns
        ]
        pictures = torch.stack(drawn, dim=1).flatten(0, 1)
        save_sheet(as_images(pictures), path, num_columns=len(columns))


def rule_score(found: dict[str, Any]) -> float:
    """Percentages, and PSNR four times, summed: hit rates saturate, PSNR goes on telling."""
    score = 0.0
    for name, value in found.items():
        if not isinstance(value, float) or name.endswith("_mean"):
            continue
        score += 4 * value if name.startswith("psnr") else value
    return score


def evaluate(report: Report) -> bool:
    """Everything in the order of its worth; False where a stop was asked for."""
    if not report.measure(DECIDING):
        return False
    report.draw_sheets("aware-nf4")
    if not report.measure(FURTHER):
        return False
    report.draw_sheets("distil")
    report.measure_ceiling()
    return not report.run.stop
