"""Any bytes at all are an image, or a FormatError."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.image_file import decode_image, to_rgb


def encoded(form, **options):
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.random.default_rng(1).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, form, exif=exif, **options)
    return file.getvalue()


FILES = (encoded("PNG"), encoded("JPEG"), encoded("JPEG", progressive=True), encoded("WEBP"))


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 2**16),
)
def test_a_damaged_file_is_an_image_or_a_format_error(data, changes, length):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        image = decode_image(bytes(damaged[: length + 1]), "it")
    except FormatError:
        return
    assert to_rgb(image).mode == "RGB"
