"""The settings that made an image, in the image: for other tools, for us, and for the law.

Three texts, as a PNG names them:
    parameters          A1111's line, which its family of tools and many viewers read
    flux_nf4            our own JSON, exact and complete: what `info` and a repetition go by
    XML:com.adobe.xmp   IPTC digital source type `trainedAlgorithmicMedia`: made by a model

In JPEG and WebP the first is the EXIF `UserComment`, as A1111 has it, and the second a property
of the XMP packet.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_nf4 import __version__
from flux_nf4.errors import DiskError, FormatError
from flux_nf4.pipeline.image_header import (
    EXIF_POINTER,
    MAX_JPEG_SEGMENT_BYTES,
    PARAMETERS_KEY,
    UNICODE_COMMENT,
    USER_COMMENT,
    XMP_KEY,
    read_header,
)
from flux_nf4.pipeline.png import write_png

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from flux_nf4.pipeline.png import ImageHeader

SETTINGS_KEY = "flux_nf4"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SETTINGS_PROPERTY = "flux_nf4:Settings"
_SETTINGS_IN_XMP = re.compile(rf'{_SETTINGS_PROPERTY}="([^"]*)"')
# Of the length that a JPEG has for a part of its metadata, what stands before the metadata.
_MAX_JPEG_METADATA = MAX_JPEG_SEGMENT_BYTES - 100

# `name: value` pairs of A1111's last line; a value with commas, colons or lines is a JSON string.
# It starts at a letter, not at the space before it: a line of nothing but spaces is read at once.
_PAIR = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """Everything that decided an image; the same settings and software give the same image.

    `strength` None: drawn from noise alone; else from another image, which is not in it.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    distilled_guidance_scale: float | None
    seed: int
    schedule: str = "flux"
    strength: float | None = None
    max_sequence_length: int
    model: str
    quantization: str
    dtype: str
    version: str = __version__

    def to_a1111(self) -> str:
        """A1111's text: prompt, negative prompt, and one line of `name: value` pairs."""
        pairs = {
            "Steps": self.num_inference_steps,
            "Sampler": "Euler",
            # A1111's name for what Forge does; it has none for the shift by image size.
            "Schedule type": "Simple" if self.schedule == "forge" else None,
            "CFG scale": f"{self.guidance_scale:g}",
            "Distilled CFG Scale": (
                None
                if self.distilled_guidance_scale is None
                else f"{self.distilled_guidance_scale:g}"
            ),
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Denoising strength": None if self.strength is None else f"{self.strength:g}",
            "Model": self.model,
            "Version": f"flux-nf4 {self.version}",
        }
        line = ", ".join(f"{k}: {_quote(str(v))}" for k, v in pairs.items() if v is not None)
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        return f"{self.prompt}{negative}\n{line}"

    def to_json(self) -> str:
        """Our own text: every field under its own name."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ImageSettings:
        """Read what `to_json` wrote; fields that a newer version added are passed over.

        Raises:
            FormatError: it is not JSON, or a field is missing or of the wrong type.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the settings in the image are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise FormatError("the settings in the image are not a JSON object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in values
        ]
        if missing:
            raise FormatError(f"the settings in the image lack {', '.join(missing)}")
        chosen = {name: value for name, value in values.items() if name in known}
        for name, value in chosen.items():
            _check_type(name, value, str(known[name].type))
        return cls(**chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What an image file tells: its size; our settings, or A1111's pairs; whether a model made it.

    `parameters` is A1111's text as it stands, `pairs` that text taken apart (`Prompt` and
    `Negative prompt` among its names); both are empty where the file has none.
    """

    width: int
    height: int
    settings: ImageSettings | None
    parameters: str
    pairs: Mapping[str, str]
    is_declared_generated: bool


def save_image(path: str | Path, image: Image, settings: ImageSettings) -> None:
    """Write a PNG with the settings in it; the file is there whole, or as it was before.

    Raises:
        InputError: the name does not end in `.png`.
        DiskError: no such folder, no permission, no space.
    """
    write_png(path, image, png_texts(settings))


def png_texts(settings: ImageSettings) -> dict[str, str]:
    """The three texts of a PNG."""
    return {
        PARAMETERS_KEY: settings.to_a1111(),
        SETTINGS_KEY: settings.to_json(),
        XMP_KEY: xmp_packet(),
    }


def exif_and_xmp(record: ImageRecord, *, is_jpeg: bool) -> tuple[bytes, bytes]:
    """An image's settings as the metadata of a JPEG or WebP file.

    A JPEG holds 64 KB of each: of a longer prompt neither text is kept, as half of one would be
    read as the whole. That a model made the image is said in any case.
    """
    from PIL.Image import Exif

    comment = UNICODE_COMMENT + record.parameters.encode("utf-16-be") if record.parameters else b""
    xmp = xmp_packet(record.settings).encode()
    if is_jpeg and max(len(comment), len(xmp)) > _MAX_JPEG_METADATA:
        return b"", xmp_packet().encode()
    exif = Exif()
    if comment:
        exif.get_ifd(EXIF_POINTER)[USER_COMMENT] = comment
    return exif.tobytes() if comment else b"", xmp


def xmp_packet(settings: ImageSettings | None = None) -> str:
    """The XMP that says that a model made the image, and with which settings if they are given.

    Source: XMP specification, part 1 (the packet's id is a constant of it), and IPTC's "Digital
    Source Type" vocabulary.
    """
    ours = ""
    if settings is not None:
        # ASCII, as XML cannot hold every character that a prompt may.
        text = html.escape(json.dumps(dataclasses.asdict(settings)))
        ours = f'\n    xmlns:flux_nf4="urn:flux-nf4"\n    {_SETTINGS_PROPERTY}="{text}"'
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"{ours}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


def read_image(source: str | Path | bytes) -> ImageRecord:
    """Read what a PNG, JPEG or WebP, a file or its bytes, tells about its making.

    Raises:
        DiskError: the file cannot be read.
        FormatError: it is none of these, or damaged.
    """
    if isinstance(source, bytes):
        return _record(read_header(io.BytesIO(source), "the image"))
    try:
        with Path(source).open("rb") as file:
            return _record(read_header(file, f"`{source}`"))
    except OSError as error:
        raise DiskError(f"`{source}` cannot be read: {error.strerror or error}") from error


def _record(header: ImageHeader) -> ImageRecord:
    xmp = header.texts.get(XMP_KEY, "")
    in_xmp = _SETTINGS_IN_XMP.search(xmp)
    settings_text = header.texts.get(SETTINGS_KEY) or (in_xmp and html.unescape(in_xmp[1]))
    parameters = header.texts.get(PARAMETERS_KEY, "")
    return ImageRecord(
        width=header.width,
        height=header.height,
        settings=ImageSettings.from_json(settings_text) if settings_text else None,
        parameters=parameters,
        pairs=parse_a1111(parameters),
        is_declared_generated=SOURCE_TYPE in xmp,
    )


def parse_a1111(text: str) -> dict[str, str]:
    """Take A1111's text apart as A1111 does: the last line holds pairs if it holds three.

    Where a prompt contains such lines itself the text is ambiguous; our JSON is not.
    """
    if not text:
        return {}
    *lines, last = text.strip().split("\n")
    pairs = {name: _unquote(value.strip()) for name, value in _PAIR.findall(last)}
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    prompt: list[str] = []
    negative: list[str] = []
    is_negative = False
    for line in lines:
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if is_negative else prompt).append(line)
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    return {name: value for name, value in found.items() if value} | pairs


def _quote(value: str) -> str:
    is_plain = value == value.strip() and not set(value) & set(',:\n"')
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _check_type(name: str, value: Any, annotation: str) -> None:
    wanted: tuple[type, ...] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }[annotation]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise FormatError(f"the image's setting `{name}` must be {annotation}, got `{value!r:.80}`")
