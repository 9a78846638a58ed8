import pytest

from flux_nf4.formats.keymap import (
    SWAPPED_HALVES,
    all_in_one_table,
    clip_table,
    t5_table,
    table_for,
    transformer_table,
    vae_table,
)


@pytest.fixture(scope="module")
def flux():
    return transformer_table(19, 38)


def test_flux_1_dev_has_780_canonical_transformer_names(flux):
    assert len(flux.names) == 2 * 314 + 152


def test_flux_1_dev_has_1160_transformer_names_in_diffusers(flux):
    assert len(flux.inverse()) == 19 * 32 + 38 * 14 + 20


@pytest.mark.parametrize(
    ("bfl", "diffusers"),
    [
        ("img_in.weight", ("x_embedder.weight",)),
        ("txt_in.bias", ("context_embedder.bias",)),
        ("time_in.in_layer.weight", ("time_text_embed.timestep_embedder.linear_1.weight",)),
        ("guidance_in.out_layer.bias", ("time_text_embed.guidance_embedder.linear_2.bias",)),
        ("vector_in.out_layer.weight", ("time_text_embed.text_embedder.linear_2.weight",)),
        ("final_layer.linear.weight", ("proj_out.weight",)),
        ("final_layer.adaLN_modulation.1.bias", ("norm_out.linear.bias",)),
        (
            "double_blocks.18.txt_attn.qkv.bias",
            tuple(f"transformer_blocks.18.attn.add_{x}_proj.bias" for x in "qkv"),
        ),
        (
            "double_blocks.0.txt_attn.norm.key_norm.scale",
            ("transformer_blocks.0.attn.norm_added_k.weight",),
        ),
        ("double_blocks.3.img_attn.proj.weight", ("transformer_blocks.3.attn.to_out.0.weight",)),
        (
            "double_blocks.3.txt_mlp.0.weight",
            ("transformer_blocks.3.ff_context.net.0.proj.weight",),
        ),
        (
            "single_blocks.37.linear1.weight",
            tuple(
                f"single_transformer_blocks.37.{x}.weight"
                for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ),
        ),
        ("single_blocks.2.linear2.weight", ("single_transformer_blocks.2.proj_out.weight",)),
        (
            "single_blocks.2.norm.query_norm.scale",
            ("single_transformer_blocks.2.attn.norm_q.weight",),
        ),
    ],
)
def test_a_transformer_name_maps_as_the_format_says(flux, bfl, diffusers):
    assert flux.names[bfl] == diffusers


def test_the_halves_of_the_last_modulation_are_the_only_swapped_ones(flux):
    assert {name for name in flux.names if "adaLN" in name} == SWAPPED_HALVES


@pytest.mark.parametrize(
    ("diffusers", "bfl"),
    [
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.0.upsamplers.0.conv.bias", "decoder.up.3.upsample.conv.bias"),
        (
            "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
            "decoder.up.0.block.0.nin_shortcut.weight",
        ),
        (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            "encoder.down.1.block.0.nin_shortcut.weight",
        ),
        (
            "encoder.down_blocks.2.downsamplers.0.conv.weight",
            "encoder.down.2.downsample.conv.weight",
        ),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("encoder.mid_block.attentions.0.group_norm.bias", "encoder.mid.attn_1.norm.bias"),
        ("decoder.mid_block.resnets.1.norm2.weight", "decoder.mid.block_2.norm2.weight"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
    ],
)
def test_a_vae_name_maps_as_the_format_says(diffusers, bfl):
    assert vae_table(4, 2).names[diffusers] == (bfl,)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.up_blocks.3.upsamplers.0.conv.weight",
        "encoder.down_blocks.3.downsamplers.0.conv.bias",
    ],
)
def test_the_last_level_of_a_vae_keeps_its_resolution(name):
    assert name not in vae_table(4, 2).names


def test_t5_xxl_has_219_names():
    assert len(t5_table(24).names) == 219


def test_clip_l_has_197_names():
    assert len(clip_table(12).names) == 197


def test_only_the_first_t5_block_has_a_position_bias():
    names = [name for name in t5_table(24).names if "relative_attention_bias" in name]
    assert names == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]


def test_flattened_clip_names_lose_their_prefix_only():
    names = clip_table(1, flattened=True).names
    assert names["text_model.final_layer_norm.bias"] == ("final_layer_norm.bias",)


def test_guidance_is_optional_as_a_whole(flux):
    without = {name for name in flux.names if not name.startswith("guidance_in.")}
    assert flux.required(without) == without


def test_half_of_guidance_requires_the_other_half(flux):
    assert "guidance_in.out_layer.bias" in flux.required({"guidance_in.in_layer.weight"})


@pytest.mark.parametrize("dialect", ["bfl", "diffusers"])
@pytest.mark.parametrize("counts", [(19, 38), (8, 38), (1, 2), (0, 1), (1, 0)])
def test_counts_and_dialect_are_read_off_transformer_names(dialect, counts):
    table = transformer_table(*counts, dialect)
    assert table_for("transformer", set(table.inverse())) == table


@pytest.mark.parametrize("dialect", ["bfl", "diffusers"])
@pytest.mark.parametrize("counts", [(4, 2), (4, 1), (2, 3), (1, 1)])
def test_counts_and_dialect_are_read_off_vae_names(dialect, counts):
    table = vae_table(*counts, dialect)
    assert table_for("vae", set(table.inverse())) == table


@pytest.mark.parametrize("flattened", [True, False])
def test_counts_and_dialect_are_read_off_clip_names(flattened):
    table = clip_table(3, flattened=flattened)
    assert table_for("clip", set(table.inverse())) == table


def test_counts_are_read_off_t5_names():
    assert table_for("t5", set(t5_table(5).names)) == t5_table(5)


def test_an_all_in_one_file_has_bfl_vae_names():
    assert all_in_one_table("vae", vae_table(4, 2).names) == vae_table(4, 2, "bfl")


@pytest.mark.parametrize("kind", ["transformer", "t5", "clip", "vae"])
def test_a_huge_block_number_does_not_make_a_huge_table(kind):
    names = {
        "double_blocks.999999999.img_mod.lin.weight",
        "encoder.block.999999999.layer.0.layer_norm.weight",
        "encoder.layers.999999999.layer_norm1.weight",
        "encoder.down.999999999.block.0.conv1.weight",
    }
    assert len(table_for(kind, names).names) < 200


def test_two_hostile_counts_do_not_multiply():
    names = {f"encoder.down.{i}.x" for i in range(5000)}
    names |= {f"encoder.down.0.block.{j}.x" for j in range(5000)}
    assert len(table_for("vae", names).names) < 50_000


def test_digits_of_other_scripts_are_no_block_numbers():
    assert table_for("t5", {"encoder.block.\u0663.layer.0.layer_norm.weight"}) == t5_table(0)
