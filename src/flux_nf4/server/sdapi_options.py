"""A1111's options and pickers: short lists, and settings that a client may change for itself.

There, options are one set for all; here each caller has his own, so that nobody changes another's
images. Few have an effect. Forge's are kept, as its clients read back what they wrote, and what
they decide there (memory, data types) is decided here when the server starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flux_nf4.memory.host import measure_host
from flux_nf4.server.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flux_nf4.server.context import Context
    from flux_nf4.server.images import ImageFormat

FORMATS: dict[str, ImageFormat] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_MAX_CALLERS = 1000
_LONGEST_TEXT = 200
_DEFAULTS: dict[str, Any] = {
    "samples_format": "png",
    "jpeg_quality": 90,
    "forge_preset": "flux",
    "forge_additional_modules": [],
    "forge_unet_storage_dtype": "Automatic",
    "forge_inference_memory": 1024,
    "forge_async_loading": "Queue",
    "forge_pin_shared_memory": "CPU",
    "CLIP_stop_at_last_layers": 1,
    "sd_vae": "Automatic",
}
_WITH_EFFECT = ("samples_format", "jpeg_quality")

EMPTY_LISTS = (
    "sd-modules",
    "sd-vae",
    "loras",
    "prompt-styles",
    "latent-upscale-modes",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "script-info",
)
PICKERS: dict[str, Any] = {
    **{name: [] for name in EMPTY_LISTS},
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "samplers": [{"name": "Euler", "aliases": ["k_euler"], "options": {}}],
    "schedulers": [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0}
        | {"need_inner_model": False}
        for name, label in (("automatic", "Automatic"), ("simple", "Simple"))
    ],
    "upscalers": [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    ],
}


class Options:
    """What each caller has set; of callers beyond a thousand the oldest are forgotten."""

    def __init__(self) -> None:
        self._changed: dict[str, dict[str, Any]] = {}

    def read(self, context: Context, caller: str) -> dict[str, Any]:
        """All options as they hold for a caller."""
        own = {"sd_model_checkpoint": context.model_names[0], "sd_checkpoint_hash": ""}
        return _DEFAULTS | self._changed.get(caller, {}) | own

    def write(self, context: Context, caller: str, values: Mapping[str, Any]) -> list[str]:
        """Keep what can be kept; returns what has no effect.

        Raises:
            ApiError: 400 or 404, a value cannot be, or it names a model that is not served.
        """
        kept, warnings = checked(context, values)
        if kept:
            self._changed[caller] = self._changed.pop(caller, {}) | kept
        if len(self._changed) > _MAX_CALLERS:
            del self._changed[next(iter(self._changed))]
        return warnings


def checked(context: Context, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options among `values` that are known, and what has no effect.

    Raises:
        ApiError: 400 or 404, a value cannot be, or it names a model that is not served.
    """
    warnings = []
    kept = {}
    for name, value in values.items():
        if name == "sd_model_checkpoint":
            warnings += _check_model(context, value)
        elif name not in _DEFAULTS:
            warnings.append(f"the option `{name[:60]}` has no effect")
        else:
            _check_option(name, value)
            kept[name] = value
            if name not in _WITH_EFFECT and value != _DEFAULTS[name]:
                warnings.append(f"the option `{name}` has no effect: the server's start decides it")
    return kept, warnings


def _check_model(context: Context, value: object) -> list[str]:
    served = context.model_names
    if not value or value in served:
        return []
    if context.settings.strict_model:
        raise ApiError(
            404,
            f"the model `{str(value)[:60]}` is not served; this is `{served[0]}`",
            code="model_not_found",
            param="sd_model_checkpoint",
        )
    return [f"the model is `{served[0]}`, not `{str(value)[:60]}`"]


def _check_option(name: str, value: object) -> None:
    if name == "samples_format":
        is_right = value in FORMATS if isinstance(value, str) else False
    elif name == "jpeg_quality":
        is_right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100
    else:
        is_right = len(repr(value)) <= _LONGEST_TEXT
    if not is_right:
        raise ApiError(
            400,
            f"the option `{name}` cannot be `{str(value)[:60]}`",
            code="invalid_value",
            param=name,
        )


def output_format(options: Mapping[str, Any]) -> tuple[ImageFormat, int | None]:
    """The format and the quality in which a caller wants images."""
    form = FORMATS[options["samples_format"]]
    return form, None if form == "png" else options["jpeg_quality"]


def models(context: Context) -> list[dict[str, Any]]:
    """The served names as checkpoints; no path leaves the server."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None}
        | {"filename": name, "config": None}
        for name in context.model_names
    ]


def memory() -> dict[str, Any]:
    """Main memory in bytes, where the system tells; the device belongs to another process."""
    host = measure_host()
    ram: dict[str, Any] = {"error": "unknown on this system"}
    if host.free is not None and host.total is not None:
        ram = {"free": host.free, "used": host.total - host.free, "total": host.total}
    return {"ram": ram, "cuda": {"error": "see `/metrics`"}}
