"""The prompts of one run: from the command line, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from flux_nf4.cli.options import shortened
from flux_nf4.errors import InputError

_MOST_BYTES = 16 * 2**20


def read_prompts(prompt: str | None, prompt_file: str | None) -> tuple[str, ...]:
    """One prompt, or one a line of a file (`-`: standard input), blank lines left out.

    Raises:
        InputError: none, both, an empty one, or a file that cannot be read as text.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("both a prompt and `--prompt-file` are given", hint="use one of them")
    if prompt is not None:
        return (_checked(prompt, "the prompt"),)
    if prompt_file is None:
        raise InputError(
            "no prompt is given", hint='say what to draw: `flux-nf4 generate "a red apple"`'
        )
    name = "standard input" if prompt_file == "-" else f"`{prompt_file}`"
    lines = _read_text(prompt_file, name).splitlines()
    prompts = tuple(
        _checked(line, f"line {number} of {name}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise InputError(f"{name} holds no prompt", hint="write one prompt a line")
    return prompts


def _read_text(prompt_file: str, name: str) -> str:
    try:
        if prompt_file == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(prompt_file).expanduser().open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read prompts from {name}: {reason}") from error
    if len(data) > _MOST_BYTES:
        raise InputError(f"{name} is larger than {_MOST_BYTES // 2**20} MiB; is it a prompt file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
        ) from error


def _checked(prompt: str, where: str) -> str:
    if not prompt.strip():
        raise InputError(f"{where} is empty", hint='say what to draw: "a red apple"')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not valid text: `{shortened(ascii(prompt))}`") from error
    return prompt.strip()
