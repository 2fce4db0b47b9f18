"""Load on a running service: `python load.py --requests 5000 --concurrency 16 --graph guard.onnx`.

The client takes a core, too, so it sends requests that it has built beforehand over plain sockets.
"""

import argparse
import asyncio
import io
import time
from collections import Counter
from urllib.parse import urlsplit

import clusterguard as cg
import onnxruntime
from PIL import Image

HEAD = (
    "POST /detect HTTP/1.1\r\nHost: load\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {}\r\n\r\n"
)
PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="image"\r\nContent-Type: image/png\r\n\r\n'


async def main(address: str, requests: int, concurrency: int) -> None:
    """Send digits, one a request, and print how fast the answers came."""
    messages = []
    for image in cg.samples.load_digits("test").tensors[0][:, 0]:
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().numpy()).save(buffer, "PNG")
        body = PART + buffer.getvalue() + b"\r\n--x--\r\n"
        messages.append(HEAD.format(len(body)).encode() + body)
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    waiting = iter(range(requests))
    place = urlsplit(address)

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: int) -> int:
        writer.write(messages[index % len(messages)])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        return int(head.split()[1])

    async def ask_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for index in waiting:
            started = time.perf_counter()
            status = await ask(reader, writer, index)
            seconds.append(time.perf_counter() - started)
            statuses[status] += 1

    connections = [await asyncio.open_connection(place.hostname, place.port) for _ in range(concurrency)]
    for connection in connections:  # opening them is not measured
        await ask(*connection, 0)
    started = time.perf_counter()
    await asyncio.gather(*(ask_on(*connection) for connection in connections))
    elapsed = time.perf_counter() - started
    for _, writer in connections:
        writer.close()
    seconds.sort()
    p50, p99 = (1000 * seconds[int(share * len(seconds))] for share in (0.5, 0.99))
    print(f"{requests} requests, {concurrency} at a time: {requests / elapsed:.0f} a second, ", end="")
    print(f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, statuses {dict(statuses)}")


def bare(graph: str, images: int) -> None:
    """Print how fast onnxruntime alone judges images, one at a time."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    digits = cg.samples.load_digits("test").tensors[0].numpy()
    started = time.perf_counter()
    for index in range(images):
        position = index % len(digits)
        session.run(None, {"images": digits[position : position + 1]})
    print(f"onnxruntime alone: {images / (time.perf_counter() - started):.0f} images a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--graph", help="also measure onnxruntime alone on it")
    options = parser.parse_args()
    if options.graph:
        bare(options.graph, options.requests)
    asyncio.run(main(options.address, options.requests, options.concurrency))
