from types import SimpleNamespace

import pytest

from flux_nf4.pipeline.threads import suited_num_threads


def make_model(hidden_size, device):
    transformer = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    return SimpleNamespace(transformer=transformer, device=SimpleNamespace(type=device))


@pytest.mark.parametrize(
    ("hidden_size", "device", "side", "expected"),
    [
        (384, "cpu", 256, 1),
        (384, "cpu", 1024, 4),
        (3072, "cpu", 256, 4),
        (384, "cuda", 256, 4),
    ],
    ids=["small and narrow", "a large image", "a wide model", "a GPU"],
)
def test_threads_that_would_wait_for_each_other_are_left_out(hidden_size, device, side, expected):
    model = make_model(hidden_size, device)

    assert suited_num_threads(model, side, side, otherwise=4) == expected
