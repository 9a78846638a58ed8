"""Which tensors each part must have, and of which shapes, for the sizes that it has.

Sizes are read off a few tensors, as no file names them; every other shape follows. Shapes are
those of weights, not of their packed bytes, under canonical names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from flux_nf4.errors import FormatError
from flux_nf4.formats.keymap import CLIP_PROJECTION, T5_EMBEDDING

if TYPE_CHECKING:
    from flux_nf4.formats.component import ComponentKind

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]

_TIME_CHANNELS = 256  # of the sinusoid that encodes a timestep or a guidance scale
_RGB = 3


def expected_shapes(kind: ComponentKind, shapes: Shapes) -> dict[str, Shape]:
    """Every name that a part must hold -> its shape; `shapes` are those that it has.

    Raises:
        FormatError: a tensor that tells a size is missing or has another number of axes.
    """
    makers = {"transformer": _transformer, "t5": _t5, "clip": _clip, "vae": _vae}
    return makers[kind](shapes)


def _sizes(shapes: Shapes, name: str, num_axes: int = 2) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != num_axes or 0 in shape:
        found = "is not there to be read" if shape is None else f"has the shape {list(shape)}"
        raise FormatError(f"`{name}`, which tells the sizes of this part, {found}")
    return shape


def count_numbered(names: Iterable[str], prefix: str) -> int:
    """How many blocks, or the like, are numbered after `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _linear(name: str, num_out: int, num_in: int) -> dict[str, Shape]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _norm(name: str, num_channels: int) -> dict[str, Shape]:
    return {f"{name}.weight": (num_channels,), f"{name}.bias": (num_channels,)}


def _convolution(name: str, num_out: int, num_in: int, size: int = 3) -> dict[str, Shape]:
    return {f"{name}.weight": (num_out, num_in, size, size), f"{name}.bias": (num_out,)}


def _transformer(shapes: Shapes) -> dict[str, Shape]:
    width, num_in = _sizes(shapes, "img_in.weight")
    num_double = count_numbered(shapes, "double_blocks.")
    num_single = count_numbered(shapes, "single_blocks.")
    expected = _linear("img_in", width, num_in)
    expected |= _linear("txt_in", width, _sizes(shapes, "txt_in.weight")[1])
    embedders = {
        "time_in": _TIME_CHANNELS,
        "vector_in": _sizes(shapes, "vector_in.in_layer.weight")[1],
    }
    if any(name.startswith("guidance_in.") for name in shapes):
        embedders["guidance_in"] = _TIME_CHANNELS
    for name, num_channels in embedders.items():
        expected |= _linear(f"{name}.in_layer", width, num_channels)
        expected |= _linear(f"{name}.out_layer", width, width)
    if num_double:
        expected |= _double_blocks(shapes, num_double, width)
    if num_single:
        expected |= _single_blocks(shapes, num_single, width)
    num_out = _sizes(shapes, "final_layer.linear.weight")[0]
    expected |= _linear("final_layer.linear", num_out, width)
    expected |= _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return expected


def _double_blocks(shapes: Shapes, num_blocks: int, width: int) -> dict[str, Shape]:
    scale = "norm.query_norm.scale"
    (head_dim,) = _sizes(shapes, f"double_blocks.0.img_attn.{scale}", num_axes=1)
    mlp_width, _ = _sizes(shapes, "double_blocks.0.img_mlp.0.weight")
    expected: dict[str, Shape] = {}
    for i in range(num_blocks):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            expected |= _linear(f"{name}_mod.lin", 6 * width, width)
            expected |= _linear(f"{name}_attn.qkv", 3 * width, width)
            expected |= _linear(f"{name}_attn.proj", width, width)
            expected |= _linear(f"{name}_mlp.0", mlp_width, width)
            expected |= _linear(f"{name}_mlp.2", width, mlp_width)
            expected |= _head_scales(f"{name}_attn", head_dim)
    return expected


def _single_blocks(shapes: Shapes, num_blocks: int, width: int) -> dict[str, Shape]:
    (head_dim,) = _sizes(shapes, "single_blocks.0.norm.query_norm.scale", num_axes=1)
    mlp_width = _sizes(shapes, "single_blocks.0.linear2.weight")[1] - width
    expected: dict[str, Shape] = {}
    for i in range(num_blocks):
        name = f"single_blocks.{i}"
        expected |= _linear(f"{name}.modulation.lin", 3 * width, width)
        expected |= _linear(f"{name}.linear1", 3 * width + mlp_width, width)
        expected |= _linear(f"{name}.linear2", width, width + mlp_width)
        expected |= _head_scales(name, head_dim)
    return expected


def _head_scales(name: str, head_dim: int) -> dict[str, Shape]:
    return {f"{name}.norm.{which}_norm.scale": (head_dim,) for which in ("query", "key")}


def _t5(shapes: Shapes) -> dict[str, Shape]:
    vocabulary_size, width = _sizes(shapes, T5_EMBEDDING)
    first = "encoder.block.0.layer"
    bias = f"{first}.0.SelfAttention.relative_attention_bias.weight"
    attention_width, _ = _sizes(shapes, f"{first}.0.SelfAttention.q.weight")
    mlp_width, _ = _sizes(shapes, f"{first}.1.DenseReluDense.wi_0.weight")
    expected: dict[str, Shape] = {
        T5_EMBEDDING: (vocabulary_size, width),
        bias: _sizes(shapes, bias),
        "encoder.final_layer_norm.weight": (width,),
    }
    for i in range(count_numbered(shapes, "encoder.block.")):
        layer = f"encoder.block.{i}.layer"
        expected |= {
            f"{layer}.0.SelfAttention.{name}.weight": (attention_width, width) for name in "qkv"
        }
        expected[f"{layer}.0.SelfAttention.o.weight"] = (width, attention_width)
        for name in ("wi_0", "wi_1"):
            expected[f"{layer}.1.DenseReluDense.{name}.weight"] = (mlp_width, width)
        expected[f"{layer}.1.DenseReluDense.wo.weight"] = (width, mlp_width)
        expected |= {f"{layer}.{j}.layer_norm.weight": (width,) for j in (0, 1)}
    return expected


def _clip(shapes: Shapes) -> dict[str, Shape]:
    model = "text_model"
    tokens = f"{model}.embeddings.token_embedding.weight"
    positions = f"{model}.embeddings.position_embedding.weight"
    vocabulary_size, width = _sizes(shapes, tokens)
    mlp_width, _ = _sizes(shapes, f"{model}.encoder.layers.0.mlp.fc1.weight")
    expected = {
        tokens: (vocabulary_size, width),
        positions: (_sizes(shapes, positions)[0], width),
        **_norm(f"{model}.final_layer_norm", width),
    }
    for i in range(count_numbered(shapes, f"{model}.encoder.layers.")):
        layer = f"{model}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= _linear(f"{layer}.self_attn.{name}", width, width)
        expected |= _linear(f"{layer}.mlp.fc1", mlp_width, width)
        expected |= _linear(f"{layer}.mlp.fc2", width, mlp_width)
        expected |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    if CLIP_PROJECTION in shapes:
        expected[CLIP_PROJECTION] = (_sizes(shapes, CLIP_PROJECTION)[0], width)
    return expected


def _vae(shapes: Shapes) -> dict[str, Shape]:
    num_levels = count_numbered(shapes, "encoder.down_blocks.")
    widths = [
        _sizes(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", num_axes=4)[0]
        for i in range(max(num_levels, 1))
    ]
    num_resnets = count_numbered(shapes, "encoder.down_blocks.0.resnets.")
    latents = _sizes(shapes, "decoder.conv_in.weight", num_axes=4)[1]
    expected = _convolution("encoder.conv_in", widths[0], _RGB)
    expected |= _convolution("encoder.conv_out", 2 * latents, widths[-1])  # means and variances
    expected |= _convolution("decoder.conv_in", widths[-1], latents)
    expected |= _convolution("decoder.conv_out", _RGB, widths[0])
    expected |= _norm("encoder.conv_norm_out", widths[-1])
    expected |= _norm("decoder.conv_norm_out", widths[0])
    for side in ("encoder", "decoder"):
        expected |= _middle(f"{side}.mid_block", widths[-1])
    expected |= _levels("encoder.down_blocks", "down", widths, num_resnets)
    expected |= _levels("decoder.up_blocks", "up", widths[::-1], num_resnets + 1)
    return expected


def _middle(name: str, width: int) -> dict[str, Shape]:
    attention = f"{name}.attentions.0"
    expected = _norm(f"{attention}.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        expected |= _linear(f"{attention}.{part}", width, width)
    for j in (0, 1):
        expected |= _resnet(f"{name}.resnets.{j}", width, width)
    return expected


def _levels(name: str, way: str, widths: list[int], num_resnets: int) -> dict[str, Shape]:
    expected: dict[str, Shape] = {}
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(num_resnets):
            expected |= _resnet(f"{name}.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:  # the last level of either side keeps its resolution
            expected |= _convolution(f"{name}.{i}.{way}samplers.0.conv", width, width)
    return expected


def _resnet(name: str, num_in: int, num_out: int) -> dict[str, Shape]:
    expected = _norm(f"{name}.norm1", num_in) | _norm(f"{name}.norm2", num_out)
    expected |= _convolution(f"{name}.conv1", num_out, num_in)
    expected |= _convolution(f"{name}.conv2", num_out, num_out)
    if num_in != num_out:
        expected |= _convolution(f"{name}.conv_shortcut", num_out, num_in, 1)
    return expected
