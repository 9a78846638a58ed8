"""Every stage of the recipe on a CPU with tiny networks, stopped in the middle and resumed."""

import json
from pathlib import Path

import pytest
import torch

from flux_nf4.formats.checkpoint import open_checkpoint
from training import collect, package_demo, report, train_autoencoder, train_transformer
from training.checkpoint import Journal, Progress, load_tensors, state_progress
from training.runtime import Log
from training.stage import Run

LONG = 1e6
CPU = torch.device("cpu")
WEIGHTS = ("autoencoder", "flow", "t5", "clip", "distil", "aware")


class StopAfter:
    """A stop request that comes after it was asked for a number of times."""

    def __init__(self, num_checks: int | None = None) -> None:
        self.left = num_checks

    def __bool__(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


def run_autoencoder(work: Path, stop: StopAfter, seconds: float) -> Journal:
    settings = train_autoencoder.Settings(
        work=work,
        sprites=work / "sprites.npz",
        seconds=seconds,
        batch_size=2,
        device=CPU,
        compiled=False,
        save_every=0.2,
        is_dry_run=True,
    )
    train_autoencoder.run(settings, Log("vae"), stop)
    return Journal.open(work / "state" / "autoencoder.json", "autoencoder")


def run_transformer(work: Path, stop: StopAfter, flow_seconds: float = 0.0) -> Journal:
    settings = train_transformer.Settings(
        work=work,
        sprites=work / "sprites.npz",
        prompts=work / "prompts.json.gz",
        flow_seconds=flow_seconds,
        distil_seconds=0.1,
        aware_seconds=0.1,
        batch_size=2,
        num_scenes=16,
        num_judged=2,
        max_sampling_steps=2,
        device=CPU,
        compiled=False,
        save_every=0.2,
        is_dry_run=True,
    )
    run = Run(
        folder=work / "state",
        journal=Journal.open(work / "state" / "journal.json", "flow"),
        log=Log("flux"),
        stop=stop,
        save_every=settings.save_every,
        steps_between_notes=2,
    )
    train_transformer.train(settings, run)
    return run.journal


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """The work folder after the whole recipe, each training stopped once on its way."""
    (work / "state").mkdir()
    stopped = run_autoencoder(work, StopAfter(1), LONG)
    assert stopped.progress.step > 0
    assert stopped.progress.stage == "autoencoder"
    resumed = run_autoencoder(work, StopAfter(), stopped.progress.seconds)
    assert resumed.progress.stage == "done"
    stopped = run_transformer(work, StopAfter(2), LONG)
    assert stopped.progress.stage == "flow"
    assert stopped.progress.step > 0
    # Long enough for one more round of steps.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "TASKS", report.TASKS[:3])
        patch.setattr(report, "NEUTRAL_STRENGTHS", (1.0, 1.25))
        resumed = run_transformer(work, StopAfter(), stopped.progress.seconds + 0.05)
    assert resumed.facts["flow_steps"] > stopped.progress.step
    assert resumed.progress.stage == "done"
    return work


def test_every_stage_leaves_its_weights(trained: Path) -> None:
    found = {path.stem for path in (trained / "state" / "weights").glob("*.safetensors")}
    assert found == set(WEIGHTS)


def test_training_moves_the_weights(trained: Path) -> None:
    folder = trained / "state" / "weights"
    flow, aware = (load_tensors(folder / f"{name}.safetensors") for name in ("flow", "aware"))
    assert not torch.equal(flow["img_in.weight"], aware["img_in.weight"])


def test_every_sheet_is_drawn(trained: Path) -> None:
    names = {path.name for path in (trained / "state" / "pictures").iterdir()}
    for weights in ("aware-nf4", "distil"):
        for sheet in ("grid", "free", "seeds", "steps", "guidance"):
            assert f"{weights}_{sheet}.jpg" in names


def test_results_name_weights_prompts_steps_and_guidance(trained: Path) -> None:
    results = json.loads((trained / "state" / "journal.json").read_text())["results"]
    assert "aware-nf4/test/20 steps/guidance 3.5" in results
    assert "autoencoder/test" in results


def test_a_finished_plan_does_nothing(trained: Path) -> None:
    before = (trained / "state" / "journal.json").stat().st_mtime_ns
    run_transformer(trained, StopAfter())
    assert (trained / "state" / "journal.json").stat().st_mtime_ns == before


def test_the_pieces_join_to_the_same_files(trained: Path, tmp_path: Path) -> None:
    collect.pack(trained / "state", tmp_path / "out")
    collect.unpack(tmp_path / "out", tmp_path / "state")
    weights = "weights/aware.safetensors"
    assert (tmp_path / "state" / weights).read_bytes() == (trained / "state" / weights).read_bytes()


def test_a_run_without_its_state_goes_on_from_the_weights(trained: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("sprites.npz", "scenes.npz", "prompts.npz", "prompts.json.gz"):
        (work / name).symlink_to(trained / name)
    collect.pack(trained / "state", tmp_path / "out")
    collect.unpack(tmp_path / "out", work / "state")
    # Only a plan that is not over carries the first stage's weights: put them back by hand.
    flow = trained / "state" / "weights" / "flow.safetensors"
    (work / "state" / "weights" / "flow.safetensors").symlink_to(flow)
    journal = Journal.open(work / "state" / "journal.json", "flow")
    journal.progress = Progress(stage="aware", step=4, seconds=0.05)
    journal.save()
    # The end of the stage, and then the stop before the next one.
    assert run_transformer(work, StopAfter(8)).facts["aware_steps"] > 4
    assert state_progress(work / "state" / "transformer.state") is not None


def test_both_packages_open_with_all_parts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"--shipped": tmp_path / "nf4.safetensors", "--bf16": tmp_path / "bf16.safetensors"}
    arguments = [text for pair in paths.items() for text in map(str, pair)]
    monkeypatch.setattr("sys.argv", ["package_demo", "--work", str(trained), *arguments])
    package_demo.main()
    shipped, bf16 = (open_checkpoint(path) for path in paths.values())
    assert (shipped.missing, bf16.missing) == ((), ())
    assert (shipped.quantization, bf16.quantization) == ("nf4 v2", "bf16")
    assert shipped.facts.name == "flux-demo"
