"""From a path to a model that can draw: which parts, on which device, in which arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flux_nf4.errors import DoesNotFitError, FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.checkpoint import Checkpoint, open_checkpoint
from flux_nf4.memory.activations import Workload
from flux_nf4.model.arithmetic import (
    ArithmeticWish,
    check_arithmetic,
    choose_arithmetic,
    set_arithmetic,
)
from flux_nf4.model.assemble import check_compute_dtype
from flux_nf4.model.attention import AttentionWish, check_attention, choose_attention
from flux_nf4.model.build import build_autoencoder, build_clip, build_t5, build_transformer
from flux_nf4.model.fast_step import fast_step
from flux_nf4.pipeline.convert import QuantizationWish, quantize_component
from flux_nf4.pipeline.model_memory import ModelMemory, attempt, manage, managed_device
from flux_nf4.pipeline.sampling import LATENT_CHANNELS, PIXELS_PER_LATENT
from flux_nf4.pipeline.tokenizers import Tokenizers, load_tokenizers
from flux_nf4.pipeline.warm_up import wake_cuda, wake_libraries

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Tokenizer
    from torch import nn

    from flux_nf4.formats.component import Component, ComponentKind
    from flux_nf4.formats.facts import Facts
    from flux_nf4.memory.device import Device
    from flux_nf4.model.autoencoder import Autoencoder
    from flux_nf4.model.text import ClipTextEncoder, T5Encoder
    from flux_nf4.model.transformer import FluxTransformer
    from flux_nf4.nf4.eight_bit import Arithmetic

DEMO_FILE = "flux-demo-nf4-v2.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Where and how to compute.

    `device`: `auto` (a CUDA device if there is one, else the CPU), or what `torch.device` takes.
    `vram` and `ram` limit the device memory and the main memory for weights, in bytes. `vram` None:
    what is free, less some for the desktop. On a CPU everything stays in main memory.
    `dtype` None: bfloat16 where the device is fast in it, else float32; float16 is refused, as
    FLUX's activations overflow it. `quantization` None: the weights as the file has them.
    `arithmetic`: how the transformer's NF4 layers multiply. `bf16` is exact: in the model's dtype;
    `fp8` and `int8` are quicker on a GPU that has them; `auto` takes the quickest, and a note of
    the model says which. `attention`: `exact`, or in 8 bits, `fp8` by cuDNN or `int8` by
    SageAttention.

    Raises:
        InputError: the arithmetic or attention is unknown, or the dtype is not one to compute in.
    """

    device: str = "auto"
    dtype: torch.dtype | None = None
    quantization: QuantizationWish | None = None
    vram: int | None = None
    ram: int | None = None
    arithmetic: ArithmeticWish = "bf16"
    attention: AttentionWish = "exact"

    def __post_init__(self) -> None:
        check_arithmetic(self.arithmetic)
        check_attention(self.attention)
        if self.dtype is not None:
            check_compute_dtype(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A model, loaded: four networks, their tokenizers, and what is known about them."""

    path: Path
    facts: Facts
    variant: str
    quantization: str
    device: torch.device
    dtype: torch.dtype
    tokenizers: Tokenizers
    t5: T5Encoder
    clip: ClipTextEncoder
    transformer: FluxTransformer
    autoencoder: Autoencoder
    notes: tuple[str, ...] = ()
    memory: ModelMemory = field(default_factory=ModelMemory)
    arithmetic: Arithmetic = "bf16"

    @property
    def embeds_guidance(self) -> bool:
        """Whether the distilled guidance scale has an effect (dev: yes; schnell: no)."""
        return self.transformer.config.guidance_embed


def load_model(path: str | Path | None, settings: LoadSettings | None = None) -> Model:
    """Load a checkpoint file or folder; None is the demo model inside the package.

    Raises:
        ModelNotFoundError: nothing is there, or a part that an image needs is missing.
        FormatError: a file is damaged, or its parts do not belong together.
        InputError: a setting does not fit the machine or the file; the variant needs an image.
    """
    settings = settings or LoadSettings()
    wake_cuda(settings.device)
    return assemble_model(open_checkpoint(demo_path() if path is None else path), settings)


def assemble_model(
    checkpoint: Checkpoint, settings: LoadSettings, *, is_managed: bool = True
) -> Model:
    """Make a model of a checkpoint that is open already.

    Not managed, every network is on the device and stays there, for who calls them one by one.

    Raises:
        ModelNotFoundError, FormatError, InputError: as `load_model`.
    """
    wake_cuda(settings.device)
    checkpoint.require_complete()
    check_variant(checkpoint)
    check_facts(checkpoint.facts)
    tokenizers = load_tokenizers(checkpoint)  # while CUDA starts
    device = resolve_device(settings.device)
    dtype = settings.dtype or default_dtype(device)
    arithmetic, note = choose_arithmetic(settings.arithmetic, device)
    attention = choose_attention(settings.attention, device)
    if settings.quantization is not None:
        components = dict(checkpoint.components)
        components["transformer"] = quantize_component(
            components["transformer"], settings.quantization
        )
        checkpoint = dataclasses.replace(checkpoint, components=components)

    components, facts = dict(checkpoint.components), checkpoint.facts
    check_vocabularies(tokenizers, components)
    notes = [*checkpoint.notes, *([] if note is None else [note])]
    manager = managed_device(device, settings.vram) if is_managed else None
    if is_managed and manager is None and (settings.vram or settings.ram) is not None:
        notes.append(f"limits of memory are not used: the device is `{device}`")
    place = device if manager is None else torch.device("meta")
    model = Model(
        path=checkpoint.path,
        facts=facts,
        variant=checkpoint.variant,
        quantization=checkpoint.quantization,
        device=device,
        dtype=dtype,
        tokenizers=tokenizers,
        t5=build_t5(components["t5"], device=place, dtype=dtype),
        clip=build_clip(components["clip"], facts, device=place, dtype=dtype),
        transformer=build_transformer(components["transformer"], device=place, dtype=dtype),
        autoencoder=build_autoencoder(components["vae"], facts, device=place, dtype=dtype),
        notes=tuple(notes),
        arithmetic=arithmetic,
    )
    set_arithmetic(model.transformer.blocks, arithmetic)
    model.transformer.blocks.fast_step = partial(fast_step, attention=attention)
    check_parts_match(model)
    return model if manager is None else _managed(model, components, manager, settings)


def _managed(
    model: Model,
    components: Mapping[ComponentKind, Component],
    device: Device,
    settings: LoadSettings,
) -> Model:
    """The model with a plan for its own size, which begins to load."""
    wake_libraries(model.device)
    model.autoencoder.is_in_strips = True  # under every plan: all of them give the same image
    modules: dict[ComponentKind, nn.Module] = {
        "transformer": model.transformer,
        "t5": model.t5,
        "clip": model.clip,
        "vae": model.autoencoder,
    }
    memory = manage(
        {kind: (module, components[kind]) for kind, module in modules.items()},
        device,
        name=f"{model.facts.name} {model.quantization}",
        dtype=model.dtype,
        arithmetic=model.arithmetic,
        vram=settings.vram,
        ram=settings.ram,
    )
    size, length = model.facts.default_size, model.facts.max_sequence_length
    own = Workload(width=size, height=size, num_text_tokens=length)
    notes = list(model.notes)
    with contextlib.suppress(DoesNotFitError):  # a request for a smaller image may
        notes += (notice.message for notice in attempt(memory, partial(memory.begin, own)))
    return dataclasses.replace(model, memory=memory, notes=tuple(notes))


def demo_path() -> Path:
    """Where the demo model lies.

    Raises:
        ModelNotFoundError: this installation does not have it.
    """
    path = Path(str(resources.files("flux_nf4"))) / "assets" / "demo" / DEMO_FILE
    if not path.is_file():
        raise ModelNotFoundError(
            f"the built-in demo model is missing: `{path}`",
            hint="install flux-nf4 again, or give a model of your own with `--model`",
        )
    return path


def resolve_device(name: str) -> torch.device:
    """The device that `name` means on this machine.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"`{name}` is not a device", hint="use `auto`, `cpu`, `cuda`, `cuda:1` or `mps`"
        ) from error
    is_there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not is_there.get(device.type, False):
        raise InputError(
            f"this machine has no device `{name}` that PyTorch {torch.__version__} can use",
            hint="`flux-nf4 doctor` tells what it has; `cpu` always works",
        )
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies matrices in it, else float32.

    Of CPUs only those with AMX do. Measured on two cores of one, 20 steps of the demo model:
    bfloat16 0.47 s, float32 0.61 s; with AMX off 0.73 s against 0.61 s; with AVX2 alone 18 s.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        has_bfloat16 = bool(_cpu_capabilities().get("amx_bf16"))
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def imitates_bfloat16() -> bool:
    """Whether this CPU has no arithmetic for bfloat16: a convolution took 70 times as long."""
    return not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _cpu_capabilities() -> dict[str, object]:
    # Younger than the oldest PyTorch that is supported.
    read = getattr(torch.cpu, "get_capabilities", dict)
    return dict(read())


def check_variant(checkpoint: Checkpoint) -> None:
    """Raises InputError for the variants that edit an image, which are not supported yet."""
    if checkpoint.variant not in ("dev", "schnell"):
        raise InputError(
            f"`{checkpoint.path}` is FLUX.1 {checkpoint.variant}, which needs an input image; "
            "that is not supported yet",
            hint="to start from an image, use FLUX.1-dev or FLUX.1-schnell with `--image`",
        )


def check_facts(facts: Facts) -> None:
    """Raises FormatError unless the numbers in a file's facts are ones to compute with."""
    bounds = {
        "default_size": (64, 4096),
        "max_sequence_length": (2, 512),
        "vae_scaling_factor": (1e-3, 1e3),
        "vae_shift_factor": (-1e3, 1e3),
        "shift": (1e-3, 1e3),
        "base_shift": (-10.0, 10.0),
        "max_shift": (-10.0, 10.0),
        "base_image_seq_len": (1, 10**6),
        "max_image_seq_len": (facts.base_image_seq_len + 1, 10**6),
    }
    for name, (low, high) in bounds.items():
        value = getattr(facts, name)
        if not low <= value <= high:
            raise FormatError(f"the model's `{name}` must lie in {low:g} to {high:g}, got {value}")
    if facts.default_size % 16:
        raise FormatError(f"the model's `default_size` {facts.default_size} is no multiple of 16")


def check_parts_match(model: Model) -> None:
    """Raises FormatError unless the parts are of one model, with FLUX.1's latents (16 x, 8 x 8)."""
    config, autoencoder = model.transformer.config, model.autoencoder
    channels, reduction = autoencoder.latent_channels, autoencoder.pixels_per_latent
    if (channels, reduction) != (LATENT_CHANNELS, PIXELS_PER_LATENT):
        raise FormatError(
            f"the VAE has {channels} channels of {reduction} x {reduction} pixels; FLUX.1's has "
            f"{LATENT_CHANNELS} of {PIXELS_PER_LATENT} x {PIXELS_PER_LATENT}"
        )
    pairs = (
        ("predicts", config.out_channels, "VAE reads", 4 * channels),
        ("reads text tokens of", config.context_dim, "T5 makes", model.t5.hidden_size),
        ("reads a pooled text of", config.pooled_dim, "CLIP makes", model.clip.hidden_size),
    )
    for reads, width, other, other_width in pairs:
        if width != other_width:
            raise FormatError(
                f"the transformer {reads} {width} channels, and the {other} {other_width}",
                hint="its parts come from different models",
            )


def check_vocabularies(tokenizers: Tokenizers, components: dict[ComponentKind, Component]) -> None:
    """Raises FormatError where a tokenizer knows tokens that its encoder has no vector for."""
    pairs: tuple[tuple[ComponentKind, Tokenizer, str], ...] = (
        ("t5", tokenizers.t5, "shared.weight"),
        ("clip", tokenizers.clip, "text_model.embeddings.token_embedding.weight"),
    )
    for kind, tokenizer, name in pairs:
        embedding = components[kind].entries.get(name)
        num_tokens = tokenizer.get_vocab_size()
        if embedding is not None and num_tokens > embedding.shape[0]:
            raise FormatError(
                f"the {kind} tokenizer knows {num_tokens} tokens, and the {kind} encoder has "
                f"vectors for {embedding.shape[0]}"
            )
