"""What requests hold, and the one thread that judges the images of several requests together."""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import clusterguard as cg
import numpy as np
import torch
from clusterguard.deployment import fit_image, read_image
from fastapi import HTTPException
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from torch import Tensor

MAX_PIXELS = 4_000_000  # of all images of a request
MAX_IMAGES = 64  # in a request; a batch is judged when it has as many
MAX_WAITING = 128  # requests
BATCH_SECONDS = 0.01  # in which requests are read into a batch; nobody waits for others who may come
DECODERS = {"image/png": "PNG", "image/jpeg": "JPEG"}
Shape = tuple[int, int, int]


class Judged(NamedTuple):
    """Verdicts on the images of a request, and their distances over the thresholds of their labels, each (B,)."""

    detection: cg.Detection
    ratios: Tensor


class Judge:
    """Reads and judges requests off the event loop, in one thread: together those that came while it was busy.

    The graph looks at each image alone and thresholds have some slack, so a verdict does not depend on the others.
    """

    def __init__(self, detector: cg.deployment.OnnxDetector) -> None:
        self.detector = detector
        self.waiting = 0
        channels, *size = detector.image_shape
        detector.detect(fit_image(Image.new("L", (8, 8)), size, channels)[None])  # the first is slow, and not a user's
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Tensor], asyncio.Future[Judged]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    async def __aenter__(self) -> "Judge":
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._start()
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __call__(self, kind: str, content_type: str, body: bytes) -> Judged:
        """Verdicts on a body of JSON or a form; HTTPException if it holds no images, or if too many wait already."""
        if self.waiting >= MAX_WAITING:
            raise HTTPException(503, f"expected at most {MAX_WAITING} requests at a time", {"Retry-After": "1"})
        shape = self.detector.image_shape
        read = partial(read_json, body) if kind == "application/json" else partial(read_form, content_type, body)
        future: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self._start()
        self.waiting += 1
        try:
            self._jobs.put((partial(read, shape), future))
            return await future
        finally:
            self.waiting -= 1

    def _start(self) -> None:
        if self._thread.ident is None:  # a client for tests may leave out the application's start
            self._thread.start()

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            batch, images, end = [], 0, time.monotonic() + BATCH_SECONDS
            while job is not None:
                read, future = job
                try:
                    batch.append((read(), future))
                    images += len(batch[-1][0])
                except Exception as error:  # goes to the one who asked
                    answer(future, error)
                if images >= MAX_IMAGES or time.monotonic() > end or self._jobs.empty():
                    break
                job = self._jobs.get()
            if batch:
                self._judge(*zip(*batch, strict=True))
            if job is None:
                return

    def _judge(self, images: tuple[Tensor, ...], futures: tuple["asyncio.Future[Judged]", ...]) -> None:
        answers: list[Any] = []
        try:  # unchecked, for what is read has the right shape and range
            detection = self.detector.detect(torch.cat(images), check=False)
            ratios = detection.distances / self.detector.thresholds[detection.labels]
            sizes = [len(batch) for batch in images]
            for *verdicts, shares in zip(*(part.split(sizes) for part in (*detection, ratios)), strict=True):
                answers.append(Judged(cg.Detection(*verdicts), shares))
        except Exception as error:
            answers = [error] * len(futures)
        for future, result in zip(futures, answers, strict=True):
            answer(future, result)


def answer(future: "asyncio.Future[Judged]", result: Any) -> None:
    """Answer a request on its event loop, unless it was given up."""

    def tell() -> None:
        if not future.done():
            (future.set_exception if isinstance(result, Exception) else future.set_result)(result)

    with suppress(RuntimeError):  # the loop is closed, and nobody waits
        future.get_loop().call_soon_threadsafe(tell)


def read_form(content_type: str, body: bytes, shape: Shape) -> Tensor:
    """Images of the files in a form, as `clusterguard train` reads them; the limit of pixels is for all of them."""
    channels, *size = shape
    images, left = [], MAX_PIXELS
    for kind, content in find_files(content_type, body):
        image = decode(kind, content, left)
        left -= image.width * image.height
        images.append(fit_image(image, size, channels))
    return torch.stack(images)


def find_files(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """Media types, in small letters and without parameters, and contents of the files under `images` in a form."""
    parts: list[tuple[dict[bytes, bytes], bytearray]] = []
    name, value, ends = bytearray(), bytearray(), []

    def begin() -> None:
        if len(parts) == MAX_IMAGES:
            raise HTTPException(413, f"expected at most {MAX_IMAGES} images, got more")
        parts.append(({}, bytearray()))

    def end_header() -> None:
        parts[-1][0][bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def on_data(data: bytes, start: int, end: int) -> None:
        parts[-1][1].extend(memoryview(data)[start:end])

    try:
        parser = MultipartParser(
            parse_options_header(content_type)[1][b"boundary"],
            {
                "on_part_begin": begin,
                "on_header_field": lambda data, start, end: name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": end_header,
                "on_part_data": on_data,
                "on_end": lambda: ends.append(True),
            },
        )
        parser.write(body)
    except (FormParserError, KeyError) as error:
        raise HTTPException(400, "expected a multipart form, got one that cannot be read") from error
    if not ends:
        raise HTTPException(400, "expected a multipart form, got one that is cut off or has no parts")
    described = [
        (parse_options_header(headers.get(b"content-disposition"))[1], headers, bytes(data)) for headers, data in parts
    ]
    files = [(options, headers, data) for options, headers, data in described if options.get(b"name") == b"images"]
    if not files or not all(b"filename" in options for options, _, _ in files):
        raise HTTPException(422, "expected one or several files under the name images, and only files")
    files = [(media_type(headers.get(b"content-type", b"").decode("latin-1")), data) for _, headers, data in files]
    for kind, _ in files:
        if kind not in DECODERS:
            raise HTTPException(415, f"expected {' or '.join(DECODERS)}, got {kind[:100]!a}")
    return files


def media_type(header: str) -> str:
    """A media type in small letters and without parameters."""
    return header.partition(";")[0].strip().lower()


def decode(kind: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An opaque, still image as people see it, read as in training; what programs show differently is not judged."""
    try:
        read = read_image(content, name=f"this {kind}", formats=(DECODERS[kind],), max_pixels=max_pixels)
    except cg.errors.InputError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise HTTPException(413, f"expected at most {MAX_PIXELS} pixels in all images, got more") from error
        raise HTTPException(422, str(error)) from error
    if read.doubts:
        raise HTTPException(422, f"expected an image that all programs show alike, got one with {read.doubts[0]}")
    return read.image


def read_json(content: bytes, shape: Shape) -> Tensor:
    """Images (B, C, H, W) from `{"images": nested lists}` of numbers in [0, 1]; texts and booleans are none."""
    wanted = f"expected {{'images': numbers, (B, {', '.join(map(str, shape))})}}"
    channels, height, width = shape
    # More of these than the largest batch has, and a few for other keys: known before anything is built from them.
    if content.count(b",") > MAX_IMAGES * channels * height * width + 16:
        raise HTTPException(413, f"expected at most {MAX_IMAGES} images in {wanted[9:]}, got more numbers")
    if content.count(b"[") > MAX_IMAGES * (1 + channels * (1 + height)) + 16 or content.count(b"{") > 16:
        raise HTTPException(422, f"{wanted}, got more lists or objects")
    try:
        body = json.loads(content, parse_int=number, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"{wanted}, got {str(error)[:100]!a}") from error
    if not isinstance(body, dict) or "images" not in body:
        got = f"the keys {str([*body])[:100]!a}" if isinstance(body, dict) else f"a {type(body).__name__}"
        raise HTTPException(422, f"{wanted}, got {got}")
    images = body["images"]
    if not isinstance(images, list) or not images:
        raise HTTPException(422, f"{wanted}, got no list of images")
    if len(images) > MAX_IMAGES:
        raise HTTPException(413, f"expected at most {MAX_IMAGES} images, got {len(images)}")
    array = np.empty((len(images), *shape))
    try:
        copy_numbers(images, array)
    except ValueError as error:
        raise HTTPException(422, f"{wanted}, got {error}") from error
    if not ((array >= 0) & (array <= 1)).all():  # also where not finite
        raise HTTPException(422, f"expected numbers in [0, 1], got {array.min():.4g} to {array.max():.4g}")
    return torch.from_numpy(array).float()


def number(text: str) -> float:
    """A number of JSON; in Python, so that other threads get their turn while a long body is parsed."""
    return float(text)


def copy_numbers(values: Any, place: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
    """Copy nested lists of the shape of an array into it; ValueError at the first that is of another."""
    if not isinstance(values, list) or len(values) != len(place):
        raise ValueError("another shape")
    if place.ndim == 1:
        kinds = set(map(type, values)) - {float}
        if kinds:
            raise ValueError(f"values of type {kinds.pop().__name__}")
        place[:] = values
        return
    for below, there in zip(values, place, strict=True):
        copy_numbers(below, there)
