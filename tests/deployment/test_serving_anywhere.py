"""The example service and its paths: loaded from another folder, and with paths that are missing, or links."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, FalsePositiveMonitor, export_onnx
from starlette.testclient import TestClient
from torch import nn

from benchmarks.studies.chaos._writers import load_service

APP = Path(__file__).parents[2] / "examples" / "serve" / "app.py"


@pytest.mark.filterwarnings("ignore:classes:UserWarning")  # that share a threshold
@pytest.mark.parametrize("is_started", [False, True])
def test_the_service_answers(tmp_path, monkeypatch, is_started):
    monkeypatch.chdir(tmp_path)
    images = torch.rand(100, 1, 8, 8)
    guard = ClusterGuard(nn.Flatten(), 2, example=images).eval()
    Calibrator(0.1, scarce="pool").fit(guard, [(images, guard(images).argmax(1))])
    graph = export_onnx(guard, tmp_path / "guard.onnx", images)
    spec = importlib.util.spec_from_file_location("serve_anywhere", APP)
    application = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, application)  # FastAPI looks annotations up there
    spec.loader.exec_module(application)
    client = TestClient(application.create_app(str(graph)))
    if is_started:
        client.__enter__()
    answers = [client.post("/detect", json={"images": images[:3].tolist()}) for _ in range(2)]
    if is_started:
        client.__exit__(None, None, None)
    refused = [verdict["is_adversarial"] for verdict in answers[1].json()["verdicts"]]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert refused == guard.detect(images[:3]).is_adversarial.tolist()


def test_paths_that_cannot_work_stop_the_start(tmp_path, monkeypatch):
    app = load_service()
    with pytest.raises(RuntimeError, match=r"existing folder for .*no folder"):
        app.create_app("guard.onnx", str(tmp_path / "no folder" / "state"))
    monkeypatch.delenv("CLUSTERGUARD_GRAPH", raising=False)
    with pytest.raises(RuntimeError, match="path of a graph in CLUSTERGUARD_GRAPH, got none"):
        app.create_app()


def test_a_link_to_the_state_stays_a_link(tmp_path):
    link, target = tmp_path / "link", tmp_path / "state"
    link.symlink_to(target)
    load_service().save(link, "0", FalsePositiveMonitor(0.1))
    assert link.is_symlink()
    assert json.loads(target.read_text())["sha256"] == "0"
