import pytest

from flux_nf4.server.links import Links
from flux_nf4.server.problems import ApiError


def test_a_token_says_what_was_signed():
    links = Links()

    assert links.read(links.sign(["job_1", "é", 0, None], lifetime_s=60)) == ["job_1", "é", 0, None]


def test_a_token_ends():
    links = Links()

    with pytest.raises(ApiError, match="ended"):
        links.read(links.sign(["job_1"], lifetime_s=-1))


def test_a_token_of_another_server_is_none():
    with pytest.raises(ApiError, match="ended"):
        Links().read(Links().sign(["job_1"], lifetime_s=60))


def test_no_changed_token_is_read():
    links = Links()
    token = links.sign(["job_1", 0], lifetime_s=60)
    for place in range(len(token) - 1):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(ApiError):
            links.read(changed)


@pytest.mark.parametrize("token", ["", "a", "====", "é", "A" * 10_000])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(ApiError):
        Links().read(token)
