import contextlib
import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.image_header import user_comment
from flux_nf4.pipeline.image_metadata import ImageSettings, parse_a1111, read_image
from flux_nf4.pipeline.png import SIGNATURE

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
lines = st.text("abc ,:\"'\\é猫", max_size=30).map(str.strip)
settings = st.builds(
    ImageSettings,
    prompt=texts,
    negative_prompt=texts,
    width=st.integers(64, 4096),
    height=st.integers(64, 4096),
    num_inference_steps=st.integers(1, 1000),
    guidance_scale=st.floats(1, 100),
    distilled_guidance_scale=st.none() | st.floats(0, 100),
    seed=st.integers(0, 2**64 - 1),
    max_sequence_length=st.integers(2, 512),
    model=texts,
    quantization=texts,
    dtype=texts,
)


@given(settings)
def test_settings_survive_their_json(values):
    assert ImageSettings.from_json(values.to_json()) == values


@given(settings, lines.filter(lambda line: not line.startswith("Negative prompt:")), lines)
def test_the_a1111_text_gives_every_value_back(values, prompt, model):
    import dataclasses

    values = dataclasses.replace(values, prompt=prompt, negative_prompt="", model=model)
    pairs = parse_a1111(values.to_a1111())
    assert pairs.get("Prompt", "") == prompt
    assert pairs["Model"] == model
    assert pairs["Seed"] == str(values.seed)


@given(texts)
def test_any_text_is_taken_apart_without_complaint(text):
    assert all(isinstance(value, str) for value in parse_a1111(text).values())


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


kinds = st.sampled_from([b"IHDR", b"tEXt", b"zTXt", b"iTXt", b"IDAT", b"IEND"])
bodies = st.binary(max_size=60) | st.sampled_from(
    [b"flux_nf4\0{}", b"parameters\0a", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)]
)
streams = st.lists(st.builds(chunk, kinds, bodies) | st.binary(max_size=20), max_size=6)


def refused_or_read(data):
    with contextlib.suppress(FormatError):
        assert read_image(data).width > 0


@given(streams)
def test_any_png_is_read_or_refused_as_a_format_error(parts):
    refused_or_read(SIGNATURE + b"".join(parts))


segments = st.builds(
    lambda marker, body: b"\xff" + marker + struct.pack(">H", len(body) + 2) + body,
    st.sampled_from([b"\xe1", b"\xc0", b"\xc2", b"\xda", b"\xd9", b"\xfe"]),
    st.binary(max_size=40).map(lambda body: b"Exif\0\0" + body) | st.binary(max_size=60),
)
riffs = st.builds(
    lambda kind, body: kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2),
    st.sampled_from([b"VP8 ", b"VP8L", b"VP8X", b"EXIF", b"XMP ", b"ANIM"]),
    st.binary(max_size=60),
)
directories = st.builds(
    bytes.__add__, st.sampled_from([b"MM\0*", b"II*\0"]), st.binary(max_size=80)
)


@given(st.lists(segments | st.binary(max_size=20), max_size=6))
def test_any_jpeg_is_read_or_refused_as_a_format_error(parts):
    refused_or_read(b"\xff\xd8\xff\xfe\0\2" + b"".join(parts))


@given(st.lists(riffs | st.binary(max_size=20), max_size=6))
def test_any_webp_is_read_or_refused_as_a_format_error(parts):
    refused_or_read(b"RIFF\0\0\0\0WEBP" + b"".join(parts))


@given(directories)
def test_any_exif_has_a_text_for_a_comment(block):
    assert isinstance(user_comment(block), str)
