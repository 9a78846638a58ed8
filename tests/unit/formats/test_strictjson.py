import pytest

from flux_nf4.errors import FormatError
from flux_nf4.formats.strictjson import MAX_CONFIG_BYTES, parse_json, read_json_object


def test_plain_json_is_parsed():
    assert parse_json(b'{"a": [1, 2.5, null, true]}', "it") == {"a": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "holds the key 'a' twice"),
        (b'{"b": {"a": 1, "a": 1}}', "holds the key 'a' twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b"\xff{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 200_000, "nests too deeply"),
        (b"1" * 5000, "not JSON"),
    ],
    ids=["doubled", "doubled-inside", "nan", "infinity", "utf8", "cut", "empty", "deep", "digits"],
)
def test_odd_json_is_refused(data, message):
    with pytest.raises(FormatError, match=message):
        parse_json(data, "it")


def test_a_list_is_no_object(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(FormatError, match="must hold a JSON object, got list"):
        read_json_object(path)


def test_a_huge_configuration_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(FormatError, match="too many"):
        read_json_object(path)


def test_an_unreadable_configuration_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_json_object(tmp_path)
