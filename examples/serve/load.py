"""Load on a running service: `python load.py --requests 5000 --concurrency 16`. The client takes a core, too."""

import argparse
import asyncio
import io
import time
from collections import Counter

import clusterguard as cg
import httpx2
from PIL import Image


async def main(address: str, requests: int, concurrency: int) -> None:
    """Send digits and print how fast the answers came."""
    pictures = []
    for image in cg.samples.load_digits("test").tensors[0][:, 0]:
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().numpy()).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    waiting = iter(range(requests))

    async def ask(client: httpx2.AsyncClient) -> None:
        for index in waiting:
            started = time.perf_counter()
            files = {"images": ("image", pictures[index % len(pictures)], "image/png")}
            response = await client.post(f"{address}/detect", files=files)
            seconds.append(time.perf_counter() - started)
            statuses[response.status_code] += 1

    async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(concurrency)))
        elapsed = time.perf_counter() - started
    seconds.sort()
    p50, p99 = (1000 * seconds[int(share * len(seconds))] for share in (0.5, 0.99))
    print(f"{requests} requests, {concurrency} at a time: {requests / elapsed:.0f} a second, ", end="")
    print(f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, statuses {dict(statuses)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    asyncio.run(main(options.address, options.requests, options.concurrency))
