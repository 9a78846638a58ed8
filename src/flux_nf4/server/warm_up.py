"""One image before the first job, so that no client waits for what happens only once.

On a GPU that is 1 to 3 s: libraries load their kernels, attention is measured, Triton compiles, and
a step is captured as CUDA graphs, which stay for images of the same size.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from flux_nf4.pipeline.request import GenerationRequest
from flux_nf4.server.failures import FAULTS, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from flux_nf4.pipeline.load import Model


def repays(device: torch.device) -> bool:
    """Whether the first image on a device takes clearly longer than those after it."""
    return device.type == "cuda"


def warm_up(model: Model, on_event: Callable[[], None]) -> bool:
    """Draw one image of the model's own size, and throw it away; whether that went well.

    Else standard error says why: a smaller image may be drawn all the same. `on_event` is called
    while it goes on.
    """
    from flux_nf4.model.step_graph import LEAST_CALLS
    from flux_nf4.pipeline.events import Notice
    from flux_nf4.pipeline.generate import generate

    size = model.facts.default_size
    request = GenerationRequest(
        prompt="warm-up", width=size, height=size, num_inference_steps=LEAST_CALLS + 1
    )
    try:
        for event in generate(model, request):
            on_event()
            if isinstance(event, Notice):
                sys.stderr.write(f"warm-up: {event.message}\n")
    except FAULTS as error:
        failure = describe(error)
        if failure["code"] != "out_of_memory":
            traceback.print_exc()
        sys.stderr.write(f"no warm-up: {failure['message']}\n")
        return False
    return True
