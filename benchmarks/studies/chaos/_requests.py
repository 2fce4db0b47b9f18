"""Hostile and ordinary requests to the example service, at the same time."""

import asyncio
import io
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from clusterguard import export_onnx, load_onnx
from PIL import Image

from benchmarks.studies.chaos._writers import load_service, make_guard, make_images

_BOUNDARY = b'--x\r\nContent-Disposition: form-data; name="images"; filename="image"\r\nContent-Type: image/png\r\n\r\n'
Request = tuple[bytes, str]


def send_requests(hostile: int, benign: int, seed: int, *, at_once: int = 16) -> Counter[str]:
    """Send hostile and ordinary requests in random order.

    Hostile requests are ordinary ones with flipped bits, parts cut out, doubled or replaced by bytes, and other media
    types. Some of them are still whole, and then must be answered as such.

    Returns:
        How many requests of each kind were answered with which class of status, such as "hostile 4xx"; "wrong" ordinary
        answers; and "health missed", how often `/health` did not answer within a second meanwhile.
    """
    chance = random.Random(seed)
    images, _ = make_images(50)
    bodies = [_png(image) for image in images]
    plan: list[tuple[bool, int]] = [(True, 0)] * hostile + [(False, index % len(images)) for index in range(benign)]
    chance.shuffle(plan)
    with tempfile.TemporaryDirectory() as folder:
        graph = export_onnx(make_guard(), Path(folder) / "guard.onnx")
        pixels = (images * 255).round() / 255
        detection = load_onnx(graph).detect(pixels)
        expected = [
            {"is_adversarial": refused, "label": None if refused else label}
            for refused, label in zip(detection.is_adversarial.tolist(), detection.labels.tolist(), strict=True)
        ]
        with served(load_service().create_app(str(graph))) as port:
            requests = [
                (is_hostile, index, *(_spoil(chance, bodies) if is_hostile else _form(bodies[index])))
                for is_hostile, index in plan
            ]
            return asyncio.run(_send_all(port, requests, expected, at_once))


async def _send_all(port: int, requests: list[Any], expected: list[dict[str, Any]], at_once: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    waiting, is_done = iter(requests), asyncio.Event()

    async def work() -> None:
        for is_hostile, index, body, kind in waiting:
            status, answer = await _ask(port, body, kind)
            outcomes[f"{'hostile' if is_hostile else 'ordinary'} {status // 100}xx"] += 1
            if not is_hostile and status == 200:
                (verdict,) = json.loads(answer)["verdicts"]
                outcomes["wrong"] += {name: verdict[name] for name in expected[index]} != expected[index]

    async def watch() -> None:
        while not is_done.is_set():
            try:
                await asyncio.wait_for(_ask(port, b"", "", path="/health"), 1)
                outcomes["health answered"] += 1
            except TimeoutError:
                outcomes["health missed"] += 1
            await asyncio.sleep(0.2)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(work() for _ in range(at_once)))
    is_done.set()
    await watcher
    return outcomes


async def _ask(port: int, body: bytes, kind: str, path: str = "/detect") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{'GET' if path == '/health' else 'POST'} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}", "", ""]
    try:
        writer.write("\r\n".join(lines).encode() + body)
        answer = await reader.read()
    finally:
        writer.close()
    first, _, content = answer.partition(b"\r\n\r\n")
    return int(first.split(b" ", 2)[1]) if first.startswith(b"HTTP/") else 599, content


def _form(picture: bytes) -> Request:
    return _BOUNDARY + picture + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _spoil(chance: random.Random, pictures: list[bytes]) -> Request:
    """An ordinary request, as a form or as JSON, damaged in one to three ways."""
    body, kind = _form(chance.choice(pictures))
    if chance.random() < 0.5:
        values = [[[[chance.choice([0, 0.5, 1, 2, -1, 1e308])] * 6] * 6]]
        body, kind = json.dumps({"images": values}).encode(), "application/json"
    for _ in range(chance.randint(1, 3)):
        body, kind = chance.choice(_DAMAGES)(chance, body, kind)
    return body, kind


def _flip(chance: random.Random, body: bytes, kind: str) -> Request:
    changed = bytearray(body or b"\0")
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed), kind


def _cut(chance: random.Random, body: bytes, kind: str) -> Request:
    start, end = sorted(chance.randrange(len(body) + 1) for _ in range(2))
    return body[:start] + body[end:], kind


def _repeat(chance: random.Random, body: bytes, kind: str) -> Request:
    start, end = sorted(chance.randrange(len(body) + 1) for _ in range(2))
    return (body[:end] + body[start:end] * chance.randint(1, 5) + body[end:])[:1_000_000], kind


def _insert(chance: random.Random, body: bytes, kind: str) -> Request:
    place = chance.randrange(len(body) + 1)
    return body[:place] + chance.choice(_INSERTS) + body[place:], kind


def _relabel(chance: random.Random, body: bytes, kind: str) -> Request:
    return body, chance.choice(
        ["", "text/html", "image/png", "application/json; charset=utf-16", "multipart/form-data"]
    )


_DAMAGES = (_flip, _cut, _repeat, _insert, _relabel)
_INSERTS = (
    b"NaN",
    b"1e999",
    b"[" * 50_000,
    b"9" * 9000,
    b"\xff\xfe",
    b"null",
    b'"0.5"',
    b"\r\n--x\r\n",
    bytes(70_000),
    b"{}",
)


@contextmanager
def served(application: Any, protocol: Any = "auto", limit_concurrency: int | None = None) -> Iterator[int]:
    """Run a server with an application for the block, and yield its port.

    Args:
        application: ASGI application.
        protocol: class of a connection, or a name that uvicorn knows.
        limit_concurrency: number of connections or requests at a time; None for any number.
    """
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            application, http=protocol, log_level="critical", lifespan="on", limit_concurrency=limit_concurrency
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
