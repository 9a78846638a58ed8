import contextlib
import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_settings import SETTINGS
from PIL import Image

from flux_nf4.errors import InputError
from flux_nf4.pipeline.image_metadata import SOURCE_TYPE, read_image
from flux_nf4.server.images import check_upload, encode_png, encode_preview, transcode

RGB = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8).tobytes()
PNG = encode_png(RGB, 48, 32, SETTINGS)
FORMATS = ("png", "jpeg", "webp")


def encoded(form, mode="RGB", **options):
    file = io.BytesIO()
    Image.frombytes("RGB", (48, 32), RGB).convert(mode).save(file, form, **options)
    return file.getvalue()


def replaced(data, kind, change):
    """`data` with the body of one PNG chunk changed, and its checksum right."""
    start = data.index(kind)
    length = int.from_bytes(data[start - 4 : start], "big")
    body = change(data[start + 4 : start + 4 + length])
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[: start - 4] + chunk + data[start + 8 + length :]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_still_images_are_accepted_with_their_size(form, mode):
    if form == "JPEG" and mode in ("RGBA", "P"):
        mode = "CMYK"
    upload = check_upload(encoded(form, mode), max_pixels=48 * 32)

    assert (upload.width, upload.height) == (48, 32)


def test_an_image_on_its_side_has_the_size_that_one_sees():
    exif = Image.Exif()
    exif[0x0112] = 6
    upload = check_upload(encoded("JPEG", exif=exif), max_pixels=48 * 32)

    assert (upload.width, upload.height) == (32, 48)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(form):
    with pytest.raises(InputError, match="not a PNG, JPEG or WebP"):
        check_upload(encoded(form), max_pixels=10**6)


def test_more_pixels_than_allowed_are_refused_and_counted():
    with pytest.raises(InputError, match=r"48 x 32 pixels, more than 1535"):
        check_upload(encoded("PNG"), max_pixels=48 * 32 - 1)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused(form):
    with pytest.raises(InputError, match="animation"):
        check_upload(
            encoded(form, save_all=True, append_images=[Image.new("RGB", (48, 32))]),
            max_pixels=10**6,
        )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_cut_short_is_refused(form, share):
    data = encoded(form)
    with pytest.raises(InputError):
        check_upload(data[: int(len(data) * share)], max_pixels=10**6)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("decoded"))
    bomb = replaced(encoded("PNG"), b"IHDR", lambda body: struct.pack(">II", 9**5, 9**5) + body[8:])
    with pytest.raises(InputError, match="59049 x 59049 pixels"):
        check_upload(bomb, max_pixels=16 * 10**6)


def test_a_file_with_two_sizes_is_refused():
    webp = encoded("WEBP")
    lie = struct.pack("<4sIB3x", b"VP8X", 10, 0) + b"\x07\0\0" + b"\x07\0\0"
    with pytest.raises(InputError):
        check_upload(webp[:12] + lie + webp[12:], max_pixels=64)


def test_pillows_own_limit_of_pixels_stays_on():
    assert Image.MAX_IMAGE_PIXELS is not None


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0), st.binary(min_size=1, max_size=4))
def test_damage_is_an_input_error_or_harmless(form, place, junk):
    data = encoded(form)
    place %= len(data)
    with contextlib.suppress(InputError):
        check_upload(data[:place] + junk + data[place + len(junk) :], max_pixels=10**6)


def test_no_address_in_memory_is_told_to_a_stranger():
    data = replaced(encoded("PNG"), b"IHDR", lambda body: body[:8] + b"\xff" * 5)
    with pytest.raises(InputError, match=r"damaged: it cannot be decoded\n"):
        check_upload(data, max_pixels=10**6)


def test_a_png_holds_its_pixels_exactly():
    assert Image.open(io.BytesIO(PNG)).tobytes() == RGB


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_keeps_settings_text_and_marker(form):
    record = read_image(transcode(PNG, form))

    assert record.settings == SETTINGS
    assert record.parameters == SETTINGS.to_a1111()
    assert record.is_declared_generated


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_tools_find_the_text_where_a1111_writes_it(form):
    opened = Image.open(io.BytesIO(transcode(PNG, form)))
    comment = opened.getexif().get_ifd(0x8769)[0x9286]

    assert comment == b"UNICODE\0" + SETTINGS.to_a1111().encode("utf-16-be")


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_the_xmp_packet_is_well_formed_xml(form):
    from xml.etree import ElementTree as ET

    root = ET.fromstring(Image.open(io.BytesIO(transcode(PNG, form))).info["xmp"])
    values = [value for node in root.iter() for value in node.attrib.values()]

    assert values[1:] == [SOURCE_TYPE, json.dumps(dataclasses.asdict(SETTINGS))]


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_quality_decides_the_size(form):
    assert len(transcode(PNG, form, 20)) < len(transcode(PNG, form, 95))


def test_a_png_stays_as_it_is():
    assert transcode(PNG, "png", 10) is PNG


def test_texts_too_long_for_a_jpeg_are_left_out_and_the_marker_stays():
    png = encode_png(RGB, 48, 32, dataclasses.replace(SETTINGS, prompt="猫" * 40_000))
    record = read_image(transcode(png, "jpeg"))

    assert (record.parameters, record.settings) == ("", None)
    assert record.is_declared_generated


def test_a_webp_holds_texts_of_any_length():
    settings = dataclasses.replace(SETTINGS, prompt="猫" * 40_000)
    assert read_image(transcode(encode_png(RGB, 48, 32, settings), "webp")).settings == settings


def test_a_preview_is_a_jpeg_of_the_same_size():
    opened = Image.open(io.BytesIO(encode_preview(RGB, 48, 32)))

    assert (opened.format, opened.size) == ("JPEG", (48, 32))
