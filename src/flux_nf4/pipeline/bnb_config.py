"""Read a `quantization_config` as people write it for bitsandbytes, and refuse what is not meant.

A dict holds only what its writer wished. A `BitsAndBytesConfig` (anything with `to_dict`) holds
defaults beside it; of those, the ones that say nothing about four bits are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from flux_nf4.errors import InputError
from flux_nf4.pipeline.convert import QuantizationWish

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = (
    "write {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4', "
    "'bnb_4bit_use_double_quant': False}, "
    "or leave `quantization_config` out to take the weights as they are"
)
# What transformers' BitsAndBytesConfig puts beside the four-bit keys, with its defaults.
OTHER_DEFAULTS: dict[str, tuple[object, ...]] = {
    "quant_method": ("bitsandbytes",),
    "_load_in_4bit": (True,),
    "_load_in_8bit": (False,),
    "load_in_8bit": (False,),
    "llm_int8_threshold": (6.0,),
    "llm_int8_skip_modules": (None, []),
    "llm_int8_enable_fp32_cpu_offload": (False,),
    "llm_int8_has_fp16_weight": (False,),
}


def parse_dtype(name: str, value: object) -> torch.dtype:
    """A `torch.dtype`, or its name with or without `torch.`.

    Raises:
        InputError: it is neither.
    """
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise InputError(f"`{name}` must be a torch.dtype such as torch.bfloat16, got `{value!r}`")
    return found


def parse_quantization_config(config: object) -> tuple[QuantizationWish, torch.dtype | None]:
    """What is wished for, and the dtype to compute in if the config names one.

    Raises:
        InputError: a key is unknown, or a value is not one that four-bit weights can have.
    """
    values = _as_mapping(config)
    unknown = sorted(str(key) for key in values if key not in _CHECKS)
    if unknown:
        raise InputError(
            f"`quantization_config` has unknown keys: {', '.join(f'`{key}`' for key in unknown)}",
            hint=f"the keys are {', '.join(f'`{key}`' for key in _CHECKS)}",
        )
    for key, value in values.items():
        _CHECKS[key](key, value)
    if values.get("load_in_4bit") is not True:
        raise InputError("`quantization_config` must hold `load_in_4bit`: True", hint=HELP)
    wish = QuantizationWish(
        quant_type=values.get("bnb_4bit_quant_type"),
        double_quant=values.get("bnb_4bit_use_double_quant"),
    )
    name = "bnb_4bit_compute_dtype"
    return wish, parse_dtype(name, values[name]) if name in values else None


def _as_mapping(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict) or isinstance(config, type):
        raise InputError(
            f"`quantization_config` must be a dict or a BitsAndBytesConfig, got `{config!r:.80}`",
            hint=HELP,
        )
    values = dict(to_dict())
    for key, defaults in OTHER_DEFAULTS.items():
        if key in values and values[key] in defaults:
            del values[key]
    # Its default is float32, whether anybody wished for that or not.
    if values.get("bnb_4bit_compute_dtype") in ("float32", torch.float32):
        del values["bnb_4bit_compute_dtype"]
    return values


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"`{key}` must be True or False, got `{value!r}`")


def _check_quant_type(key: str, value: object) -> None:
    if value not in ("nf4", "fp4"):
        raise InputError(f"`{key}` must be `nf4` or `fp4`, got `{value!r}`")


def _check_storage(key: str, value: object) -> None:
    if parse_dtype(key, value) != torch.uint8:
        raise InputError(f"`{key}` must be torch.uint8, got `{value!r}`")


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "load_in_4bit": _check_bool,
    "bnb_4bit_quant_type": _check_quant_type,
    "bnb_4bit_use_double_quant": _check_bool,
    "bnb_4bit_compute_dtype": parse_dtype,
    "bnb_4bit_quant_storage": _check_storage,
}
