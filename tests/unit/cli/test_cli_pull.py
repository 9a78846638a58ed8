"""`flux-nf4 pull` against a Hub on this machine; the fetching itself is tested in test_hub.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hub_server import COMMIT, HubServer, Repository, serving, sha256

DATA = bytes(range(256)) * 400
FILE = "model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub with one repository, which holds one checkpoint."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(monkeypatch, tmp_path) as server:
        server.repositories["owner/repo"] = Repository({FILE: DATA}, card={"license": "mit"})
        yield server


def test_the_path_is_all_that_goes_to_standard_output(flux, hub, tmp_path):
    ended = flux("pull", "owner/repo")
    path = tmp_path / f"cache/models--owner--repo/snapshots/{COMMIT}/{FILE}"

    assert (ended.exit_code, ended.out) == (0, f"{path}\n")
    assert path.read_bytes() == DATA


def test_what_is_fetched_is_said_before(flux, hub):
    said = flux("pull", "owner/repo").err

    assert "owner/repo: 1 file, 102 kB; 102 kB to fetch" in said
    assert "its licence: mit" in said


def test_what_is_here_is_not_fetched_again(flux, hub):
    first = flux("pull", "owner/repo")
    second = flux("pull", "owner/repo")

    assert second.out == first.out
    assert "nothing to fetch" in second.err


def test_quiet_says_nothing_but_the_path(flux, hub):
    assert flux("pull", "owner/repo", "-q").err == ""


def test_progress_goes_to_standard_error(flux, hub, monkeypatch):
    monkeypatch.setattr("flux_nf4.cli.byte_progress.PATIENCE_S", 0)
    said = flux("pull", "owner/repo").err

    assert "fetching: 100 %" in said
    assert "checking: 100 %" in said


def test_json_tells_where_and_what(flux, hub):
    ended = flux("pull", "owner/repo", "--json")
    told = json.loads(ended.out)

    assert told.pop("path").endswith(FILE)
    assert told == {
        "name": "owner/repo",
        "repository": "owner/repo",
        "revision": "main",
        "commit": COMMIT,
        "licence": "mit",
        "bytes": len(DATA),
        "bytes_to_fetch": len(DATA),
        "is_offline": False,
        "files": [{"name": FILE, "bytes": len(DATA), "digest": sha256(DATA), "was_cached": False}],
    }


def test_a_dry_run_lists_and_fetches_nothing(flux, hub):
    ended = flux("pull", "owner/repo", "--dry-run")

    assert ended.out.split() == ["102,400", "to", "fetch", FILE]
    assert hub.transfers() == []


def test_a_dry_run_in_json_has_no_path(flux, hub):
    told = json.loads(flux("pull", "owner/repo", "--dry-run", "--json").out)

    assert (told["path"], told["bytes_to_fetch"]) == (None, len(DATA))
    assert hub.transfers() == []


def test_a_dry_run_of_a_gated_model_says_so(flux, hub):
    hub.repositories["owner/repo"].is_gated = True

    assert flux("pull", "owner/repo", "--dry-run").exit_code == 4


def test_offline_the_cache_is_said_to_be_all(flux, hub, monkeypatch):
    flux("pull", f"owner/repo/{FILE}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = flux("pull", f"owner/repo/{FILE}")

    assert ended.exit_code == 0
    assert "the Hub was not asked" in ended.err


def test_names_from_the_hub_do_not_steer_the_terminal(flux, hub):
    hub.repositories["owner/repo"].card = {"license": "\x1b]0;owned\x07"}

    assert "\x1b" not in flux("pull", "owner/repo").err


@pytest.mark.parametrize(
    ("name", "faults", "exit_code", "said"),
    [
        ((), {}, 2, "no model is named"),
        (("flux1-dve",), {}, 2, "`flux1-dev`"),
        (("owner/repo", "--revision", "v9"), {}, 3, "`v9`"),
        (("owner/other",), {}, 3, "`owner/other`"),
        (("owner/repo",), {"corrupts": True}, 3, "is damaged"),
        (("flux1-dev",), {}, 4, "hf auth login"),
        (("owner/repo",), {"status": 403}, 4, "hf auth login"),
        (("owner/repo",), {"status": 503}, 6, "503"),
        (("owner/repo",), {"break_after": [0] * 9}, 6, "run the same again"),
    ],
)
def test_what_goes_wrong_ends_with_its_own_code_and_words(flux, hub, name, faults, exit_code, said):
    for fault, value in faults.items():
        setattr(hub, fault, value)
    ended = flux("pull", *name)

    assert (ended.exit_code, ended.out) == (exit_code, "")
    assert said in ended.err
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"]


def test_a_full_disk_ends_with_its_own_code(flux, hub, tmp_path):
    (tmp_path / "cache").write_text("a file")

    assert flux("pull", "owner/repo").exit_code == 7


# ---- as a process, with nothing replaced --------------------------------------------------------


def start(server, home, *arguments):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flux_nf4", "pull", *arguments],
        env={**environment, "HF_ENDPOINT": server.url, "HF_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_variables_of_huggingface_hub_hold(tmp_path):
    with HubServer() as server:
        server.repositories["owner/repo"] = Repository({FILE: DATA})
        process = start(server, tmp_path, "owner/repo")
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out.strip().endswith(FILE)) == (0, True)
    assert out.startswith(str(tmp_path / "hub"))
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_download_and_no_part_of_it_passes_for_the_file(tmp_path, number, code):
    with HubServer() as server:
        server.repositories["owner/repo"] = Repository({FILE: DATA})
        server.stall_after = 1000
        process = start(server, tmp_path, "owner/repo")
        while not server.transfers() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)

    assert process.returncode == code
    assert "Traceback" not in err
    # Some versions keep what has arrived, under a name that says that it is not all.
    assert {path.suffix for path in tmp_path.rglob("blobs/*")} <= {".incomplete"}
    assert not list(tmp_path.rglob("snapshots/*/*"))
