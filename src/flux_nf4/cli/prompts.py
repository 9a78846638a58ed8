"""The prompts of one run: from the command line, a file, or standard input."""

from __future__ import annotations

import io

from flux_nf4.cli.options import shortened
from flux_nf4.cli.paths import read_text
from flux_nf4.errors import InputError


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
    # Not `splitlines`: it also breaks where an editor does not, as at U+2028.
    lines = io.StringIO(read_text(prompt_file), newline=None)
    prompts = tuple(
        _checked(line, f"line {number} of {name}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise InputError(f"{name} holds no prompt", hint="write one prompt a line")
    return prompts


def _checked(prompt: str, where: str) -> str:
    if not prompt.strip():
        raise InputError(f"{where} is empty", hint='say what to draw: "a red apple"')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not valid text: `{shortened(ascii(prompt))}`") from error
    return prompt.strip()
