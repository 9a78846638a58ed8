"""Train the transformer and its text encoders: flow, guidance rule, distillation, NF4, evaluation.

    python -m training.train_transformer --flow-seconds 800 --distil-seconds 90 --aware-seconds 200
    python -m training.train_transformer --init training/weights/flux-demo-bf16.safetensors ...
    python -m training.train_transformer --init FILE --text FILE

Needs `scenes.npz` and `prompts.npz` in the work folder, and waits for the VAE that
`training.train_autoencoder` makes, or, with `--init`, takes it and all other weights from a file;
with `--text` too the VAE alone is the file's, T5 and CLIP come from `training.train_text`, and the
transformer starts anew (`warm_start`). It compiles meanwhile. The stages, each from where it
stopped:

    flow      rectified flow, all three networks       -> weights/flow, t5, clip
    rule      which guidance the student shall learn    (on validation prompts)
    distil    guidance distillation                    -> weights/distil: the bf16 model
    aware     the same on the weights as they ship     -> weights/aware: the NF4 model
    evaluate  every measure on held-out prompts, and sheets of pictures

Seconds are training seconds of the whole plan: compiling, waiting and loading do not count, and
schedules do not depend on how often a run was stopped. SIGTERM saves the state; the same command
goes on. The learning rates follow these seconds, so give every run of one plan the same ones.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training import DATA, WORK
from training.checkpoint import Journal, load_tensors
from training.compose import Composer, load_sprites
from training.dataset import load_scenes
from training.demo_tokenizers import load_tokenizer
from training.flow import Captions, Data, DistillationStep, FlowStep, GuidanceRule
from training.latents import EncodingJob, Latents, autoencoder_facts, make_autoencoder
from training.networks import (
    Networks,
    Sizes,
    dry_run_sizes,
    load_transformer_weights,
    make_networks,
)
from training.report import Report, ReportOptions, evaluate
from training.rounding import shipped_text, shipped_transformer
from training.runtime import Log, StopRequest, default_device, torch_settings
from training.sampling import Sampler
from training.stage import Run, Stage, StagePlan, weights_path
from training.warm_start import warm_start

if TYPE_CHECKING:
    from torch import Tensor

STAGES = ("flow", "rule", "distil", "aware", "evaluate", "done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of the command."""

    work: Path
    sprites: Path
    prompts: Path
    init: Path | None
    text: Path | None
    rule: float | None
    flow_seconds: float
    distil_seconds: float
    aware_seconds: float
    batch_size: int
    num_scenes: int | None
    num_judged: int | None
    max_sampling_steps: int | None
    device: torch.device
    compiled: bool
    save_every: float
    is_dry_run: bool
    profiles: bool

    @property
    def encoding(self) -> EncodingJob:
        """What makes the latents."""
        return EncodingJob(
            work=self.work,
            sprites=self.sprites,
            num_scenes=self.num_scenes,
            device=self.device,
            compiled=self.compiled,
            is_dry_run=self.is_dry_run,
        )

    def plan(self, stage: str) -> StagePlan:
        """The schedule of a training stage."""
        if stage == "flow":
            return StagePlan(
                name=stage,
                seconds=self.flow_seconds,
                learning_rate=2e-3,
                warm_up_steps=300,
                decay_start=0.4,
                average=0.9985,
            )
        return StagePlan(
            name=stage,
            seconds=self.distil_seconds if stage == "distil" else self.aware_seconds,
            learning_rate=4e-4,
            warm_up_steps=100,
            decay_start=0.0,
            average=0.995,
        )


class Training:
    """Everything that lives on the device through all stages."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self.settings, self.run, self.device = settings, run, settings.device
        self.sizes = Sizes(
            t5_vocabulary=load_tokenizer("t5").get_vocab_size(),
            clip_vocabulary=load_tokenizer("clip").get_vocab_size(),
        )
        if settings.is_dry_run:
            self.sizes = dry_run_sizes(self.sizes)
        scenes = load_scenes(settings.work / "scenes.npz")
        t5, clip, empty_t5, empty_clip = (
            torch.from_numpy(scenes[name]).to(self.device) for name in ("t5", "clip", "u5", "uc")
        )
        chosen = slice(settings.num_scenes)
        captions = Captions(
            t5=t5[chosen],
            clip=clip[chosen],
            empty_t5=empty_t5.long(),
            empty_clip=empty_clip.long(),
        )
        self.data = Data(captions, self.sizes, settings.batch_size)
        self.composer = Composer(load_sprites(settings.sprites), self.device)
        self.autoencoder = make_autoencoder(self.device, is_dry_run=settings.is_dry_run)
        self.trained, self.frozen = self._make_networks(compiled=settings.compiled)

    def _make_networks(self, *, compiled: bool) -> tuple[Networks, Networks]:
        torch.manual_seed(0)
        trained = make_networks(self.sizes, self.device, compiled=compiled)
        frozen = make_networks(self.sizes, self.device, compiled=compiled)
        for module in frozen.modules():
            module.requires_grad_(requires_grad=False)
        return trained, frozen

    def compile(self) -> None:
        """Compile every network that the stage at hand needs; where it fails, go on without."""
        if not self.settings.compiled:
            return
        try:
            self._warm_up()
        except RuntimeError as error:
            self.run.log(f"warning: compiling failed, going on without: {str(error)[:600]}")
            torch._dynamo.reset()
            self.trained, self.frozen = self._make_networks(compiled=False)
        gc.collect()
        self.run.log("the networks are compiled")

    def _warm_up(self) -> None:
        """One step at learning rate 0, and one pass without gradients."""
        if self.run.journal.progress.stage == "flow":
            FlowStep(self.trained, self.data)()
            self.run.log("the step is compiled")
        rule = GuidanceRule(neutral=1.0)
        DistillationStep(self.trained.transformer, self.frozen, self.data, rule)()

    def take(self, latents_NLC: Tensor) -> None:
        """The latents of every scene, and the VAE that made them."""
        self.data.latents_NLC = latents_NLC
        weights = load_tensors(weights_path(self.run.folder, "autoencoder"))
        self.autoencoder.load_state_dict(weights)
        self.run.journal.facts |= autoencoder_facts(self.run.folder) or {}

    def load_text(self) -> None:
        """The text encoders of the flow stage into the frozen networks, rounded as they ship."""
        for name, module in (("t5", self.frozen.t5), ("clip", self.frozen.clip)):
            module.load_state_dict(load_tensors(weights_path(self.run.folder, name)))
        shipped_text(self.frozen.t5, self.frozen.clip).apply()

    def load_transformer(self, networks: Networks, stage: str) -> None:
        """Weights that a stage made."""
        weights = load_tensors(weights_path(self.run.folder, stage))
        load_transformer_weights(networks.transformer, weights)

    def flow(self) -> bool:
        """Stage `flow`; True when it is done."""
        # Pretrained, a warm start, or a state file lost on the way: with one, all is replaced.
        for name, module in (("t5", self.trained.t5), ("clip", self.trained.clip)):
            if (path := weights_path(self.run.folder, name)).exists():
                module.load_state_dict(load_tensors(path))
        if weights_path(self.run.folder, "flow").exists():
            self.load_transformer(self.trained, "flow")
        step = FlowStep(self.trained, self.data)
        return Stage(self.settings.plan("flow"), step, self.data, self.run).train()

    def rule(self) -> bool:
        """Stage `rule`: as told, or by what draws best."""
        if self.settings.rule is not None:
            rule = GuidanceRule(neutral=self.settings.rule)
        else:
            rule = self.report("flow").choose_rule()
        self.run.journal.facts["guidance_rule"] = {"neutral": rule.neutral}
        self.run.log(f"guidance rule: {rule}")
        return True

    def distil(self) -> bool:
        """Stage `distil`."""
        return self._distil("distil", start="flow")

    def aware(self) -> bool:
        """Stage `aware`: from the student, on weights as they ship."""
        return self._distil("aware", start="distil")

    def _distil(self, stage: str, *, start: str) -> bool:
        self.load_text()
        self.load_transformer(self.frozen, "flow")
        is_begun = self.run.journal.progress.step > 0
        self.load_transformer(self.trained, stage if is_begun else start)
        rule = GuidanceRule(**self.run.journal.facts["guidance_rule"])
        transformer = self.trained.transformer
        rounding = shipped_transformer(transformer, self.device) if stage == "aware" else None
        step = DistillationStep(transformer, self.frozen, self.data, rule, rounding)
        return Stage(self.settings.plan(stage), step, self.data, self.run).train()

    def report(self, loaded: str) -> Report:
        """A report whose sampler uses the frozen networks, with `loaded` in the transformer."""
        self.load_text()
        sampler = Sampler(self.frozen, self.autoencoder, self.data, self.run.journal.facts)
        options = ReportOptions(
            prompts=self.settings.prompts,
            tokens=self.settings.work / "prompts.npz",
            num_judged=self.settings.num_judged,
            max_steps=self.settings.max_sampling_steps,
        )
        report = Report(sampler, self.composer, self.run, options)
        report.load(loaded)
        return report

    def evaluate(self) -> bool:
        """Stage `evaluate`."""
        return evaluate(self.report("aware-nf4"))


def train(settings: Settings, run: Run) -> None:
    """Run the plan's stages from where it stands."""
    if run.journal.progress.stage == "done":
        run.log("already done")
        return
    latents = Latents(settings.encoding, run.log, in_child=settings.device.type == "cuda")
    training = Training(settings, run)
    training.compile()
    run.log("waiting for the latents")
    latents_NLC = latents.take(run.stop)
    if latents_NLC is None:
        return
    training.take(latents_NLC)
    stages = {
        "flow": training.flow,
        "rule": training.rule,
        "distil": training.distil,
        "aware": training.aware,
        "evaluate": training.evaluate,
    }
    while (stage := run.journal.progress.stage) != "done":
        is_done = stages[stage]()
        gc.collect()
        if is_done:
            advance(run, stage)
        if not is_done or run.stop:
            run.log(f"stopped in stage {run.journal.progress.stage}")
            return
    if settings.device.type == "cuda":
        run.log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def advance(run: Run, stage: str) -> None:
    """The next stage begins."""
    progress = run.journal.progress
    run.journal.facts[f"{stage}_steps"] = progress.step
    progress.stage, progress.step, progress.seconds = STAGES[STAGES.index(stage) + 1], 0, 0.0
    run.journal.save()
    run.log(f"stage {stage} is done")


def parse() -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="train the demo model's transformer")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--sprites", type=Path, default=DATA / "sprites.npz")
    parser.add_argument("--prompts", type=Path, default=DATA / "prompts.json.gz")
    parser.add_argument("--init", type=Path, help="begin from this all-in-one file's weights")
    parser.add_argument("--text", type=Path, help="with --init: begin from these text encoders")
    parser.add_argument("--rule", type=float, help="strength of guidance, instead of a search")
    parser.add_argument("--flow-seconds", type=float, default=800.0)
    parser.add_argument("--distil-seconds", type=float, default=90.0)
    parser.add_argument("--aware-seconds", type=float, default=200.0)
    parser.add_argument("--batch-size", type=int, default=384)
    parser.add_argument("--num-scenes", type=int, help="only so many scenes")
    parser.add_argument("--num-judged", type=int, help="only so many prompts of each set")
    parser.add_argument("--max-sampling-steps", type=int, help="sample with fewer, to try it out")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between states")
    parser.add_argument(
        "--dry-run", dest="is_dry_run", action="store_true", help="tiny networks, to find mistakes"
    )
    parser.add_argument(
        "--profile", dest="profiles", action="store_true", help="log each stage's slowest kernels"
    )
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    """Run or continue the plan."""
    settings = parse()
    folder = settings.work / "state"
    folder.mkdir(parents=True, exist_ok=True)
    log = Log("flux", folder / "transformer.log")
    if settings.init is not None and warm_start(settings.init, folder, text=settings.text):
        log(f"begins from {settings.init}")
    run = Run(
        folder=folder,
        journal=Journal.open(folder / "journal.json", STAGES[0]),
        log=log,
        stop=StopRequest(),
        save_every=settings.save_every,
        steps_between_notes=2 if settings.is_dry_run else 500,
        profiles=settings.profiles,
    )
    with torch_settings(cudnn_attention=True):
        train(settings, run)


if __name__ == "__main__":
    main()
