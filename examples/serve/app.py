"""A guard as a web service: `POST /detect` with image files or a JSON batch, `/model`, `/health`, `/metrics`.

CLUSTERGUARD_GRAPH=guard.onnx uvicorn --app-dir examples/serve --factory app:create_app
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clusterguard as cg
import numpy as np
import torch
from anyio import CapacityLimiter, to_thread
from clusterguard.deployment import fit_image, read_image
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

MAX_BYTES = 4 * 2**20  # of a request
MAX_PIXELS = 4_000_000  # of an image
MAX_IMAGES = 64  # in a request
PATHS = ("/detect", "/model", "/health", "/metrics")
MODES = {"P": "a palette", "1": "1 bit a pixel", "LA": "an alpha channel", "RGBA": "an alpha channel", "CMYK": "inks"}
DECODERS = {"image/png": "PNG", "image/jpeg": "JPEG"}


class Verdict(BaseModel):
    """On one image. Distances stay inside: they would show an attacker which changes bring him closer."""

    is_adversarial: bool
    label: int | None  # None where the image is refused, so that nobody takes it for an answer
    class_name: str | None  # of the label; None also where the guard does not know its classes' names


class Answer(BaseModel):
    """Verdicts in the order of the images."""

    verdicts: list[Verdict]


class Model(BaseModel):
    """What is served: the graph's SHA-256, what a request needs to know of it, and the model card exported with it."""

    sha256: str
    clusterguard: str
    num_classes: int
    class_names: list[str] | None
    image_shape: list[int]
    false_positive_rate: float
    card: str | None


class Metrics:
    """What Prometheus reads; of one process."""

    def __init__(self, monitor: cg.FalsePositiveMonitor) -> None:
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "clusterguard", "registry": self.registry}
        self.images = Counter("images", "Images judged.", ["verdict"], **shared)
        self.distances = Histogram(
            "distance_over_threshold",
            "Finite distances over the threshold of their class; accepted up to 1.",
            buckets=(0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0),
            **shared,
        )
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **shared)
        self.seconds = Histogram("request_seconds", "From request to answer.", ["path"], **shared)
        self.alarm = Gauge("monitor_alarm", "1 if more is refused than calibration explains.", **shared)
        self.evidence = Gauge("monitor_evidence", "The alarm sounds at clusterguard_monitor_level.", **shared)
        Gauge("monitor_level", "Evidence at which the alarm sounds.", **shared).set(monitor.run_length)
        Gauge("monitor_limit", "Refusal rate that calibration makes plausible.", **shared).set(monitor.limit)
        for verdict in ("accepted", "refused"):
            self.images.labels(verdict)  # so that rates are 0 and not absent at first

    def count(self, found: cg.Detection, ratios: Tensor, report: cg.deployment.MonitorReport) -> None:
        """Take up the verdicts of a request."""
        refused = int(found.is_adversarial.sum())
        self.images.labels("refused").inc(refused)
        self.images.labels("accepted").inc(len(found.labels) - refused)
        for ratio in ratios[ratios.isfinite()].tolist():
            self.distances.observe(ratio)
        self.alarm.set(report.alarm)
        self.evidence.set(report.evidence)


class Gate:
    """Reads a request's body, up to a limit, before anything else looks at it, and times the answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, path = time.perf_counter(), scope["path"] if scope["path"] in PATHS else "other"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
            await send(message)

        body, size, more = bytearray(), 0, True
        while more and size <= 16 * MAX_BYTES:  # who sends a little too much shall hear so; not for ever
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size <= MAX_BYTES:
                body += message.get("body", b"")
        if size > MAX_BYTES:
            error = JSONResponse({"detail": f"expected at most {MAX_BYTES} bytes, got more"}, status_code=413)
            await error(scope, receive, answer)
            return
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        try:
            await self.app(scope, replay, answer)
        except Exception:
            self.metrics.requests.labels(path, 500).inc()  # answered further out
            raise


def create_app(graph: str | None = None) -> FastAPI:
    """The service of a graph that `clusterguard export` wrote; None takes its path from CLUSTERGUARD_GRAPH."""
    path = Path(graph or os.environ["CLUSTERGUARD_GRAPH"])
    detector = cg.load_onnx(path)
    if detector.calibration is None:
        raise RuntimeError("expected thresholds that a Calibrator fitted, got others; run: clusterguard calibrate")
    monitor = cg.FalsePositiveMonitor(cg.deployment.plausible_rate(detector.calibration))
    metrics = Metrics(monitor)
    channels, *size = detector.image_shape
    names, model = detector.class_names, describe_model(path, detector)
    workers = CapacityLimiter(os.cpu_count() or 1)  # more threads than cores only wait for each other
    app = FastAPI(title="clusterguard")
    app.add_middleware(Gate, metrics=metrics)

    def judge(read: Any, content: Any) -> cg.Detection:
        images = read(content)
        try:
            return detector.detect(images)
        except cg.errors.InputError as error:
            raise HTTPException(422, str(error)) from error

    def read_files(files: Sequence[tuple[str, bytes]]) -> Tensor:
        return torch.stack([fit_image(decode(*own), size, channels) for own in files])  # as `clusterguard train` does

    @app.post("/detect")
    async def detect(request: Request) -> Answer:
        """Verdicts on `images`: files of a multipart form, or nested lists (B, C, H, W) in [0, 1] in JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            found = await to_thread.run_sync(judge, read_json, await request.body(), limiter=workers)
        elif kind == "multipart/form-data":
            found = await to_thread.run_sync(judge, read_files, await uploads(request), limiter=workers)
        else:
            raise HTTPException(415, f"expected multipart/form-data or application/json, got {kind or 'nothing'}")
        metrics.count(found, found.distances / detector.thresholds[found.labels], monitor.update(found))
        verdicts = []
        for label, is_refused in zip(found.labels.tolist(), found.is_adversarial.tolist(), strict=True):
            shown = None if is_refused else label
            name = None if shown is None or names is None else names[shown]
            verdicts.append(Verdict(is_adversarial=is_refused, label=shown, class_name=name))
        return Answer(verdicts=verdicts)

    @app.get("/model")
    def describe() -> Model:
        """Which graph answers here."""
        return model

    @app.get("/health")
    def health() -> dict[str, Any]:
        """The service is up; nothing is said of the traffic, for which see the monitor."""
        return {"status": "ok", "classes": detector.num_classes, "image_shape": detector.image_shape}

    @app.get("/metrics")
    def report() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def describe_model(path: Path, detector: cg.deployment.OnnxDetector) -> Model:
    """What `/model` answers."""
    return Model(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        clusterguard=cg.__version__,
        num_classes=detector.num_classes,
        class_names=detector.class_names and list(detector.class_names),
        image_shape=detector.image_shape,
        false_positive_rate=detector.calibration.false_positive_rate,
        card=detector.card,
    )


async def uploads(request: Request) -> list[tuple[str, bytes]]:
    """Media types, in small letters and without parameters, and contents of the files in a form."""
    async with request.form() as form:
        found = form.getlist("images")
        files = [own for own in found if isinstance(own, UploadFile)]
        if not files or len(files) < len(found):
            raise HTTPException(422, "expected one or several files under the name images, and only files")
        if len(files) > MAX_IMAGES:
            raise HTTPException(413, f"expected at most {MAX_IMAGES} images, got {len(files)}")
        kinds = [(own.content_type or "").partition(";")[0].strip().lower() for own in files]
        for kind in kinds:
            if kind not in DECODERS:
                raise HTTPException(415, f"expected {' or '.join(DECODERS)}, got {kind or 'no media type'}")
        return [(kind, await own.read()) for kind, own in zip(kinds, files, strict=True)]


def decode(media_type: str, content: bytes) -> Image.Image:
    """An opaque, still image of 8 bits a channel, as people see it; what programs show differently is not judged."""
    try:
        read = read_image(content, name=f"this {media_type}", formats=(DECODERS[media_type],), max_pixels=MAX_PIXELS)
    except cg.errors.InputError as error:
        too_large = isinstance(error.__cause__, Image.DecompressionBombError)
        raise HTTPException(413 if too_large else 422, str(error)) from error
    doubts = [*read.doubts, *([] if read.mode in ("L", "RGB") else [MODES.get(read.mode, f"mode {read.mode}")])]
    if doubts:
        raise HTTPException(422, f"expected one opaque image, grey or RGB, of 8 bits, got one with {doubts[0]}")
    return read.image


def read_json(content: bytes) -> Tensor:
    """Images (B, C, H, W) from `{"images": nested lists}`; NaN and infinity are no JSON, and overflow is infinity."""
    try:
        images = np.asarray(json.loads(content)["images"], dtype=np.float64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise HTTPException(422, f"expected {{'images': numbers, (B, C, H, W)}}, got {error}") from error
    if images.ndim != 4 or not len(images) or not np.isfinite(images).all():
        raise HTTPException(422, f"expected finite images of shape (B, C, H, W), got shape {images.shape}")
    if len(images) > MAX_IMAGES:
        raise HTTPException(413, f"expected at most {MAX_IMAGES} images, got {len(images)}")
    return torch.from_numpy(images).clamp(-2, 2).float()  # what is outside [0, 1] stays there, and float32 holds it
