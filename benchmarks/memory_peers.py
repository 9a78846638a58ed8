"""Diffusers' own ways to need less memory, for `benchmarks.memory`: its transformer's steps alone.

The weights are random, at the real size: written once in bf16 and once in bitsandbytes' NF4, then
loaded as people do. The text is random as well, so that only the transformer is on the device.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Storage, how it is kept off the device, and the caps in GiB to try: it counts where it runs first.
_SMALL, _LARGE = (2.0, 4.0, 6.0, 8.0, 12.0), (6.0, 8.0, 12.0)
WAYS = (
    ("nf4", "none", _LARGE),
    ("nf4", "group leaf", _LARGE),
    ("fp8", "group block", _SMALL),
    ("bf16", "group block", _SMALL),
    ("nf4", "group block", _LARGE),
    ("fp8", "none", _LARGE),
    ("bf16", "sequential", _SMALL),
)
_NUM_STEPS = 8


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Load, then a few steps at 1024 x 1024; errors are the caller's to report."""
    began = time.perf_counter()
    transformer = _load(_folder(case), case)
    torch.cuda.reset_peak_memory_stats()
    steps_s = _steps(transformer)
    return {
        "first_step_s": time.perf_counter() - began - sum(steps_s[1:]),
        "step_ms": 1000 * statistics.median(steps_s[1:]),
        "steps_s": steps_s,
    }


def _folder(case: dict[str, Any]) -> Path:
    if case["model"] != "flux1-dev" or case["device"] != "cuda":
        raise NotImplementedError("peers are measured at FLUX.1-dev's size, on CUDA")
    return Path(case["folder"]) / ("nf4" if case["storage"] == "nf4" else "bf16")


def prepare(case: dict[str, Any]) -> dict[str, Any]:
    """Write the weights of a storage; without a cap, since bitsandbytes quantises on the device."""
    folder, began = _folder(case), time.perf_counter()
    if not folder.exists():
        _prepare(folder, is_nf4=case["storage"] == "nf4")
    return {"seconds": time.perf_counter() - began}


def _prepare(folder: Path, *, is_nf4: bool) -> None:
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel

    plain = folder.parent / "bf16"
    if not plain.exists():
        with torch.device("meta"):
            model = FluxTransformer2DModel(guidance_embeds=True)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        pool = torch.empty(2**24, dtype=torch.bfloat16).normal_(0, 0.02)
        with torch.no_grad():
            for parameter in model.parameters():
                flat = parameter.view(-1)
                for first in range(0, len(flat), len(pool)):
                    piece = flat[first : first + len(pool)]
                    piece.copy_(pool[: len(piece)])
        model.save_pretrained(plain)
        del model
    if is_nf4:
        wish = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        quantized = FluxTransformer2DModel.from_pretrained(
            plain, quantization_config=wish, torch_dtype=torch.bfloat16
        )
        quantized.save_pretrained(folder)


def _load(folder: Path, case: dict[str, Any]) -> nn.Module:
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import apply_group_offloading

    transformer = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    if case["storage"] == "fp8":
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    if case["offload"] == "none":
        transformer.to(cuda)
    elif case["offload"] == "sequential":
        from accelerate import cpu_offload

        cpu_offload(transformer, cuda)
    else:
        is_leaf = case["offload"] == "group leaf"
        apply_group_offloading(
            transformer,
            onload_device=cuda,
            offload_device=cpu,
            offload_type="leaf_level" if is_leaf else "block_level",
            num_blocks_per_group=None if is_leaf else 1,
            use_stream=True,
        )
    return transformer.eval()


@torch.inference_mode()
def _steps(transformer: nn.Module) -> list[float]:
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    tokens, text = torch.randn(1, 4096, 64, **cuda), torch.randn(1, 512, 4096, **cuda)
    pooled, ones = torch.randn(1, 768, **cuda), torch.ones(1, **cuda)
    image_ids = torch.zeros(4096, 3, device="cuda")
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image_ids[:, 1], image_ids[:, 2] = rows.flatten().cuda(), columns.flatten().cuda()
    seconds = []
    for _ in range(_NUM_STEPS):
        began = time.perf_counter()
        transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=ones,
            guidance=ones,
            img_ids=image_ids,
            txt_ids=torch.zeros(512, 3, device="cuda"),
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds
