"""Image files of strangers: opened upright and whole, or refused before they cost anything."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flux_nf4.errors import FormatError, InputError
from flux_nf4.pipeline.image_file import decode_image, open_image

random = np.random.default_rng(6)
PICTURE = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))


def encoded(image=PICTURE, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def claiming(width, height):
    """A PNG that says it is so large, with next to no pixels in it."""
    data = bytearray(encoded())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_three_formats_are_read_whatever_the_name(tmp_path, form):
    path = tmp_path / "picture.bin"
    path.write_bytes(encoded(form=form))
    with Image.open(path) as expected:
        assert np.array_equal(open_image(path), expected)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_an_image_comes_out_upright(form):
    image = decode_image(encoded(form=form, exif=on_its_side()), "it")
    assert image.size == (24, 32)
    assert 0x0112 not in image.getexif()


def test_of_an_animation_the_first_picture_counts():
    data = encoded(save_all=True, append_images=[Image.new("RGB", PICTURE.size)])
    assert np.array_equal(decode_image(data, "it"), PICTURE)


def test_a_hundred_megapixels_are_refused_before_they_are_decoded():
    with pytest.raises(FormatError, match="30000 x 30000 pixels, more than 100 megapixels"):
        decode_image(claiming(30_000, 30_000), "it")


def test_an_image_cut_short_is_refused():
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(form=form)
        with pytest.raises(FormatError, match=r"^it "):
            decode_image(data[: len(data) * 2 // 3], "it")


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"<svg/>", encoded(form="BMP"), encoded(form="TIFF"), b"\0" * 99]
)
def test_what_is_no_such_image_is_refused(data):
    with pytest.raises(FormatError, match="is not a PNG, JPEG or WebP image"):
        decode_image(data, "it")


def test_a_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the image `.*absent\.png`"):
        open_image(tmp_path / "absent.png")


def test_a_name_that_is_none_is_an_input_error():
    with pytest.raises(InputError, match="cannot read the image"):
        open_image("a\0b")


def test_a_device_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("flux_nf4.pipeline.image_file._MAX_FILE_BYTES", 2**20)

    with pytest.raises(FormatError, match="is not a PNG, JPEG or WebP image"):
        open_image("/dev/zero")


def test_a_file_beyond_all_measure_is_not_read(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**30)  # of holes: it takes no room
    with pytest.raises(FormatError, match="larger than 512 MiB"):
        open_image(path)
