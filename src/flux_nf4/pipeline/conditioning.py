"""From prompts to what the denoise loop reads: text tokens, and one modulation row a step.

Everything here runs once a request, whatever the number of images: the text encoders, then the
conditioner. After that neither is needed any more, and their memory may go to the blocks.

Shape letters, in this module only:
    T  text tokens    D  token channels    P  pooled channels
    S  steps          K  steps + 1         M  modulation width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flux_nf4.errors import NumericalError
from flux_nf4.pipeline.events import Notice
from flux_nf4.pipeline.limits import DEFAULT_DISTILLED_GUIDANCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from flux_nf4.pipeline.events import Stage
    from flux_nf4.pipeline.load import Model
    from flux_nf4.pipeline.request import GenerationRequest

NOTICE_CHARACTERS = 200
# FLUX.1-dev is made for 0.1 to 2 megapixels, twice the area of its default size.
MAX_AREA_RATIO = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """What the encoders make of a prompt: tokens (1, T, D), and one vector (1, P) for all of it."""

    txt: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """What the blocks read for one prompt: text tokens (1, T, D), a table (S, 1, M)."""

    txt: Tensor
    table: Tensor


def text_length(model: Model, request: GenerationRequest) -> int:
    """How many T5 tokens are read: what was asked for, else what the model was trained with."""
    return request.max_sequence_length or model.facts.max_sequence_length


def encode_text(model: Model, request: GenerationRequest) -> list[Text]:
    """The prompt, and the negative prompt where it is used, each through T5 and CLIP.

    Raises:
        NumericalError: an encoder gave NaN or infinity.
    """
    prompts = [request.prompt]
    if request.is_guided:
        prompts.append(request.negative_prompt)
    length = text_length(model, request)
    # Of all prompts together: encoded one by one they would differ in the last bits.
    texts = model.memory.texts.get((length, *prompts), lambda: _encode(model, prompts, length))
    return [
        Text(txt=text.txt.to(model.device), pooled=text.pooled.to(model.device)) for text in texts
    ]


def _encode(model: Model, prompts: list[str], length: int) -> list[Text]:
    """Each prompt's text, in main memory."""
    t5_ids, _ = model.tokenizers.encode_t5(prompts, length)
    clip_ids = model.tokenizers.encode_clip(prompts)
    with model.memory.phase("text"):
        txt = model.t5(t5_ids.to(model.device)).to(model.dtype)
        pooled = model.clip(clip_ids.to(model.device)).to(model.dtype)
        require_finite(txt, "text", "T5")
        require_finite(pooled, "text", "CLIP")
    txt, pooled = txt.cpu(), pooled.cpu()
    return [Text(txt=txt[i : i + 1], pooled=pooled[i : i + 1]) for i in range(len(prompts))]


def condition(
    model: Model, request: GenerationRequest, texts: Sequence[Text], sigmas_K: Tensor
) -> list[Conditioning]:
    """Every modulation vector of every step, in one pass of the conditioner for each prompt.

    Raises:
        NumericalError: the conditioner gave NaN or infinity.
    """
    timesteps_S = sigmas_K[:-1].to(model.device)
    guidance = None
    if model.embeds_guidance:
        guidance = torch.tensor([float(request.distilled_guidance_scale)], device=model.device)
    conditionings = []
    with model.memory.phase("modulation", num_passes=len(texts)):
        for text in texts:
            table = model.transformer.conditioner.table(timesteps_S, guidance, text.pooled)
            require_finite(table, "modulation")
            conditionings.append(Conditioning(txt=text.txt, table=table))
    return conditionings


def notices(model: Model, request: GenerationRequest) -> Iterator[Notice]:
    """What the caller should know about the request before it runs."""
    limit = text_length(model, request)
    prompts = {"prompt": request.prompt}
    if request.is_guided:
        prompts["negative prompt"] = request.negative_prompt
    elif request.negative_prompt:
        yield Notice(message="the negative prompt is not used: the true CFG scale is 1")
    if not request.prompt.strip():
        yield Notice(message="the prompt is empty: the model draws what it likes")
    for name, prompt in prompts.items():
        _, (dropped,) = model.tokenizers.encode_t5([prompt], limit)
        if dropped:
            yield Notice(
                message=f"the {name} is longer than {limit} tokens; not read: `{_cut(dropped)}`"
            )
            continue
        dropped = model.tokenizers.dropped_by_clip(prompt)
        if dropped:
            yield Notice(
                message=f"only T5 reads the whole {name}; CLIP stops before: `{_cut(dropped)}`"
            )
    if limit > model.facts.max_sequence_length:
        trained = model.facts.max_sequence_length
        yield Notice(message=f"{limit} text tokens are more than the model's own {trained}")
    size = model.facts.default_size
    if request.width * request.height > MAX_AREA_RATIO * size**2:
        yield Notice(
            message=f"the model is made for {size} x {size} pixels; "
            f"{request.width} x {request.height} may not show what the prompt says"
        )
    if not model.embeds_guidance and request.distilled_guidance_scale != DEFAULT_DISTILLED_GUIDANCE:
        yield Notice(message="this model has no guidance embedding: distilled guidance is not used")


def require_finite(values: Tensor, stage: Stage, where: str = "") -> None:
    """Raises NumericalError, naming the stage, where a value is NaN or infinite."""
    if values.isfinite().all():
        return
    place = f"`{stage}`, {where}" if where else f"`{stage}`"
    raise NumericalError(
        f"NaN or infinity in stage {place}",
        hint="compute in float32, or check the file: its weights may be damaged",
    )


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= NOTICE_CHARACTERS else text[: NOTICE_CHARACTERS - 3] + "..."
