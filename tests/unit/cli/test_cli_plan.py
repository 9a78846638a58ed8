import json

import pytest
from checkpoints import save_all_in_one

from flux_nf4.cli import accelerators

GIB = 2**30


def test_without_a_budget_every_usual_card_has_a_row(flux):
    rows = flux("plan").out.splitlines()

    assert [row.split()[0] for row in rows[3:10]] == [
        "2GB", "4GB", "6GB", "8GB", "12GB", "16GB", "24GB"
    ]  # fmt: skip


def test_the_last_line_of_a_plan_is_its_verdict(flux):
    last = flux("plan", "--vram", "6GB").out.splitlines()[-1]

    assert last == "fits 6GB with nothing streamed per step"


def test_a_plan_has_a_row_for_every_phase(flux):
    lines = flux("plan", "--vram", "4GB").out.splitlines()

    assert [line.split()[0] for line in lines[3:7]] == ["text", "modulation", "denoise", "decode"]


def test_json_holds_what_an_executor_needs(flux):
    told = json.loads(flux("plan", "--vram", "4GB", "--json").out)
    (plan,) = told["plans"]

    assert (plan["fits"], plan["device_bytes"]) == (True, 4 * GIB)
    assert plan["peak_bytes"] <= 4 * GIB
    assert {"unit", "bytes", "home", "use"} == plan["placements"][0].keys()
    assert plan["step_s"].keys() == {"PCIe 3.0 x16", "PCIe 4.0 x8", "PCIe 4.0 x16"}


def test_a_budget_that_does_not_do_ends_in_5_with_what_would(flux):
    ended = flux("plan", "--vram", "1GB")

    assert (ended.exit_code, ended.out) == (5, "")
    assert "hint: allow " in ended.err


def test_a_budget_that_does_not_do_is_told_in_json_too(flux):
    ended = flux("plan", "--vram", "1GB", "--json")
    (plan,) = json.loads(ended.out)["plans"]

    assert (ended.exit_code, plan["fits"]) == (5, False)
    assert plan["error"]["hint"].startswith("allow ")


def test_an_overview_has_rows_for_what_does_not_fit(flux):
    ended = flux("plan", "-s", "4096x4096", "-n", "2")

    assert ended.exit_code == 0
    assert "2GB     does not fit" in ended.out


def test_size_steps_and_images_are_those_asked_for(flux):
    told = json.loads(
        flux("plan", "-s", "896x1152", "-n", "3", "--steps", "7", "--vram", "6GB", "--json").out
    )

    shown = ("width", "height", "num_images", "num_steps")
    assert [told["workload"][name] for name in shown] == [896, 1152, 3, 7]


def test_a_file_is_planned_from_its_header(flux, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_all_in_one(path)
    told = json.loads(flux("plan", "-m", str(path), "--vram", "1GB", "--json").out)

    assert told["model"] == "tiny nf4 v2"
    assert (told["workload"]["width"], told["workload"]["num_text_tokens"]) == (64, 32)


def test_the_demo_model_can_be_planned(flux):
    assert flux("plan", "-m", "demo", "--vram", "2GB").out.startswith("flux-demo nf4 v2: 256 x 256")


def test_little_main_memory_leaves_weights_in_the_file(flux):
    told = flux("plan", "--vram", "6GB", "--ram", "4GB").out
    (host,) = (line for line in told.splitlines() if line.startswith("host"))

    assert "0.00 GiB left in the file" not in host


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vram", "6"),
        ("--vram", "lots"),
        ("--ram", "-1GB", "--vram", "6GB"),
        ("--size", "1000x1000"),
        ("--size", "wide"),
        ("--batch", "0"),
    ],
)
def test_what_cannot_be_planned_is_bad_usage(flux, arguments):
    ended = flux("plan", *arguments)

    assert ended.exit_code == 2
    assert ended.err.startswith("error: ")


def test_a_model_that_is_not_there_ends_in_3(flux):
    assert flux("plan", "-m", "nowhere.safetensors").exit_code == 3


def with_card(monkeypatch, *cards):
    found = accelerators.Torch(
        version="2.13.0", cuda="13.0", cards=cards, has_mps=False, triton="3.6.0"
    )
    monkeypatch.setattr(accelerators, "inspect_torch", lambda: found)


def test_auto_takes_what_is_free_less_the_desktops_room(flux, monkeypatch):
    card = accelerators.Card(name="any", capability=(8, 6), free=6 * GIB, total=8 * GIB)
    with_card(monkeypatch, card)
    told = json.loads(flux("plan", "--vram", "auto", "--json").out)

    assert told["plans"][0]["device_bytes"] == 6 * GIB - 256 * 2**20


def test_auto_without_a_gpu_asks_for_an_amount(flux, monkeypatch):
    with_card(monkeypatch)
    ended = flux("plan", "--vram", "auto")

    assert (ended.exit_code, "`--vram 6GB`" in ended.err) == (2, True)
