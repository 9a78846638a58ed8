"""The peers of `bench` compute what we compute: the same weights under their names."""

import pytest
import torch
from tolerances import FLUX_FP32, PEER_EIGHT_BIT, PEER_REQUANTIZED

from flux_nf4.model.build import build_transformer
from flux_nf4.model.rope import rope_table
from flux_nf4.pipeline.peers import PEERS, measure_peers, random_inputs
from flux_nf4.pipeline.random_model import random_checkpoint
from flux_nf4.pipeline.sampling import token_grid

SIZE, TEXT = (64, 64), 8
CLOSE = {
    "Diffusers": FLUX_FP32,
    "Diffusers + bitsandbytes NF4": PEER_REQUANTIZED,
    "Diffusers, stored in fp8": PEER_EIGHT_BIT,
}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr("flux_nf4.pipeline.peers._STEPS_BUDGET_S", 0)


@pytest.fixture(scope="module")
def component():
    return random_checkpoint("tiny").components["transformer"]


@pytest.fixture(scope="module")
def ours(component):
    return build_transformer(component, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(ours):
    return random_inputs(
        ours.config,
        size=SIZE,
        num_text_tokens=TEXT,
        batch_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("peer", [p for p in PEERS if not p.is_compiled], ids=lambda p: p.name)
# bitsandbytes looks for a faster kernel on the Hub, and says that it found none.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_peer_predicts_our_velocity(peer, component, ours, inputs):
    (measured,) = measure_peers(component, inputs, peers=(peer,))
    time, guidance = torch.tensor([inputs.time]), torch.tensor([inputs.guidance])
    rope = rope_table(TEXT, *token_grid(*SIZE), ours.config)
    with torch.inference_mode():
        expected = ours(inputs.img, inputs.txt, inputs.pooled, time, guidance, rope)

    assert measured.error is None
    assert (measured.velocity - expected).norm() / expected.norm() < CLOSE[peer.name]


def test_a_peer_that_is_not_installed_is_not_run(component, inputs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    assert list(measure_peers(component, inputs)) == []


def test_running_out_of_memory_is_a_peers_result(component, inputs, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("flux_nf4.pipeline.peers.build_peer", run_out)
    (measured,) = measure_peers(component, inputs, peers=PEERS[:1])

    assert measured.error == "out of memory"
