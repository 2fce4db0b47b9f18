import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(script, tmp_path):
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside this one
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "worst case per image" in done.stdout or "recalibrated" in done.stdout


def test_the_readme_shows_the_example_that_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks == [(ROOT / "examples" / "drop_in.py").read_text()]


def test_the_quickstart_includes_the_example_that_runs():
    assert '--8<-- "examples/drop_in.py"' in (ROOT / "docs" / "quickstart.md").read_text()


def test_links_in_the_front_pages_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"


def test_the_notebook_runs_and_is_committed_without_outputs(capsys):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in cells:
            exec("".join(cell["source"]), namespace)
    printed = capsys.readouterr().out
    assert "worst case per image" in printed
    assert namespace["guard"].is_calibrated


def test_links_in_the_notebook_lead_somewhere():
    text = (ROOT / "examples" / "quickstart.ipynb").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "examples" / target).exists(), target
