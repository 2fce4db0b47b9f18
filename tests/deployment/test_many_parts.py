"""Image files of many small parts are refused, because one of them would hold up a service for seconds."""

import io
import struct
import zlib

import numpy as np
import pytest
from clusterguard.deployment import read_image
from clusterguard.errors import InputError
from PIL import Image


def encode(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def refuses(message, content):
    with pytest.raises(InputError, match=message):
        read_image(content)


SMALL = encode(Image.new("L", (8, 8)))


def jpeg_with(segments):
    content = encode(Image.new("L", (8, 8)), "JPEG")
    return content[:2] + segments + content[2:]


@pytest.mark.parametrize(
    "content",
    [
        SMALL[:33] + chunk(b"tEXt", b"a\0b") * 3000 + SMALL[33:],
        SMALL[:-12] + chunk(b"prVt", b"") * 3000 + SMALL[-12:],
        jpeg_with(b"\xff\xfe\0\3a" * 3000),
        jpeg_with(b"\xff" * 3000),
        encode(Image.new("L", (8, 8)), "JPEG")[:-2] + b"\xff\xfe\0\3a" * 3000,
    ],
    ids=["png", "png, late", "jpeg", "jpeg, filled", "jpeg, late"],
)
def test_files_of_many_small_parts_are_refused_before_they_are_read_for_seconds(content):
    refuses(r"more than 10\d\d parts", content)


def test_a_large_file_may_have_many_parts_but_no_restarts_that_a_jpeg_does_not_announce():
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise))
    head = struct.pack(">IIBBBBB", 1500, 1500, 8, 0, 0, 0, 0)
    parts = b"".join(chunk(b"IDAT", pixels[start : start + 1024]) for start in range(0, len(pixels), 1024))
    large = SMALL[:8] + chunk(b"IHDR", head) + parts + chunk(b"IEND", b"")
    assert np.array_equal(read_image(large).image, noise)
    content = encode(Image.new("L", (8, 8)), "JPEG")
    refuses("restarts that it does not announce", content[:-2] + b"\xff\xd0" * 9 + content[-2:])
