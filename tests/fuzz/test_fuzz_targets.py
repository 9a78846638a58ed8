"""What `scripts/fuzz` runs for minutes, for a moment and without atheris."""

import random

import pytest
from fuzz_runner import TARGETS as NAMES
from fuzz_runner import main, parse_arguments
from fuzz_targets import ALLOWED, TARGETS

NUM_MUTATIONS = 150


def damaged(data, chance):
    """Bytes with a few of them changed, removed or put in."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(found) + 1)
        found[position : position + chance.choice((0, 1, 1, 8))] = chance.randbytes(
            chance.choice((0, 1, 1, 4))
        )
    return bytes(found)


def test_the_runner_knows_every_target():
    assert tuple(TARGETS) == NAMES


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_valid(name):
    for seed in TARGETS[name].seeds():
        TARGETS[name].parse(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_else_is_raised_for_damaged_seeds(name):
    target, chance = TARGETS[name], random.Random(name)
    seeds = target.seeds()

    for _ in range(NUM_MUTATIONS):
        target.run(damaged(chance.choice(seeds), chance))


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].json_start is not None])
def test_nothing_else_is_raised_for_json_of_another_meaning(name):
    target, chance = TARGETS[name], random.Random(name)
    inputs = target.seeds()

    for _ in range(NUM_MUTATIONS):
        changed = target.mutated(chance.choice(inputs), chance.randrange(2**32))
        assert changed is not None
        target.run(changed)
        inputs.append(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_fault_of_the_parser_is_not_swallowed(name, monkeypatch):
    def faulty(data):
        raise KeyError(data)

    monkeypatch.setitem(vars(TARGETS[name]), "parse", faulty)

    with pytest.raises(KeyError):
        TARGETS[name].run(b"")
    assert not issubclass(KeyError, ALLOWED)


def test_without_atheris_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main([]) == 2
    assert "error: fuzzing needs atheris" in capsys.readouterr().err


def test_an_input_is_replayed_without_atheris(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "input").write_bytes(b"{")

    assert main(["--target", "header", "--replay", str(tmp_path / "input")]) == 0


def test_it_takes_a_minute_unless_told_otherwise():
    assert parse_arguments([]).seconds == 60


@pytest.mark.parametrize("arguments", [["--seconds", "1"], ["--replay", "x"], ["--target", "y"]])
def test_arguments_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
