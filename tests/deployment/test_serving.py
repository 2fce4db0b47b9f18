"""The service of examples/serve, over HTTP."""

import asyncio
import copy
import hashlib
import importlib.util
import io
import json
import re
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import clusterguard as cg
import httpx2
import pytest
import torch
from clusterguard.cli import app as cli
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from benchmarks.studies.chaos._requests import served

# How to store a picture that orientations 2 to 8 turn upright.
UNDONE_BY = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "九")
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"serve_{name}", EXAMPLE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # FastAPI looks annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guard():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
    guard = cg.ClusterGuard(backbone, num_classes=10, class_names=NAMES)
    train, calibration = (
        DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
        for split in ("train", "calibration")
    )
    trainer = cg.AdversarialClusterTrainer(guard, cg.FGSM(eps=0.1), warmup_epochs=1, calibrator=cg.Calibrator(0.05))
    trainer.fit(train, calibration, epochs=2, progress=False)
    return guard.eval()


@pytest.fixture(scope="module")
def app():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)  # as uvicorn does
        module = load("app")
        module.MAX_BYTES = 500_000
        yield module
    torch.set_num_threads(threads)


@pytest.fixture
def judging(app):
    return sys.modules["judging"]


@pytest.fixture(scope="module")
def graph(guard, tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "guard.onnx"
    return cg.export_onnx(guard, path, torch.zeros(1, 1, 28, 28), card="# A guard\n\nof 数字")


@contextmanager
def served_at(application):
    """The address of a server on a free port."""
    with served(application) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def address(graph, app):
    """A server whose metrics start at zero."""
    with served_at(app.create_app(str(graph))) as place:
        yield place


@pytest.fixture
def gate(judging, monkeypatch):
    """While it is clear the judging thread stands still at the first picture that it decodes."""
    is_open, is_reached, decode = threading.Event(), threading.Event(), judging.decode

    def slowly(*given):
        is_reached.set()
        assert is_open.wait(60)
        return decode(*given)

    monkeypatch.setattr(judging, "decode", slowly)
    is_open.is_reached = is_reached
    yield is_open
    is_open.set()


def png(picture: Image.Image | torch.Tensor, kind: str = "PNG", **options: object) -> bytes:
    if isinstance(picture, torch.Tensor):
        picture = Image.fromarray((picture[0] * 255).round().byte().numpy())
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def files(*contents: bytes, media_type: str = "image/png") -> dict[str, object]:
    return {"files": [("images", ("image", content, media_type)) for content in contents]}


def text(body: str | bytes, kind: str = "application/json") -> dict[str, object]:
    return {"content": body, "headers": {"content-type": kind}}


def batch(*values: str) -> str:
    """A JSON batch of one digit in which these values stand for its first pixels."""
    row = [*values, *["0"] * (28 - len(values))]
    rows = [row, *[["0"] * 28] * 27]
    return f'{{"images": [[[{",".join("[" + ",".join(line) + "]" for line in rows)}]]]}}'


def with_gamma(content: bytes, gamma: int) -> bytes:
    """A PNG that states a gamma, in units of 1/100,000."""
    body = b"gAMA" + gamma.to_bytes(4, "big")
    position = content.index(b"IDAT") - 4
    return content[:position] + b"\0\0\0\4" + body + zlib.crc32(body).to_bytes(4, "big") + content[position:]


async def stream(size: int):
    for _ in range(size // 10_000):
        yield b"0" * 10_000  # without a content-length


def refused_requests(digit: torch.Tensor) -> list[tuple[int, dict[str, object]]]:
    """Requests that are not answered with verdicts, and the status that each deserves."""
    whole = png(digit)
    jpeg, second = "image/jpeg", Image.new("RGB", (28, 28), "white")
    animated = png(Image.new("L", (28, 28)), save_all=True, append_images=[Image.new("L", (28, 28), 255)])
    return [
        (422, files(whole[:-30])),
        (422, files(b"")),
        (422, files(whole, b"no image")),
        (422, files(png(Image.new("L", (28, 28)), kind="GIF"))),  # whatever it says it is
        (422, files(whole, media_type="image/jpeg")),
        (422, files(png(Image.new("I;16", (28, 28))))),
        (422, files(png(Image.new("RGBA", (28, 28))))),
        (422, files(whole + b"more")),
        (422, files(png(Image.new("RGB", (28, 28)), "MPO", save_all=True, append_images=[second]), media_type=jpeg)),
        (422, files(png(Image.new("CMYK", (28, 28)), "JPEG"), media_type=jpeg)),
        (422, files(png(digit, icc_profile=b"no profile"))),
        (422, files(with_gamma(whole, 100_000))),
        (422, files(png(Image.new("L", (28, 28)), transparency=0))),
        (422, files(animated)),
        (422, files(png(Image.new("L", (1, 3000))))),
        (422, {"files": [("pictures", ("image", whole, "image/png"))]}),
        (422, {"data": {"images": "text"}, "files": {"other": b""}}),
        (415, files(whole, media_type="image/gif")),
        (415, files(whole, media_type="text/html")),
        (415, text(whole, "image/png")),
        (415, {}),
        (400, text(b"--x", "multipart/form-data")),
        (413, files(png(Image.new("L", (4001, 1000))))),
        (413, files(*[png(Image.new("L", (1000, 1000)))] * 5)),  # each alone would do
        (413, files(*[whole] * 65)),
        (413, text(json.dumps({"images": [digit.tolist()] * 65}))),
        (400, text(b'--x\r\nContent-Disposition: form-data; name="images"', "multipart/form-data; boundary=x")),
        (400, text(b"no form", "multipart/form-data; boundary=x")),
        (400, text(b"", "multipart/form-data; boundary=x")),
        (413, text(batch() + " " * 500_000)),
        (413, {"content": None, "headers": {"content-type": "application/json"}}),  # a stream, see below
        (422, text("")),
        (422, text("[]")),
        (422, text('{"images": []}')),
        (422, text('{"images": [[[[0.5]]]]}')),
        (422, text('{"images": [[[[0.5], [0.5, 0.5]]]]}')),
        (422, text('{"images": ' + "[" * 100_000)),
        (422, text('{"images": "\ud83d"}'.encode("utf-8", "surrogatepass"))),
        *[
            (422, text(batch(value)))
            for value in (
                *("NaN", "Infinity", "-Infinity", "1e999", "1e300", "null", '"nan"', "2", "-1", "9" * 400, "9" * 9999),
                *('"0.5"', "true", "false", "[0.5]", "{}"),
            )
        ],
    ]


async def ask(address: str, requests: list[dict[str, object]]) -> list[httpx2.Response]:
    """All at once, over at most 50 connections."""
    limits = httpx2.Limits(max_connections=50)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=None, trust_env=False) as client:
        bodies = [body | ({"content": stream(10**6)} if body.get("content", b"") is None else {}) for body in requests]
        return await asyncio.gather(*(client.post("/detect", **body) for body in bodies))


def test_a_thousand_concurrent_requests_are_all_answered_as_the_guard_says(address, guard):
    generator = torch.Generator().manual_seed(0)
    digits = cg.samples.load_digits("test").tensors[0]
    noise = torch.randint(0, 256, (200, 1, 28, 28), generator=generator) / 255
    images = torch.cat([digits, noise])[torch.randperm(1200, generator=generator)]
    expected = guard.detect(images)
    assert expected.is_adversarial.sum() > 100
    assert (~expected.is_adversarial).sum() > 700

    bad = refused_requests(digits[0])
    requests, answers, position = [], [], 0
    for index in range(1000):
        if index % 7 == 3:
            status, request = bad[index // 7 % len(bad)]
            requests.append(request)
            answers.append((status, None))
            continue
        rows = range(position, position + 1 + index % 2)
        position = (position + 2) % 1198
        if index % 10 == 0:
            requests.append(text(json.dumps({"images": images[list(rows)].tolist()})))
        else:
            requests.append(files(*(png(images[row]) for row in rows)))
        answers.append((200, rows))

    responses = asyncio.run(ask(address, requests))
    assert len(responses) == 1000
    statuses, refused, accepted = Counter(), 0, 0
    for request, response, (status, rows) in zip(requests, responses, answers, strict=True):
        assert response.status_code == status, (str(request)[:300], response.text)
        statuses[status] += 1
        if rows is None:
            assert "verdicts" not in response.json()
            continue
        assert response.json()["verdicts"] == [
            {
                "is_adversarial": bool(expected.is_adversarial[row]),
                "label": None if expected.is_adversarial[row] else int(expected.labels[row]),
                "class_name": None if expected.is_adversarial[row] else NAMES[expected.labels[row]],
            }
            for row in rows
        ]
        refused += int(expected.is_adversarial[list(rows)].sum())
        accepted += int((~expected.is_adversarial[list(rows)]).sum())

    assert httpx2.get(f"{address}/health", trust_env=False).json()["status"] == "ok"
    metrics = httpx2.get(f"{address}/metrics", trust_env=False).text

    def value(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", metrics, flags=re.MULTILINE)[1])

    assert value('clusterguard_images_total{verdict="refused"}') == refused
    assert value('clusterguard_images_total{verdict="accepted"}') == accepted
    assert value('clusterguard_distance_over_threshold_bucket{le="1.0"}') == pytest.approx(accepted, abs=1)
    for status, count in statuses.items():
        assert value(f'clusterguard_requests_total{{path="/detect",status="{status}"}}') == count
    assert value('clusterguard_request_seconds_count{path="/detect"}') == 1000
    assert value("clusterguard_monitor_alarm") == 1  # every sixth image is noise
    assert value("clusterguard_monitor_limit") == pytest.approx(cg.deployment.plausible_rate(guard.calibration))


def test_ordinary_traffic_raises_no_alarm_and_images_of_another_size_are_fitted(address, guard):
    digits = cg.samples.load_digits("test").tensors[0][:100]
    large = Image.fromarray((digits[0, 0] * 255).byte().numpy()).resize((84, 56)).convert("RGB")
    jpeg = files(png(large, "JPEG"), media_type="image/jpeg")
    answers = asyncio.run(ask(address, [files(*map(png, digits[:50])), jpeg]))
    assert [len(answer.json()["verdicts"]) for answer in answers] == [50, 1]
    assert "clusterguard_monitor_alarm 0.0" in httpx2.get(f"{address}/metrics", trust_env=False).text


def test_what_people_see_is_what_is_judged(address, guard):
    digits = cg.samples.load_digits("test").tensors[0][:40]
    expected = [guard.detect(digits).is_adversarial.tolist(), guard.detect(digits).labels.tolist()]
    assert not all(expected[0])
    turns = [None, *(getattr(Image.Transpose, name) for name in UNDONE_BY.split())]
    requests = []
    for tag, turn in enumerate(turns, 1):
        exif, contents = Image.Exif(), []
        exif[0x0112] = tag
        for digit in digits:
            picture = Image.fromarray((digit[0] * 255).round().byte().numpy())
            contents.append(png(picture if turn is None else picture.transpose(turn), exif=exif))
        requests.append(files(*contents))
    for response in asyncio.run(ask(address, requests)):
        verdicts = response.json()["verdicts"]
        assert [verdict["is_adversarial"] for verdict in verdicts] == expected[0]
        assert all(verdict["label"] in (None, label) for verdict, label in zip(verdicts, expected[1], strict=True))


def test_an_error_says_what_is_wrong_with_the_picture(address):
    white = Image.new("L", (28, 28), 255)
    second = png(white.convert("RGB"), "MPO", save_all=True, append_images=[white.convert("RGB")])
    cases = {
        "several pictures": files(second, media_type="image/jpeg"),
        "animation": files(png(white, save_all=True, append_images=[Image.new("L", (28, 28))])),
        "16 bits a channel": files(png(Image.new("I;16", (28, 28)))),
        "transparent": files(png(Image.new("LA", (28, 28)))),
        "gamma of 1 ": files(with_gamma(png(white), 100_000)),
        "data after its end": files(png(white) + b"\0"),
        "cut off": files(png(white, "JPEG")[:-2], media_type="image/jpeg"),
        "lists or objects": text('{"images": [' + "{}," * 900 + "{}]}"),
        "more lists": text('{"images": [' + "[]," * 9000 + "[]]}"),
        "more numbers": text('{"images": [' + "0," * 60_000 + "0]}"),
        "got the keys \"['image']\"": text('{"image": []}'),
        "got a list": text("[[]]"),
        "values of type str": text(batch('"0.5"')),
        "values of type bool": text(batch("true")),
    }
    for words, response in zip(cases, asyncio.run(ask(address, list(cases.values()))), strict=True):
        assert response.status_code == (413 if words == "more numbers" else 422)
        assert words in response.json()["detail"]


@pytest.mark.parametrize("kind", ["image/png", "image/PNG", "IMAGE/Png", "image/png; charset=binary", "image/png ;x=y"])
def test_media_types_have_no_case_and_parameters_do_not_count(address, kind):
    white = png(Image.new("L", (28, 28), 255))
    (response,) = asyncio.run(ask(address, [files(white, media_type=kind)]))
    assert response.status_code == 200


def test_the_model_is_told_with_its_hash_names_and_card(address, guard, graph):
    told = httpx2.get(f"{address}/model", trust_env=False).json()
    assert told["sha256"] == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert (told["class_names"], told["num_classes"], told["image_shape"]) == (list(NAMES), 10, [1, 28, 28])
    assert told["false_positive_rate"] == guard.calibration.false_positive_rate
    assert told["card"] == "# A guard\n\nof 数字"


def test_the_load_generator_counts_what_is_answered(address, capsys):
    asyncio.run(load("load").main(address, requests=20, concurrency=3))
    assert re.search(r"20 requests, 3 at a time: \d+ a second, .* statuses {200: 20}", capsys.readouterr().out)


def test_a_graph_without_a_calibration_record_is_not_served(graph, app, tmp_path):
    plain = cg.load_onnx(graph)
    plain.calibration = None
    with pytest.raises(RuntimeError, match="run: clusterguard calibrate"):
        app.create_app(str(plain.save(tmp_path / "guard.onnx")))


def test_a_png_without_its_last_bytes_is_damage(address):
    whole = png(cg.samples.load_digits("test").tensors[0][0])
    responses = asyncio.run(ask(address, [files(whole[:-cut]) for cut in range(1, 40)]))
    assert {response.status_code for response in responses} == {422}


def test_a_verdict_does_not_depend_on_who_shares_the_batch(address, guard, gate, judging):
    digits = cg.samples.load_digits("test").tensors[0][:30]
    noise = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = torch.stack([digits, (noise * 255).round() / 255], dim=1).flatten(0, 1)
    requests, sizes, judged = [files(png(image)) for image in images], [], judging.Judge._judge

    def watch(self, batch, futures):
        sizes.append(sum(map(len, batch)))
        return judged(self, batch, futures)

    gate.set()
    alone = [asyncio.run(ask(address, [request]))[0].json()["verdicts"] for request in requests]
    gate.clear()
    gate.is_reached.clear()
    threading.Timer(0.5, gate.set).start()  # until then all but the first wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging.Judge, "_judge", watch)
        patch.setattr(judging, "BATCH_SECONDS", 60)
        together = [answer.json()["verdicts"] for answer in asyncio.run(ask(address, requests))]
    assert together == alone
    assert [answer[0]["is_adversarial"] for answer in alone] == guard.detect(images).is_adversarial.tolist()
    assert max(sizes) > 10


def test_a_request_whose_judging_fails_does_not_take_others_of_its_batch_along(address, gate):
    good = files(png(cg.samples.load_digits("test").tensors[0][0]))
    threading.Timer(0.3, gate.set).start()
    responses = asyncio.run(ask(address, [good, files(b"no image"), good, text("[]"), good]))
    assert [response.status_code for response in responses] == [200, 422, 200, 422, 200]


def test_a_full_queue_answers_at_once_and_health_while_images_are_judged(address, gate, judging, monkeypatch):
    monkeypatch.setattr(judging, "MAX_WAITING", 3)
    whole = png(cg.samples.load_digits("test").tensors[0][0])

    async def crowd() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=address, timeout=None, trust_env=False) as client:
            asked = [asyncio.create_task(client.post("/detect", **files(whole))) for _ in range(8)]
            while sum(task.done() for task in asked) < 5:
                await asyncio.sleep(0.01)
            turned_away = [task.result() for task in asked if task.done()]
            assert {(response.status_code, response.headers["retry-after"]) for response in turned_away} == {(503, "1")}
            assert (await client.get("/health")).status_code == 200
            gate.set()
            judged = await asyncio.gather(*asked)
            return [*judged, await client.post("/detect", **files(whole))]  # there is room again

    assert Counter(answer.status_code for answer in asyncio.run(crowd())) == {503: 5, 200: 4}


def test_a_slow_client_is_dropped(address, app, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        answer = b"".join(iter(lambda: client.recv(1000), b""))  # ends, for the connection is closed
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"within 0.2 seconds, got 4 bytes" in answer


def test_the_api_describes_bodies_and_errors(address):
    api = httpx2.get(f"{address}/openapi.json", trust_env=False).json()
    detect = api["paths"]["/detect"]["post"]
    assert set(detect["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert set(detect["responses"]) == {"200", "400", "408", "413", "415", "422", "503"}
    problem, answer = ({"$ref": f"#/components/schemas/{kind}"} for kind in ("Problem", "Answer"))
    for status, response in detect["responses"].items():
        assert response["content"]["application/json"]["schema"] == (answer if status == "200" else problem)
    assert set(api["components"]["schemas"]) >= {"Problem", "Answer", "Verdict"}


def test_the_monitor_goes_on_after_a_restart(app, graph, tmp_path, monkeypatch, caplog):
    state, noise = tmp_path / "monitor.json", files(*map(png, torch.rand(40, 1, 28, 28)))
    monkeypatch.setattr(app, "SAVE_SECONDS", 0.05)
    with served_at(app.create_app(str(graph), str(state))) as place:
        assert asyncio.run(ask(place, [noise]))[0].status_code == 200
        deadline = time.monotonic() + 30
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(state.read_text())["monitor"]["seen"] == 40
        monkeypatch.setattr(app, "SAVE_SECONDS", 3600)
        asyncio.run(ask(place, [noise]))  # saved at the shutdown
    saved = json.loads(state.read_text())
    assert (saved["monitor"]["seen"], saved["monitor"]["alarm"]) == (80, True)
    assert [path.name for path in tmp_path.iterdir()] == ["monitor.json"]
    with served_at(app.create_app(str(graph), str(state))) as place:
        assert "clusterguard_monitor_alarm 1.0" in httpx2.get(f"{place}/metrics", trust_env=False).text
    assert json.loads(state.read_text()) == saved

    app.save(state, "0" * 64, cg.FalsePositiveMonitor(0.1))  # of another graph
    app.create_app(str(graph), str(state))
    assert app.restore(state, saved["sha256"], 0.1).report.seen == 0
    for damaged in ({}, [], None, saved | {"monitor": saved["monitor"] | {"seen": 81}}, saved | {"sha256": "0" * 64}):
        state.write_text(json.dumps(damaged) if damaged != {} else "{")
        with pytest.raises(RuntimeError, match=r"monitor.json.*remove it"):
            app.create_app(str(graph), str(state))
    app.save(tmp_path / "no folder" / "state", "0", cg.FalsePositiveMonitor(0.1))  # stops nothing
    assert "not saved" in caplog.text


def test_text_from_outside_cannot_write_into_answers_and_metrics(address, app, guard, tmp_path):
    whole = png(cg.samples.load_digits("test").tensors[0][0])
    hostile = 'x"\n# HELP bad\r\n{"verdicts": []}\u202e'
    form = {"files": [("images", (hostile, whole, "image/png")), ("images", (hostile, b"no image", "image/png"))]}
    for response in asyncio.run(ask(address, [form, text(b"", 'text/"x\\y'), text(b'{"images": "\\u202e"}')])):
        assert response.status_code in (415, 422)
        assert "HELP" not in response.text
        assert "\u202e" not in response.json()["detail"]
    httpx2.get(f"{address}/%0A%22%7D", trust_env=False)
    families = list(text_string_to_metric_families(httpx2.get(f"{address}/metrics", trust_env=False).text))
    paths = {sample.labels["path"] for family in families for sample in family.samples if "path" in sample.labels}
    assert paths == {"/detect", "other"}

    guard = copy.deepcopy(guard)
    guard.class_names = ["a\nb", 'quote"', "\u202egnp", "x\u2028", *NAMES[4:]]
    path = cg.export_onnx(guard, tmp_path / "guard.onnx", torch.zeros(1, 1, 28, 28))
    shown = app.describe_model(path, cg.load_onnx(path)).class_names
    assert shown == [r"a\nb", 'quote"', r"\u202egnp", r"x\u2028", *NAMES[4:]]


@pytest.mark.slow
def test_the_commands_of_the_readme_make_a_service(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^clusterguard (.*)$", (EXAMPLE / "README.md").read_text(), flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "export"]
    for command in commands:
        assert CliRunner().invoke(cli, command.split()).exit_code == 0
    images = cg.samples.load_digits("test").tensors[0]
    detector = cg.load_onnx("runs/digits/guard.onnx")
    expected = cg.ClusterGuard.from_pretrained("runs/digits").detect(images)
    verdict = detector.detect(images)
    assert torch.equal(verdict.labels, expected.labels)
    assert torch.equal(verdict.is_adversarial, expected.is_adversarial)
    assert app.create_app("runs/digits/guard.onnx").routes
