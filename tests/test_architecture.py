"""The walls of docs/architecture.md, held by reading the imports."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

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

# Who may import whom, from the ground up; what a room may import stands above it.
FLOORS = {
    "errors": set(),
    "samples": {"errors"},
    "_support": {"errors"},
    "detection": {"_support", "errors"},
    "attacks": {"_support", "detection", "errors"},
    "detectors": {"_support", "detection", "errors"},
    "certification": {"_support", "attacks", "detection", "detectors", "errors"},
    "evaluation": {"_support", "attacks", "detection", "errors"},
    "deployment": {"_support", "detection", "detectors", "errors"},
    "training": {"_support", "attacks", "certification", "detection", "detectors", "errors"},
}
FLOORS |= {"assurance": {"_support", "attacks", "deployment", "detection", "detectors", "errors", "evaluation"}}
FLOORS |= {"": {*FLOORS} - {"_support"}}  # the top level hands on what users need most
FLOORS |= {"cli": {*FLOORS}}
PACKAGES = [name for name in FLOORS if (PACKAGE / name / "__init__.py").is_file()]
# From the ground up. "" is what stands beside the packages, which is the command line.
BENCHMARK_FLOORS = ["_support", "data", "detectors", "experiments", "running", "reporting", "studies", ""]
FILES = sorted(PACKAGE.rglob("*.py"))
EVERY = [
    *(
        path
        for part in ("clusterguard", "benchmarks", "tests", "examples", "docs")
        for path in (ROOT / part).rglob("*.py")
    ),
    ROOT / "clusterguard_command.py",
    ROOT / "clusterguard_torchvision.py",
]
BENCHMARKS = [path for path in EVERY if path.is_relative_to(ROOT / "benchmarks")]
BENCHMARK_PACKAGES = [
    ".".join(path.relative_to(ROOT).parent.parts) for path in BENCHMARKS if path.name == "__init__.py"
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, top_level_only: bool = False) -> list[tuple[str, str]]:
    """(module, name) of everything a file imports, in functions and for type checkers too; name is "" for modules."""
    tree = ast.parse(path.read_text())
    imported = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            imported += [(node.module or "", alias.name) for alias in node.names]
    return imported


def inner_imports(path: Path) -> list[tuple[str, str, str]]:
    """(room, module in it, name) of what a file imports of clusterguard."""
    imported = []
    for module, name in imports(path):
        top, *parts = module.split(".")
        if top == "clusterguard":
            imported.append((parts[0] if parts else "", ".".join(parts[1:]), name))
    return imported


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def face(name: str) -> set[str]:
    return {*importlib.import_module(f"clusterguard.{name}".rstrip(".")).__all__}


def is_for_packages(here: str, inner: str) -> bool:
    """Whether this is the module of a package that the other packages import from, and nobody else."""
    return inner == "_internal" and here not in ("", "benchmarks")


def test_every_room_is_on_the_plan():
    assert {room(path) for path in FILES} == {*FLOORS}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_import_only_what_stands_below_them(path):
    here = room(path)
    for other, inner, name in inner_imports(path):
        if other == here != "":
            assert f"{inner}{name}".startswith("_"), f"{inner or name}: a package does not import its own face"
        elif here == "" and other == "":
            assert name in PACKAGES or name in FLOORS
        else:
            assert other in FLOORS[here], other
            assert not inner or is_for_packages(here, inner), f"{other}.{inner}.{name} is private"


def test_what_declares_torchvision_operators_stands_below_everything():
    assert not inner_imports(ROOT / "clusterguard_torchvision.py")


def benchmark_room(parts: Sequence[str]) -> str:
    """The package of the benchmarks that a path or a module name, without "benchmarks", lies in."""
    return parts[0] if parts and parts[0] in BENCHMARK_FLOORS else ""


def benchmark_package(path: Path) -> str:
    """The dotted name of the package that holds a file of the benchmarks."""
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("path", BENCHMARKS, ids=name_of)
def test_packages_of_the_benchmarks_import_only_faces_that_stand_below_them(path):
    here = benchmark_room(path.relative_to(ROOT / "benchmarks").parts[:-1])
    for module, name in imports(path):
        if module.split(".")[0] != "benchmarks":
            continue
        other = benchmark_room(module.split(".")[1:])
        assert BENCHMARK_FLOORS.index(other) <= BENCHMARK_FLOORS.index(here), module
        package, _, inner = module.rpartition(".")
        if inner.startswith("_") and package == benchmark_package(path):
            continue  # a module of the same package
        assert module in BENCHMARK_PACKAGES, f"{module} is private"
        assert module != benchmark_package(path), "a package does not import its own face"
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


@pytest.mark.parametrize("path", BENCHMARKS, ids=name_of)
def test_a_module_of_the_benchmarks_is_private_or_a_command(path):
    if not path.name.startswith("_"):
        assert '\nif __name__ == "__main__":\n' in path.read_text()


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=name_of)
def test_only_what_a_package_hands_on_is_imported_from_outside(path):
    here = room(path) if path in FILES else "benchmarks"
    for other, inner, name in inner_imports(path):
        if other != here and (other in PACKAGES or other == ""):
            assert not inner or is_for_packages(here, inner)
            assert name in face(f"{other}.{inner}".rstrip(".")), f"{other}.{name}"
        assert here != "benchmarks" or not other.startswith("_") or path.parent.name == "_support", f"{other}.{name}"


INTERNAL = [f"clusterguard.{path.parent.name}._internal" for path in FILES if path.name == "_internal.py"]


@pytest.mark.parametrize(
    "package", [*(f"clusterguard.{name}".rstrip(".") for name in PACKAGES), *INTERNAL, *BENCHMARK_PACKAGES]
)
def test_a_package_hands_on_what_it_says(package):
    module = importlib.import_module(package)
    names = module.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    known = {
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    modules = {name for name in names if isinstance(getattr(module, name), ModuleType)}
    assert {*names} == known - {"on_torch_import", "version"} | modules
    assert all(getattr(module, name).__doc__ for name in names if inspect.isroutine(getattr(module, name)))


@pytest.mark.parametrize("module", INTERNAL)
def test_what_a_package_hands_to_the_others_alone_is_used_there_and_is_not_on_its_face(module):
    _, package, _ = module.split(".")
    used = {
        name
        for path in FILES
        for other, inner, name in inner_imports(path)
        if other == package != room(path) and inner == "_internal"
    }
    assert face(f"{package}._internal") == used
    assert not used & face(package)


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_package_has_a_circle(package):
    folder = ROOT / package if package == "benchmarks" else PACKAGE / package
    prefix = package if package == "benchmarks" else f"clusterguard.{package}"
    below: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        inner = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        wanted = {f"{module}.{name}" for module, name in imports(path)} | {module for module, _ in imports(path)}
        below[inner] = {name.removeprefix(f"{prefix}.") for name in wanted if name.startswith(f"{prefix}.")}
    order = [*TopologicalSorter(below).static_order()]  # raises CycleError
    assert {*below} <= {*order}


def test_the_page_on_the_architecture_names_every_package():
    table = (ROOT / "docs" / "architecture.md").read_text().split("| package | what it holds |")[1].split("\n\n")[0]
    assert {*re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)} == {*FLOORS, "benchmarks"} - {""}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_begins_with_a_sentence_that_says_what_it_holds(path):
    """The site makes its table of modules from these sentences."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    assert re.match(r"[A-Z`].{15,}[.:]$", first, re.DOTALL), first


def test_the_plan_is_small():
    arrows = {(room(path), other) for path in FILES for other, _, _ in inner_imports(path) if other != room(path)}
    arrows |= {("benchmarks", other) for path in BENCHMARKS for other, _, _ in inner_imports(path)}
    assert len(arrows) <= 70
    floors: dict[str, int] = {}
    for name in TopologicalSorter({a: {b for x, b in arrows if x == a} for a, _ in arrows}).static_order():
        floors[name] = 1 + max((floors[b] for a, b in arrows if a == name), default=0)
    assert len(floors) <= 14
    assert max(floors.values()) <= 8


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not {module.split(".")[0] for module, _ in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_files_and_functions_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            assert (node.end_lineno or 0) - first.lineno < 60, node.name


def test_no_two_files_of_tests_share_a_name():
    """They are imported by their bare names, so pytest would refuse to collect the second one."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_importing_clusterguard_imports_neither_timm_nor_torchvision():
    code = f"import clusterguard, sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["clusterguard, timm", "torch, timm, clusterguard"])
def test_torchvision_and_timm_import_before_and_after_clusterguard_on_any_torch(order):
    code = f"import {order}; import clusterguard_torchvision as c; c.declare_missing_operators()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_name_that_has_moved_is_said_to_have():
    with pytest.raises(AttributeError, match=r"no MIM, but clusterguard\.attacks has"):
        clusterguard.MIM  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        clusterguard.nonsense  # noqa: B018


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_a_program_may_declare_the_operators_of_torchvision_itself(autoload):
    code = (
        "import torch; library = torch.library.Library('torchvision', 'DEF'); "
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'); "
        "import clusterguard, timm, torchvision"
    )
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_modules_within_packages_are_private():
    """A package's face says what is public; its modules begin with an underscore."""
    loose = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "clusterguard").rglob("*.py")
        if path.parent != ROOT / "clusterguard" and not path.name.startswith("_")
    }
    nested = {path.parent.name for path in (ROOT / "clusterguard").glob("*/*/__init__.py")}
    assert (loose, nested) == (set(), set())


def test_private_names_stay_in_their_package():
    crossing = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name.name}"
        for path in (*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "clusterguard").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
        if name.name.startswith("_") and not name.name.startswith("__")
        if Path(*node.module.split(".")[:2]).as_posix() not in path.relative_to(ROOT).as_posix()
        if node.module.split(".")[0] in ("clusterguard", "benchmarks")
    ]
    assert crossing == []


def public_definitions(path: Path) -> Iterator[str]:
    """The public functions, classes and constants that a file defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def test_no_two_public_things_of_the_benchmarks_share_a_name():
    places: dict[str, list[str]] = defaultdict(list)
    for path in BENCHMARKS:
        is_command = path.name == "__main__.py" or not path.name.startswith("_")
        for name in public_definitions(path):
            if not (is_command and name in {"app", "main", "run", "table"}):  # each command line has its own
                places[name].append(name_of(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_public_thing_of_the_benchmarks_is_named_like_one_of_the_library():
    of_library = {name for path in FILES for name in public_definitions(path)}
    of_benchmarks = {name for path in BENCHMARKS for name in public_definitions(path)}
    assert of_library & of_benchmarks == {"app", "main"}


def test_no_two_public_things_of_the_library_share_a_name():
    """Nor do a class and a function whose names differ in capitals and underscores only."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        if path.name != "_app.py":  # its functions are commands, named for what they run
            for name in public_definitions(path):
                places[name.lower().replace("_", "")].append(f"{name_of(path)}: {name}")
    assert [found for found in places.values() if len(found) > 1] == []
