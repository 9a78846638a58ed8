"""JPEG and WebP containers; PNG has a file of its own."""

import io
import struct

import pytest
from PIL import Image

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.image_header import read_header, user_comment

FORMS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"xmp": b"<x/>"}),
]


def encoded(form, image=None, **options):
    file = io.BytesIO()
    (image or Image.new("RGB", (301, 77))).save(file, form, **options)
    return file.getvalue()


def header(data):
    return read_header(io.BytesIO(data), "the file")


def exif(comment, order=">"):
    """An EXIF block with one comment, laid out by hand."""
    mark = b"MM\0*" if order == ">" else b"II*\0"
    directory = struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    ours = struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    return mark + struct.pack(f"{order}I", 8) + directory + ours + comment


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_format_and_size_are_those_that_pillow_finds(form, options):
    found = header(encoded(form, **options))

    assert (found.format, found.width, found.height) == (form, 301, 77)
    assert not found.is_animated


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_known_as_one(form):
    red = Image.new("RGB", (301, 77), "red")

    assert header(encoded(form, save_all=True, append_images=[red])).is_animated


def test_the_first_part_of_a_webp_counts_for_its_size():
    simple = encoded("WEBP")
    big = struct.pack("<4sIB3x", b"VP8X", 10, 0) + b"\xff\xff\x00" + b"\xff\xff\x00"

    assert header(simple[:12] + big + simple[12:]).width == 0x10000


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_a_comment_and_xmp_are_found(form):
    block = b"Exif\0\0" + exif(b"UNICODE\0" + "a 猫".encode("utf-16-be"))
    found = header(encoded(form, exif=block, xmp=b"<x>\xc3\xa9</x>"))

    assert found.texts == {"parameters": "a 猫", "XML:com.adobe.xmp": "<x>é</x>"}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_a_comment_is_read_in_either_byte_order(order, codec):
    assert user_comment(exif(b"UNICODE\0" + "Steps: 2, 猫".encode(codec), order)) == "Steps: 2, 猫"


@pytest.mark.parametrize("prefix", [b"ASCII\0\0\0", bytes(8), b""])
def test_a_comment_is_read_with_any_prefix(prefix):
    assert user_comment(exif(prefix + b"a comment\0\0")) == "a comment"


@pytest.mark.parametrize(
    "block", [b"", b"MM", b"MM\0*\xff\xff\xff\xff", exif(b"x")[:30], exif(b"x")[:20], b"Exif"]
)
def test_damaged_exif_holds_no_comment(block):
    assert user_comment(block) == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a PNG, JPEG or WebP"),
        (b"GIF89a and so on", "not a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG or WebP"),
        (b"\xff\xd8\xff", "cut short"),
        (encoded("JPEG")[:30], "cut short"),
        (b"\xff\xd8\xff\xe0\x00\x01", "cut short or damaged"),
        (b"\xff\xd8\xff\xd9", "does not say how large"),
        (b"\xff\xd8" + b"\xff\xd0" * 100_000, "does not say how large"),
        (b"RIFF\0\0\0\0WEBP", "does not say how large"),
        (encoded("WEBP")[:20], "cut short"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "cut short"),
        (b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff", "bytes of metadata"),
    ],
)
def test_a_hostile_file_is_a_format_error(data, reason):
    with pytest.raises(FormatError, match=reason):
        header(data)
