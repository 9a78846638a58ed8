"""Read the sizes of a network off the names and shapes of its tensors.

Files name no sizes: pruned and extended models share every name with FLUX.1-dev. So blocks are
counted and widths are read, never assumed.
"""

from __future__ import annotations

import re

from flux_nf4.errors import FormatError, InputError
from flux_nf4.formats.component import Component
from flux_nf4.model.config import FluxConfig, axes_for_head


def flux_config(component: Component) -> FluxConfig:
    """The sizes of a FLUX transformer, from its entries under BFL's names.

    Raises:
        FormatError: an entry that tells a size is missing, or the sizes cannot be FLUX's.
    """
    num_double_blocks = count_blocks(component, "double_blocks")
    num_single_blocks = count_blocks(component, "single_blocks")
    hidden_size, in_channels = matrix_shape(component, "img_in.weight")
    attention = "double_blocks.0.img_attn" if num_double_blocks else "single_blocks.0"
    (head_dim,) = shape_of(component, f"{attention}.norm.query_norm.scale", num_axes=1)
    try:
        return FluxConfig(
            in_channels=in_channels,
            out_channels=matrix_shape(component, "final_layer.linear.weight")[0],
            hidden_size=hidden_size,
            num_heads=hidden_size // head_dim,
            num_double_blocks=num_double_blocks,
            num_single_blocks=num_single_blocks,
            context_dim=matrix_shape(component, "txt_in.weight")[1],
            pooled_dim=matrix_shape(component, "vector_in.in_layer.weight")[1],
            axes_dim=axes_for_head(head_dim),
            guidance_embed=any(name.startswith("guidance_in.") for name in component.entries),
        )
    except (InputError, ZeroDivisionError) as error:
        raise FormatError(
            f"the transformer in `{component.source}` cannot be FLUX: heads of {head_dim} channels "
            f"in a hidden size of {hidden_size}"
        ) from error


def count_blocks(component: Component, prefix: str) -> int:
    """How many `prefix.0.`, `prefix.1.` ... there are.

    Raises:
        FormatError: a number in between is missing.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,5}})\.")
    matches = (pattern.match(name) for name in component.entries)
    found = {int(match[1]) for match in matches if match}
    missing = [str(index) for index in range(max(found, default=-1)) if index not in found]
    if missing:
        raise FormatError(
            f"the {component.kind} in `{component.source}` has `{prefix}` up to {max(found)} but "
            f"lacks {len(missing)} of them: {', '.join(missing[:20])}"
        )
    return len(found)


def matrix_shape(component: Component, name: str) -> tuple[int, int]:
    """Rows and columns of a matrix that must be there.

    Raises:
        FormatError: there is no such entry, it is no matrix, or it is empty.
    """
    rows, columns = shape_of(component, name, num_axes=2)
    return rows, columns


def shape_of(component: Component, name: str, *, num_axes: int) -> tuple[int, ...]:
    """The shape of an entry that must be there.

    Raises:
        FormatError: there is no such entry, it has another number of axes, or it is empty.
    """
    if name not in component.entries:
        raise FormatError(
            f"the {component.kind} in `{component.source}` lacks `{name}`",
            hint=f"it does not look like FLUX's {component.kind}, or the file is incomplete",
        )
    shape = entry_shape(component, name)
    if len(shape) != num_axes or 0 in shape:
        raise FormatError(
            f"`{name}` in `{component.source}` has shape {shape}; it must have {num_axes} axes, "
            "none of them empty"
        )
    return shape


def entry_shape(component: Component, name: str) -> tuple[int, ...]:
    """The shape that an entry has when it is read, without reading it: pieces add up their rows."""
    shapes = [tuple(part.shape) for part in component.parts(name)]
    if len(shapes) == 1:
        return shapes[0]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]
