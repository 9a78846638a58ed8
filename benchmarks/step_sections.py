"""The sections of `benchmarks.step`: each loads what it needs, and yields records as it goes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.stepper import Setting, Stepper, relative_error
from flux_nf4.cli.bench_record import drawing_record, environment, peer_record
from flux_nf4.errors import InputError
from flux_nf4.model import attention, fast_step, fused
from flux_nf4.model.arithmetic import possible_arithmetic
from flux_nf4.model.sizes import flux_config
from flux_nf4.model.step_graph import StepGraph
from flux_nf4.nf4 import eight_bit, ops
from flux_nf4.nf4.linear import NF4Linear
from flux_nf4.pipeline.benchmark import draw, measure_drawing
from flux_nf4.pipeline.ceilings import timed_calls
from flux_nf4.pipeline.generate import GenerationRequest, generate
from flux_nf4.pipeline.load import LoadSettings, load_model, resolve_device
from flux_nf4.pipeline.peers import PEERS, Peer, measure_peers, random_inputs
from flux_nf4.pipeline.random_model import random_checkpoint
from flux_nf4.pipeline.sampling import token_grid
from flux_nf4.pipeline.warm_up import repays, warm_up

# What a variant may fail with and leave the others standing.
FAILURES = (RuntimeError, AttributeError, TypeError, ValueError, ImportError)
_STEPS = {"flux1-dev": 28, "tiny": 4}
_PROFILED_STEPS = 5
_CAPPED_BYTES = int(5.8 * 2**30)  # 5.3 GiB, and CUDA's context


def kernels(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every expansion against a copy of the same bytes; every back end of attention."""
    device = resolve_device(setting.device)
    yield from (record for form in ("nf4 v2", "nf4 v1") for record in _expansions(setting, form))
    config = flux_config(random_checkpoint(setting.sizes).components["transformer"])
    for side, batch in setting.shapes:
        total = math.prod(token_grid(side, side)) + 512
        shape = (batch, config.num_heads, total, config.head_dim)
        for heads_first in (True, False):
            q, k, v = (_heads(shape, device, heads_first=heads_first) for _ in range(3))
            for backend in attention.BACKENDS:
                name = f"{backend.name}, {'heads' if heads_first else 'tokens'} first"
                record = {"kind": "attention", "name": name, "side": side, "batch": batch}
                call = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
                try:
                    with attention.sdpa_kernel(backend), torch.inference_mode():
                        seconds = median(timed_calls(call, device))
                except FAILURES as error:
                    yield record | {"error": _text(error)}
                    continue
                operations = 4 * batch * total**2 * config.hidden_size
                rate = operations / seconds
                yield record | {"seconds": seconds, "per_s": rate, "error": None}


def _heads(shape: tuple[int, ...], device: torch.device, *, heads_first: bool) -> torch.Tensor:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return x if heads_first else x.transpose(1, 2).contiguous().transpose(1, 2)


def _expansions(setting: Setting, form: Any) -> Iterator[dict[str, Any]]:
    device = resolve_device(setting.device)
    entries = random_checkpoint(setting.sizes, form=form).components["transformer"].entries
    layers = ("single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.0.img_mlp.0")
    for name in layers:
        layer = NF4Linear(entries[f"{name}.weight"]).to(device)
        for arithmetic in ("bf16", "fp8", "int8"):
            record = {"kind": "expansion", "name": f"{form} to {arithmetic}", "layer": name}
            try:
                layer.set_arithmetic(arithmetic)
                inverse, dtype = None, torch.bfloat16
                if arithmetic != "bf16":
                    inverse, dtype = layer.row_scales()[1], eight_bit.eight_bit_dtype(arithmetic)
                out = layer.expand_for_product(dtype, inverse)
                expand = partial(layer.expand_for_product, dtype, inverse)
                seconds = median(timed_calls(expand, device))
            except FAILURES as error:
                yield record | {"error": _text(error)}
                continue
            num_bytes = layer.weight.num_bytes + out.nbytes
            source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            copy_s = median(timed_calls(partial(target.copy_, source), device))
            yield record | {
                "bytes_per_s": num_bytes / seconds,
                "share_of_copy": copy_s / seconds,
                "error": None,
            }


def drawing(
    setting: Setting, arithmetic: Any, *, rest: bool = True, way: Any = "exact"
) -> Iterator[dict[str, Any]]:
    """From prompt to PNG in one arithmetic; steps of the other shapes; each trick left out.

    `way` is that of attention.
    """
    began_s = time.perf_counter()
    model = setting.load(arithmetic=arithmetic, attention=way)
    (side, _), *others = setting.shapes
    if repays(model.device):
        warm_up(model, size=(side, side))
    load_s = time.perf_counter() - began_s
    settings = {"width": side, "height": side, "batch": 1, "arithmetic": arithmetic}
    measured = measure_drawing(model, size=(side, side), num_steps=_STEPS[setting.sizes])
    attends = "" if way == "exact" else f", attention in {way}"
    name = f"flux-nf4 {arithmetic}{attends}"
    record = drawing_record(name, load_s, measured)
    yield record | {"settings": settings | {"steps": _STEPS[setting.sizes]}}
    if not rest:
        return
    if way == "exact":
        yield from _waterfall(setting, model, arithmetic)
    else:
        others = list(setting.shapes)
    for side, batch in others:
        record = {"kind": "step", "name": name}
        record["settings"] = settings | {"width": side, "height": side, "batch": batch}
        try:
            yield record | Stepper(setting, model, side, batch).measured()
        except FAILURES as error:
            yield record | {"step": None, "error": _text(error)}


def _waterfall(setting: Setting, model: Any, arithmetic: str) -> Iterator[dict[str, Any]]:
    """Each trick left out in turn: the step's time, and its error against float32."""
    side, batch = setting.shapes[0]
    stepper = Stepper(setting, model, side, batch)
    with model.memory.phase("denoise"):
        exact = stepper.exact()
    np.save(setting.shared / "exact.npy", exact.cpu().numpy())
    shared = {"kind": "waterfall", "arithmetic": arithmetic, "side": side, "batch": batch}
    tricks = _tricks(stepper)
    for name in (*tricks, "nothing"):  # twice, as clocks drift: the last counts
        try:
            with tricks[name]() as call:
                record = stepper.measured(call, is_graph=name != "graph")
                with model.memory.phase("denoise"):
                    error = relative_error((call or stepper.step)(), exact)
        except FAILURES as failure:
            yield shared | {"without": name, "step": None, "error": _text(failure)}
            continue
        yield shared | {"without": name, "relative_error": error} | record


def _tricks(stepper: Stepper) -> dict[str, Callable[[], Any]]:
    """What is left out -> how; `nothing` is the first. A switch may give another call to time."""
    blocks = stepper.model.transformer.blocks
    flash = attention.SDPBackend.FLASH_ATTENTION
    cudnn = attention.SDPBackend.CUDNN_ATTENTION

    def swap(owner: Any, name: str, value: Any) -> Callable[[], Any]:
        return lambda: _patched(owner, name, value)

    tricks: dict[str, Callable[[], Any]] = {
        "nothing": lambda: contextlib.nullcontext(None),
        "graph": lambda: contextlib.nullcontext(None),
        "modulation table": lambda: contextlib.nullcontext(stepper.conditioned_step),
        "cuDNN attention": swap(attention, "_fastest_backend", lambda *_: flash),
        "flash attention": swap(attention, "_fastest_backend", lambda *_: cudnn),
        "all fused kernels": swap(blocks, "fast_step", None),
        "scratch buffer": swap(
            ops,
            "scratch",
            lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
        ),
        "GELU in the product": swap(fast_step, "has_gelu", lambda *_: False),
        "expansion kernel": swap(ops, "_implementation", lambda _: ops.reference),
    }
    for wish in ("fp8", "int8"):
        with contextlib.suppress(InputError):  # no library, or no GPU for it
            chosen = attention.choose_attention(wish, stepper.model.device)
            in_eight_bits = partial(fast_step.fast_step, attention=chosen)
            tricks[f"exact attention ({wish})"] = swap(blocks, "fast_step", in_eight_bits)
    for name in ("norm_modulate", "norm_rotate_out", "join"):
        tricks[f"fused {name}"] = swap(fused, name, _without_kernels(getattr(fused, name)))
    if stepper.model.arithmetic == "int8":  # the kernels of fp8, but for two
        return {name: tricks[name] for name in ("nothing", "graph", "all fused kernels")}
    if stepper.model.arithmetic == "fp8":
        tricks["fast accumulation"] = swap(ops, "FAST_ACCUMULATION", value=False)
    return tricks


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with patch.object(owner, name, value):
        yield None


def _without_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    def plain(*arguments: Any) -> Any:
        with patch.object(fused, "kernels", lambda _: None):
            return function(*arguments)

    return plain


def profile(setting: Setting) -> Iterator[dict[str, Any]]:
    """Which kernels a step consists of, and what each takes on the device."""
    if resolve_device(setting.device).type != "cuda":
        return
    for arithmetic in possible_arithmetic(resolve_device(setting.device)):
        model = setting.load(arithmetic=arithmetic)
        for side, batch in setting.shapes[:2]:
            stepper = Stepper(setting, model, side, batch)
            with model.memory.phase("denoise"):
                spent = _profiled(stepper)
            record = {"kind": "profile", "arithmetic": arithmetic, "side": side}
            yield record | {"name": "graph", "kernels": spent, "error": None}


def _profiled(stepper: Stepper) -> dict[str, list[float]]:
    """Kernel -> how often it runs in a step, and its microseconds."""
    stepper.predict = StepGraph(stepper.model.transformer.blocks, stepper.model.device)
    for _ in range(20):  # the clocks settle
        stepper.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(_PROFILED_STEPS):
            stepper.step()
        torch.cuda.synchronize()
    return {
        each.key[:160]: [each.count / _PROFILED_STEPS, each.device_time_total / _PROFILED_STEPS]
        for each in sorted(found.key_averages(), key=lambda each: -each.device_time_total)
    }


def no_rotation(setting: Setting) -> Iterator[dict[str, Any]]:
    """Int8 without its rotation: in every kernel, before the first of them is compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(eight_bit, "rotate", torch.clone))
        if torch.cuda.is_available():
            from benchmarks.no_rotation import pairs_scaled_up, scaled_up
            from flux_nf4.model import fused_kernels
            from flux_nf4.nf4 import picking

            stack.enter_context(patch.object(fused_kernels, "rotate64", scaled_up))
            stack.enter_context(patch.object(picking, "rotation", pairs_scaled_up))
        model = setting.load(arithmetic="int8")
        side, batch = setting.shapes[0]
        stepper = Stepper(setting, model, side, batch)
        record = {"kind": "waterfall", "arithmetic": "int8", "side": side, "batch": batch}
        record |= {"without": "rotation"} | stepper.measured()
        with model.memory.phase("denoise"):
            error = relative_error(stepper.step(), stepper.exact())
        yield record | {"relative_error": error}


def peers(setting: Setting) -> Iterator[dict[str, Any]]:
    """All of them at the first shape."""
    order = sorted(PEERS, key=lambda peer: (not peer.is_nf4, peer.is_fp8_stored))
    yield from _peers(setting, *setting.shapes[0], tuple(order))


def other_peers(setting: Setting) -> Iterator[dict[str, Any]]:
    """Those without a compiler at the other shapes, the largest first."""
    for side, batch in reversed(setting.shapes[1:]):
        chosen = tuple(peer for peer in PEERS if not peer.is_compiled)
        yield from _peers(setting, side, batch, chosen)


def _peers(
    setting: Setting, side: int, batch: int, chosen: tuple[Peer, ...]
) -> Iterator[dict[str, Any]]:
    checkpoint = random_checkpoint(setting.sizes)
    component, device = checkpoint.components["transformer"], resolve_device(setting.device)
    exact_file = setting.shared / "exact.npy"
    inputs = random_inputs(
        flux_config(component),
        size=(side, side),
        num_text_tokens=checkpoint.facts.max_sequence_length,
        batch_size=batch,
        device=device,
        dtype=torch.bfloat16,
    )
    for peer in measure_peers(component, inputs, peers=chosen):
        settings = {"width": side, "height": side, "batch": batch}
        record = peer_record(peer) | {"settings": settings}
        if (side, batch) == setting.shapes[0] and peer.velocity is not None:
            exact = torch.from_numpy(np.load(exact_file)).to(device)
            record["relative_error"] = relative_error(peer.velocity, exact)
        yield record


def demo(setting: Setting) -> Iterator[dict[str, Any]]:
    """How far 8-bit images of the built-in model are from exact ones, with the same seeds."""
    yield from _demo(setting, (("bf16", "exact"), ("fp8", "exact"), ("int8", "exact")))


def demo_attention(setting: Setting) -> Iterator[dict[str, Any]]:
    """The same for attention in 8 bits, in exact arithmetic and in fp8."""
    ways = [(how, way) for way in ("exact", "fp8", "int8") for how in ("bf16", "fp8")]
    yield from _demo(setting, ways)


def _demo(setting: Setting, ways: Sequence[tuple[Any, Any]]) -> Iterator[dict[str, Any]]:
    """Each arithmetic and way of attention; the first is what others are compared with."""
    prompts = ("a red apple on a light blue background", "two yellow stars", "a green car")
    exact: list[np.ndarray] = []
    for arithmetic, way in ways:
        settings = LoadSettings(device=setting.device, arithmetic=arithmetic, attention=way)
        record = {"kind": "images", "arithmetic": arithmetic, "attention": way}
        try:
            model = load_model(None, settings)
        except InputError as error:
            yield record | {"psnr": None, "error": str(error)}
            continue
        side = model.facts.default_size
        images = [
            np.asarray(event.image, dtype=np.float64)
            for prompt in prompts
            for event in generate(
                model,
                GenerationRequest(prompt=prompt, width=side, height=side, seed=1, num_images=2),
            )
            if hasattr(event, "image")
        ]
        exact = exact or images
        errors = [np.mean((ours - best) ** 2) for ours, best in zip(images, exact, strict=True)]
        psnr = [float(10 * np.log10(255**2 / max(error, 1e-9))) for error in errors]
        yield record | {"psnr": psnr, "error": None}


def capped(setting: Setting) -> Iterator[dict[str, Any]]:
    """The peak of each stage where not all that an image takes has room at once."""
    for arithmetic in ("fp8", "bf16"):
        yield _capped(setting, arithmetic)


def _capped(setting: Setting, arithmetic: Any) -> dict[str, Any]:
    model = setting.load(arithmetic=arithmetic, vram=_CAPPED_BYTES)
    side, _ = setting.shapes[0]
    request = GenerationRequest(prompt="a fox", width=side, height=side, num_inference_steps=8)
    drawn = draw(model, request)
    streamed = None if model.memory.plan is None else model.memory.plan.step_bytes
    record = {"kind": "capped", "vram": _CAPPED_BYTES, "arithmetic": arithmetic}
    return record | {"step_bytes": streamed} | asdict(drawn) | {"error": None}


@dataclass(frozen=True, slots=True)
class Section:
    """What to run, and for how many seconds at most."""

    run: Callable[[Setting], Iterator[dict[str, Any]]]
    limit_s: float


def _if_possible(
    run: Callable[..., Iterator[dict[str, Any]]], arithmetic: Any, **options: Any
) -> Callable[[Setting], Iterator[dict[str, Any]]]:
    def section(setting: Setting) -> Iterator[dict[str, Any]]:
        if arithmetic in possible_arithmetic(resolve_device(setting.device)):
            yield from run(setting, arithmetic, **options)

    return section


SECTIONS = {
    "bf16": Section(_if_possible(drawing, "bf16"), 120),
    "fp8": Section(_if_possible(drawing, "fp8"), 120),
    "int8": Section(_if_possible(drawing, "int8"), 90),
    "peers": Section(peers, 400),
    "attention fp8": Section(_if_possible(drawing, "fp8", way="fp8"), 60),
    # Once more: Triton's cache is warm now, so the first image waits for no compiler.
    "warm start fp8": Section(_if_possible(drawing, "fp8", rest=False), 60),
    "no rotation": Section(no_rotation, 60),
    "kernels": Section(kernels, 60),
    "profile": Section(profile, 90),
    "capped": Section(capped, 60),
    "demo": Section(demo, 60),
    "demo attention": Section(demo_attention, 60),
    "other peers": Section(other_peers, 120),
}


def run_section(name: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of one section, with what they depend on."""
    shared = environment(resolve_device(setting.device).type)
    for record in SECTIONS[name].run(setting):
        yield {"schema": 1, "section": name, "sizes": setting.sizes, **shared, **record}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
