"""Our FLUX transformer against Diffusers' on the same random weights, from their names to ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from tolerances import BF16_ERROR_RATIO, FLUX_FP32, relative_error

from flux_nf4.formats.component import Component, Entries
from flux_nf4.formats.keymap import SWAPPED_HALVES, transformer_table
from flux_nf4.model.build import build_transformer
from flux_nf4.model.config import FluxConfig
from flux_nf4.model.rope import rope_table

CONFIGS = {
    "two heads": FluxConfig(
        hidden_size=128, num_heads=2, num_double_blocks=1, num_single_blocks=2,
        context_dim=96, pooled_dim=80, axes_dim=(8, 28, 28),
    ),
    "one head of 128": FluxConfig(
        hidden_size=128, num_heads=1, num_double_blocks=2, num_single_blocks=1,
        context_dim=64, pooled_dim=64, axes_dim=(16, 56, 56),
    ),
    "schnell": FluxConfig(
        hidden_size=192, num_heads=3, num_double_blocks=2, num_single_blocks=3,
        context_dim=64, pooled_dim=64, axes_dim=(8, 28, 28), guidance_embed=False,
    ),
    "depth": FluxConfig(
        in_channels=128, hidden_size=128, num_heads=2, num_double_blocks=3, num_single_blocks=1,
        context_dim=64, pooled_dim=64, axes_dim=(8, 28, 28),
    ),
    "fill": FluxConfig(
        in_channels=384, hidden_size=128, num_heads=2, num_double_blocks=1, num_single_blocks=4,
        context_dim=64, pooled_dim=64, axes_dim=(8, 28, 28),
    ),
}  # fmt: skip
TXT_LENGTH, HEIGHT, WIDTH = 7, 5, 3

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@dataclass(frozen=True)
class Inputs:
    img: torch.Tensor
    txt: torch.Tensor
    pooled: torch.Tensor
    timestep: torch.Tensor
    guidance: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        parts = (self.img.to(dtype), self.txt.to(dtype), self.pooled.to(dtype))
        return Inputs(*parts, self.timestep, self.guidance)


def make_inputs(config: FluxConfig, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return Inputs(
        img=torch.randn(batch, HEIGHT * WIDTH, config.in_channels, generator=generator),
        txt=torch.randn(batch, TXT_LENGTH, config.context_dim, generator=generator),
        pooled=torch.randn(batch, config.pooled_dim, generator=generator),
        # Exact in bfloat16, and so are their thousandfolds: Diffusers rounds both, we neither,
        # and it would lose the comparison in bfloat16 by that alone.
        timestep=torch.tensor([0.5, 0.25])[:batch],
        guidance=torch.tensor([4.0, 2.0])[:batch] if config.guidance_embed else None,
    )


def make_theirs(config: FluxConfig) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
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
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "norm_" in name and name.endswith(".weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model


def component_of(theirs: FluxTransformer2DModel, config: FluxConfig) -> Component:
    state = theirs.state_dict()
    table = transformer_table(config.num_double_blocks, config.num_single_blocks, "diffusers")
    parts = {
        ours: tuple(state.pop(name) for name in names)
        for ours, names in table.names.items()
        if names[0] in state
    }
    assert not state
    entries = Entries(parts, frozenset(SWAPPED_HALVES))
    return Component(kind="transformer", entries=entries, source=Path("their weights"))


def run_ours(ours, inputs: Inputs) -> torch.Tensor:
    rope = rope_table(TXT_LENGTH, HEIGHT, WIDTH, ours.config)
    with torch.no_grad():
        return ours(
            inputs.img, inputs.txt, inputs.pooled, inputs.timestep, inputs.guidance, rope
        ).float()


def run_theirs(theirs: FluxTransformer2DModel, inputs: Inputs) -> torch.Tensor:
    rows = torch.arange(HEIGHT).repeat_interleave(WIDTH)
    columns = torch.arange(WIDTH).repeat(HEIGHT)
    with torch.no_grad():
        output = theirs(
            hidden_states=inputs.img,
            encoder_hidden_states=inputs.txt,
            pooled_projections=inputs.pooled,
            timestep=inputs.timestep,
            guidance=inputs.guidance,
            img_ids=torch.stack((torch.zeros_like(rows), rows, columns), dim=1).float(),
            txt_ids=torch.zeros(TXT_LENGTH, 3),
            return_dict=False,
        )[0]
    return output.float()


@every_config
def test_velocity_equals_diffusers_in_float32(config):
    theirs, inputs = make_theirs(config), make_inputs(config)
    ours = build_transformer(component_of(theirs, config), device="cpu", dtype=torch.float32)
    expected = run_theirs(theirs, inputs)
    assert relative_error(run_ours(ours, inputs), expected) < FLUX_FP32


@every_config
def test_bfloat16_error_is_at_most_twice_that_of_diffusers(config):
    theirs_bf16 = make_theirs(config).to(torch.bfloat16)
    component = component_of(theirs_bf16, config)
    ours_bf16 = build_transformer(component, device="cpu", dtype=torch.bfloat16)
    inputs_bf16 = make_inputs(config).to(torch.bfloat16)
    exact = run_theirs(copy.deepcopy(theirs_bf16).float(), inputs_bf16.to(torch.float32))

    our_error = relative_error(run_ours(ours_bf16, inputs_bf16), exact)
    their_error = relative_error(run_theirs(theirs_bf16, inputs_bf16), exact)
    assert our_error <= BF16_ERROR_RATIO * their_error


@every_config
def test_the_config_is_read_off_the_shapes(config):
    component = component_of(make_theirs(config), config)
    assert build_transformer(component, device="cpu", dtype=torch.float32).config == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_config
def test_the_two_parts_are_exactly_the_whole(config, dtype):
    component = component_of(make_theirs(config), config)
    ours = build_transformer(component, device="cpu", dtype=dtype)
    inputs = make_inputs(config).to(dtype)
    rope = rope_table(TXT_LENGTH, HEIGHT, WIDTH, config)
    with torch.no_grad():
        row = ours.conditioner(inputs.timestep, inputs.guidance, inputs.pooled)
        in_parts = ours.blocks(inputs.img, inputs.txt, row, rope).float()
    assert torch.equal(in_parts, run_ours(ours, inputs))


@every_config
def test_every_step_of_the_table_equals_the_whole_at_that_step(config):
    component = component_of(make_theirs(config), config)
    ours = build_transformer(component, device="cpu", dtype=torch.float32)
    inputs, timesteps = make_inputs(config), torch.tensor([1.0, 0.625, 0.125])
    rope = rope_table(TXT_LENGTH, HEIGHT, WIDTH, config)
    with torch.no_grad():
        table = ours.conditioner.table(timesteps, inputs.guidance, inputs.pooled)
    for step, timestep in enumerate(timesteps):
        at_step = Inputs(inputs.img, inputs.txt, inputs.pooled, timestep.expand(2), inputs.guidance)
        with torch.no_grad():
            from_table = ours.blocks(inputs.img, inputs.txt, table[step], rope)
        assert relative_error(from_table, run_ours(ours, at_step)) < FLUX_FP32
