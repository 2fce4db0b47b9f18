"""The walls of docs/architecture.md, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import clusterguard
import pytest

PACKAGE = Path(clusterguard.__file__).parent
ROOT = Path(__file__).parents[1]
HEAVY = {
    "timm",
    "torchvision",
    "matplotlib",
    "foolbox",
    "torchattacks",
    "art",
    "sklearn",
    "onnx",
    "onnxscript",
    "onnxruntime",
}

# Who may import whom; rooms that are not named may import every room.
ALLOWED = {
    "errors": set(),
    "decision": {"checks", "errors"},
    "checkpoints": {"errors", "files"},
    "processes": set(),
    "loaders": {"errors"},
    "loader_state": {"errors"},
    "optimizers": {"errors"},
    "replay": {"detector", "errors", "loader_state", "loaders"},
    "training_options": {"errors", "processes"},
    "modes": {"errors"},
    "files": {"errors"},
    "torchvision_operators": set(),
    "clusters": {"checks", "errors"},
    "checks": {"errors"},
    "image_files": {"errors"},
    "image_folders": {"checks", "errors", "image_files"},
    "metrics": {"checks", "decision", "errors"},
    "samples": {"errors"},
    "copying": {"errors"},
    "wrappers": {"copying"},
    "backbones": {"copying", "errors", "wrappers"},
    "attacks": {"attacks", "decision", "errors", "checks", "modes", "files"},
    "detector": {
        "copying",
        "decision",
        "errors",
        "checks",
        "loaders",
        "modes",
        "precision",
        "processes",
        "calibration",
    },  # calibration: only for type checkers
    "monitoring": {"calibration", "checks", "decision", "errors"},
    # results: only for type checkers, in these three; so is guard in the second
    "compiling": {"errors", "modes"},
    "precision": {"errors"},
    "boxes": {"precision"},
    "interval_rules": {"boxes", "errors", "precision"},
    "intervals": {"boxes", "errors", "interval_rules", "precision"},
    "guard": {"backbones", "clusters", "compiling", "decision", "detector", "modes", "persistence", "results"},
    "persistence": {"backbones", "calibration", "errors", "guard", "model_card", "results"},
    "model_card": {"calibration", "metrics", "results"},
    "export": {"calibration", "checks", "copying", "decision", "detector", "errors", "files", "modes", "precision"},
    "confidence": {"backbones", "decision", "detector", "errors"},
    "consistency": {"checks", "decision", "detector", "errors"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
EVERY = sorted(
    path for part in ("clusterguard", "benchmarks", "tests", "examples", "docs") for path in (ROOT / part).rglob("*.py")
)


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    own = {name.split(".")[1] for name in imports(path, top_level_only=False) if name.startswith("clusterguard.")}
    allowed = ALLOWED.get(room(path))
    if allowed is not None:
        assert own <= allowed | {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_benchmarks_use_the_public_interface():
    private = {
        f"{path.name}: {name}"
        for path in (PACKAGE.parent / "benchmarks").rglob("*.py")
        for name in imports(path, top_level_only=False)
        if name.startswith("clusterguard.") and "._" in name
    }
    assert not private


def test_importing_clusterguard_imports_neither_timm_nor_torchvision():
    code = f"import clusterguard, sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_after_clusterguard_torchvision_and_timm_import_on_any_torch(package):
    code = f"import clusterguard, {package}; clusterguard._support.declare_missing_operators()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_public_names_are_sorted_documented_and_there():
    assert list(clusterguard.__all__) == sorted(
        clusterguard.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in clusterguard.__all__:
        assert getattr(clusterguard, name).__doc__, name
