"""Set-up without a network: the Python that it calls is a script that plays venv and pip."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import _environment
import _steps
import pytest
from _environment import Environment, ensure, find_python, pinned, torch_choices
from _steps import SetupError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")

# `-m venv DIR` copies the script into DIR; `-m pip` answers as the file `answer` beside it says.
# Every call is written down, one line each.
STAND_IN = """\
#!/bin/sh
here={folder}
echo "$@" >> "$here/calls"
case "$2" in
venv)
    if test -e "$here/no-venv"; then echo "Error: ensurepip is not available"; exit 1; fi
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
pip)
    if test -e "$here/slow"; then touch "$here/started"; sleep 30; fi
    if test -e "$here/answer"; then cat "$here/answer"; exit 1; fi
    echo "Installing collected packages: everything" ;;
esac
"""
OFFLINE = "WARNING: Failed to establish a new connection\nERROR: No matching distribution found\n"


class Machine:
    """A clone, and a Python to set it up with."""

    def __init__(self, folder):
        self.folder = folder
        clone = folder / "clone"
        clone.mkdir()
        (clone / "pyproject.toml").write_text("[project]\n")
        (clone / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0  # any build\n")
        self.python = folder / "python3"
        self.python.write_text(STAND_IN.format(folder=folder))
        self.python.chmod(0o755)
        self.environment = Environment(clone)

    def calls(self):
        """What was run, but for the questions whether a Python works."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("-c")]

    def say(self, name, text=""):
        (self.folder / name).write_text(text)

    def stop_saying(self, name):
        (self.folder / name).unlink()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path)
    monkeypatch.setattr(_environment, "find_python", lambda: str(machine.python))
    monkeypatch.setattr(_environment.platform, "system", lambda: "Linux")
    monkeypatch.setattr(_environment, "has_nvidia_gpu", lambda: False)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return machine


def failure_of(machine, extra="run"):
    with pytest.raises(SetupError) as caught:
        ensure(machine.environment, extra)
    return caught.value


# ---- stamps -------------------------------------------------------------------------------------


def test_set_up_makes_an_environment_then_installs_torch_then_the_rest(machine):
    ensure(machine.environment, "run")

    root = machine.environment.root
    assert machine.calls() == [
        f"-m venv {root}/.venv",
        "-m pip install --no-deps torch==2.13.0+cpu",
        f"-m pip install --editable {root}[serve] --constraint {root}/constraints.txt",
    ]


def test_the_second_run_calls_nothing(machine):
    ensure(machine.environment, "run")
    before = machine.calls()

    ensure(machine.environment, "run")

    assert machine.calls() == before


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_installs_again_into_the_same_environment(machine, name):
    ensure(machine.environment, "run")
    path = machine.environment.root / name
    path.write_text(path.read_text() + "# changed\n")

    ensure(machine.environment, "run")

    assert sum("venv" in call.split() for call in machine.calls()) == 1
    assert machine.environment.is_ready("run")


def test_tests_need_more_than_the_command(machine):
    ensure(machine.environment, "run")

    assert not machine.environment.is_ready("dev")


def test_what_tests_need_is_enough_for_the_command(machine):
    ensure(machine.environment, "dev")

    assert machine.environment.is_ready("run")
    assert f"--editable {machine.environment.root}[serve,dev]" in machine.calls()[-1]


def test_a_moved_clone_is_set_up_again(machine, tmp_path):
    ensure(machine.environment, "run")
    machine.environment.root.rename(tmp_path / "elsewhere")

    assert not Environment(tmp_path / "elsewhere").is_ready("run")


def test_an_environment_whose_python_is_gone_is_made_again(machine):
    ensure(machine.environment, "run")
    machine.environment.python.unlink()
    machine.environment.python.symlink_to("/nowhere/python3")

    ensure(machine.environment, "run")

    assert sum("venv" in call.split() for call in machine.calls()) == 2


# ---- interruptions ------------------------------------------------------------------------------


def test_half_an_environment_is_made_again_from_nothing(machine):
    environment = machine.environment
    ensure(environment, "run")
    environment.unfinished.touch()
    (environment.folder / "lib").mkdir()

    ensure(environment, "run")

    assert not (environment.folder / "lib").exists()
    assert environment.is_ready("run")


def test_an_interrupted_set_up_is_not_taken_for_a_finished_one(machine, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_steps, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure(machine.environment, "run")

    assert machine.environment.unfinished.exists()
    assert not machine.environment.is_ready("run")


def test_a_killed_set_up_leaves_no_lock_behind_and_is_finished_by_the_next(machine):
    machine.say("slow")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _environment as e; import pathlib;"
        "e.find_python = lambda: sys.argv[3];"
        "e.ensure(e.Environment(pathlib.Path(sys.argv[2])), 'run')"
    )
    scripts = Path(_environment.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, scripts, machine.environment.root, machine.python],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not (machine.folder / "started").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    machine.stop_saying("slow")

    ensure(machine.environment, "run")

    assert machine.environment.is_ready("run")


def test_two_at_once_set_up_once(machine):
    threads = [threading.Thread(target=ensure, args=(machine.environment, "run")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum("venv" in call.split() for call in machine.calls()) == 1


def test_whoever_waits_for_another_is_told_so(machine, capsys):
    machine.environment.folder.mkdir()
    with machine.environment.lock.open("ab") as lock:
        assert _environment._try_lock(lock)
        thread = threading.Thread(target=ensure, args=(machine.environment, "run"))
        thread.start()
        while "waiting for another set-up" not in capsys.readouterr().err:
            time.sleep(0.01)
    thread.join()

    assert machine.environment.is_ready("run")


# ---- failures -----------------------------------------------------------------------------------


def test_without_a_network_it_says_so_and_does_not_try_every_index(machine):
    machine.say("answer", OFFLINE)

    failure = failure_of(machine)

    assert "cannot be downloaded" in failure.message
    assert failure.exit_code == _steps.EXIT_NETWORK
    assert sum("torch==2.13.0" in call for call in machine.calls()) == 1


def test_a_failure_shows_the_end_of_the_log_and_where_it_lies(machine):
    machine.say("answer", "\n".join(f"line {i}" for i in range(50)))

    message = failure_of(machine).message

    assert "line 49" in message
    assert "line 10" not in message
    assert str(machine.environment.log) in message


def test_the_log_holds_everything_that_was_said(machine):
    machine.say("answer", "a strange error")
    failure_of(machine)

    assert "a strange error" in machine.environment.log.read_text()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch", "no build for this machine"),
        ("a strange error", "installing PyTorch 2.13.0 failed"),
    ],
)
def test_a_failure_is_put_in_plain_words(machine, answer, expected):
    machine.say("answer", answer)

    assert expected in failure_of(machine).message


def test_a_python_without_venv_names_the_package_to_install(machine):
    machine.say("no-venv")

    assert "apt install python3-venv" in failure_of(machine).hint


def test_tools_that_cannot_be_fetched_leave_the_command_working(machine):
    ensure(machine.environment, "run")
    machine.say("answer", OFFLINE)
    failure_of(machine, "dev")

    assert machine.environment.is_ready("run")


def test_packages_that_were_half_exchanged_are_not_trusted(machine):
    ensure(machine.environment, "run")
    machine.say("answer", "Installing collected packages: torch\nERROR: killed\n")
    failure_of(machine, "dev")

    assert not machine.environment.is_ready("run")


def test_a_place_that_cannot_be_written_to_is_named(machine):
    machine.environment.folder.write_text("a file where the folder should be")

    failure = failure_of(machine)

    assert str(machine.environment.folder) in failure.message
    assert failure.exit_code == _steps.EXIT_DISK


def test_an_error_becomes_a_message_a_hint_and_an_exit_code(machine, monkeypatch, capsys):
    monkeypatch.setattr(_environment, "ROOT", machine.environment.root)
    machine.say("answer", OFFLINE)

    with pytest.raises(SystemExit) as caught:
        _environment.prepare("run")

    assert caught.value.code == _steps.EXIT_NETWORK
    assert "error: installing PyTorch" in (said := capsys.readouterr().err)
    assert "hint: check the network" in said


def test_progress_has_a_line_for_each_step(machine, capsys):
    ensure(machine.environment, "run")

    captured = capsys.readouterr()
    steps = [line.split(" ...")[0] for line in captured.err.splitlines() if " ..." in line]
    assert steps == [
        "  making a virtual environment",
        "  installing PyTorch 2.13.0",
        "  installing flux-nf4 and what it needs",
    ]
    assert captured.out == ""


# ---- which Python, which PyTorch ----------------------------------------------------------------


def test_this_python_is_used_where_it_suits():
    assert find_python() == sys.executable


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 15, 0)])
def test_an_unsuitable_python_hands_over_to_one_on_the_path(tmp_path, monkeypatch, version):
    other = tmp_path / "python3.12"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_environment.sys, "version_info", version)

    assert find_python() == str(other)


def test_a_python_on_the_path_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'python3.12: command not found'; exit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_environment.sys, "version_info", (3, 10, 2))

    with pytest.raises(SetupError, match=r"needs 3\.11 to 3\.14"):
        find_python()


CPU = ["torch==2.13.0", "--index-url", _environment.CPU_INDEX]
CUDA = ["torch==2.13.0", "--index-url", _environment.CUDA_INDEX]
PLAIN = ["torch==2.13.0"]


@pytest.mark.parametrize(
    ("system", "has_gpu", "expected"),
    [
        ("Linux", True, [PLAIN]),
        ("Linux", False, [["torch==2.13.0+cpu"], CPU, PLAIN]),
        ("Windows", True, [CUDA, PLAIN]),
        ("Windows", False, [PLAIN]),
        ("Darwin", False, [PLAIN]),
    ],
)
def test_the_build_of_torch_suits_the_machine(system, has_gpu, expected):
    assert torch_choices("2.13.0", system=system, has_gpu=has_gpu, index=None) == expected


def test_an_index_that_is_named_is_the_only_one_asked():
    choices = torch_choices(
        "2.13.0", system="Linux", has_gpu=False, index="https://example.org/simple"
    )

    assert choices == [["torch==2.13.0", "--index-url", "https://example.org/simple"]]


def test_a_second_index_is_tried_when_the_first_has_no_such_build(machine):
    machine.say("answer", "ERROR: No matching distribution found for torch==2.13.0+cpu\n")
    failure_of(machine)

    asked = [call.split("--no-deps ")[1] for call in machine.calls() if "--no-deps" in call]
    assert asked == ["torch==2.13.0+cpu", " ".join(CPU), "torch==2.13.0"]


def test_a_pin_is_read_without_its_comment(machine):
    assert pinned(machine.environment.root, "torch") == "2.13.0"


def test_variables_that_lead_out_of_the_environment_are_not_handed_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PIP_USER", "1")

    env = _steps.clean_env()

    assert "PYTHONPATH" not in env
    assert env["PIP_USER"] == "0"
