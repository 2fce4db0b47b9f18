"""The suite in bfloat16, in float32, and as version 0.1 had it: what each breaks, and how long it takes.

Each run has a process of its own with one thread, and attacks the first accepted test digits. Version 0.1 is a checkout
of commit a0aa332. The demo's guard is trained by it, because later versions read its folders, but not the other way
round.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks._support import markdown_table
from benchmarks.running import RESULTS, read_study, write_study

SUITE_RUNS = RESULTS / "suite-runs"
_ROOT = Path(__file__).parents[2]
_OLD = "0.1"
_SCRIPT = """
import json, sys, time, torch
from clusterguard import ClusterGuard, WorstCaseSuite
from clusterguard.samples import load_digits
folder, norm, eps, budget, precision, count, seed = sys.argv[1:]
torch.set_num_threads(1)
if folder.endswith(".safetensors"):  # what the demo of 0.1 wrote
    from safetensors.torch import load_file
    try:
        from clusterguard.cli import digit_network
        names = {"clusters.": "head."}
    except ImportError:
        from clusterguard.demo import digit_network
        names = {}
    guard = ClusterGuard(digit_network(), num_classes=10, example=torch.zeros(1, 1, 28, 28)).eval()
    state = load_file(folder)
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    guard.load_state_dict(state)
else:
    guard = ClusterGuard.from_pretrained(folder).eval()
images, labels = load_digits("test").tensors
seen = guard.detect(images)
rows = (~seen.is_adversarial & (seen.labels == labels)).nonzero().flatten()[: int(count)]
images, labels = images[rows], labels[rows]
options = {} if precision == "0.1" else {"precision": precision}
suite = WorstCaseSuite(norm, eps=float(eps), budget=budget, **options)
began = time.process_time()
attacked = suite(guard, images, labels, generator=torch.Generator().manual_seed(int(seed)))
seconds = time.process_time() - began
verdict = guard.detect(attacked)
broken = ~verdict.is_adversarial & (verdict.labels != labels)
print(json.dumps({"images": len(rows), "broken": broken.nonzero().flatten().tolist(), "seconds": round(seconds, 1)}))
"""


class SuiteRun(NamedTuple):
    """A run of the suite.

    Attributes:
        guard: "demo", or the name of a guard that ships with the project.
        norm: norm of the ball.
        eps: its radius.
        images: number of accepted test digits to attack.
        side: "bf16", "float32" or "0.1".
    """

    guard: str
    norm: str
    eps: float
    images: int
    side: str

    @property
    def key(self) -> str:
        """The name of the run in the file of results."""
        return "/".join(map(str, self))


def planned_runs() -> Iterator[SuiteRun]:
    """All runs. Those of one threat follow each other, so that they meet the machine in the same state.

    Where the suite breaks most images, it attacks more of them, because those that it cannot break take the time.
    """
    for norm, eps, images in (("linf", 0.3, 100), ("l2", 2.0, 20), ("l1", 10.0, 20), ("l0", 10.0, 20)):
        for side in ("bf16", "float32", _OLD):
            yield SuiteRun("demo", norm, eps, images, side)
    threats = (("linf", 0.3, 20), ("l2", 2.0, 100))
    shipped = [(guard, *threat) for guard in ("mnist-certified", "mnist-certified-accurate") for threat in threats]
    for guard, norm, eps, images in (*shipped, ("mnist", "linf", 0.3, 10)):
        for side in ("bf16", "float32"):
            yield SuiteRun(guard, norm, eps, images, side)


def run_suite_once(run: SuiteRun, folder: Path, old: Path, *, budget: str) -> dict[str, Any]:
    """Run the suite in a fresh process.

    Args:
        run: the run.
        folder: folder of the guard.
        old: checkout of version 0.1.
        budget: budget of the suite.
    """
    arguments = folder, run.norm, run.eps, budget, run.side, run.images, 0
    return json.loads(_python(old if run.side == _OLD else _ROOT, "-c", _SCRIPT, *map(str, arguments)))  # type: ignore[no-any-return]


def run_lines(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of the runs in Markdown."""
    threats: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for key, run in runs.items():
        guard, norm, eps, _, side = key.split("/")
        threats.setdefault((guard, norm, eps), {})[side] = run
    head = (
        "guard",
        "norm",
        "radius",
        "side",
        "images",
        "broken",
        "broken by it, not in float32",
        "the reverse",
        "seconds",
    )
    rows = []
    for threat, sides in threats.items():
        exact = {*sides.get("float32", {}).get("broken", [])}
        for side, run in sides.items():
            broken = {*run["broken"]}
            apart = (len(broken - exact), len(exact - broken)) if "float32" in sides else ("", "")
            rows.append((*threat, side, run["images"], len(broken), *apart, run["seconds"]))
    return markdown_table(head, rows)


def _python(checkout: Path, *arguments: str) -> str:
    """Run Python with the library of a checkout, on one thread, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    if checkout != _ROOT:  # torch would load what the installed version registers, and 0.1 registers the same
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


def main(
    old: Annotated[Path, typer.Argument(help="Checkout of a0aa332: git worktree add PATH a0aa332.")],
    budget: Annotated[str, typer.Option(help="Budget of the suite.")] = "standard",
    output: Annotated[Path, typer.Option(help="The folder for results.")] = SUITE_RUNS,
) -> None:
    """Run what is not there yet, and write counts and table after each run."""
    old, demo = old.resolve(), Path("runs/suite-runs/guard.safetensors").resolve()
    if not demo.exists():
        _python(old, "-m", "clusterguard", "demo", "--output", str(demo.parent))
    runs = read_study(output, {"runs": {}})["runs"]
    for run in planned_runs():
        if run.key not in runs:
            folder = demo if run.guard == "demo" else _ROOT / "guards" / run.guard
            runs[run.key] = run_suite_once(run, folder, old, budget=budget) | {"budget": budget}
            print(run.key, len(runs[run.key]["broken"]), "broken,", runs[run.key]["seconds"], "s", flush=True)
            write_study(output, {"runs": runs}, run_lines(runs))
    print("\n".join(run_lines(runs)))


if __name__ == "__main__":
    typer.run(main)
