"""A pipeline that draws nothing, and a clean place to run the command line in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from PIL import Image

from flux_nf4.cli import main, words
from flux_nf4.formats.facts import Facts
from flux_nf4.model.config import FluxConfig
from flux_nf4.pipeline import events
from flux_nf4.pipeline.request import GenerationRequest


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json_lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder of every test here: empty, and with no settings around it."""
    import os

    for name in os.environ:
        if name.startswith("FLUX_NF4_"):
            monkeypatch.delenv(name)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def flux(capsys):
    """Run the command line: `flux("demo", "cat")`."""

    def run(*arguments):
        exit_code = main(arguments)
        said = capsys.readouterr()
        return Ended(exit_code, said.out, said.err)

    return run


@pytest.fixture
def known_words(monkeypatch):
    """A small demo model's words."""
    few = words.Words(
        things={"apple": ("red apple",), "dog": ("puppy",), "hot dog": (), "wolf": ("wolves",)},
        backgrounds=("white",),
    )
    for module in ("demo", "generate"):
        monkeypatch.setattr(f"flux_nf4.cli.{module}.load_words", lambda: few)
    return few


class FakePipeline:
    """Stands for `load_model` and `generate`; remembers what was asked of it."""

    def __init__(self):
        import torch

        self.requests: list[GenerationRequest] = []
        self.loaded: list[object] = []
        self.error: BaseException | None = None
        self.notice: str | None = None
        self.on_step = lambda step: None
        self.model = SimpleNamespace(
            variant="dev",
            facts=Facts(name="flux-demo", default_size=64, max_sequence_length=32),
            embeds_guidance=True,
            quantization="nf4 v2",
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            transformer=SimpleNamespace(config=FluxConfig()),
            notes=(),
        )

    def load_model(self, path, settings=None):
        self.loaded.append((path, settings))
        return self.model

    def generate(self, model, request):
        self.requests.append(request)
        if self.notice:
            yield events.Notice(message=self.notice)
        for stage in ("text", "modulation"):
            yield events.StageStarted(stage=stage)
        picture = Image.new("RGB", (request.width, request.height))
        for index in range(request.num_images):
            yield events.StageStarted(stage="denoise")
            for step in range(1, request.num_steps + 1):
                yield events.StepDone(
                    step=step,
                    num_steps=request.num_steps,
                    preview=picture if request.num_previews else None,
                )
                self.on_step(step)
            if self.error is not None:
                raise self.error
            yield events.StageStarted(stage="decode")
            yield events.ImageDone(index=index, image=picture, seed=request.seed + index)


@pytest.fixture
def pipeline(monkeypatch, known_words):
    """The fake, in the real one's place."""
    fake = FakePipeline()
    monkeypatch.setattr("flux_nf4.pipeline.load.load_model", fake.load_model)
    monkeypatch.setattr("flux_nf4.pipeline.generate.generate", fake.generate)
    return fake
