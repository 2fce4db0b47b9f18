"""What people see in an image file is what is read, or the file is refused by name."""

import io
import struct
import zlib

import numpy as np
import PIL.ImageFile
import pytest
import torch
from clusterguard.deployment import fit_image, read_image
from clusterguard.errors import InputError
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

RAMP = np.tile(np.linspace(0, 1, 16)[None], (12, 1))
GREY = Image.fromarray((RAMP * 255).round().astype(np.uint8))
CORNER = Image.new("RGB", (16, 12), (200, 120, 40))
CORNER.paste((10, 220, 30), (0, 0, 8, 4))
MADE_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(png, name, body, *, before=b"IDAT"):
    position = png.index(before) - 4
    return png[:position] + chunk(name, body) + png[position:]


def linear_profile():
    """An RGB profile like sRGB's, but with a linear curve, so that middle grey looks far brighter."""
    profile = bytearray(MADE_SRGB)
    for position in range(128 + 4, 128 + 4 + 12 * struct.unpack_from(">I", profile, 128)[0], 12):
        name, offset, length = struct.unpack_from(">4sII", profile, position)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + length] = (b"curv" + bytes(8)).ljust(length, b"\0")
    return bytes(profile)


def looks_like(image, expected, tolerance=3):
    difference = ImageChops.difference(image.convert("RGB"), expected.convert("RGB"))
    return image.size == expected.size and max(high for _, high in difference.getextrema()) <= tolerance


def refuses(message, content, **options):
    with pytest.raises(InputError, match=message) as caught:
        read_image(content, name="photos/cat/1", **options)
    assert "photos/cat/1" in str(caught.value)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    content = encode(CORNER, kind, exif=exif, **options)
    read = read_image(content)
    assert looks_like(read.image, ImageOps.exif_transpose(Image.open(io.BytesIO(content))), 12)
    # An oracle without Pillow's table: where the stored corner at the top left comes to lie.
    corners = {2: "top right", 3: "bottom right", 4: "bottom left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    width, height = read.image.size
    assert (width > height) == (orientation not in (5, 6, 7, 8))
    place = corners.get(orientation, "top left")
    pixel = read.image.getpixel((width - 1 if "right" in place else 0, height - 1 if "bottom" in place else 0))
    assert max(abs(a - b) for a, b in zip(pixel, (10, 220, 30), strict=True)) < 15
    assert read.doubts == ()


def test_an_orientation_that_only_some_viewers_know_is_a_doubt():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    read = read_image(encode(CORNER, "JPEG", xmp=xmp))
    assert "orientation" in read.doubts[0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    assert read_image(encode(CORNER, "JPEG", xmp=xmp, exif=exif)).doubts == ()


def exif_of(*entries, order="<"):
    """EXIF data with these entries (type, count, bytes) for the orientation."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return (
        b"Exif\0\0"
        + head
        + b"".join(
            struct.pack(f"{order}HHI", ExifTags.Base.Orientation, kind, count) + value.ljust(4, b"\0")
            for kind, count, value in entries
        )
        + bytes(16)
    )


UNUSUAL = {
    "long": [(4, 1, b"\6")],
    "signed": [(8, 1, b"\6")],
    "byte": [(1, 1, b"\6")],
    "undefined": [(7, 1, b"\6")],
    "text": [(2, 2, b"6")],
    "fraction": [(11, 1, struct.pack("<f", 6))],
    "two": [(3, 2, b"\6\0\1\0")],
    "none": [(3, 0, b"\6")],
    "twice": [(3, 1, b"\6"), (3, 1, b"\1")],
    "unknown": [(77, 1, b"\6")],
}


@pytest.mark.filterwarnings("ignore:Metadata Warning:UserWarning")  # of Pillow, which takes the first number of several
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_orientation_that_is_stored_in_an_unusual_way_is_a_doubt(kind, name):
    (doubt,) = read_image(encode(CORNER, kind, exif=exif_of(*UNUSUAL[name]))).doubts
    assert "orientation" in doubt


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_that_is_stored_as_it_should_be_is_followed_in_either_order_of_bytes(order):
    read = read_image(encode(CORNER, "JPEG", exif=exif_of((3, 1, struct.pack(f"{order}H", 6)), order=order)))
    assert (read.image.size, read.doubts) == ((12, 16), ())
    assert read_image(encode(CORNER, "JPEG", exif=exif_of())).doubts == ()


@pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
def test_an_orientation_of_a_tiff_is_followed_or_doubted(order, is_big):
    usual, long = (274, 3, 1, 6), (274, 4, 1, 6)
    pixels = (RAMP * 255).astype("u1").tobytes()
    for entry, doubts in ((usual, 0), (long, 1)):
        read = read_image(tiff(pixels, 1, 8, order=order, extra=[entry], is_big=is_big))
        assert read.image.size == (12, 16)
        assert len(read.doubts) == doubts


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(">u2"), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PPM"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.uint8), "GIF"),
        (RAMP > 0.5, "PNG"),
        (RAMP > 0.5, "TIFF"),
    ],
)
def test_every_depth_keeps_its_brightness(values, kind):
    read = read_image(encode(Image.fromarray(values), kind))
    expected = RAMP > 0.5 if values.dtype == bool else RAMP
    assert np.allclose(np.asarray(read.image.convert("L")) / 255, expected, atol=0.5 / 255 + 1e-6)


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=6))
def test_sixteen_bits_are_rounded_to_the_nearest_of_eight(values):
    pixels = np.asarray(read_image(encode(Image.fromarray(np.array([values], dtype=np.uint16)))).image)[0]
    assert np.abs(pixels / 255 - np.array(values) / 65535).max() <= 0.5 / 255 + 1e-9


def test_sixteen_bits_of_colour_in_a_png_are_read_and_doubted():
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 12850, 25700, 51400)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    read = read_image(content)
    assert [read.image.getpixel((x, 0)) for x in (0, 1)] == [(255, 128, 0), (50, 100, 200)]
    assert read.doubts == ("16 bits a channel",)


@pytest.mark.parametrize(
    ("picture", "kind", "message"),
    [
        (Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF", "do not tell which value is white"),
        (Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF", "between 0 and 255; scale them"),
        (Image.fromarray((RAMP - 0.1).astype(np.float32)), "TIFF", "between -0.1"),
        (Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF", "between nan"),
        (CORNER.convert("CMYK"), "JPEG", "inks"),
        (CORNER.convert("LAB"), "TIFF", "stored as LAB"),
        (Image.new("L", (1, 21)), "PNG", "20 : 1"),
    ],
)
def test_what_nobody_can_know_is_refused_by_name(picture, kind, message):
    refuses(message, encode(picture, kind))


def test_a_tiff_that_pillow_would_misread_is_refused():
    values = Image.fromarray((RAMP * 65535).astype(np.uint16))
    tags = ImageFileDirectory_v2()
    tags[262] = 0  # white is zero
    content = bytearray(encode(values, "TIFF"))
    entry = content.index(struct.pack("<HHI", 262, 3, 1))
    content[entry + 8 : entry + 10] = b"\0\0"
    refuses("white as zero", bytes(content))


def tiff(pixels, sample_format, bits, *, order="<", extra=(), is_big=False):
    """A grey TIFF without compression, around bytes of 16 × 12 pixels. Entries are (tag, type, count, value)."""
    entries = [(256, 3, 1, 16), (257, 3, 1, 12), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(278, 3, 1, 12), (279, 4, 1, len(pixels)), (339, 3, 1, sample_format), *extra]
    size = 24 + 20 * (len(entries) + 1) + 8 if is_big else 10 + 12 * (len(entries) + 1) + 4
    entries = sorted([*entries, (273, 4, 1, size)])
    magic, start, word = (43, (8, 0, 16, len(entries)), "Q") if is_big else (42, (8, len(entries)), "I")
    content = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", magic)
    content += struct.pack(f"{order}{'HHQQ' if is_big else 'IH'}", *start)
    for tag, kind, count, value in entries:
        content += struct.pack(f"{order}HH{word}", tag, kind, count)
        content += struct.pack(order + {3: "H", 4: "I"}[kind], value).ljust(8 if is_big else 4, b"\0")
    return content + bytes(8 if is_big else 4) + pixels


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("sample_format", "values", "message"),
    [
        (1, (RAMP * 255).astype("u1"), None),
        (1, (RAMP * 65535).astype("u2"), None),
        (3, RAMP.astype("f4"), None),
        (2, (RAMP * 127).astype("i1"), "signed"),
        (2, (RAMP * 255 - 128).astype("i1"), "signed"),
        (2, (RAMP * 32767).astype("i2"), "signed"),
        (2, (RAMP * 32767).astype("i4"), "signed"),
        (4, (RAMP * 255).astype("u1"), "kind 4|damaged or of none of the formats"),
        (6, RAMP.astype("c8"), "kind 6|damaged or of none of the formats"),
    ],
)
def test_pixels_of_a_tiff_are_unsigned_or_fractions_or_refused(sample_format, values, message, order):
    stored = values.astype(values.dtype.newbyteorder(order))
    content = tiff(stored.tobytes(), sample_format, 8 * values.itemsize, order=order)
    if message is None:
        assert np.allclose(np.asarray(read_image(content).image) / 255, RAMP, atol=1 / 255)
    else:
        refuses(message, content)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_refused_unless_nothing_is_transparent(mode):
    picture = CORNER.convert("RGBA")
    opaque = picture.convert(mode) if mode != "P" else picture.quantize(8)
    assert looks_like(read_image(encode(opaque)).image, opaque.convert("RGB"))
    picture.putpixel((3, 3), (0, 0, 0, 200))
    refuses("transparent in places", encode(picture.convert(mode) if mode != "P" else picture.quantize(8)))


def test_a_transparent_colour_is_refused_where_it_occurs():
    refuses("transparent in places", encode(GREY, transparency=0))
    assert read_image(encode(GREY, transparency=1)).doubts == ("a transparent colour",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colour_profiles_are_applied(kind, mode):
    picture = Image.new(mode, (16, 16), {"L": 64, "RGB": (64, 64, 64)}[mode])
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    plain = read_image(encode(picture, kind, icc_profile=MADE_SRGB, **options))
    assert looks_like(plain.image, picture)
    bright = read_image(encode(picture, kind, icc_profile=linear_profile(), **options))
    expected = 255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055)  # the standard's curve
    assert bright.image.convert("L").getpixel((5, 5)) == pytest.approx(expected, abs=3)


def test_profiles_that_cannot_be_applied_are_refused():
    refuses("profile cannot be applied", encode(CORNER, icc_profile=b"no profile at all"))
    refuses("profile is for Lab", encode(CORNER, icc_profile=_lab()))
    refuses("profile is damaged", with_chunk(encode(CORNER), b"iCCP", b"name\0\0not compressed"))
    broken = encode(CORNER, "JPEG", icc_profile=MADE_SRGB).replace(b"ICC_PROFILE\0\x01\x01", b"ICC_PROFILE\0\x01\x02")
    refuses("profile is damaged", broken)


def _lab():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


SRGB_PRIMARIES = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_PRIMARIES = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        (b"gAMA", struct.pack(">I", 45455), None),
        (b"gAMA", struct.pack(">I", 45000), None),
        (b"gAMA", struct.pack(">I", 100000), "gamma of 1 "),
        (b"gAMA", struct.pack(">I", 55556), "gamma"),
        (b"gAMA", struct.pack(">I", 0), "gamma"),
        (b"cHRM", SRGB_PRIMARIES, None),
        (b"cHRM", P3_PRIMARIES, "cHRM"),
        (b"sRGB", b"\0", None),
        (b"cICP", b"\x01\x0d\x00\x01", None),
        (b"cICP", b"\x09\x10\x00\x01", "cICP"),
    ],
)
def test_what_a_png_states_of_its_colours_is_that_of_srgb_or_refused(name, body, message):
    content = with_chunk(encode(CORNER), name, body)
    if message is None:
        assert looks_like(read_image(content).image, CORNER, 0)
    else:
        refuses(message, content)


def test_a_profile_goes_before_gamma():
    content = with_chunk(encode(CORNER, icc_profile=MADE_SRGB), b"gAMA", struct.pack(">I", 100000))
    assert looks_like(read_image(content).image, CORNER)


def test_parts_of_a_png_that_programs_read_differently_are_refused():
    gamma = struct.pack(">I", 45455)
    twice = with_chunk(with_chunk(encode(CORNER), b"gAMA", gamma), b"gAMA", gamma)
    refuses("repeated or out of order", twice)
    refuses("repeated or out of order", with_chunk(encode(CORNER), b"gAMA", gamma, before=b"IEND"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_animations_and_pages_are_refused(kind):
    second = ImageOps.invert(CORNER)
    refuses("animation or has several pages, 2 pictures", encode(CORNER, kind, save_all=True, append_images=[second]))
    alone = encode(CORNER, kind, save_all=True)
    assert read_image(alone).image.size == CORNER.size


def test_an_animation_of_one_picture_beside_another_is_refused():
    refuses("animation", with_chunk(encode(CORNER), b"acTL", struct.pack(">II", 1, 0)))


def test_second_pictures_and_data_after_the_end_are_doubts():
    grey = GREY.convert("RGB")
    phone = encode(grey, "MPO", save_all=True, append_images=[ImageOps.invert(grey)])
    read = read_image(phone)
    assert looks_like(read.image, GREY, 12)
    assert "several pictures" in read.doubts[0]
    assert read_image(encode(CORNER, "JPEG") + phone).doubts == ("data after its end",)
    assert read_image(encode(CORNER) + b"PK").doubts == ("data after its end",)


@pytest.mark.parametrize("screen", [(16, 12), (20, 12), (16, 30), (15, 12), (16, 4), (0, 0)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (4, 0)])
@pytest.mark.parametrize("palette", [None, 4])
def test_a_gif_that_does_not_fill_its_screen_is_a_doubt(screen, corner, palette):
    """Programs show what is left of the screen transparent, in the background's colour, or not at all."""
    content = bytearray(encode(GREY if palette is None else CORNER.quantize(palette), "GIF"))
    content[6:10] = struct.pack("<HH", *screen)
    frame = content.rindex(b"," + struct.pack("<4H", 0, 0, 16, 12))
    content[frame + 1 : frame + 5] = struct.pack("<HH", *corner)
    doubts = read_image(bytes(content)).doubts
    assert [*doubts] == [] if (screen, corner) == ((16, 12), (0, 0)) else "screen" in doubts[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_truncated_files_are_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    content = encode(noise if kind != "GIF" else noise.quantize(64), kind)
    refuses("cut off|cannot be read|damaged or of none of the formats", content[: int(len(content) * share)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_files_without_their_end_are_refused(kind):
    content = encode(CORNER, kind)
    refuses("cut off|cannot be read|damaged or of none of the formats", content[:-2])
    refuses("cut off|cannot be read|damaged or of none of the formats", content[: -12 if kind == "PNG" else -2])


def test_a_flipped_bit_in_a_png_is_found():
    content = bytearray(encode(CORNER))
    content[content.index(b"IDAT") + 12] ^= 1
    refuses("damaged|cannot be read", bytes(content))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PPM"])
def test_a_cut_off_file_is_refused_also_where_a_program_reads_such_files(kind, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    content = encode(noise, kind)
    read_image(content)
    refuses("cannot be read", content[: len(content) // 2])
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_image(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read():
    assert looks_like(read_image(encode(GREY, "AVIF", quality=100)).image, GREY, 12)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    content = encode(Image.new("L", (100, 100)))
    with pytest.raises(InputError, match="100 × 100 pixels") as caught:
        read_image(content, max_pixels=9999)
    assert isinstance(caught.value.__cause__, Image.DecompressionBombError)
    assert read_image(content, max_pixels=10000).image.size == (100, 100)


def test_images_are_fitted_to_size_and_channels():
    tall = Image.new("RGB", (20, 60), "black")
    tall.paste("white", (0, 20, 20, 40))  # the middle alone is white
    for channels in (1, 3):
        tensor = fit_image(tall, (20, 20), channels)
        assert tensor.shape == (channels, 20, 20)
        assert torch.equal(tensor, torch.ones_like(tensor))
    assert fit_image(GREY, (6, 10), 3).shape == (3, 6, 10)


def test_exif_data_that_cannot_be_read_is_a_doubt_and_not_damage():
    picture = Image.new("RGB", (16, 8), (200, 30, 40))
    file = read_image(encode(picture, "JPEG", exif=b"Exif\0\0garbage here!!"))
    assert file.image.size == (16, 8)
    assert any("EXIF data that cannot be read" in doubt for doubt in file.doubts)


def test_a_png_that_is_cut_off_says_so_in_plain_words():
    content = encode(Image.new("L", (16, 8)))
    for length in range(40, len(content)):
        with pytest.raises(InputError) as raised:
            read_image(content[:length])
        assert "unpack" not in str(raised.value)


NOISE = np.random.default_rng(0).integers(0, 256, (20, 28), dtype=np.uint8)
ROWS = b"".join(b"\0" + row.tobytes() for row in NOISE)


def png_of(compressed, *, before=b"", end=b"", interlaced=0):
    """A PNG of 28 × 20 grey pixels around compressed rows; all its checksums are right."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 20, 8, 0, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", compressed) + chunk(b"IEND", end)


@pytest.mark.parametrize(
    "damaged",
    [
        *(png_of(zlib.compress(ROWS)[:-cut]) for cut in range(1, 9)),
        png_of(zlib.compress(ROWS)[:-1] + b"?"),
        png_of(zlib.compress(ROWS) + b"PK\x03\x04"),
        png_of(zlib.compress(ROWS) + zlib.compress(ROWS)),
        png_of(zlib.compress(ROWS + ROWS[:1])),
        png_of(zlib.compress(ROWS[:-29])),
        png_of(zlib.compress(ROWS + bytes(10**7))),
    ],
)
def test_a_png_whose_pixels_are_cut_short_or_followed_by_more_is_damaged(damaged):
    refuses("pixels end|cannot be read", damaged)


def test_a_png_with_a_part_that_programs_must_know_and_do_not_is_refused():
    refuses("ABCD", png_of(zlib.compress(ROWS), before=chunk(b"ABCD", b"")))
    assert read_image(png_of(zlib.compress(ROWS), end=b"PK")).doubts == ("data after its end",)
    for known in (b"tEXt", b"prVt"):  # ancillary parts may be passed over
        assert read_image(png_of(zlib.compress(ROWS), before=chunk(known, b"a\0b"))).doubts == ()


@pytest.mark.parametrize(("bits", "colour", "channels"), [(1, 0, 1), (4, 3, 1), (8, 2, 3), (16, 0, 1)])
@pytest.mark.parametrize("interlaced", [0, 1])
@given(width=st.integers(1, 19), height=st.integers(1, 19))
def test_whole_pngs_of_every_layout_are_read(width, height, bits, colour, channels, interlaced):
    """Against the definition of Adam7: which pass each pixel belongs to, counted one by one."""
    passes = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    rows = {}
    for y in range(height):
        for x in range(width):
            name = (passes[y % 8][x % 8] if interlaced else "", y)
            rows[name] = rows.get(name, 0) + bits * channels
    data = b"".join(bytes(1 + -(-size // 8)) for size in rows.values())
    palette = chunk(b"PLTE", bytes(48)) if colour == 3 else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    start, end = b"\x89PNG\r\n\x1a\n" + header + palette, chunk(b"IEND", b"")
    assert read_image(start + chunk(b"IDAT", zlib.compress(data)) + end).image.size == (width, height)
    for wrong in (data[:-1], data + b"\0"):
        refuses("pixels end", start + chunk(b"IDAT", zlib.compress(wrong)) + end)
