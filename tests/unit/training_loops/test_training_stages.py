"""Every stage of the recipe on a CPU with tiny networks, stopped in the middle and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_nf4.formats.checkpoint import open_checkpoint
from training import collect, package_demo, report, train_autoencoder, train_transformer
from training.checkpoint import Journal, Progress, load_tensors, save_tensors, state_progress
from training.dataset import load_scenes
from training.latents import EncodingJob, Latents, autoencoder_facts
from training.runtime import Log, slowest_kernels
from training.stage import Run
from training.warm_start import warm_start

LONG = 1e6
CPU = torch.device("cpu")
HEARS = "transformer.txt_in.weight"
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


def run_transformer(
    work: Path, stop: StopAfter, flow_seconds: float = 0.0, *, rule: float | None = None
) -> Journal:
    settings = train_transformer.Settings(
        work=work,
        sprites=work / "sprites.npz",
        prompts=work / "prompts.json.gz",
        init=None,
        text=None,
        rule=rule,
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
        profiles=False,
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


# For the session, as `work` is: a worker may come back to this module.
@pytest.fixture(scope="session")
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
    # Long enough for one more round of steps, on a busy machine too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FURTHER", report.FURTHER[:2])
        patch.setattr(report, "NEUTRAL_STRENGTHS", (1.0, 1.25))
        resumed = run_transformer(work, StopAfter(), stopped.progress.seconds + 0.5)
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
    assert "autoencoder/val" in results


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


def packages(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths = {"--shipped": folder / "nf4.safetensors", "--bf16": folder / "bf16.safetensors"}
    arguments = [text for pair in paths.items() for text in map(str, pair)]
    monkeypatch.setattr("sys.argv", ["package_demo", "--work", str(trained), *arguments])
    package_demo.main()
    return list(paths.values())


def warm(trained: Path, folder: Path, file: Path) -> Path:
    """A work folder that begins from a packaged model."""
    for name in ("sprites.npz", "scenes.npz", "prompts.npz", "prompts.json.gz"):
        (folder / name).symlink_to(trained / name)
    warm_start(file, folder / "state")
    return folder


def test_a_warm_start_takes_over_every_part(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = packages(trained, tmp_path, monkeypatch)
    weights = warm(trained, tmp_path, file) / "state" / "weights"
    for mine, theirs in (("flow", "distil"), ("autoencoder", "autoencoder")):
        ours = load_tensors(weights / f"{mine}.safetensors")
        expected = load_tensors(trained / "state" / "weights" / f"{theirs}.safetensors")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_warm_start_keeps_the_constants_of_the_vae(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = packages(trained, tmp_path, monkeypatch)
    state = warm(trained, tmp_path, file) / "state"
    assert autoencoder_facts(state) == autoencoder_facts(trained / "state")


def test_with_other_text_encoders_the_transformer_starts_anew(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = packages(trained, tmp_path, monkeypatch)
    text = tmp_path / "text.safetensors"
    save_tensors(text, {"t5.shared.weight": torch.ones(2, 2), "clip.a": torch.zeros(1)})
    warm_start(file, tmp_path / "state", text=text)
    weights = tmp_path / "state" / "weights"
    assert {path.stem for path in weights.iterdir()} == {"autoencoder", "t5", "clip"}
    assert torch.equal(load_tensors(weights / "t5.safetensors")["shared.weight"], torch.ones(2, 2))


def test_a_transformer_goes_on_with_encoders_that_it_understands(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = packages(trained, tmp_path, monkeypatch)
    text = tmp_path / "text.safetensors"
    ears = torch.full((64, 64), 0.5)
    save_tensors(text, {"t5.a": torch.ones(2), "clip.a": torch.zeros(1), HEARS: ears})
    warm_start(file, tmp_path / "state", text=text)
    before = load_tensors(trained / "state" / "weights" / "distil.safetensors")
    after = load_tensors(tmp_path / "state" / "weights" / "flow.safetensors")
    own = HEARS.removeprefix("transformer.")
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [own]
    assert torch.equal(after[own], ears)


def test_a_quantised_model_can_be_begun_from(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = packages(trained, tmp_path, monkeypatch)
    weights = warm(trained, tmp_path, file) / "state" / "weights"
    assert load_tensors(weights / "flow.safetensors")["img_in.weight"].dtype == torch.bfloat16


def test_a_warm_plan_trains_to_its_end_without_a_search(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = packages(trained, tmp_path, monkeypatch)
    work = warm(trained, tmp_path, file)
    monkeypatch.setattr(report, "DECIDING", report.DECIDING[:1])
    monkeypatch.setattr(report, "FURTHER", ())
    journal = run_transformer(work, StopAfter(), 0.1, rule=1.25)
    assert (journal.progress.stage, journal.facts["guidance_rule"]) == ("done", {"neutral": 1.25})


def test_a_warm_start_leaves_a_plan_that_has_begun(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = packages(trained, tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in (trained / "state").glob("*.json")}
    warm_start(file, trained / "state")
    assert before == {path.name: path.read_bytes() for path in (trained / "state").glob("*.json")}


def encoding(work: Path) -> EncodingJob:
    return EncodingJob(
        work=work,
        sprites=work / "sprites.npz",
        num_scenes=8,
        device=CPU,
        compiled=False,
        is_dry_run=True,
    )


def test_a_child_process_makes_the_same_latents(trained: Path) -> None:
    job, log = encoding(trained), Log("latents")
    child, parent = (Latents(job, log, in_child=in_child) for in_child in (True, False))
    made, expected = child.take(StopAfter()), parent.take(StopAfter())
    assert made is not None
    assert torch.equal(made, expected)


def test_without_its_child_the_parent_encodes(trained: Path) -> None:
    latents = Latents(encoding(trained), Log("latents"), in_child=True)
    latents._child.kill()
    assert latents.take(StopAfter()).shape == (8, 256, 64)


def test_a_scene_file_of_an_older_form_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "scenes.npz", objs=np.zeros((2, 4, 6), np.int16))
    with pytest.raises(ValueError, match=r"training\.dataset"):
        load_scenes(tmp_path / "scenes.npz")


def test_the_slowest_kernels_are_listed() -> None:
    assert "aten::mm" in slowest_kernels(lambda: torch.ones(8, 8) @ torch.ones(8, 8))


def test_both_packages_open_with_all_parts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, bf16 = map(open_checkpoint, packages(trained, tmp_path, monkeypatch))
    assert (shipped.missing, bf16.missing) == ((), ())
    assert (shipped.quantization, bf16.quantization) == ("nf4 v2", "bf16")
    assert shipped.facts.name == "flux-demo"
