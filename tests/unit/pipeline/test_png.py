import os
import struct
import zlib

import pytest
from PIL import Image

from flux_nf4.errors import DiskError, FormatError, InputError
from flux_nf4.pipeline.png import MAX_TEXT_BYTES, SIGNATURE, read_png_header, write_png


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
