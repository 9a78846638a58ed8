"""Plans carried out on a real GPU: the same images under every budget, and the peak as planned."""

import gc

import pytest
import torch
from tiny_pipeline import save_tiny_folder, tiny_parts

from flux_nf4.memory.plan import smallest_budget
from flux_nf4.pipeline.events import ImageDone, Notice
from flux_nf4.pipeline.generate import GenerationRequest, generate, workload_of
from flux_nf4.pipeline.load import LoadSettings, load_model

pytestmark = pytest.mark.gpu
REQUEST = GenerationRequest(
    prompt="a red cat", width=256, height=256, num_inference_steps=4, max_sequence_length=32
)
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parts = tiny_parts(num_double_blocks=10, num_single_blocks=30)
    return save_tiny_folder(tmp_path_factory.mktemp("gpu") / "model", models=parts)


@pytest.fixture(autouse=True)
def _alone():
    """What tests before this one left behind is not this one's: models, workspaces of cuBLAS."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def opened(path, **settings):
    return load_model(path, LoadSettings(device="cuda", **settings))


def drawn(model):
    events = list(generate(model, REQUEST))
    (image,) = (event.image.tobytes() for event in events if isinstance(event, ImageDone))
    notices = [event.message for event in events if isinstance(event, Notice)]
    return image, [each for each in notices if "memory" in each]


@pytest.mark.parametrize("path", ["many blocks", "demo"])
@pytest.mark.parametrize("arithmetic", ["bf16", "auto"])
def test_under_every_budget_the_image_is_the_same(folder, path, arithmetic):
    path = folder if path == "many blocks" else None
    roomy = opened(path, arithmetic=arithmetic)
    expected, _ = drawn(roomy)
    least = smallest_budget(roomy.memory.inventory, workload_of(roomy, REQUEST))
    del roomy  # its weights would count as well
    for extra in (0, 2 * MIB, 10 * MIB, 50 * MIB):
        for ram in (None, 0):
            model = opened(path, arithmetic=arithmetic, vram=least + extra, ram=ram)
            image, notices = drawn(model)

            assert image == expected
            assert notices == []
            assert model.memory.residency.device.peak_bytes() <= model.memory.planned_bytes
            del model


def test_another_image_is_the_same_again(folder):
    """Slots are written again and again, while the arithmetic of the pass before may still run."""
    roomy = opened(folder)
    expected, _ = drawn(roomy)
    least = smallest_budget(roomy.memory.inventory, workload_of(roomy, REQUEST))
    model = opened(folder, vram=least)
    for _ in range(10):
        assert drawn(model) == (expected, [])


def test_memory_that_is_capped_lower_than_the_budget_is_made_do_with(folder):
    expected, _ = drawn(opened(folder))
    model = opened(folder, vram=4096 * MIB)
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(200 * MIB / total_bytes)
    try:
        image, notices = drawn(model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert image == expected
    assert all(notice.startswith("the device ran out of memory") for notice in notices)
