"""From components to modules: what is kept, what is cast, and what is refused."""

from dataclasses import replace

import pytest
import torch
from tiny_config import tiny

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.component import Entries
from flux_nf4.formats.facts import Facts
from flux_nf4.model.build import build_autoencoder, build_clip, build_t5, build_transformer
from flux_nf4.model.fp8 import Fp8Linear
from flux_nf4.model.rope import rope_table
from flux_nf4.nf4.codec import NF4Weight
from flux_nf4.nf4.linear import NF4Linear
from flux_nf4.nf4.reference import dequantize, quantize

FACTS = Facts(clip_eos_token_id=1, vae_norm_num_groups=4)
BUILDERS = {
    "t5": build_t5,
    "clip": lambda component, **how: build_clip(component, FACTS, **how),
    "vae": lambda component, **how: build_autoencoder(component, FACTS, **how),
    "transformer": build_transformer,
}


@pytest.fixture(params=BUILDERS)
def part(request, make_transformer):
    """The component of one kind, and the function that builds it on the CPU."""
    kind = request.param
    component = make_transformer() if kind == "transformer" else request.getfixturevalue(kind)
    return component, lambda entries, dtype=torch.float32: BUILDERS[kind](
        replace(component, entries=entries), device="cpu", dtype=dtype
    )


def quantised(component, **how):
    """The component with every matrix in NF4, as all-in-one files have it."""
    return {
        name: quantize(entry, **how) if entry.ndim == 2 else entry
        for name, entry in component.entries.items()
    }


def run(transformer, dtype=torch.float32):
    config = transformer.config
    generator = torch.Generator().manual_seed(1)
    img, txt, pooled = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (1, 6, config.in_channels),
            (1, 4, config.context_dim),
            (1, config.pooled_dim),
        )
    )
    guidance = torch.tensor([3.5]) if config.guidance_embed else None
    rope = rope_table(4, 2, 3, config)
    with torch.no_grad():
        return transformer(img, txt, pooled, torch.tensor([0.5]), guidance, rope)


def test_nothing_is_left_on_meta(part):
    component, build = part
    module = build(component.entries)
    left = [
        name
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_meta
    ]
    assert left == []


def test_nothing_asks_for_a_gradient(part):
    component, build = part
    assert not any(value.requires_grad for value in build(component.entries).parameters())


def test_every_module_is_in_eval_mode(part):
    component, build = part
    assert not any(module.training for module in build(component.entries).modules())


def test_a_missing_entry_is_named(part):
    component, build = part
    # The last block's entry tells no size, so it is the comparison of names that must miss it.
    name = sorted(name for name in component.entries if ".1." in name)[-1]
    entries = {other: entry for other, entry in component.entries.items() if other != name}
    with pytest.raises(FormatError, match=rf"missing \(1\): `{name}`"):
        build(entries)


def test_every_entry_that_tells_a_size_is_named_when_it_is_missing(part):
    component, build = part
    for name in component.entries:
        if name == "text_projection.weight":
            continue
        entries = {other: entry for other, entry in component.entries.items() if other != name}
        with pytest.raises(FormatError, match=name):
            build(entries)


def test_an_unknown_entry_is_named(part):
    component, build = part
    entries = {**component.entries, "what.is.this": torch.zeros(2), "and.this": torch.zeros(2)}
    with pytest.raises(FormatError, match=r"unknown \(2\): `and\.this`, `what\.is\.this`"):
        build(entries)


def test_a_misshapen_entry_is_named_with_both_shapes(part):
    component, build = part
    ends = ("norm1.bias", "layer_norm1.bias", "layer_norm.weight", "linear2.bias")
    name, entry = next(item for item in component.entries.items() if item[0].endswith(ends))
    shape = tuple(entry.shape)
    with pytest.raises(FormatError, match=rf"`{name}` is \(3,\) and must be \({shape[0]},\)"):
        build({**component.entries, name: torch.zeros(3)})


def test_an_entry_of_integers_is_named(part):
    component, build = part
    name = next(name for name, entry in component.entries.items() if entry.ndim == 1)
    broken = component.entries[name].to(torch.uint8)
    with pytest.raises(FormatError, match=rf"`{name}` is torch.uint8"):
        build({**component.entries, name: broken})


def test_a_part_of_another_kind_is_refused(part, make_transformer, t5):
    component, build = part
    other = t5 if component.kind == "transformer" else make_transformer()
    with pytest.raises(FormatError, match="lacks"):
        build(other.entries)


def test_no_entries_at_all_are_refused(part):
    _, build = part
    with pytest.raises(FormatError, match="lacks"):
        build({})


def test_a_long_list_of_names_is_cut_with_its_count(make_transformer):
    component = make_transformer()
    entries = {**component.entries, **{f"x.{i:03}": torch.zeros(1) for i in range(100)}}
    with pytest.raises(FormatError, match=r"unknown \(100\): .*`x\.019` and 80 more"):
        build_transformer(replace(component, entries=entries), device="cpu", dtype=torch.float32)


def test_float16_is_refused(part):
    component, build = part
    with pytest.raises(InputError, match="not in float16"):
        build(component.entries, torch.float16)


def test_everything_computes_in_the_dtype_asked_for(part):
    component, build = part
    dtypes = {
        value.dtype
        for name, value in build(component.entries, torch.bfloat16).named_parameters()
        if not name.endswith(".scale")
    }
    assert dtypes == {torch.bfloat16}


def test_a_tensor_that_is_already_right_is_not_copied(make_transformer):
    component = make_transformer()
    built = build_transformer(component, device="cpu", dtype=torch.float32)
    taken = built.blocks.img_in.weight
    assert taken.data_ptr() == component.entries["img_in.weight"].data_ptr()


def test_norm_scales_stay_float32(make_transformer):
    component = make_transformer()
    entries = {name: entry.bfloat16() for name, entry in component.entries.items()}
    built = build_transformer(
        replace(component, entries=entries), device="cpu", dtype=torch.bfloat16
    )
    scales = [value for name, value in built.named_parameters() if name.endswith(".scale")]
    assert {scale.dtype for scale in scales} == {torch.float32}


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_linears_sit_where_nf4_weights_came(make_transformer, nested):
    component = make_transformer()
    entries = quantised(component, nested=nested)
    built = build_transformer(
        replace(component, entries=entries), device="cpu", dtype=torch.float32
    )
    places = {
        name.partition(".")[2] + ".weight"
        for name, module in built.named_modules()
        if isinstance(module, NF4Linear)
    }
    assert places == {name for name, entry in entries.items() if isinstance(entry, NF4Weight)}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("guidance_embed", [False, True])
def test_nf4_transformer_equals_one_of_the_dequantised_weights(
    make_transformer, nested, guidance_embed
):
    component = make_transformer(tiny(guidance_embed=guidance_embed, num_double_blocks=2))
    entries = quantised(component, nested=nested)
    values = {
        name: dequantize(entry, torch.float32) if isinstance(entry, NF4Weight) else entry
        for name, entry in entries.items()
    }
    from_nf4, from_values = (
        build_transformer(replace(component, entries=held), device="cpu", dtype=torch.float32)
        for held in (entries, values)
    )
    assert torch.equal(run(from_nf4), run(from_values))


def test_fp8_transformer_keeps_8_bits_and_equals_one_of_the_widened_weights(make_transformer):
    component = make_transformer()
    entries = {name: entry.to(torch.float8_e4m3fn) for name, entry in component.entries.items()}
    values = {name: entry.float() for name, entry in entries.items()}
    from_fp8, from_values = (
        build_transformer(replace(component, entries=held), device="cpu", dtype=torch.float32)
        for held in (entries, values)
    )
    assert isinstance(from_fp8.blocks.img_in, Fp8Linear)
    assert torch.equal(run(from_fp8), run(from_values))


def test_nf4_outside_a_linear_layer_is_named(t5):
    entries = {**t5.entries, "shared.weight": quantize(t5.entries["shared.weight"])}
    with pytest.raises(FormatError, match=r"`shared.weight` is quantised and does not belong"):
        build_t5(replace(t5, entries=entries), device="cpu", dtype=torch.float32)


def test_fused_entries_are_joined_once_and_equal_whole_ones(make_transformer):
    component = make_transformer()
    parts = {name: (entry,) for name, entry in component.entries.items()}
    name = "double_blocks.0.img_attn.qkv.weight"
    parts[name] = component.entries[name].chunk(3)
    joined = replace(component, entries=Entries(parts))
    from_parts, from_whole = (
        build_transformer(held, device="cpu", dtype=torch.float32) for held in (joined, component)
    )
    assert torch.equal(run(from_parts), run(from_whole))
