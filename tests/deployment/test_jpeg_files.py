"""JPEG files are whole, or they are refused: decoders fill missing pixels with grey and do not say so."""

import io
import struct

import numpy as np
import pytest
from clusterguard.deployment import read_image
from clusterguard.errors import InputError
from PIL import Image


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def refuses(message, content, **options):
    with pytest.raises(InputError, match=message) as caught:
        read_image(content, name="photos/cat/1", **options)
    assert "photos/cat/1" in str(caught.value)


def test_progressive_jpegs_with_restarts_and_thumbnails_are_whole():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    comment = {"comment": b"\xff\xd9" * 10}  # looks like an end
    content = encode(noise, "JPEG", progressive=True, restart_marker_blocks=1, **comment)
    assert read_image(content).doubts == ()


def half_of_the_pixels(content):
    start = content.index(b"\xff\xda") + 14
    return content[: start + (len(content) - start) // 2].rstrip(b"\xff") + b"\xff\xd9"


def one_scan(content):
    second = content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)
    return content[:second] + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": 2}], ids=str
)
def test_a_jpeg_whose_pixels_end_early_is_refused_although_it_has_an_end(mode, options):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)).convert(mode)
    content = encode(noise, "JPEG", **options)
    assert read_image(content).doubts == ()
    refuses("pixels end before their time", half_of_the_pixels(content))
    if options.get("progressive"):
        assert read_image(one_scan(content)).doubts == ("scans that are missing",)
    else:
        header = content.index(b"\xff\xc0") + 5
        refuses("pixels end before their time", content[:header] + struct.pack(">H", 90) + content[header + 2 :])


def test_a_jpeg_that_takes_long_to_decode_is_refused_before_it_is_decoded():
    content = encode(Image.new("L", (40, 40)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    refuses("more than 50 scans", content[:-2] + content[last:-2] * 60 + b"\xff\xd9")
