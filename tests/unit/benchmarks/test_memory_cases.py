"""Which cases of `benchmarks.memory` are not run again."""

import pytest

from benchmarks import memory_cases

OURS = {"case": "ours", "storage": "file", "cap_gib": 6.0, "size": [1024, 1024]}
PEER = {"case": "peer", "storage": "nf4", "offload": "none", "cap_gib": 8.0}


@pytest.mark.parametrize(
    ("before", "is_known"),
    [
        (OURS | {"step_ms": 1.0}, True),
        (OURS | {"error": "it was killed"}, False),
        (OURS | {"error": "DoesNotFit: 2 GB are too little"}, True),
        (OURS | {"cap_gib": 8.0}, False),
        (OURS | {"ram": 0}, False),
    ],
)
def test_what_has_been_measured_is_known(before, is_known):
    assert memory_cases.is_known(OURS, [before], [OURS]) == is_known


@pytest.mark.parametrize(
    ("before", "is_known"),
    [
        ({"cap_gib": 6.0}, True),
        ({"cap_gib": 6.0, "error": "full"}, False),
        ({"storage": "fp8"}, False),
    ],
)
def test_a_peer_that_ran_under_less_is_known(before, is_known):
    assert memory_cases.is_known(PEER, [PEER | before], [PEER]) == is_known


def test_a_file_is_written_for_what_is_not_known_yet():
    writing = {"case": "write", "storage": "fp8", "cap_gib": None}
    wanted = [writing] + [
        OURS | {"storage": storage, "cap_gib": cap}
        for storage in ("fp8", "bf16")
        for cap in (8.0, 6.0)
    ]
    half, all_of_it = [wanted[1]], wanted[1:3]
    assert not memory_cases.is_known(writing, half, wanted)
    assert memory_cases.is_known(writing, all_of_it, wanted)
