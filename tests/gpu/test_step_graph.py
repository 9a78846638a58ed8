"""A step as a CUDA graph: the same images, one launch a step."""

import pytest
import torch
from tiny_pipeline import save_tiny_folder, tiny_parts

from flux_nf4.pipeline import generate as pipeline
from flux_nf4.pipeline.events import ImageDone
from flux_nf4.pipeline.generate import GenerationRequest, generate
from flux_nf4.pipeline.load import LoadSettings, load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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
    request = GenerationRequest(
        prompt="a cat",
        width=256,
        height=256,
        num_inference_steps=NUM_STEPS,
        max_sequence_length=32,
        **settings,
    )
    return [e.image.tobytes() for e in generate(model, request) if isinstance(e, ImageDone)]


@pytest.mark.parametrize("path", ["tiny", "demo"])
@pytest.mark.parametrize("arithmetic", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("is_roomy", [True, False])
def test_graph_gives_the_same_images(
    folder, replays, monkeypatch, path, arithmetic, guidance_scale, is_roomy
):
    model = load_model(
        folder if path == "tiny" else None, LoadSettings(device="cuda", arithmetic=arithmetic)
    )
    monkeypatch.setattr(type(model.memory), "is_roomy", is_roomy)
    settings = {"guidance_scale": guidance_scale, "num_images": 2, "seed": 3}
    images = draw(model, **settings)
    num_passes = NUM_STEPS * (2 if guidance_scale > 1 else 1)
    assert len(replays) == 2 * (num_passes - 1)
    monkeypatch.setattr(pipeline, "LEAST_CALLS", 10**9)
    assert draw(model, **settings) == images
    assert len(replays) == 2 * (num_passes - 1)


def test_a_graph_leaves_no_memory_behind(folder):
    model = load_model(folder, LoadSettings(device="cuda"))
    draw(model, seed=0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for seed in range(5):
        draw(model, seed=seed)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
