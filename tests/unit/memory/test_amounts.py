import pytest

from flux_nf4.errors import InputError
from flux_nf4.memory.amounts import memory_text, parse_memory


@pytest.mark.parametrize("text", ["6GB", "6GiB", "6 gb", "6G", "6144MB", "6144MiB", "6.0GB"])
def test_every_way_to_write_six_gigabytes_is_the_same(text):
    assert parse_memory(text, "--vram") == 6 * 2**30


@pytest.mark.parametrize("text", ["6", "6.5"])
def test_a_bare_number_is_answered_with_units(text):
    with pytest.raises(InputError) as raised:
        parse_memory(text, "--vram")

    assert f"`{text}GB`" in raised.value.hint


@pytest.mark.parametrize("text", ["", "GB", "-6GB", "0GB", "6XB", "6GB of it", "nan", "1e3GB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(InputError, match="`--ram` must be an amount of memory"):
        parse_memory(text, "--ram")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(6 * 2**30, "6.00 GiB"), (50 * 2**20, "50 MiB"), (0, "0.00 GiB")]
)
def test_bytes_are_told_as_memory_is_sold(num_bytes, text):
    assert memory_text(num_bytes) == text
