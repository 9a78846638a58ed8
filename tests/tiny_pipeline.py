"""A whole tiny pipeline, weights and tokenizers, as a Diffusers folder and in memory."""

from pathlib import Path

import torch
from checkpoints import save_diffusers_folder, tiny_models
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

WORDS = (
    "a",
    "an",
    "the",
    "red",
    "cat",
    "dog",
    "apple",
    "on",
    "in",
    "big",
    "photo",
    "of",
    "background",
)


def tiny_t5_tokenizer():
    """Unigram pieces: whole words, then letters; `<pad>` 0, `</s>` 1, as T5 has them."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -9.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def tiny_clip_tokenizer():
    """Letters only, every one also as the end of a word; start 0 and end 1, as the tiny CLIP's."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(vocabulary)},
            [],
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def tiny_parts(*, seed=0, **sizes):
    """`tiny_models` in evaluation mode: those made from a config train, and T5 would drop out."""
    return {kind: part.eval() for kind, part in tiny_models(seed=seed, **sizes).items()}


def save_tiny_folder(folder, **options):
    """`save_diffusers_folder` with tokenizers beside the weights: float32 unless told otherwise."""
    seed, models = options.pop("seed", 0), options.pop("models", None)
    models = models or tiny_parts(seed=seed, guidance=options.get("guidance", True))
    options = {"dtype": torch.float32} | options
    folder = save_diffusers_folder(Path(folder), models=models, **options)
    for name, tokenizer in (
        ("tokenizer_2", tiny_t5_tokenizer()),
        ("tokenizer", tiny_clip_tokenizer()),
    ):
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


def their_pipeline(parts):
    """Diffusers' FluxPipeline on the modules of `tiny_parts` and the tiny tokenizers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    t5, clip = tiny_t5_tokenizer(), tiny_clip_tokenizer()
    t5.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    clip.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=parts["vae"],
        text_encoder=parts["clip"],
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=clip, pad_token="<|endoftext|>", model_max_length=77
        ),
        text_encoder_2=parts["t5"],
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=t5, pad_token="<pad>", eos_token="</s>", model_max_length=512
        ),
        transformer=parts["transformer"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
