"""A step as a CUDA graph: the same images, one launch a step."""

import pytest
import torch
from tiny_pipeline import save_tiny_folder, tiny_parts

from flux_nf4.pipeline import model_memory
from flux_nf4.pipeline.events import ImageDone
from flux_nf4.pipeline.generate import GenerationRequest, generate
from flux_nf4.pipeline.load import LoadSettings, load_model

pytestmark = pytest.mark.gpu
NUM_STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("graph") / "model", models=tiny_parts())


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was told to the device."""
    counted, replay = [], torch.cuda.CUDAGraph.replay

    def counting(graph):
        counted.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counting)
    return counted


def draw(model, **settings):
    size = {"width": 256, "height": 256}
    request = GenerationRequest(
        prompt="a cat",
        num_inference_steps=NUM_STEPS,
        max_sequence_length=32,
        **size | settings,
    )
    return [e.image.tobytes() for e in generate(model, request) if isinstance(e, ImageDone)]


@pytest.mark.parametrize("path", ["tiny", "demo"])
@pytest.mark.parametrize("arithmetic", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_graph_gives_the_same_images(
    folder, replays, monkeypatch, path, arithmetic, guidance_scale
):
    path = folder if path == "tiny" else None
    settings = {"guidance_scale": guidance_scale, "num_images": 2, "seed": 3}
    model = load_model(path, LoadSettings(device="cuda", arithmetic=arithmetic))
    images = draw(model, **settings)
    num_passes = 2 * NUM_STEPS * (2 if guidance_scale > 1 else 1)
    assert len(replays) == num_passes - 1  # one graph for both images
    assert draw(model, **settings) == images
    assert len(replays) == 2 * num_passes - 1

    monkeypatch.setattr(model_memory, "LEAST_CALLS", 10**9)
    eager = load_model(path, LoadSettings(device="cuda", arithmetic=arithmetic))
    assert draw(eager, **settings) == images
    assert len(replays) == 2 * num_passes - 1


def test_another_size_has_a_graph_of_its_own(folder, replays):
    model = load_model(folder, LoadSettings(device="cuda"))
    images = draw(model, seed=1)
    other = draw(model, seed=1, width=128)
    assert len(replays) == 2 * (NUM_STEPS - 1)
    assert draw(model, seed=1) == images
    assert draw(model, seed=1, width=128) == other


def test_graphs_leave_no_memory_behind(folder):
    model = load_model(folder, LoadSettings(device="cuda"))
    reserved = []
    for _ in range(4):
        draw(model, width=128)
        draw(model)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1:] == reserved[1:2] * 3
