"""Reads image files as people see them. `read_image` decodes them in the same way for training and for a service."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.ImageFile
from clusterguard._support import ProcessSwitch, open_ordinary
from clusterguard.errors import InputError
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Image.init()
FORMATS = tuple({"PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF"} & set(Image.OPEN))
MAX_RATIO = 20  # longer side to shorter side; scaling up the shorter side of a thin line would need too much memory
_OPAQUE = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "RGBX": "RGB", "YCbCr": "RGB", "CMYK": "CMYK"}
_TRANSPARENT = {"LA": "L", "La": "L", "RGBA": "RGB", "RGBa": "RGB", "PA": "RGB"}
_PNG_SINGLE = {b"IHDR", b"PLTE", b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf", b"acTL"}
_PNG_FIRST = _PNG_SINGLE - {b"eXIf"}  # these must come before the pixels, or some programs ignore them
_PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PNG_WHOLE = ((0, 0, 1, 1),)  # passes over an image: first column and row, and the steps between these
_PNG_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # other bytes after 0xFF belong to the compressed data
_JPEG_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")
_JPEG_SCANS = 50  # encoders write at most some 20; the time of decoding grows with their number
_MOST_PARTS = 1000  # of a file, and one more for each KiB: a small part takes longer to read than its bytes
_JPEG_PADDING = bytes((37 * index + 254) % 255 for index in range(64))  # any bytes but 0xFF
_SRGB_GAMMA = 45455
_SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


class ImageFile(NamedTuple):
    """An image file, read as people see it.

    Attributes:
        image: upright, opaque image of 8 bits, in mode "L" or in mode "RGB" with the colours of sRGB.
        mode: Pillow's name for the way in which the file stores pixels, such as "RGB", "P" or "I;16".
        doubts: properties that other programs may read differently, each worded as the end of "it has …".
    """

    image: Image.Image
    mode: str
    doubts: tuple[str, ...]


class _RefusedError(Exception):
    """The reason why a file is refused, worded to follow its name."""


def read_image(
    file: str | Path | bytes,
    *,
    name: str | None = None,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int | None = None,
) -> ImageFile:
    """Read a file as viewers show it, turned by its orientation tag and with its colour profile applied.

    Grey images of 16 bits and fractions in [0, 1] keep their brightness and are rounded to 8 bits. Files that programs
    show differently are refused: images that are not opaque, animations, files with several pages, and 32-bit numbers
    without a stated range.

    Args:
        file: path of the file, or its content as bytes.
        name: name of the file in error messages; None takes the path.
        formats: Pillow's names of the formats to try.
        max_pixels: largest width times height that is allowed; None takes Pillow's limit of 179 million.

    Returns:
        The image, the mode in which it was stored, and doubts. A caller may treat doubts as reasons to refuse it.

    Raises:
        InputError: the file is damaged, or programs show it differently. The cause is Pillow's `DecompressionBombError`
            if it has too many pixels.

    Example:
        >>> content = io.BytesIO()
        >>> Image.new("P", (4, 2)).save(content, "PNG")
        >>> read_image(content.getvalue()).image.mode
        'RGB'
    """
    name = name or ("a file" if isinstance(file, bytes) else str(file))
    try:
        content = file if isinstance(file, bytes) else _content_of(file)
        _refuse_many_parts(content)
        picture = Image.open(io.BytesIO(content), formats=formats)
        with _truncated_images_refused.on():
            return _read(picture, content, max_pixels)
    except UnidentifiedImageError as error:
        raise InputError(
            f"expected a still, opaque image, got {name}, which is damaged or of none of the formats "
            f"{', '.join(sorted(formats))}; mend the file or remove it"
        ) from error
    except _RefusedError as error:
        raise InputError(f"expected a still, opaque image, got {name}: {error}") from error
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        raise InputError(
            f"expected a still, opaque image, got {name}, which cannot be read: {error}; mend the file or remove it"
        ) from error


def _content_of(path: str | Path) -> bytes:
    with open_ordinary(path) as file:
        return file.read()


def _refuse_many_parts(content: bytes) -> None:
    """Refuse a PNG or JPEG of so many small parts that reading them would take seconds, before a decoder reads them."""
    is_png, position, most = content.startswith(_PNG_BEGINNING), 2, _MOST_PARTS + len(content) // 1024
    if is_png:
        position = len(_PNG_BEGINNING)
    elif not content.startswith(b"\xff\xd8"):
        return
    for _ in range(most):
        if position + 4 > len(content):
            return
        if is_png:
            position += 12 + int.from_bytes(content[position : position + 4])
        elif content[position : position + 2] in (b"\xff\xda", b"\xff\xd9"):  # the pixels begin
            return
        elif content[position + 1] == 0xFF:  # a byte that fills a gap
            position += 1
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4])
    raise _RefusedError(f"it has more than {most} parts; save it again")


def fit_image(image: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """Turn an image into a tensor. The shorter side is scaled, and the middle is cut out.

    Args:
        image: image in mode "L" or "RGB".
        size: height and width (H, W) of the result.
        channels: number C of channels, 1 or 3.

    Returns:
        The image, (C, H, W) float32 in [0, 1].

    Example:
        >>> fit_image(Image.new("L", (40, 30)), (16, 16), 3).shape
        torch.Size([3, 16, 16])
    """
    from torchvision.transforms import functional

    fitted = functional.center_crop(functional.resize(image, min(size)), list(size))
    tensor: Tensor = functional.to_tensor(fitted.convert("L" if channels == 1 else "RGB"))
    return tensor


def _read(picture: Image.Image, content: bytes, max_pixels: int | None) -> ImageFile:
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:  # checked before any pixel is decoded
        raise Image.DecompressionBombError(f"it has {width} × {height} pixels, more than {max_pixels}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _RefusedError(f"its sides, {width} × {height} pixels, exceed {MAX_RATIO} : 1; cut it to size")
    mode, pages = picture.mode, getattr(picture, "n_frames", 1)
    if pages > 1 and picture.format != "MPO":
        raise _RefusedError(f"it is an animation or has several pages, {pages} pictures in all; save one of them alone")
    examine = _EXAMINE.get(str(picture.format))
    doubts = examine(picture, content) if examine else []
    picture.load()
    upright = picture
    try:
        doubts += _doubt_metadata(picture)
        upright = ImageOps.exif_transpose(picture)
    except Exception:  # Pillow's parser raises many kinds of errors for broken EXIF data
        doubts.append("EXIF data that cannot be read, so that its orientation is not known")
    image = _to_8_bits(picture, upright)
    if "icc_profile" in picture.info:
        image = _to_srgb(image, picture.info["icc_profile"])
    elif image.mode == "CMYK":
        raise _RefusedError("its colours are inks (CMYK), and no profile says how they look; save it as RGB")
    return ImageFile(image, mode, tuple(doubts))


def _doubt_metadata(picture: Image.Image) -> list[str]:
    """Doubts about metadata that only some viewers follow. Pillow applies a TIFF's own orientation when it loads it."""
    every, plain = picture.getexif(), Image.Exif()
    plain.load(picture.info.get("exif", b""))
    tag = ExifTags.Base.Orientation
    doubts = _doubt_orientation(picture.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    if not doubts and every.get(tag, 1) in range(2, 9) and plain.get(tag) != every[tag]:
        doubts.append("an orientation that is not in its EXIF data, where viewers look for it")
    adobe = every.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) == 2
    adobe |= str(every.get_ifd(ExifTags.IFD.Interop).get(1, "")).startswith("R03")
    if adobe and not picture.info.get("icc_profile"):
        doubts.append("Adobe RGB colours without a profile")
    return doubts


def _doubt_orientation(directory: bytes) -> list[str]:
    """A doubt unless EXIF data, or a TIFF, states its orientation once and as one number of 16 bits, or not at all."""
    if not directory:
        return []
    order = "<" if directory[:2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", directory, 2) == (43,)  # BigTIFF, with longer numbers
    offset, count, entry = ("8xQ", "Q", "HHQ8x") if is_big else ("4xI", "H", "HHI4x")
    (start,) = struct.unpack_from(order + offset, directory)
    (entries,) = struct.unpack_from(order + count, directory, start)
    start, size = start + struct.calcsize(order + count), struct.calcsize(order + entry)
    fields = [struct.unpack_from(order + entry, directory, start + index * size) for index in range(entries)]
    stated = [(kind, values) for tag, kind, values in fields if tag == ExifTags.Base.Orientation]
    return ["an orientation in an unusual form, which only some viewers follow"] if stated not in ([], [(3, 1)]) else []


def _to_8_bits(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Convert an image to an opaque one of 8 bits, in mode L, RGB or CMYK."""
    mode = picture.mode
    # Pillow reads 16-bit files of these two formats as "I", in the range of 16 bits. For others, the range is unknown.
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        if image.has_transparency_data:
            raise _RefusedError("it has 16 bits and a transparent colour; save it opaque")
        return _from_fractions(np.asarray(image, dtype=np.float64) / 65535)
    if mode == "F":
        return _from_fractions(np.asarray(image, dtype=np.float64))
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise _RefusedError("it is transparent in places, so what is behind it shows; save it opaque")
        image.info.pop("transparency", None)
    if mode not in _OPAQUE and mode not in _TRANSPARENT:
        raise _RefusedError(
            f"its pixels, stored as {mode}, do not tell which value is white; save it in 8 or 16 bits, grey or RGB"
        )
    wanted = {**_OPAQUE, **_TRANSPARENT}[mode]
    return image if image.mode == wanted else image.convert(wanted)


def _from_fractions(values: "np.ndarray[Any, np.dtype[np.float64]]") -> Image.Image:
    if not ((values >= 0) & (values <= 1)).all():
        raise _RefusedError(
            f"its floating-point pixels lie between {values.min():.4g} and {values.max():.4g}; scale them to [0, 1]"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    from PIL import ImageCms

    if not profile:
        raise _RefusedError("its colour profile is damaged; save it as sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "")
        # A grey image may have a profile for RGB. No other combination has a meaning.
        if mode != image.mode and (mode, image.mode) != ("RGB", "L"):
            raise _RefusedError(f"its colour profile is for {source.profile.xcolor_space.strip()}; save it as sRGB")
        target = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise _RefusedError(f"its colour profile cannot be applied ({error}); save it as sRGB") from error
    if shown is None:
        raise _RefusedError("its colour profile cannot be applied; save it as sRGB")
    return shown.convert("L") if image.mode == "L" else shown


def _examine_png(_: Image.Image, content: bytes) -> list[str]:
    position = 8
    chunks: list[tuple[bytes, bytes]] = []
    while not chunks or chunks[-1][0] != b"IEND":
        if position + 12 > len(content):
            raise _RefusedError("it is cut off before its end; save it again")
        length, name = struct.unpack_from(">I4s", content, position)
        body = content[position + 8 : position + 8 + length]
        position += 12 + length
        if position > len(content):
            raise _RefusedError("it is cut off before its end; save it again")
        if struct.unpack_from(">I", content, position - 4)[0] != zlib.crc32(body, zlib.crc32(name)):
            raise _RefusedError("a checksum in it is wrong, so it is damaged; save it again")
        chunks.append((name, body))
    names = [name for name, _ in chunks]
    parts = {name: body for name, body in chunks if name in _PNG_SINGLE}
    unknown = [name.decode("ascii", "replace") for name in names if name[:1].isupper() and name not in _PNG_CRITICAL]
    if unknown:
        raise _RefusedError(f"it needs a part {unknown[0]!r} that no standard names; save it again")
    if b"acTL" in parts:
        raise _RefusedError("it is an animation; save one of its pictures alone")
    late = names[names.index(b"IDAT") :]
    if any(names.count(name) > 1 for name in _PNG_SINGLE) or not _PNG_FIRST.isdisjoint(late):
        raise _RefusedError("its parts are repeated or out of order, so programs read it differently; save it again")
    _check_png_colours(parts)
    _check_png_pixels(parts[b"IHDR"], b"".join(body for name, body in chunks if name == b"IDAT"))
    is_longer = position < len(content) or chunks[-1][1] != b""
    doubts = [("16 bits a channel", parts[b"IHDR"][8] == 16), ("a transparent colour", b"tRNS" in parts)]
    return [doubt for doubt, is_so in [*doubts, ("data after its end", is_longer)] if is_so]


def _check_png_pixels(header: bytes, compressed: bytes) -> None:
    """Check that all rows are there and nothing follows. Decoders fill missing rows with black, without a warning."""
    width, height, bits, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", header)
    expected = 0
    for left, top, across, down in _PNG_INTERLACED if is_interlaced else _PNG_WHOLE:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * bits * _PNG_CHANNELS[colour] // 8))  # each begins with its filter
    stream = zlib.decompressobj()
    size = len(stream.decompress(compressed, expected + 1))
    if size != expected or not stream.eof or stream.unused_data:
        raise _RefusedError("its pixels end before their time or are followed by something else; save it again")


def _check_png_colours(parts: dict[bytes, bytes]) -> None:
    """Check that colours are those of sRGB or of a profile. A profile overrides everything else that a file states."""
    if parts.get(b"cICP", b"\x01\x0d\x00\x01") != b"\x01\x0d\x00\x01":
        raise _RefusedError("it states colours other than sRGB (cICP), which few programs show; save it as sRGB")
    if b"iCCP" in parts:
        return
    (gamma,) = struct.unpack(">I", parts[b"gAMA"]) if b"gAMA" in parts else (_SRGB_GAMMA,)
    if abs(gamma - _SRGB_GAMMA) > 0.02 * _SRGB_GAMMA:
        raise _RefusedError(
            f"it states a gamma of {gamma / 100000:g} (gAMA), which some programs follow and others do not; save it "
            "as sRGB"
        )
    primaries = struct.unpack(">8I", parts[b"cHRM"]) if b"cHRM" in parts else _SRGB_PRIMARIES
    if max(abs(value - usual) for value, usual in zip(primaries, _SRGB_PRIMARIES, strict=True)) > 200:
        raise _RefusedError(
            "it states colours other than sRGB (cHRM), which some programs follow and others do not; save it as sRGB"
        )


def _examine_jpeg(picture: Any, content: bytes) -> list[str]:
    position, marker, interval = 2, b"", 0
    scans: list[bytes] = []  # headers
    padded, parts = bytearray(content[:2]), 0
    while marker != b"\xd9":
        match = _JPEG_MARKER.search(content, position)
        if match is None:
            raise _RefusedError("it is cut off before its end; save it again")
        between = content[position : match.start()]
        if marker == b"\xda":  # the pixels of a scan
            restarts = len(_JPEG_RESTART.findall(between))
            if not interval and restarts:
                raise _RefusedError("its pixels have restarts that it does not announce; save it again")
            if interval and restarts != -(-_count_jpeg_units(picture, scans[-1]) // interval) - 1:
                raise _RefusedError("its pixels end before their time; save it again")
            between = _JPEG_RESTART.sub(_JPEG_PADDING + rb"\g<0>", between) + _JPEG_PADDING
        marker, position = match[1], match.end()
        if marker not in (b"\xd9", b"\x01"):  # only these have no length
            position += struct.unpack_from(">H", content, position)[0]
        segment, parts = content[match.end() + 2 : position], parts + 1
        if parts > _MOST_PARTS + len(content) // 1024:
            raise _RefusedError(f"it has more than {parts - 1} parts; save it again")
        padded += between + content[match.start() : position]
        if marker == b"\xda":
            scans.append(segment)
            if len(scans) > _JPEG_SCANS:
                raise _RefusedError(f"it has more than {_JPEG_SCANS} scans, each of which is decoded; save it again")
        if marker == b"\xdd":
            (interval,) = struct.unpack(">H", segment)
    doubts = _doubt_jpeg_scans(picture, scans)
    if picture.format == "JPEG" and not _shows(picture, bytes(padded)):
        raise _RefusedError("its pixels end before their time; save it again")
    if picture.format == "MPO" or "mp" in picture.info or any(b"hdrgm:" in segment for _, segment in picture.applist):
        doubts.append("several pictures in it; save the first one alone")
    elif position < len(content):
        doubts.append("data after its end")
    if sum(segment.startswith(b"Exif\0\0") for _, segment in picture.applist) > 1:
        doubts.append("several blocks of EXIF data")
    return doubts


def _count_jpeg_units(picture: Any, scan: bytes) -> int:
    """The number of coded units in a scan with this header: of blocks of 8 × 8 pixels, or of groups of such blocks."""
    across, down = (max(int(layer[axis]) for layer in picture.layer) for axis in (1, 2))
    width, height = map(int, picture.size)
    if scan[0] == 1:  # a single component, possibly of fewer pixels than the image
        _, component_across, component_down, *_ = next(layer for layer in picture.layer if layer[0] == scan[1])
        width, height = -(-width * component_across // across), -(-height * component_down // down)
        across = down = 1
    return -(-width // (8 * across)) * -(-height // (8 * down))


def _doubt_jpeg_scans(picture: Any, scans: list[bytes]) -> list[str]:
    """Whether the scans hold every coefficient of every component to its last bit. They may refine it step by step."""
    missing = {component[0]: set(range(64)) for component in picture.layer}
    for scan in scans:
        first, last, precision = scan[-3:]
        for component in scan[1 : 1 + 2 * scan[0] : 2]:
            if precision & 15 == 0:
                missing.get(component, set()).difference_update(range(first, last + 1))
    return ["scans that are missing"] if any(missing.values()) else []


def _shows(picture: Image.Image, padded: bytes) -> bool:
    """Whether extra bytes leave the picture of a JPEG unchanged, which shows that none of its pixels are missing."""
    return np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(padded), formats=("JPEG",))))


def _refuse_truncated_images() -> Callable[[], None]:
    """Let Pillow refuse files that are cut off, also where a program has told it to read them."""
    before, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, False
    return partial(setattr, PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", before)


_truncated_images_refused = ProcessSwitch(_refuse_truncated_images)


def _examine_tiff(picture: Any, content: bytes) -> list[str]:
    kinds = set(picture.tag_v2.get(339, (1,)))
    if kinds != {1} and not (kinds == {3} and picture.mode == "F"):
        kind = "signed numbers" if kinds == {2} else f"numbers of kind {', '.join(map(str, sorted(kinds)))}"
        raise _RefusedError(f"its pixels are {kind}, which do not tell which value is white; store unsigned ones")
    bits, photometric = picture.tag_v2.get(258), picture.tag_v2.get(262)
    # Pillow does not convert these. It would read 12 bits as 16, and white as black.
    if picture.mode.startswith("I;16") and bits != (16,):
        raise _RefusedError(f"it has {bits[0]} bits a pixel; save it in 8 or 16 bits")
    if picture.mode[0] in "IF" and photometric != 1:
        raise _RefusedError("it has more than 8 bits a pixel, with white as zero; save it with black as zero")
    has_profile = picture.info.get("icc_profile")
    primaries = [*picture.tag_v2.get(318, ()), *picture.tag_v2.get(319, ())]
    usual = [*_SRGB_PRIMARIES[: 2 * (318 in picture.tag_v2)], *_SRGB_PRIMARIES[2 if 319 in picture.tag_v2 else 8 :]]
    is_other = any(abs(float(value) * 100000 - want) > 200 for value, want in zip(primaries, usual, strict=False))
    if not has_profile and (301 in picture.tag_v2 or is_other):
        raise _RefusedError("it states colours other than sRGB, which few programs follow; save it as sRGB")
    return _doubt_orientation(content)


def _examine_gif(picture: Any, content: bytes) -> list[str]:
    screen = struct.unpack_from("<HH", content, 6)
    is_full = tuple(picture.tile[0][1]) == (0, 0, *screen)
    return [] if is_full else ["a picture that does not fill its screen, so that programs show more or less around it"]


def _examine_avif(_: Image.Image, content: bytes) -> list[str]:
    start = content.find(b"colrnclx")
    if start >= 0:
        primaries, transfer = struct.unpack_from(">HH", content, start + 8)
        if primaries not in (1, 2) or transfer not in (1, 2, 6, 13):
            raise _RefusedError("it states colours other than sRGB, which Pillow does not convert; save it as sRGB")
    return []


_EXAMINE: dict[str, Callable[[Any, bytes], list[str]]] = {
    "PNG": _examine_png,
    "JPEG": _examine_jpeg,
    "MPO": _examine_jpeg,
    "TIFF": _examine_tiff,
    "AVIF": _examine_avif,
    "GIF": _examine_gif,
}
