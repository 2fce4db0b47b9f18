"""What clusterguard writes to a disk, each with a way to write it and a way to read it back."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from clusterguard import (
    FGSM,
    AdversarialClusterTrainer,
    Calibration,
    ClusterGuard,
    Evaluation,
    FalsePositiveMonitor,
    WorstCaseSuite,
    evaluate,
    export_onnx,
    load_onnx,
)
from clusterguard.cli import begin_run, write_evaluation
from clusterguard.deployment import load_program, save_program
from clusterguard.errors import ConfigurationError
from clusterguard.evaluation import to_html
from torch import Tensor, nn

from benchmarks.experiments import load_experiment
from benchmarks.running import Store, read_chunk, save_chunk

_SERVICE = Path(__file__).parents[3] / "examples" / "serve"
_SHAPE, _CLASSES = (1, 6, 6), 3
_CALIBRATION = Calibration((9.0,) * _CLASSES, (120,) * _CLASSES, 400, (0.01,) * _CLASSES, 0.01, "conformal")


@dataclass(frozen=True)
class Writer:
    """One kind of file or folder.

    Attributes:
        files: names of the files that readers judge by, relative to the folder.
        write: writes one of two versions, 0 or 1, into a folder. It may be called again and again.
        read: reads what is in a folder, as a value that tells the versions and all damage apart.
        is_resumed: whether reading resumes an interrupted task, and ends at the same value whenever it was killed.
        is_checked: whether a reader of ours notices damage; if not, the file is only for people and other programs.
        is_shared: whether several processes may write at the same time.
        nothing: value of a reader that finds nothing, so that the work is done again.
    """

    files: tuple[str, ...]
    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]
    is_resumed: bool = False
    is_checked: bool = True
    is_shared: bool = True
    nothing: Any = None


def make_guard(version: int = 0, *, width: int = 16) -> ClusterGuard:
    """A small guard with batch normalisation and a record of calibration; versions differ in all weights."""
    torch.manual_seed(version)
    body = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.BatchNorm1d(width), nn.ReLU())
    guard = ClusterGuard(body, _CLASSES, image_shape=_SHAPE)
    guard.thresholds = torch.tensor(_CALIBRATION.thresholds) + version
    guard.calibration = replace(_CALIBRATION, thresholds=tuple(guard.thresholds.tolist()))
    return guard


def make_images(number: int) -> tuple[Tensor, Tensor]:
    """Images of bright bands, with labels."""
    labels = torch.arange(number) % _CLASSES
    images = 0.3 * torch.rand(number, *_SHAPE, generator=torch.Generator().manual_seed(0))
    for row, label in enumerate(labels.tolist()):
        images[row, :, 2 * label : 2 * label + 2] += 0.6
    return images, labels


def load_service() -> ModuleType:
    """The application of examples/serve."""
    if str(_SERVICE) not in sys.path:
        sys.path.insert(0, str(_SERVICE))
    spec = importlib.util.spec_from_file_location("served_app", _SERVICE / "app.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(_SERVICE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _values(module: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in module.state_dict().values()]


def _read_guard(folder: Path) -> Any:
    guard = ClusterGuard.from_pretrained(folder / "guard")
    return _values(guard), guard.calibration, guard.class_names, guard.image_shape


def _read_graph(folder: Path) -> Any:
    detector = load_onnx(folder / "guard.onnx")
    detection = detector.detect(make_images(30)[0])
    return [part.tolist() for part in detection], detector.thresholds.tolist(), detector.calibration


def _read_program(folder: Path) -> Any:
    parts = load_program(folder / "guard.pt2").module()(make_images(30)[0])
    return [part.tolist() for part in parts]


def _write_large_graph(folder: Path, version: int) -> None:
    """Export a graph as if its weights did not fit into it, so that they go into a second file."""
    with mock.patch("clusterguard.deployment._graph_files._LARGEST_GRAPH", 0):
        export_onnx(make_guard(version), folder / "guard.onnx")


@cache
def _evaluation(version: int) -> Evaluation:
    images, labels = make_images(20)
    return evaluate(make_guard(version), FGSM(eps=0.1), [(images, labels)], sanity_images=0)


def _chunk(version: int) -> dict[str, Any]:
    return {"attacked": make_images(8)[0] + version, "cost": [version, 40]}


def _train(folder: Path, epochs: int) -> Any:
    guard, images = make_guard(), make_images(60)
    batches = [(images[0][start : start + 20], images[1][start : start + 20]) for start in range(0, 60, 20)]
    trainer = AdversarialClusterTrainer(guard, FGSM(eps=0.1))
    trainer.fit(
        batches,
        make_held_out(),
        epochs=epochs,
        checkpoint=folder / "run.pt",
        checkpoint_every=1,
        calibrate=False,
        progress=False,
    )
    return _values(guard), len(trainer.history)


def make_held_out() -> list[tuple[Tensor, Tensor]]:
    """Calibration images, which differ from those of the training."""
    images, labels = make_images(30)
    return [(1 - images, labels)]


def _attack(folder: Path) -> Any:
    images, labels = make_images(4)
    guard = make_guard()
    suite = WorstCaseSuite("linf", eps=0.2, budget="quick")
    labels = guard(images).argmax(dim=1)
    result = suite.run(
        guard, images, labels, generator=torch.Generator().manual_seed(0), checkpoint=folder / "suite.pt"
    )
    return result.images.tolist(), [(stage.name, stage.broken) for stage in result.stages]


def _write_results(folder: Path, version: int) -> None:
    cell = load_experiment("table2-mnist", "quick").cells[0]
    Store(folder, "quick").write_cell(cell, {"training": {"seconds": 1.0}, "images": 100 + version})


def _write_monitor(folder: Path, version: int) -> None:
    monitor = FalsePositiveMonitor(0.02)
    images = make_images(30)[0]
    monitor.update(make_guard(version).detect(images))
    load_service().save(folder / "monitor.json", "graph", monitor)


def _read_monitor(folder: Path) -> Any:
    monitor = load_service().restore(folder / "monitor.json", "graph", 0.02)
    return monitor.state_dict()


def _options(version: int) -> dict[str, Any]:
    return {"data": "photos", "epochs": 12, "seed": version, "calibrator": {"false_positive_rate": 0.01}}


def _read_record(folder: Path) -> int:
    """The version of the training that may go on."""
    text = (folder / "training.json").read_bytes()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "checkpoint.pt").touch()
        for version in (0, 1):
            (Path(place) / "training.json").write_bytes(text)
            with suppress(ConfigurationError):
                begin_run(Path(place), _options(version), resume=True)
                return version
    raise ConfigurationError("expected the record of one of the trainings, got another")


def all_writers(*, epochs: int = 3) -> dict[str, Writer]:
    """Every kind, by name.

    Args:
        epochs: epochs of the training whose checkpoint is written.
    """
    return {
        "guard folder": Writer(
            ("guard/config.json", "guard/model.safetensors"),
            lambda folder, version: make_guard(version).save_pretrained(folder / "guard"),
            _read_guard,
        ),
        "ONNX graph": Writer(
            ("guard.onnx",),
            lambda folder, version: export_onnx(make_guard(version), folder / "guard.onnx"),
            _read_graph,
        ),
        "ONNX graph of two files": Writer(
            ("guard.onnx", "guard.onnx.*.data"), _write_large_graph, _read_graph, is_shared=False
        ),
        "program of torch.export": Writer(
            ("guard.pt2",),
            lambda folder, version: save_program(make_guard(version), folder / "guard.pt2"),
            _read_program,
        ),
        "training checkpoint": Writer(
            ("run.pt",), lambda folder, _: _train(folder, epochs - 1), lambda folder: _train(folder, epochs), True
        ),
        "suite checkpoint": Writer(("suite.pt",), lambda folder, _: _attack(folder), _attack, True),
        "report as JSON": Writer(
            ("report.json",),
            lambda folder, version: _evaluation(version).to_json(folder / "report.json"),
            lambda folder: (folder / "report.json").read_text(),
            is_checked=False,
        ),
        "report as HTML": Writer(
            ("report.html",),
            lambda folder, version: to_html(_evaluation(version), folder / "report.html"),
            lambda folder: (folder / "report.html").read_text(),
            is_checked=False,
        ),
        "report as Markdown": Writer(
            ("report.md",),
            lambda folder, version: write_evaluation(_evaluation(version), folder / "report.md"),
            lambda folder: (folder / "report.md").read_text(),
            is_checked=False,
        ),
        "record of a training": Writer(
            ("training.json",), lambda folder, version: begin_run(folder, _options(version), resume=False), _read_record
        ),
        "weights of a benchmark": Writer(
            ("models/key.json", "models/key-1.safetensors"),
            lambda folder, _: Store(folder).save_weights("key", make_guard().state_dict(), {}),  # its key names them
            lambda folder: _plain(Store(folder).load_weights("key")),
        ),
        "results of a benchmark": Writer(
            ("cells",), _write_results, lambda folder: Store(folder, "quick").read_cells(), nothing={}
        ),
        "chunk of a benchmark": Writer(
            ("chunk.pt",),
            lambda folder, version: save_chunk(folder / "chunk.pt", _chunk(version)),
            lambda folder: _lists(read_chunk(folder / "chunk.pt", torch.device("cpu"))),
            is_shared=False,
        ),
        "monitor of a service": Writer(("monitor.json",), _write_monitor, _read_monitor, is_shared=False),
    }


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def _plain(loaded: tuple[dict[str, Tensor], dict[str, Any]] | None) -> Any:
    return None if loaded is None else ({name: value.tolist() for name, value in loaded[0].items()}, loaded[1])


def fresh_folders(root: Path) -> Callable[[], Path]:
    """A function that makes another empty folder at each call."""
    numbers = count()

    def make() -> Path:
        folder = root / str(next(numbers))
        folder.mkdir()
        return folder

    return make
