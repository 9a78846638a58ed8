"""What a GPU does only once, begun before the first image asks for it.

CUDA starts and libraries load while files are opened (`wake_cuda`, `wake_libraries`). The rest is
done by drawing (`warm_up`): Triton compiles, attention is measured, and a step is captured as CUDA
graphs, which stay for images of the same size. Begun at once after loading, most of it happens
while weights are still on their way.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from functools import cache
from typing import TYPE_CHECKING

import torch

from flux_nf4.model.step_graph import LEAST_CALLS
from flux_nf4.nf4 import ops
from flux_nf4.pipeline import generate
from flux_nf4.pipeline.request import GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from flux_nf4.pipeline.events import Event
    from flux_nf4.pipeline.load import Model


def repays(device: torch.device) -> bool:
    """Whether the first image on a device takes clearly longer than those after it."""
    return device.type == "cuda"


def warm_up(
    model: Model,
    *,
    size: tuple[int, int] | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
) -> None:
    """Draw an image of a few steps that nobody wants.

    `size` is width and height in pixels, by default the model's own.

    Raises:
        DoesNotFitError, InputError, NumericalError: as `generate`.
    """
    width, height = size or 2 * (model.facts.default_size,)
    request = GenerationRequest(
        prompt="warm-up", width=width, height=height, num_inference_steps=LEAST_CALLS
    )
    for event in generate.generate(model, request):
        on_event(event)


@cache
def wake_cuda(device: str) -> None:
    """Start CUDA in a thread, for a device by its name: 0.4 s.

    PyTorch would do the same, but let no other thread of Python run meanwhile.
    """
    name = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if name is not None and torch.version.cuda and not torch.cuda.is_initialized():
        _in_thread(lambda: _start_cuda(int(name[1] or 0)))


def _start_cuda(index: int) -> None:
    driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    found, context = ctypes.c_int(), ctypes.c_void_p()
    if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(found), index):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), found)  # what PyTorch uses, too


def wake_libraries(device: torch.device) -> list[threading.Thread]:
    """Load Triton and cuDNN, each in a thread: 0.5 and 0.2 s."""

    def expand() -> None:
        codes_P = torch.zeros(32, dtype=torch.uint8, device=device)
        absmax_G = torch.zeros(1, device=device)
        ops.dequantize_4bit(codes_P, absmax_G, (1, 64), 64, "nf4", torch.bfloat16)

    def convolve() -> None:
        x_BCHW = torch.zeros(8, 8, 8, 8, dtype=torch.bfloat16, device=device)
        torch.nn.functional.conv2d(x_BCHW, x_BCHW[:, :, :3, :3])

    return [_in_thread(expand), _in_thread(convolve)]


def _in_thread(do: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(Exception):  # whoever needs it is told, and soon
            do()

    # No daemon: one that is inside PyTorch when Python ends takes the process down with it.
    thread = threading.Thread(target=run)
    thread.start()
    return thread
