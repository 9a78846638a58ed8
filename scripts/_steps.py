"""Runs the tools of a set-up: their output into a log, one line each on the screen.

Part of scripts/_environment.py, and under the same rules: the standard library, Python 3.8.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EXIT_FAILED, EXIT_NETWORK, EXIT_DISK = 1, 6, 7


class SetupError(Exception):
    """The environment could not be made; says why, and what to do next."""

    def __init__(self, message: str, *, hint: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class Runner:
    """Runs the steps of one set-up: their output into the log, one line each on the screen."""

    def __init__(self, log: Path, lock: IO[bytes]) -> None:
        self.log = log
        self.lock = lock
        self.packages_were_touched = False

    def step(self, what: str, commands: Sequence[Sequence[str]]) -> None:
        """Run `commands` until one succeeds.

        Raises:
            SetupError: none did.
        """
        started = time.monotonic()
        output = ""
        for command in commands:
            code, output = self._run(command, what, started)
            # pip says so once all is downloaded and checked; until then it has changed nothing.
            self.packages_were_touched |= "Installing collected packages" in output
            if code == 0:
                _say_step(what, started, end="\n")
                return
            if _is_offline(output) and "--index-url" not in command:
                break
        _say_step(what, started, end=" failed\n")
        raise _failure(what, output, self.log)

    def _run(self, command: Sequence[str], what: str, started: float) -> tuple[int, str]:
        with self.log.open("r+b") as log:
            begin = log.seek(0, os.SEEK_END)
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            options: dict[str, Any] = {}
            if sys.platform != "win32":
                # While pip lives the lock is held, even if this process is killed.
                options["pass_fds"] = (self.lock.fileno(),)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_env(),
                **options,
            )
            try:
                code = _wait(process, what, started)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            log.seek(begin)
            return code, log.read().decode(errors="replace")


def _wait(process: subprocess.Popen[bytes], what: str, started: float) -> int:
    while True:
        if sys.stderr.isatty():
            _say_step(what, started, end="")
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue


def _is_offline(output: str) -> bool:
    signs = (
        "Failed to establish a new connection",
        "Temporary failure in name resolution",
        "getaddrinfo failed",
        "Network is unreachable",
        "Cannot connect to proxy",
        "ConnectTimeoutError",
        "Read timed out",
        "Connection reset by peer",
        "SSLError",
    )
    return any(sign in output for sign in signs)


def _failure(what: str, output: str, log: Path) -> SetupError:
    """The plainest words for what a tool's output says went wrong."""
    tail = "\n".join("    " + line[:120] for line in output.splitlines()[-6:])
    evidence = f"\nthe last lines of {log}:\n{tail}"
    if "No space left on device" in output or "Errno 28" in output:
        return SetupError(
            f"{what}: the disk is full",
            hint="free 3 GB, there and in the folder for temporary files, and run the same again",
            exit_code=EXIT_DISK,
        )
    if _is_offline(output):
        return SetupError(
            f"{what}: the packages cannot be downloaded from here{evidence}",
            hint="check the network (behind a proxy: set HTTPS_PROXY) and run the same again",
            exit_code=EXIT_NETWORK,
        )
    if "ensurepip" in output or "No module named venv" in output:
        return SetupError(
            f"{what}: this Python comes without `venv`",
            hint="Debian and Ubuntu: `sudo apt install python3-venv`; then run the same again",
        )
    if "No matching distribution found" in output:
        return SetupError(
            f"{what}: there is no build for this machine ({platform.system()} "
            f"{platform.machine()}, Python {platform.python_version()}){evidence}",
            hint="TORCH_INDEX_URL=URL takes PyTorch from another index",
        )
    return SetupError(
        f"{what} failed{evidence}", hint="run the same again; if it fails again, report that log"
    )


def clean_env() -> dict[str, str]:
    """The environment variables, less those that would lead Python or pip out of `.venv`."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    env.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return env


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_step(what: str, started: float, *, end: str) -> None:
    back = "\r" if sys.stderr.isatty() else ""
    line = f"{back}  {what} ... {time.monotonic() - started:.0f} s{end}"
    print(line, end="", file=sys.stderr, flush=True)
