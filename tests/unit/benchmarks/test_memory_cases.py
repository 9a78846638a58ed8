"""Which cases of `benchmarks.memory` are not run again."""

import pytest

from benchmarks.memory import _is_known

OURS = {"case": "ours", "storage": "file", "cap_gib": 6.0, "size": [1024, 1024]}
PEER = {"case": "peer", "storage": "nf4", "offload": "none", "cap_gib": 8.0}


@pytest.mark.parametrize(
    ("before", "is_known"),
    [
        (OURS | {"step_ms": 1.0}, True),
        (OURS | {"error": "it was killed"}, False),
        (OURS | {"cap_gib": 8.0}, False),
        (OURS | {"ram": 0}, False),
    ],
)
def test_what_has_been_measured_is_known(before, is_known):
    assert _is_known(OURS, [before]) == is_known


@pytest.mark.parametrize(
    ("before", "is_known"),
    [
        ({"cap_gib": 6.0}, True),
        ({"cap_gib": 6.0, "error": "full"}, False),
        ({"storage": "fp8"}, False),
    ],
)
def test_a_peer_that_ran_under_less_is_known(before, is_known):
    assert _is_known(PEER, [PEER | before]) == is_known
