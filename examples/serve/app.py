"""A guard as a web service: `POST /detect` with image files or a JSON batch, `/model`, `/health`, `/metrics`.

export CLUSTERGUARD_GRAPH=guard.onnx
uvicorn --app-dir examples/serve --http connections:PromptProtocol --factory app:create_app
"""

import asyncio
import gc
import hashlib
import json
import logging
import os
import sys
import time
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import clusterguard as cg
import torch
from anyio import move_on_after
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parent))  # a server may load this file from any folder
from judging import MAX_IMAGES, Judge, Judged, media_type

MAX_BYTES = 4 * 2**20  # of a request
BODY_SECONDS = 10.0  # in which a request's body must have come
SAVE_SECONDS = 30.0  # between two savings of the monitor's state
PATHS = ("/detect", "/model", "/health", "/metrics")
BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # reorder the text around them
log = logging.getLogger("clusterguard.serve")


class Verdict(BaseModel):
    """On one image. Distances stay inside: they would show an attacker which changes bring him closer."""

    is_adversarial: bool
    label: int | None  # None where the image is refused, so that nobody takes it for an answer
    class_name: str | None  # of the label; None also where the guard does not know its classes' names


class Answer(BaseModel):
    """Verdicts in the order of the images."""

    verdicts: list[Verdict]


class Problem(BaseModel):
    """Why a request has no verdicts."""

    detail: str


class Model(BaseModel):
    """What is served: the graph's SHA-256, what a request needs to know of it, and the model card exported with it."""

    sha256: str
    clusterguard: str
    num_classes: int
    class_names: list[str] | None
    image_shape: list[int]
    false_positive_rate: float
    card: str | None


PIXELS = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}
PLANES = {"type": "array", "items": {"type": "array", "items": PIXELS}}  # (C, H, W)
BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            },
            "encoding": {"images": {"contentType": "image/png, image/jpeg"}},
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "minItems": 1, "maxItems": MAX_IMAGES, "items": PLANES}},
            }
        },
    },
}
"""What `/detect` takes."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "A form that cannot be read."},
    408: {"model": Problem, "description": "A body that took too long to come."},
    413: {"model": Problem, "description": "Too many bytes, images or pixels."},
    415: {"model": Problem, "description": "A media type that is not read."},
    422: {"model": Problem, "description": "An image or numbers that cannot be judged."},
    503: {"model": Problem, "description": "Too many requests wait; see Retry-After."},
}


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
        self.show(monitor.report)

    def count(self, judged: Judged, report: cg.deployment.MonitorReport) -> None:
        """Take up the verdicts of a request."""
        detection, ratios = judged
        refused = int(detection.is_adversarial.sum())
        self.images.labels("refused").inc(refused)
        self.images.labels("accepted").inc(len(detection.labels) - refused)
        for ratio in ratios[ratios.isfinite()].tolist():
            self.distances.observe(ratio)
        self.show(report)

    def show(self, report: cg.deployment.MonitorReport) -> None:
        """Take up what the monitor says."""
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
        with move_on_after(BODY_SECONDS):
            while more and size <= 16 * MAX_BYTES:  # who sends a little too much shall hear so; not for ever
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)
                if size <= MAX_BYTES:
                    body += message.get("body", b"")
        error = None
        if size > MAX_BYTES:
            error = JSONResponse({"detail": f"expected at most {MAX_BYTES} bytes, got more"}, 413)
        elif more:
            detail = f"expected the whole body within {BODY_SECONDS:g} seconds, got {size} bytes"
            error = JSONResponse({"detail": detail}, 408, {"Connection": "close"})
        if error is not None:
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


def create_app(graph: str | None = None, state: str | None = None) -> FastAPI:
    """The service of a graph that `clusterguard export` wrote.

    Args:
        graph: path of the graph; None takes CLUSTERGUARD_GRAPH.
        state: path of a file for the monitor's state; None takes CLUSTERGUARD_STATE, and keeps none if that is not set.
    """
    path, state = check_paths(
        graph or os.environ.get("CLUSTERGUARD_GRAPH"), state or os.environ.get("CLUSTERGUARD_STATE")
    )
    torch.set_num_threads(1)  # batches are small, and threads would wait for each other
    detector = cg.load_onnx(path, spinning=False)
    if detector.calibration is None:
        raise RuntimeError("expected thresholds that a Calibrator fitted, got others; run: clusterguard calibrate")
    model = describe_model(path, detector)
    monitor = restore(Path(state) if state else None, model.sha256, cg.deployment.plausible_rate(detector.calibration))
    metrics, judge, names = Metrics(monitor), Judge(detector), model.class_names

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gc.collect()
        gc.freeze()  # what is loaded stays; searching it for garbage holds up every request for 0.2 s and more
        async with judge:
            saving = asyncio.create_task(save_now_and_then(Path(state), model.sha256, monitor)) if state else None
            yield
        gc.unfreeze()
        if saving:
            saving.cancel()
            save(Path(state), model.sha256, monitor)

    app = FastAPI(title="clusterguard", version=cg.__version__, lifespan=lifespan)
    app.add_middleware(Gate, metrics=metrics)

    @app.post("/detect", response_model=Answer, responses=PROBLEMS, openapi_extra={"requestBody": BODY})
    async def detect(request: Request) -> Response:
        """Verdicts on `images`: files of a multipart form, or nested lists (B, C, H, W) in [0, 1] in JSON."""
        content_type = request.headers.get("content-type", "")
        kind = media_type(content_type)
        if kind not in BODY["content"]:
            raise HTTPException(415, f"expected {' or '.join(BODY['content'])}, got {kind[:100]!a}")
        judged = await judge(kind, content_type, await request.body())
        metrics.count(judged, monitor.update(judged.detection))
        verdicts = []
        for label, is_refused in zip(
            judged.detection.labels.tolist(), judged.detection.is_adversarial.tolist(), strict=True
        ):
            shown = None if is_refused else label
            name = None if shown is None or names is None else names[shown]
            verdicts.append({"is_adversarial": is_refused, "label": shown, "class_name": name})
        return JSONResponse({"verdicts": verdicts})

    @app.get("/model")
    def describe() -> Model:
        """Which graph answers here."""
        return model

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The service is up; nothing is said of the traffic, for which see the monitor."""
        return {"status": "ok", "classes": detector.num_classes, "image_shape": detector.image_shape}

    @app.get("/metrics", response_class=PlainTextResponse)
    def report() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def check_paths(graph: str | None, state: str | None) -> tuple[Path, str | None]:
    """The paths of the graph and of the monitor's state; an error now, and not after the first traffic."""
    if not graph:
        raise RuntimeError("expected the path of a graph in CLUSTERGUARD_GRAPH, got none")
    if state and not Path(state).resolve().parent.is_dir():
        raise RuntimeError(f"expected an existing folder for the monitor's state, got {printable(state)}")
    return Path(graph), state


def describe_model(path: Path, detector: cg.deployment.OnnxDetector) -> Model:
    """What `/model` answers."""
    return Model(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        clusterguard=cg.__version__,
        num_classes=detector.num_classes,
        class_names=detector.class_names and [printable(name) for name in detector.class_names],
        image_shape=detector.image_shape,
        false_positive_rate=detector.calibration.false_positive_rate,
        card=detector.card,
    )


def printable(text: str) -> str:
    """A text from outside without characters that end lines, move cursors or reorder what is around them."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in BIDIRECTIONAL
        else character
        for character in text
    )


def restore(path: Path | None, sha256: str, limit: float) -> cg.FalsePositiveMonitor:
    """The monitor whose state was saved for this graph; a new one where there is no such state."""
    if path is None or not path.exists():
        return cg.FalsePositiveMonitor(limit)
    try:
        if not path.is_file():  # a pipe would wait for a writer
            raise ValueError("a folder, a pipe or a device")
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["digest"] != digest_of(saved["sha256"], saved["monitor"]):
            raise ValueError("a damaged state")
        if saved["sha256"] == sha256:
            return cg.FalsePositiveMonitor.from_state_dict(saved["monitor"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RuntimeError(
            f"expected the state of a monitor in {path}, got {printable(str(error))[:200]}; remove it to start anew"
        ) from error
    log.warning("the monitor starts anew: %s is of another graph", path)
    return cg.FalsePositiveMonitor(limit)


def digest_of(sha256: str, state: dict[str, Any]) -> str:
    """A digest of a monitor's state and its graph, by which damage is noticed."""
    return hashlib.sha256(json.dumps([sha256, state], sort_keys=True).encode()).hexdigest()


def save(path: Path, sha256: str, monitor: cg.FalsePositiveMonitor) -> None:
    """Write the monitor's state beside its file, then move it there: a kill in between leaves the old one whole."""
    path = path.resolve()  # a link stays
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            state = monitor.state_dict()
            json.dump({"sha256": sha256, "monitor": state, "digest": digest_of(sha256, state)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        log.exception("the monitor's state is not saved")


async def save_now_and_then(path: Path, sha256: str, monitor: cg.FalsePositiveMonitor) -> None:
    """Save whatever is new every SAVE_SECONDS."""
    seen = monitor.report.seen
    while True:
        await asyncio.sleep(SAVE_SECONDS)
        if monitor.report.seen != seen:
            seen = monitor.report.seen
            save(path, sha256, monitor)
