"""What `--help` prints, word for word: it is what most people read of us."""

import pytest

from flux_nf4.cli import main
from flux_nf4.cli.app import VERBS


def test_the_top_help_is_as_reviewed(capsys, check_golden):
    main(["--help"])

    check_golden("cli_help.txt", capsys.readouterr().out)


@pytest.mark.parametrize("name", [verb.name for verb in VERBS])
def test_the_help_of_a_verb_is_as_reviewed(capsys, check_golden, name):
    main([name, "--help"])

    check_golden(f"cli_help_{name}.txt", capsys.readouterr().out)
