import json
from pathlib import Path

import pytest
import torch

from flux_nf4.cli import machine
from flux_nf4.cli.accelerators import Card, Torch, card_finding, nvidia_driver, torch_findings
from flux_nf4.cli.findings import Finding, num_bytes_text
from flux_nf4.cli.model_checks import checkpoint_findings, model_findings
from flux_nf4.formats.checkpoint import Checkpoint
from flux_nf4.formats.component import Component
from flux_nf4.formats.facts import Facts
from flux_nf4.nf4.codec import NF4Weight

GIB = 2**30
CARD = Card(name="Card", capability=(9, 0), free=70 * GIB, total=80 * GIB)


def torch_with(**changes):
    values = {"version": "2.13.0", "cuda": None, "cards": (), "has_mps": False, "triton": None}
    return Torch(**(values | changes))


def severities(findings):
    return {finding.topic: finding.severity for finding in findings}


# ---- the verb -----------------------------------------------------------------------------------


@pytest.fixture
def found(monkeypatch):
    """Let `doctor` find what the test says, and only that."""

    def find(*findings):
        monkeypatch.setattr("flux_nf4.cli.doctor._examine", lambda model: iter(findings))

    return find


def test_no_problem_ends_with_0(flux, found):
    found(
        Finding(severity="ok", topic="a", text="A"), Finding(severity="note", topic="b", text="B")
    )
    ended = flux("doctor")

    assert (ended.exit_code, ended.out) == (0, "ok       A\nnote     B\n\nno problems\n")


def test_a_warning_is_no_problem(flux, found):
    found(Finding(severity="warning", topic="a", text="A", remedy="do"))

    assert flux("doctor").exit_code == 0


def test_a_problem_ends_with_1_and_its_remedy(flux, found):
    found(Finding(severity="problem", topic="a", text="A", remedy="do this"))
    ended = flux("doctor")

    assert (ended.exit_code, ended.out) == (1, "problem  A\n         -> do this\n\n1 problem\n")


def test_json_holds_every_finding(flux, found):
    found(Finding(severity="problem", topic="a", text="A", remedy="do this"))
    told = json.loads(flux("doctor", "--json").out)

    assert told["problems"] == 1
    assert told["findings"] == [
        {"severity": "problem", "topic": "a", "text": "A", "remedy": "do this"}
    ]


def test_this_machine_and_an_absent_model_are_looked_over(flux):
    told = json.loads(flux("doctor", "absent.safetensors", "--json").out)

    assert {"python", "memory", "packages", "disk", "cpu", "torch", "model"} <= {
        finding["topic"] for finding in told["findings"]
    }
    assert [f["topic"] for f in told["findings"] if f["severity"] == "problem"] == ["model"]


def test_bad_settings_are_a_finding_and_not_the_end(flux, folder):
    (folder / "flux-nf4.toml").write_text("stepz = 3")
    ended = flux("doctor")

    assert ended.exit_code == 1
    assert "problem  unknown setting `stepz`" in ended.out
    assert "PyTorch" in ended.out


# ---- PyTorch and GPUs ---------------------------------------------------------------------------


def test_a_cpu_build_beside_a_gpu_is_a_problem_with_its_remedy():
    (first, *_) = torch_findings(torch_with(), driver="580.65")

    assert first.severity == "problem"
    assert "driver 580.65" in first.text
    assert "pip install" in first.remedy


def test_a_cuda_build_that_cannot_use_the_gpu_is_a_problem():
    (first, *_) = torch_findings(torch_with(cuda="13.0"), driver="470.1")

    assert (first.severity, "driver" in first.remedy) == ("problem", True)


def test_a_cuda_build_with_a_gpu_is_fine():
    found = torch_findings(torch_with(cuda="13.0", cards=(CARD,), triton="3.9"), driver="580.65")

    assert set(severities(found).values()) == {"ok"}


def test_a_machine_without_a_gpu_is_fine():
    assert severities(torch_findings(torch_with(), driver=None)) == {"torch": "ok", "gpu": "note"}


def test_a_gpu_without_triton_is_a_warning():
    found = torch_findings(torch_with(cuda="13.0", cards=(CARD,)), driver="580.65")

    assert severities(found)["triton"] == "warning"


@pytest.mark.parametrize(
    ("capability", "offered"),
    [
        ((7, 0), "no fast low-precision arithmetic"),
        ((7, 5), "int8 arithmetic"),
        ((8, 0), "int8, bf16 arithmetic"),
        ((8, 9), "int8, bf16, fp8 arithmetic"),
        ((12, 0), "int8, bf16, fp8, fp4 arithmetic"),
    ],
)
def test_a_card_tells_what_arithmetic_it_offers(capability, offered):
    card = Card(name="Card", capability=capability, free=20 * GIB, total=24 * GIB)

    assert offered in card_finding(0, card).text


@pytest.mark.parametrize(
    ("free", "total", "severity"),
    [
        *((1.3, 1.4, "warning"), (3.5, 4, "note"), (5.5, 5.8, "ok"), (5, 6, "ok")),
        *((1, 4, "warning"), (3, 24, "warning"), (6, 24, "ok")),
    ],
)
def test_a_card_is_judged_by_its_memory(free, total, severity):
    card = Card(name="Card", capability=(8, 9), free=int(free * GIB), total=int(total * GIB))

    assert card_finding(0, card).severity == severity


def test_the_driver_is_asked_of_nvidia_smi(folder, monkeypatch):
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    assert nvidia_driver() == "580.65.06"


# ---- the rest of the machine --------------------------------------------------------------------


def test_a_processor_without_bf16_gets_a_note():
    assert machine.processor_finding({"avx2": True}).severity == "note"


def test_a_processor_with_bf16_is_fine():
    assert machine.processor_finding({"avx512_bf16": True}).severity == "ok"


@pytest.mark.parametrize(
    ("free", "total", "severity"),
    [
        (1 * GIB, 32 * GIB, "warning"),
        (6 * GIB, 8 * GIB, "note"),
        (20 * GIB, 32 * GIB, "ok"),
        (None, 32 * GIB, "ok"),
        (None, None, "note"),
    ],
)
def test_memory_is_judged_by_what_is_free(free, total, severity):
    assert machine.memory_finding(free, total).severity == severity


def test_packages_that_suit_are_listed():
    (finding,) = machine.package_findings(["rich>=1", "absent>=1; extra == 'dev'"])

    assert (finding.severity, finding.text[:5]) == ("ok", "rich ")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("rich>=1000", "; flux-nf4 needs >=1000"),
        ("no-such-package>=2", "no-such-package is missing; flux-nf4 needs >=2"),
    ],
)
def test_a_package_that_does_not_suit_is_a_problem(requirement, said):
    finding = next(machine.package_findings([requirement]))

    assert finding.severity == "problem"
    assert said in finding.text
    assert finding.remedy == f'pip install "{requirement}"'


def test_a_full_disk_is_a_warning(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: machine.shutil._ntuple_diskusage(9, 8, 1))

    assert machine.disk_finding(folder / "not" / "there", "images").severity == "warning"


def test_half_written_files_are_named(folder):
    (folder / ".flux-nf4-0011.tmp").write_text("")
    (folder / "model.safetensors.incomplete").write_text("")
    (finding,) = machine.leftover_findings(folder)

    assert ".flux-nf4-0011.tmp, model.safetensors.incomplete" in finding.text


def test_a_clean_folder_gives_no_finding(folder):
    assert list(machine.leftover_findings(folder)) == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_044_280_207, "12 GB"), (13_122_336, "13.1 MB")],
)
def test_bytes_are_said_as_downloads_are(num_bytes, text):
    assert num_bytes_text(num_bytes) == text


# ---- models -------------------------------------------------------------------------------------


def nf4(*, nested=False):
    from flux_nf4.nf4.reference import quantize

    weight = quantize(torch.ones(64, 64), nested=nested)
    assert isinstance(weight, NF4Weight)
    return weight


def checkpoint(kinds=("transformer", "t5", "clip", "vae"), *, input_width=64, **weights):
    """A checkpoint in memory, of one tensor or two a part."""
    fp8 = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    entries = {
        "transformer": {
            "img_in.weight": torch.zeros(64, input_width, dtype=torch.bfloat16),
            "guidance_in.in_layer.weight": torch.zeros(64, 64, dtype=torch.bfloat16),
            **weights,
        },
        "t5": {"shared.weight": fp8},
        "clip": {"text_projection.weight": torch.zeros(4, 4)},
        "vae": {"weight": torch.zeros(4, 4)},
    }
    return Checkpoint(
        path=Path("x.safetensors"),
        layout="all-in-one",
        components={
            kind: Component(kind=kind, entries=entries[kind], source=Path("x")) for kind in kinds
        },
        facts=Facts(),
    )


def problems(model):
    found = checkpoint_findings(model, is_demo=False)
    return [finding.text for finding in found if finding.severity == "problem"]


def test_nf4_beside_a_t5_in_fp8_is_normal():
    found = list(checkpoint_findings(checkpoint(a=nf4()), is_demo=False))

    assert {finding.severity for finding in found} == {"ok"}
    assert any("T5 is stored in fp8" in finding.text for finding in found)


def test_a_transformer_partly_in_fp8_is_a_problem():
    (said,) = problems(checkpoint(a=nf4(), b=torch.zeros(64, 64).to(torch.float8_e4m3fn)))

    assert "mixes fp8 with NF4" in said


def test_v1_is_told_as_such():
    found = list(checkpoint_findings(checkpoint(a=nf4(nested=True)), is_demo=False))

    assert any("NF4 v1" in f.text and f.severity == "note" for f in found)


def test_parts_that_are_lacking_are_a_problem():
    (said,) = problems(checkpoint(("transformer", "vae"), a=nf4()))

    assert said.endswith("T5 encoder, CLIP encoder")


def test_a_model_that_edits_images_is_a_warning():
    found = checkpoint_findings(checkpoint(a=nf4(), input_width=384), is_demo=False)

    assert any("fill" in f.text and f.severity == "warning" for f in found)


def test_leftovers_beside_a_model_are_found(folder):
    (folder / ".flux-nf4-0011.tmp").write_text("")
    found = list(model_findings(folder / "absent.safetensors"))

    assert [finding.severity for finding in found] == ["problem", "warning", "ok"]
