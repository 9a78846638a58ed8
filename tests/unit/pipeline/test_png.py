import io
import os
import random
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_nf4.errors import DiskError, FormatError, InputError
from flux_nf4.pipeline import png_encoder
from flux_nf4.pipeline.png import (
    MAX_TEXT_BYTES,
    SIGNATURE,
    read_png_header,
    save_png,
    write_png,
)


def read(path):
    with path.open("rb") as file:
        return read_png_header(file, "the file")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.fixture
def image():
    return Image.new("RGB", (3, 2), "red")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "image.png"


def test_texts_come_back_as_they_were(file, image):
    texts = {"parameters": "a cat\nSteps: 2", "flux_nf4": '{"p": "猫 é"}'}
    write_png(file, image, texts)
    assert read(file).texts == texts


def test_the_size_comes_from_the_header(file, image):
    write_png(file, image, {})
    header = read(file)
    assert (header.width, header.height) == (3, 2)


def test_pillow_reads_what_was_written(file, image):
    write_png(file, image, {"parameters": "a 猫", "flux_nf4": "x"})
    with Image.open(file) as opened:
        assert opened.text == {"parameters": "a 猫", "flux_nf4": "x"}
        assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_a_latin_text_is_a_plain_chunk_as_a1111_writes_it(file, image):
    write_png(file, image, {"parameters": "a café"})
    assert b"tEXtparameters\0a caf\xe9" in file.read_bytes()


def test_compressed_texts_are_read(file):
    compressed = zlib.compress(b"caf\xe9")
    international = b"b\0\1\0en\0B\0" + zlib.compress("猫".encode())
    file.write_bytes(png(chunk(b"zTXt", b"a\0\0" + compressed), chunk(b"iTXt", international)))
    assert read(file).texts == {"a": "café", "b": "猫"}


def test_the_first_of_two_texts_counts(file):
    file.write_bytes(png(chunk(b"tEXt", b"a\0one"), chunk(b"tEXt", b"a\0two")))
    assert read(file).texts == {"a": "one"}


TEXTS = {"parameters": "a café\nSteps: 2", "flux_nf4": "猫", "XML:com.adobe.xmp": "<x/>"}
SEVERAL_STRIPS = (700, 403)
SIZES = [(1, 1), (16, 16), (1, 1000), (1023, 7), SEVERAL_STRIPS]


def saved(image, texts=TEXTS):
    file = io.BytesIO()
    save_png(file, image, texts)
    return file.getvalue()


def noise(width, height):
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))


def waves(width, height):
    """Smooth: each of the filter's three neighbours is the nearest somewhere."""
    channel = Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", (channel, channel.rotate(180), channel.point(lambda x: x * 7 % 256)))


def chunks(data):
    """Each chunk's kind and body; its checksum is right."""
    assert data[:8] == SIGNATURE
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], data[position + 8 :][:length]
        assert data[position:][: length + 12] == chunk(kind, body)
        yield kind, body
        position += length + 12


@pytest.mark.parametrize("draw", [noise, waves])
@pytest.mark.parametrize("size", SIZES)
def test_pillow_reads_every_pixel_as_it_was(size, draw):
    image = draw(*size)
    with Image.open(io.BytesIO(saved(image))) as opened:
        assert (opened.mode, opened.size) == ("RGB", size)
        assert opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_the_pixels_are_one_stream_of_whole_rows(size):
    width, height = size
    (stream,) = [body for kind, body in chunks(saved(noise(*size))) if kind == b"IDAT"]
    decompressor = zlib.decompressobj()
    assert len(decompressor.decompress(stream)) == height * (1 + 3 * width)
    assert decompressor.eof
    assert not decompressor.unused_data


def test_the_number_of_threads_changes_no_byte(monkeypatch):
    image = noise(*SEVERAL_STRIPS)
    on_four = saved(image)
    monkeypatch.setattr(png_encoder, "_NUM_THREADS", 1)
    assert saved(image) == on_four


def test_all_but_the_pixels_is_as_pillow_writes_it(image):
    info = PngInfo()
    for keyword, text in TEXTS.items():
        (info.add_text if keyword == "parameters" else info.add_itxt)(keyword, text)
    reference = io.BytesIO()
    image.save(reference, "PNG", pnginfo=info)
    ours, theirs = (
        [(kind, body) for kind, body in chunks(data) if kind != b"IDAT"]
        for data in (saved(image), reference.getvalue())
    )
    assert ours == theirs


@pytest.mark.parametrize("draw", [noise, waves])
def test_files_are_hardly_larger_than_pillows(draw):
    image, reference = draw(*SEVERAL_STRIPS), io.BytesIO()
    image.save(reference, "PNG", compress_level=4)
    assert len(saved(image, {})) <= 1.1 * len(reference.getvalue())


def test_any_umask_gives_an_ordinary_file(file, image):
    write_png(file, image, {})
    ordinary = file.with_name("ordinary")
    ordinary.touch()
    assert file.stat().st_mode == ordinary.stat().st_mode


def test_another_ending_is_refused(tmp_path, image):
    with pytest.raises(InputError, match=r"does not end in `\.png`"):
        write_png(tmp_path / "image.jpg", image, {})


def test_a_missing_folder_is_a_disk_error(tmp_path, image):
    with pytest.raises(DiskError, match="no-such-folder"):
        write_png(tmp_path / "no-such-folder" / "image.png", image, {})


def test_a_full_disk_leaves_the_old_file_and_nothing_else(file, image, monkeypatch):
    file.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        write_png(file, image, {})
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


BOMB = zlib.compress(bytes(MAX_TEXT_BYTES + 1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a PNG"),
        (b"\xff\xd8\xff\xe0 a JPEG", "is not a PNG"),
        (SIGNATURE, "cut short"),
        (png()[:-1], "cut short"),
        (png()[:-12], "cut short"),
        (SIGNATURE + struct.pack(">I", 2**32 - 1) + b"tEXt", "cut short"),
        (SIGNATURE + chunk(b"IEND", b""), "does not say how large"),
        (SIGNATURE + chunk(b"IHDR", bytes(13)) + chunk(b"IEND", b""), "does not say how large"),
        (SIGNATURE + chunk(b"IHDR", b"\1") + chunk(b"IEND", b""), "does not say how large"),
        (png(chunk(b"tEXt", b"no separator")), "has no keyword"),
        (png(chunk(b"tEXt", b"\0text")), "has no keyword"),
        (png(chunk(b"tEXt", b"a\0b")[:-1] + b"\0"), "checksum"),
        (png(chunk(b"iTXt", b"a\0\0\0\0\0\xff\xfe")), "is not utf-8"),
        (png(chunk(b"zTXt", b"a\0\0garbage")), "does not unpack"),
        (png(chunk(b"zTXt", b"a\0\0" + BOMB)), "beyond all measure"),
        (png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)), "beyond all measure"),
        (png(*[chunk(b"tEXt", b"a\0" + bytes(2**20))] * 5), "bytes of text"),
        (png(*[chunk(b"prVt", b"")] * 100_001), "more than 100000 chunks"),
    ],
)
def test_a_hostile_file_is_a_format_error(file, content, reason):
    file.write_bytes(content)
    with pytest.raises(FormatError, match=reason):
        read(file)
