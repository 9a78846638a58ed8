"""Makes the environment in `.venv` that scripts/flux-nf4, scripts/test and scripts/check run in.

From a bare clone to a running command: a virtual environment, PyTorch, this package and the
versions of constraints.txt. What was installed is written down as a *stamp*, a hash of everything
that decides it; while the stamp is true, a start costs a few milliseconds and writes nothing.

Nothing but the standard library is used, and the file parses on Python 3.8, so that an older
Python can be told from a broken one. TORCH_INDEX_URL names another index to take PyTorch from.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from _steps import EXIT_DISK, Runner, SetupError, clean_env, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 14)  # PyTorch 2.13.0 is built for no later one
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
# What `dev` installs includes what `run` needs.
SATISFIED_BY = {"run": ("run", "dev"), "dev": ("dev",)}


@dataclass(frozen=True)
class Environment:
    """The `.venv` of one clone: where its parts lie, and whether it is ready."""

    root: Path

    @property
    def folder(self) -> Path:
        """The virtual environment; everything that set-up writes is inside it."""
        return self.root / ".venv"

    @property
    def programs(self) -> Path:
        """The folder of its programs."""
        return self.folder / ("Scripts" if sys.platform == "win32" else "bin")

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.programs / ("python.exe" if sys.platform == "win32" else "python")

    @property
    def log(self) -> Path:
        """What the tools said during the last set-up."""
        return self.folder / "setup.log"

    @property
    def lock(self) -> Path:
        """Held by the one process that sets up."""
        return self.folder / "setup.lock"

    @property
    def unfinished(self) -> Path:
        """Exists while packages are being changed: whoever finds it finds half an environment."""
        return self.folder / "setup.unfinished"

    def stamp(self, extra: str) -> Path:
        """Holds the fingerprint of what was installed for `extra`."""
        return self.folder / f"setup.{extra}"

    def fingerprint(self, extra: str) -> str:
        """A hash of all that decides what is installed, and where it points to."""
        digest = hashlib.sha256()
        parts = [extra, str(self.root), os.path.realpath(self.python)]
        for part in parts:
            digest.update(part.encode() + b"\0")
        for name in ("pyproject.toml", "constraints.txt"):
            digest.update(hashlib.sha256((self.root / name).read_bytes()).digest())
        return digest.hexdigest()

    def is_ready(self, extra: str) -> bool:
        """Whether everything for `extra` is installed. Writes nothing."""
        if self.unfinished.exists() or not self.python.exists():
            return False
        return any(
            self.stamp(each).exists() and self.stamp(each).read_text() == self.fingerprint(each)
            for each in SATISFIED_BY[extra]
        )

    def works(self) -> bool:
        """Whether there is a Python with pip to build on; its base may have been removed."""
        if self.unfinished.exists() or not self.python.exists():
            return False
        return _is_suitable(str(self.python), needs="pip")


# ---- the Python to build on -----------------------------------------------------------------


def find_python() -> str:
    """A Python that PyTorch is built for: this one, or else one that is on the PATH.

    Raises:
        SetupError: there is none.
    """
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return sys.executable
    for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found is not None and _is_suitable(found):
            return found
    raise SetupError(
        f"this is Python {platform.python_version()}; flux-nf4 needs {_dotted(OLDEST_PYTHON)} "
        f"to {_dotted(NEWEST_PYTHON)}, and none was found on the PATH",
        hint="install Python 3.13 (https://www.python.org/downloads/) and run this again with it: "
        f"`python3.13 {' '.join(sys.argv)}`",
    )


def _is_suitable(python: str, *, needs: str = "sys") -> bool:
    code = (
        f"import sys, {needs}; "
        f"sys.exit(not {OLDEST_PYTHON} <= sys.version_info[:2] <= {NEWEST_PYTHON})"
    )
    try:
        # A shim on the PATH may answer to a version that is not installed: only running tells.
        done = subprocess.run([python, "-c", code], env=clean_env(), capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


# ---- which PyTorch --------------------------------------------------------------------------


def pinned(root: Path, name: str) -> str:
    """The version that constraints.txt gives for a package."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + "=="):
            return line.split("#")[0].strip()[len(name) + 2 :]
    raise SetupError(f"constraints.txt has no line `{name}==`", hint="restore it with git")


def has_nvidia_gpu() -> bool:
    """Whether this machine has NVIDIA's driver."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def torch_choices(
    version: str, *, system: str, has_gpu: bool, index: str | None
) -> list[list[str]]:
    """What to ask pip for, best first.

    PyPI's build is the right one almost everywhere; but on Linux it brings gigabytes of CUDA that
    a machine without a GPU has no use for, and on Windows it leaves CUDA out.
    """
    plain = [f"torch=={version}"]
    if index:
        return [[*plain, "--index-url", index]]
    if system == "Linux" and not has_gpu:
        # The first is found where a mirror or `find-links` has it, and fails at once elsewhere.
        return [[f"torch=={version}+cpu"], [*plain, "--index-url", CPU_INDEX], plain]
    if system == "Windows" and has_gpu:
        return [[*plain, "--index-url", CUDA_INDEX], plain]
    return [plain]


# ---- set-up ---------------------------------------------------------------------------------


def ensure(environment: Environment, extra: str) -> None:
    """Make the environment ready for `extra` ("run" or "dev"); returns at once where it is.

    Raises:
        SetupError: it could not be made.
    """
    if environment.is_ready(extra):
        return
    try:
        environment.folder.mkdir(exist_ok=True)
        with _locked(environment) as lock:
            # Another process may have finished it while this one waited.
            if not environment.is_ready(extra):
                _set_up(environment, extra, lock)
    except OSError as error:
        raise SetupError(
            f"cannot write to {environment.folder}: {error.strerror or error}",
            hint="clone to a folder that you may write to, with 3 GB free",
            exit_code=EXIT_DISK,
        ) from error


def _set_up(environment: Environment, extra: str, lock: IO[bytes]) -> None:
    started = time.monotonic()
    say(f"flux-nf4: setting up {environment.folder} (once; takes a minute or more)")
    environment.log.write_bytes(b"")
    runner = Runner(environment.log, lock)
    if not environment.works():
        python = find_python()
        _empty(environment)
        environment.unfinished.touch()
        runner.step(
            "making a virtual environment", [[python, "-m", "venv", str(environment.folder)]]
        )
    environment.unfinished.touch()
    try:
        _install(environment, extra, runner)
    except SetupError:
        if not runner.packages_were_touched:
            # What stood before still stands: `flux-nf4` goes on working where only the
            # developer's tools could not be fetched.
            environment.unfinished.unlink()
        raise
    for each in SATISFIED_BY:
        if extra in SATISFIED_BY[each]:
            environment.stamp(each).write_text(environment.fingerprint(each))
    environment.unfinished.unlink()
    say(f"flux-nf4: ready after {time.monotonic() - started:.0f} s")


def _install(environment: Environment, extra: str, runner: Runner) -> None:
    root = environment.root
    pip = [str(environment.python), "-m", "pip", "install"]
    version = pinned(root, "torch")
    choices = torch_choices(
        version,
        system=platform.system(),
        has_gpu=has_nvidia_gpu(),
        index=os.environ.get("TORCH_INDEX_URL"),
    )
    # Alone and without its dependencies: those come from the usual index, with everything else.
    runner.step(f"installing PyTorch {version}", [[*pip, "--no-deps", *each] for each in choices])
    package = f"{root}[serve,dev]" if extra == "dev" else f"{root}[serve]"
    runner.step(
        "installing flux-nf4 and what it needs"
        + (", with the developer's tools" if extra == "dev" else ""),
        [[*pip, "--editable", package, "--constraint", str(root / "constraints.txt")]],
    )


def _empty(environment: Environment) -> None:
    """Remove what is in the folder, but for the files that set-up holds open."""
    for path in environment.folder.iterdir():
        if path in (environment.lock, environment.log):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _locked(environment: Environment) -> Iterator[IO[bytes]]:
    """Hold the lock; the system gives it back even when this process is killed."""
    with environment.lock.open("ab") as lock:
        waiting = False
        while not _try_lock(lock):
            if not waiting:
                say("flux-nf4: waiting for another set-up of this clone to end")
            waiting = True
            time.sleep(0.2)
        yield lock


if sys.platform == "win32":
    import msvcrt

    def _try_lock(lock: IO[bytes]) -> bool:
        lock.seek(0)
        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(lock: IO[bytes]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# ---- for the three scripts ------------------------------------------------------------------


def prepare(extra: str) -> Environment:
    """The ready environment of this clone; where there can be none, says why and exits."""
    environment = Environment(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        ensure(environment, extra)
    except SetupError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("\nflux-nf4: stopped; the next run begins the set-up again")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return environment


def become(command: Sequence[str]) -> NoReturn:
    """Replace this process by `command`; on Windows, which cannot, run it and exit as it does."""
    if sys.platform != "win32":
        os.execve(command[0], list(command), clean_env())
    try:
        sys.exit(subprocess.run(command, env=clean_env()).returncode)
    except KeyboardInterrupt:
        sys.exit(130)
