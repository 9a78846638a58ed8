import json

from flux_nf4.cli.demo import in_columns


def test_everything_known_is_listed_with_two_examples(flux, known_words):
    ended = flux("demo")

    assert ended.exit_code == 0
    assert "apple" in ended.out
    assert "Backgrounds: white" in ended.out
    assert ended.out.count("flux-nf4 generate") == 2


def test_json_holds_every_list(flux, known_words):
    listed = json.loads(flux("demo", "--json").out)

    assert listed["things"]["dog"] == ["puppy"]
    assert set(listed) == {
        "things",
        "backgrounds",
        "tints",
        "places",
        "relations",
        "counts",
        "sizes",
    }


def test_a_filter_finds_names_and_other_names(flux, known_words):
    assert flux("demo", "dog").out == "dog (puppy)\nhot dog\n"


def test_a_filter_holds_for_json_too(flux, known_words):
    assert set(json.loads(flux("demo", "pup", "--json").out)["things"]) == {"dog"}


def test_a_filter_without_a_match_says_so(flux, known_words):
    ended = flux("demo", "zeppelin")

    assert (ended.exit_code, ended.out) == (0, "")
    assert "no `zeppelin`" in ended.err


def test_columns_read_downwards_and_fit_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")

    assert in_columns(["a", "bb", "ccc", "dd", "e"]) == ["a    dd", "bb   e", "ccc"]


def test_a_name_wider_than_the_terminal_has_a_line_of_its_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "4")

    assert in_columns(["abcdefgh", "b"]) == ["abcdefgh", "b"]


def test_nothing_has_no_columns():
    assert in_columns([]) == []
