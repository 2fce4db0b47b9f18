"""Attacks of other libraries, called peers, held-back attacks, and our suite on five guards, in five threat models.

No other attack should break an image that the suite left. `evaluate` judges the attacked images.

`python -m benchmarks.studies.peers run` writes what each attack broke, image by image, to a file for each guard in
benchmarks/results/peers. An interrupted run resumes from there. `python -m benchmarks.studies.peers table` writes the
tables of the documentation.
"""

import hashlib
import json
import time
import warnings
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import DetectorModule, evaluate
from clusterguard.attacks import Attack, Towards, get_norm
from clusterguard.detection import Verdicts, is_broken
from torch import Tensor
from tqdm import tqdm

from benchmarks._support import keep_freed_memory, write_atomically
from benchmarks.running import RESULTS, provenance
from benchmarks.studies.peers._attacks import THOROUGH, build_all, build_suite
from benchmarks.studies.peers._guards import CASES, Case
from benchmarks.studies.peers._tables import attack_lines, list_missed, summary_lines

PEERS_RESULTS = RESULTS / "peers"
_PACKAGES = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "pyautoattack", "adv-lib")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    only: Annotated[str, typer.Option(help="Guard, norm, seed and attack, such as 'mnist/l0/*/suite*'.")] = "*",
    images: Annotated[int, typer.Option(help="How many accepted test images to attack.", min=1)] = 100,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 1,
    output: Annotated[Path, typer.Option(help="Folder of results.")] = PEERS_RESULTS,
) -> None:
    """Run the attacks that have no result yet, and the thorough suite on what the suite missed.

    Example: python -m benchmarks.studies.peers run --only 'mnist-certified/l2/0/*'
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    for name, case in CASES.items():
        threats = [f"{norm}/{seed}" for seed in range(seeds) for norm in case.radii]
        if chosen := [threat for threat in threats if _overlaps(f"{name}/{threat}/", only)]:
            _run_case(name, case, chosen, only, images, output / f"{name}.json")


@app.command()
def table(output: Annotated[Path, typer.Option(help="Folder of results.")] = PEERS_RESULTS) -> None:
    """Write the tables that the documentation shows.

    Example: python -m benchmarks.studies.peers table
    """
    cases = {
        case.title: json.loads(file.read_text())
        for name, case in CASES.items()
        if (file := output / f"{name}.json").exists()
    }
    _write(output / "summary.md", summary_lines(cases))
    details = []
    for title, case in cases.items():
        for threat, results in case["results"].items():
            norm, seed = threat.split("/")
            heading = f"### {title}, {get_norm(norm).symbol} {case['radii'][norm]:g}, seed {seed}"
            details += [heading, "", *attack_lines(results), ""]
    _write(output / "attacks.md", details[:-1])


def _run_case(name: str, case: Case, threats: list[str], only: str, count: int, file: Path) -> None:
    detector = case.load()
    pictures, labels = case.images(count)
    verdict = detector.detect(pictures)
    accepted = ((verdict.labels == labels) & ~verdict.is_adversarial).nonzero().squeeze(1)
    attacked, rest = accepted[:count], accepted[count:]
    references = Towards.accepted(detector, pictures[rest], labels[rest])
    content = _begin(file, detector, case, attacked.tolist(), len(references.labels))
    for threat in threats:
        norm, seed = threat.split("/")
        results = content["results"].setdefault(threat, {})
        named = build_all(norm, case.radii[norm], references)
        left = [title for title in named if title not in results and fnmatch(f"{name}/{threat}/{title}", only)]
        for title in (bar := tqdm(left, desc=f"{name} {norm}, seed {seed}")):
            bar.set_postfix_str(title)
            results[title] = _attack(detector, named[title], pictures, labels, attacked, int(seed))
            _save(file, content)
        missed = list_missed(results)
        if missed and results.get(THOROUGH, {}).get("attacked") != missed:
            thorough = build_suite(norm, case.radii[norm], references, budget="thorough")
            results[THOROUGH] = _attack(detector, thorough, pictures, labels, torch.tensor(missed), int(seed))
            _save(file, content)
        print(f"\n{name} {threat}", *attack_lines(results), sep="\n", flush=True)


def _save(file: Path, content: dict[str, Any]) -> None:
    content["provenance"] = provenance(torch.device("cpu"))
    _write(file, [json.dumps(content, separators=(",", ":"))])


def _begin(file: Path, detector: DetectorModule, case: Case, attacked: list[int], references: int) -> dict[str, Any]:
    """The results so far, or an empty record if there are none of this guard, these images and these versions."""
    setting = {
        "guard": _weights_digest(detector),
        "images": len(attacked),
        "attacked": attacked,
        "references": references,
        "radii": case.radii,
        "versions": {package: version(package) for package in _PACKAGES},
    }
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content if {key: content.get(key) for key in setting} == setting else setting | {"results": {}}


def _attack(
    detector: DetectorModule, attack: Attack, pictures: Tensor, labels: Tensor, rows: Tensor, seed: int
) -> dict[str, Any]:
    """What an attack broke of some rows of the test set, and what it cost."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the peers
        report = evaluate(
            detector,
            {"attack": attack},
            [(pictures[rows], labels[rows])],
            generator=torch.Generator().manual_seed(seed),
            sanity_images=0,
        )
    (result,) = report.results
    return {
        "attack": result.attack,
        "attacked": rows.tolist(),
        "broken": rows[is_broken(Verdicts(result.verdict, labels[rows]))].tolist(),
        "invalid": result.invalid,
        "gradients": result.cost.backward,
        "judged": result.cost.forward,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _weights_digest(detector: DetectorModule) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _overlaps(prefix: str, pattern: str) -> bool:
    """Whether some text that starts with the prefix can match the pattern, which has the prefix's number of parts."""
    if pattern == "*":
        return True
    parts = zip(prefix.strip("/").split("/"), pattern.split("/"), strict=False)
    return all(fnmatch(part, wanted) for part, wanted in parts)


def _write(file: Path, lines: list[str]) -> None:
    write_atomically(file, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


if __name__ == "__main__":
    app()
