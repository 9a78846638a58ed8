"""What a worker tells of its model when it is ready."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from flux_nf4.formats.headerfile import open_header
from flux_nf4.pipeline.limits import default_steps

if TYPE_CHECKING:
    from pathlib import Path

    from flux_nf4.pipeline.load import Model

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096


def capabilities(model: Model, *, is_demo: bool, memory: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of `Capabilities`.

    Raises:
        FormatError, ModelNotFoundError: a file was changed since it was loaded.
    """
    return {
        "model": model.facts.name,
        "variant": model.variant,
        "quantization": model.quantization,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "default_width": model.facts.default_size,
        "default_height": model.facts.default_size,
        "default_steps": default_steps(model.variant),
        "embeds_guidance": model.embeds_guidance,
        "max_sequence_length": model.facts.max_sequence_length,
        "licence": model.facts.licence,
        "is_demo": is_demo,
        "sha": fingerprint(model.path),
        "memory": memory,
    }


def fingerprint(path: Path) -> str:
    """SHA-256 of the headers of a model's files, and of 4 KiB at 64 places in each one's data.

    It tells models apart, fine-tuned ones of the same layout as well, without reading gigabytes;
    it does not show that a file is undamaged. In a Diffusers folder the files are those in the
    parts' folders, by their names.

    Raises:
        FormatError, ModelNotFoundError: as `open_header`.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*/*.safetensors")):
        with open_header(file) as opened:
            start, stop = opened.data_start, opened.num_bytes
            digest.update(os.pread(opened.descriptor, start, 0))
            for offset in range(start, stop, max(_SAMPLE_BYTES, (stop - start) // _NUM_SAMPLES)):
                digest.update(os.pread(opened.descriptor, _SAMPLE_BYTES, offset))
    return digest.hexdigest()
