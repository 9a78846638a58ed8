"""Models on a fake device: what they are asked, what they draw, and the budgets to try."""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from fake_device import Counting, FakeDevice
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from flux_nf4.memory.plan import smallest_budget
from flux_nf4.pipeline import generate as generation
from flux_nf4.pipeline.events import ImageDone, Notice
from flux_nf4.pipeline.generate import GenerationRequest, generate, workload_of
from flux_nf4.pipeline.load import LoadSettings, load_model

PLENTY = 2**40
# The process of a worker whose model is on such a device.
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_device import FakeDevice
from flux_nf4.pipeline import load
from flux_nf4.server import worker
load.managed_device = lambda *_: FakeDevice()
sys.exit(worker.main())
"""


def wish(prompt="a red cat", **values):
    values = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "max_sequence_length": 8,
        "seed": 3,
    } | values
    return GenerationRequest(prompt=prompt, **values)


def worker_command(source=WORKER):
    """What starts such a process."""
    return [sys.executable, "-P", "-c", source, str(Path(__file__).parent)]


def unmanaged(path):
    """A model that is in main memory as it is, and decodes as those do that are managed."""
    model = load_model(path, LoadSettings(device="cpu", dtype=torch.float32))
    model.autoencoder.is_in_strips = True
    return model


def draw(model, request):
    """The pixels of a request's images, and what was said."""
    device = (model.memory.residency and model.memory.residency.device) or FakeDevice()
    with contextlib.ExitStack() as stack:
        for name in ("make_schedule", "_draw"):
            function = getattr(generation, name)
            stack.enter_context(patch.object(generation, name, _on_the_host(function, device)))
        stack.enter_context(Counting(device))
        events = list(generate(model, request))
    images = [event.image.tobytes() for event in events if isinstance(event, ImageDone)]
    return images, [event.message for event in events if isinstance(event, Notice)]


def _on_the_host(function, device):
    """What it makes is in main memory, which a fake device on a CPU cannot see by itself."""

    def call(*arguments, **options):
        with _disable_current_modes():
            result = function(*arguments, **options)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                device.leave_out(leaf)
        return result

    return call


def budgets(model, request, count=6):
    """From the least that does to what keeps everything."""
    inventory, workload = model.memory.inventory, workload_of(model, request)
    least = smallest_budget(inventory, workload)
    everything = sum(
        unit.num_bytes
        for unit in (
            *inventory.t5,
            inventory.clip,
            *inventory.conditioner,
            *inventory.blocks,
            inventory.vae,
        )
    )
    return [least + everything * i // (count - 1) for i in range(count)]
