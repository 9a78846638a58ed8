"""The same transformer as others run it: Diffusers, with and without bitsandbytes, on our weights.

A peer gets every weight as the checkpoint has it, expanded to the dtype that it computes in, and
quantised again where that is what the peer does. Timed is its forward alone, without a scheduler's
step: what is compared with it does a little more.

Shape letters, in this module only:
    B  batch    L  image tokens    T  text tokens    C  channels    P  pooled width
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_nf4.formats.keymap import SWAPPED_HALVES, transformer_table
from flux_nf4.model.sizes import flux_config
from flux_nf4.nf4 import ops
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.pipeline.benchmark import MemoryPeak, Spread, spread
from flux_nf4.pipeline.ceilings import timed_calls
from flux_nf4.pipeline.sampling import token_grid

if TYPE_CHECKING:
    from flux_nf4.formats.component import Component
    from flux_nf4.model.config import FluxConfig

_STEPS_BUDGET_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to run the transformer."""

    name: str
    is_nf4: bool = False
    is_fp8_stored: bool = False
    is_compiled: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its packages are there."""
        packages = ("diffusers", "bitsandbytes") if self.is_nf4 else ("diffusers",)
        return all(importlib.util.find_spec(each) is not None for each in packages)


PEERS = (
    Peer(name="Diffusers"),
    Peer(name="Diffusers, compiled", is_compiled=True),
    Peer(name="Diffusers + bitsandbytes NF4", is_nf4=True),
    Peer(name="Diffusers + bitsandbytes NF4, compiled", is_nf4=True, is_compiled=True),
    Peer(name="Diffusers, stored in fp8", is_fp8_stored=True),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What one step reads: (B, L, C), (B, T, context), (B, P); time and guidance are constants.

    Those are exact in bfloat16, and so are their thousandfolds: Diffusers rounds both.
    """

    img: Tensor
    txt: Tensor
    pooled: Tensor
    size: tuple[int, int]
    time: float = 0.5
    guidance: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeerMeasurement:
    """A peer's step, or why there is none."""

    name: str
    step: Spread | None = None
    peak: MemoryPeak | None = None
    error: str | None = None
    velocity: Tensor | None = None


def random_inputs(
    config: FluxConfig,
    *,
    size: tuple[int, int],
    num_text_tokens: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> StepInputs:
    """The same numbers on every device: noise, and text that is noise too."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = token_grid(*size)
    shapes = (
        (batch_size, rows * columns, config.in_channels),
        (batch_size, num_text_tokens, config.context_dim),
        (batch_size, config.pooled_dim),
    )
    img, txt, pooled = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    return StepInputs(img=img, txt=txt, pooled=pooled, size=size)


def measure_peers(
    component: Component,
    inputs: StepInputs,
    *,
    peers: tuple[Peer, ...] = PEERS,
    on_peer: Callable[[Peer], None] = lambda _: None,
) -> Iterator[PeerMeasurement]:
    """Each peer that is installed, one after the other; what it runs out of is its result.

    On a CPU none is compiled: that takes longer than it could gain.
    """
    for peer in peers:
        if peer.is_installed and (inputs.img.is_cuda or not peer.is_compiled):
            on_peer(peer)
            yield _measured(peer, component, inputs)
            gc.collect()
            if inputs.img.is_cuda:
                torch._dynamo.reset()
                torch.cuda.empty_cache()


def _measured(peer: Peer, component: Component, inputs: StepInputs) -> PeerMeasurement:
    device = inputs.img.device
    try:
        transformer = build_peer(peer, component, device=device, dtype=inputs.img.dtype)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            call = partial(_forward, transformer, inputs)
            velocity = call()
            seconds = timed_calls(call, device, _STEPS_BUDGET_S)
    except torch.OutOfMemoryError:
        return PeerMeasurement(name=peer.name, error="out of memory")
    except (RuntimeError, ImportError, ValueError) as error:
        message = str(error).strip().partition("\n")[0]
        return PeerMeasurement(name=peer.name, error=f"{type(error).__name__}: {message}")
    peak = MemoryPeak.now(device) if device.type == "cuda" else None
    return PeerMeasurement(name=peer.name, step=spread(seconds), peak=peak, velocity=velocity)


def build_peer(
    peer: Peer, component: Component, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A peer's module with the weights of a transformer, brought to the device one by one.

    Raises:
        torch.OutOfMemoryError: it has no room.
    """
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    config = flux_config(component)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_double_blocks,
            num_single_layers=config.num_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        ).eval()
    table = transformer_table(config.num_double_blocks, config.num_single_blocks)
    for name in component.entries:
        _put(peer, transformer, table.names[name], _value(component, name, device, dtype))
    if peer.is_fp8_stored:
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if peer.is_compiled:
        transformer.compile()
    return transformer


def _value(component: Component, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    entry = component.entries[name]
    if isinstance(entry, NF4Weight):
        value = ops.dequantize(entry.to(device), dtype)
    else:
        value = entry.to(device, dtype)
    return torch.cat(value.chunk(2)[::-1]) if name in SWAPPED_HALVES else value


def _put(peer: Peer, transformer: nn.Module, names: tuple[str, ...], value: Tensor) -> None:
    owners = [(transformer.get_submodule(name.rpartition(".")[0]), name) for name in names]
    num_rows = [len(owner.get_parameter(name.rpartition(".")[2])) for owner, name in owners]
    for (owner, name), rows in zip(owners, value.split(num_rows), strict=True):
        path, _, leaf = name.rpartition(".")
        if peer.is_nf4 and isinstance(owner, nn.Linear) and leaf == "weight":
            transformer.set_submodule(path, _nf4_linear(owner, rows))
        else:
            setattr(owner, leaf, nn.Parameter(rows.clone(), requires_grad=False))


def _nf4_linear(owner: nn.Linear, rows: Tensor) -> nn.Module:
    """A layer of bitsandbytes, quantised by bitsandbytes, with the bias of `owner`."""
    from bitsandbytes.nn import modules as bnb

    with torch.device("meta"):
        layer: nn.Module = bnb.Linear4bit(  # type: ignore[no-untyped-call]
            owner.in_features, owner.out_features, compute_dtype=rows.dtype, quant_type="nf4"
        )
    weight: Any = bnb.Params4bit(
        rows.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layer.weight, layer.bias = weight.to(rows.device), owner.bias
    return layer


def _forward(transformer: Any, inputs: StepInputs) -> Tensor:
    """The velocity (B, L, C); Diffusers takes positions as numbers."""
    device, batch = inputs.img.device, len(inputs.img)
    rows, columns = token_grid(*inputs.size)
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    guidance = None
    if transformer.config.guidance_embeds:
        guidance = torch.full((batch,), inputs.guidance, device=device)
    return transformer(
        hidden_states=inputs.img,
        encoder_hidden_states=inputs.txt,
        pooled_projections=inputs.pooled,
        timestep=torch.full((batch,), inputs.time, device=device),
        guidance=guidance,
        img_ids=nn.functional.pad(positions, (1, 0)).to(device, torch.float32),
        txt_ids=torch.zeros(inputs.txt.shape[1], 3, device=device),
        return_dict=False,
    )[0]
