"""Diffusers folders: which files hold which part, and what the small configurations say."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from flux_nf4.errors import FormatError, InputError, ModelNotFoundError
from flux_nf4.formats.canonical import StoredTensor, list_names, read_component
from flux_nf4.formats.facts import FLUX_1_DEV, FLUX_1_SCHNELL, Facts
from flux_nf4.formats.keymap import QUANTIZED_KINDS
from flux_nf4.formats.strictjson import read_json_object
from flux_nf4.formats.tensorfile import TensorFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flux_nf4.formats.component import Component, ComponentKind

PART_FOLDERS: dict[ComponentKind, str] = {
    "transformer": "transformer",
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "vae": "vae",
}
_Value = TypeVar("_Value", bool, int, float)
TOKENIZER_FOLDERS: dict[Literal["t5", "clip"], str] = {"t5": "tokenizer_2", "clip": "tokenizer"}
MODEL_INDEX = "model_index.json"
_STANDARD_NAMES = [
    f"{library}.safetensors{end}"
    for library in ("diffusion_pytorch_model", "model")
    for end in ("", ".index.json")
]
_INDEX_NAME = re.compile(r".+\.safetensors\.index(\..+)?\.json")
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_FOREIGN_SUFFIXES = (".gguf", *_PICKLE_SUFFIXES)
# transformers' marker for CLIP configurations older than the real value.
_LEGACY_CLIP_EOS, _CLIP_EOS = 2, 49407
_FLUX_1_HIDDEN_SIZE = 3072


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder is laid out as Diffusers lays out a pipeline."""
    return (path / MODEL_INDEX).is_file() or (path / "transformer" / "config.json").is_file()


def is_part_folder(path: Path) -> bool:
    """Whether a folder is the `transformer` folder of such a pipeline."""
    config = path / "config.json"
    return (
        config.is_file() and read_json_object(config).get("_class_name") == "FluxTransformer2DModel"
    )


def lone_file(path: Path) -> Path:
    """The one .safetensors file of a folder that is not laid out as Diffusers does.

    Raises:
        InputError: there are several.
        ModelNotFoundError: there is none.
    """
    listing = sorted(path.iterdir())
    files = [file for file in listing if file.suffix.lower() == ".safetensors"]
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(
            f"`{path}` holds {len(files)} files that may be meant: "
            f"{list_names(file.name for file in files)}",
            hint="give the path of one of them; `flux-nf4 convert` makes one file of parts",
        )
    others = [file.name for file in listing if file.suffix.lower() in _FOREIGN_SUFFIXES]
    found = f", only {list_names(others)}, which flux-nf4 does not open" if others else ""
    raise ModelNotFoundError(
        f"`{path}` holds no .safetensors file and no Diffusers folder{found}",
        hint="give the path of a .safetensors file, or of a folder that holds one",
    )


def read_parts(path: Path) -> dict[ComponentKind, Component]:
    """Open every part that a Diffusers folder holds.

    Raises:
        FormatError: another pipeline than FLUX.1's, another quantisation, or a file that lies.
        InputError: a part could be either of two files.
        ModelNotFoundError: a part's folder holds no weights that can be read.
    """
    index = path / MODEL_INDEX
    if index.is_file():
        pipeline = read_json_object(index).get("_class_name")
        if not isinstance(pipeline, str) or not re.match(r"Flux(?![0-9])", pipeline):
            raise FormatError(
                f"`{index}` is of {pipeline!r:.80}, not a FLUX.1 pipeline",
                hint="flux-nf4 runs FLUX.1 (dev, schnell and their relatives)",
            )
    return {
        kind: read_part(kind, path / name)
        for kind, name in PART_FOLDERS.items()
        if (path / name).is_dir()
    }


def read_part(kind: ComponentKind, folder: Path) -> Component:
    """Open one part from its own folder, whole or in shards.

    Raises:
        FormatError, InputError, ModelNotFoundError: as `read_parts`.
    """
    config = folder / "config.json"
    if config.is_file():
        _check_quantization(kind, config, read_json_object(config))
    files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path, listed in files.items():
        file = TensorFile(path)
        if listed is not None and set(file.names) != listed:
            wrong = list_names(listed.symmetric_difference(file.names))
            raise FormatError(f"`{path}` does not hold what the index of its folder says: {wrong}")
        tensors.update({name: StoredTensor(file, name) for name in file.names})
    source = next(iter(files)) if len(files) == 1 else folder
    return read_component(kind, tensors, source)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files of a part, each with the names that an index says it holds.

    The standard names come first; without them a variant, such as `model.fp16.safetensors` or
    `model.safetensors.index.fp16.json` with its shards, if it is the only one.
    """
    listing = sorted(folder.iterdir())
    found = (
        [path for path in listing if path.name in _STANDARD_NAMES]
        or [path for path in listing if _INDEX_NAME.fullmatch(path.name)]
        or [path for path in listing if path.suffix == ".safetensors"]
    )
    if len(found) > 1:
        raise InputError(
            f"`{folder}` holds several sets of weights: {list_names(path.name for path in found)}",
            hint="keep one of them",
        )
    if found:
        return {found[0]: None} if found[0].suffix == ".safetensors" else _read_index(found[0])
    pickles = [path.name for path in listing if path.suffix in _PICKLE_SUFFIXES]
    raise ModelNotFoundError(
        f"`{folder}` holds no .safetensors file",
        hint=f"{list_names(pickles)} can run code when opened: get the safetensors version"
        if pickles
        else "the download is incomplete: get it again",
    )


def _read_index(path: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"`{path}` holds no `weight_map`")
    shards: dict[Path, set[str] | None] = {}
    for name, shard in weight_map.items():
        # A plain name: an index must not reach out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise FormatError(f"`{path}` names the shard {shard!r:.80} of `{name}`")
        names = shards.setdefault(path.parent / shard, set())
        assert names is not None
        names.add(name)
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelNotFoundError(
            f"`{path.parent}` lacks {list_names(absent)}, which its index names",
            hint="the download is incomplete: get it again",
        )
    return shards


def _check_quantization(kind: ComponentKind, path: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    hint = "use NF4 (bitsandbytes), bf16, fp16 or plain fp8"
    if kind not in QUANTIZED_KINDS:
        raise FormatError(
            f"`{path}`: the {kind} part is quantised; only the transformer and T5 are read so",
            hint="use that part in bf16 or fp16",
        )
    if not isinstance(quantization, dict):
        raise FormatError(f"`{path}`: `quantization_config` must be an object")
    method = quantization.get("quant_method")
    if method != "bitsandbytes" or quantization.get("load_in_4bit") is not True:
        bits = " in 8 bits" if quantization.get("load_in_8bit") is True else ""
        raise FormatError(f"`{path}`: the weights are quantised by {method!r:.40}{bits}", hint=hint)
    storage = quantization.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise FormatError(
            f"`{path}`: `bnb_4bit_quant_storage` must be 'uint8', got {storage!r:.40}", hint=hint
        )


def read_facts(path: Path, *, has_guidance: bool, hidden_size: int) -> Facts:
    """What the configurations of a Diffusers folder say; FLUX.1's values where they are silent.

    Raises:
        FormatError: a configuration holds a value of the wrong type or range.
    """
    base = FLUX_1_DEV if has_guidance else FLUX_1_SCHNELL
    values: dict[str, Any] = {"name": path.resolve().name}
    if hidden_size != _FLUX_1_HIDDEN_SIZE:
        values["licence"] = "unknown"  # not one of Black Forest Labs' own, nor made from them
    scheduler = _Config(path / "scheduler" / "scheduler_config.json")
    dynamic = scheduler.get("use_dynamic_shifting", bool, base.use_dynamic_shifting)
    values["use_dynamic_shifting"] = dynamic
    for name in ("shift", "base_shift", "max_shift"):
        values[name] = scheduler.get(name, float, getattr(base, name))
    for name in ("base_image_seq_len", "max_image_seq_len"):
        values[name] = scheduler.get(name, int, getattr(base, name))
    vae = _Config(path / "vae" / "config.json")
    values["vae_scaling_factor"] = vae.get("scaling_factor", float, base.vae_scaling_factor)
    values["vae_shift_factor"] = vae.get("shift_factor", float, base.vae_shift_factor)
    values["vae_norm_num_groups"] = vae.get("norm_num_groups", int, base.vae_norm_num_groups)
    sample_size = vae.get("sample_size", int, base.default_size)
    values["default_size"] = sample_size if sample_size <= 512 else base.default_size
    clip = _Config(path / "text_encoder" / "config.json")
    eos_token_id = clip.get("eos_token_id", int, base.clip_eos_token_id)
    is_legacy = eos_token_id == _LEGACY_CLIP_EOS
    values["clip_eos_token_id"] = _CLIP_EOS if is_legacy else eos_token_id
    tokenizer = _Config(path / TOKENIZER_FOLDERS["t5"] / "tokenizer_config.json")
    # Tokenizers without a limit say 10^30 here.
    length = tokenizer.get("model_max_length", float, float(base.max_sequence_length))
    values["max_sequence_length"] = int(min(length, base.max_sequence_length))
    try:
        return dataclasses.replace(base, **values)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error.message}", hint=error.hint) from error


def tokenizer_folders(path: Path) -> dict[Literal["t5", "clip"], Path]:
    """The tokenizers that a Diffusers folder brings along, by the text encoder that they feed."""
    folders = {kind: path / name for kind, name in TOKENIZER_FOLDERS.items()}
    return {kind: folder for kind, folder in folders.items() if folder.is_dir()}


class _Config:
    """A configuration file that may be absent, and whose values have the type asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = read_json_object(path) if path.is_file() else {}

    def get(self, key: str, kind: type[_Value], default: _Value) -> _Value:
        value = self._values.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int and abs(value) < 2**1000:
            return kind(value)
        if type(value) is not kind or abs(value) == math.inf:
            raise FormatError(f"`{self._path}`: `{key}` must be {kind.__name__}, got {value!r:.80}")
        return value
