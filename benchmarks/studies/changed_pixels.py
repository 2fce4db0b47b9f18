"""What a guard of templates can prove about changed pixels on MNIST, with refusal and without, and what attacks find.

`python -m benchmarks.studies.changed_pixels` trains one guard for each seed, and writes counts and a table of them to
benchmarks/results/changed-pixels after each. Seeds that the file of counts holds are not run again. On one core of a
CPU a seed takes about half an hour, most of it for proofs and attacks. `--save guards/mnist-pixels` only trains the
guard of seed 0, attacks and proves it at ten pixels, and saves it with these figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.attacks import L0, Attack, SigmaZero
from clusterguard.certification import certified_radius, certified_success_rate, certify
from clusterguard.detectors import CardDetails, make_template_guard
from clusterguard.evaluation import CertifiedBound
from clusterguard.training import TemplateTrainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._support import keep_freed_memory, markdown_table, without_refusal
from benchmarks.data import load_data_set
from benchmarks.running import provenance, read_study, write_study

CHANGED_PIXELS = Path(__file__).parents[1] / "results" / "changed-pixels"
PIXELS = (5, 10, 15, 25)
PATCHES = (3, 5)
LENGTHS = (5.0, 10.0, 15.0)  # in l1
_TEMPLATES, _EPOCHS, _ROOM, _RATE = 50, 12, 8.0, 0.05
_CALIBRATION = 5000  # training images that only thresholds are fitted to
_AT_ONCE = 100
_SHOWN_PIXELS = 10  # of the figures that a saved guard carries


def train_templates(seed: int, progress: bool = True) -> ClusterGuard:
    """A guard of templates for MNIST."""
    torch.manual_seed(seed)
    images, labels = load_data_set("mnist").train.floats()
    train_set = TensorDataset(images[:-_CALIBRATION], labels[:-_CALIBRATION])
    guard = make_template_guard(DataLoader(train_set, 1000, shuffle=True), 10, templates=_TEMPLATES)
    trainer = TemplateTrainer(
        guard,
        pixels=_ROOM,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS),
        calibrator=Calibrator(_RATE),
    )
    held_out = [(images[-_CALIBRATION:], labels[-_CALIBRATION:])]
    trainer.fit(DataLoader(train_set, 250, shuffle=True), held_out, epochs=_EPOCHS, progress=progress)
    return guard


def count_proofs(guard: ClusterGuard, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What is proved of images that the guard labels correctly and accepts; other images have radius −1."""
    detection = guard.detect(images)
    eligible = (detection.labels == labels) & ~detection.is_adversarial
    parts = [*zip(images[eligible].split(_AT_ONCE), labels[eligible].split(_AT_ONCE), strict=True)]
    radii = torch.cat([certified_radius(guard, *part, norm="l0", largest=64) for part in parts])
    everyone = torch.full(labels.shape, -1.0, dtype=torch.float64).index_put((eligible,), radii)

    def unproved(norm: str, eps: float) -> int:
        return int(sum((~certify(guard, *part, eps=eps, norm=norm).is_secure).sum() for part in parts))

    return {
        "eligible": int(eligible.sum()),
        "median_radius": float(everyone.median()),
        "unproved_pixels": {str(eps): int((radii < eps).sum()) for eps in PIXELS},
        "unproved_patches": {str(side): unproved("patch", side) for side in PATCHES},
        "unproved_l1": {f"{eps:g}": unproved("l1", eps) for eps in LENGTHS},
    }


def count_successes(guard: ClusterGuard, images: Tensor, labels: Tensor, seed: int) -> list[dict[str, Any]]:
    """How many images each attack breaks, of how many that are labelled correctly and accepted."""
    rows = []
    for norm, eps in (*(("l0", float(eps)) for eps in PIXELS), *(("patch", float(side)) for side in PATCHES)):
        attacks: dict[str, Attack] = {"suite": WorstCaseSuite(norm, eps=eps, budget="standard")}
        if norm == L0.name:
            attacks["sigma-zero"] = SigmaZero(eps=eps)
        generator = torch.Generator().manual_seed(seed)
        report = evaluate(guard, attacks, [(images, labels)], generator=generator, sanity_images=0)
        for result in report.results:
            broken = {"broken": result.success.count, "of": result.success.total}
            rows.append({"norm": norm, "eps": eps, "attack": result.name, **broken})
    return rows


def run_seed(seed: int, proved: int, attacked: int, progress: bool = True) -> dict[str, Any]:
    """Everything for one seed."""
    guard = train_templates(seed, progress)
    images, labels = load_data_set("mnist").open_test().floats()
    with torch.no_grad():
        detection = guard.detect(images)
    accepting = without_refusal(guard)
    few, their = images[:proved], labels[:proved]
    return {
        "seed": seed,
        "test_images": len(labels),
        "right": int((detection.labels == labels).sum()),
        "refused": int(detection.is_adversarial.sum()),
        "right_and_accepted": int(((detection.labels == labels) & ~detection.is_adversarial).sum()),
        "proved_images": proved,
        "with_refusal": count_proofs(guard, few, their),
        "without_refusal": count_proofs(accepting, few, their),
        "attacks": count_successes(guard, images[:attacked], labels[:attacked], seed),
        "provenance": provenance(torch.device("cpu")),
    }


def save_template_guard(folder: Path, attacked: int, progress: bool = True) -> None:
    """Train the guard of seed 0, and save it with what is proved and what the suite finds at ten changed pixels."""
    guard = train_templates(0, progress)
    images, labels = load_data_set("mnist").open_test().head(attacked).floats()
    pairs = [*zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)]
    suite = WorstCaseSuite("l0", eps=_SHOWN_PIXELS, budget="standard")
    report = evaluate(
        guard,
        {f"suite l0 {_SHOWN_PIXELS}": suite},
        pairs,
        generator=torch.Generator().manual_seed(0),
        sanity_images=0,
        progress=progress,
    )
    proved = certified_success_rate(guard, pairs, eps=_SHOWN_PIXELS, norm="l0")
    training = {
        "data": "mnist",
        "templates of a class": _TEMPLATES,
        "epochs": _EPOCHS,
        "room in pixels": _ROOM,
        "seed": 0,
        "provenance": provenance(torch.device("cpu")),
    }
    guard.save_pretrained(
        folder,
        training=training,
        evaluation=replace(report, certified=CertifiedBound(_SHOWN_PIXELS, proved, "l0")),
        card=CardDetails(licence="mit"),
    )


def proof_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The counts as two tables in Markdown: of each seed, and of each kind of change with the seeds side by side."""
    without, refusing = ([run[key] for run in runs] for key in ("without_refusal", "with_refusal"))
    kinds = [(name, eps) for name in ("unproved_pixels", "unproved_patches", "unproved_l1") for eps in without[0][name]]

    def unproved(results: Sequence[Mapping[str, Any]], name: str, eps: str) -> str:
        shares = _shares([result[name][eps] for result in results], [result["eligible"] for result in results])
        return ", ".join(shares)

    def broken(name: str, eps: str, attack: str) -> str:
        norm = {"unproved_pixels": L0.name, "unproved_patches": "patch"}.get(name)
        found = [
            f"{x['broken']} of {x['of']}"
            for run in runs
            for x in run["attacks"]
            if (x["norm"], f"{x['eps']:g}", x["attack"]) == (norm, eps, attack)
        ]
        return ", ".join(found) or "not run"

    tests = [run["test_images"] for run in runs]
    seeds = [
        ["accuracy", *_shares([run["right"] for run in runs], tests)],
        ["refused test images", *_shares([run["refused"] for run in runs], tests)],
        ["proofs are about, without refusal", *(f"{result['eligible']} digits" for result in without)],
        ["proofs are about, with refusal", *(f"{result['eligible']} digits" for result in refusing)],
        ["median certified pixels, without refusal", *(f"{result['median_radius']:.0f}" for result in without)],
        ["median certified pixels, with refusal", *(f"{result['median_radius']:.0f}" for result in refusing)],
    ]
    words = {"unproved_pixels": "{0} pixels", "unproved_patches": "a patch of {0}×{0}", "unproved_l1": "{0} in ℓ1"}
    changes = [
        [words[name].format(eps), unproved(without, name, eps), unproved(refusing, name, eps)]
        + [broken(name, eps, attack) for attack in ("suite", "sigma-zero")]
        for name, eps in kinds
    ]
    head = "change", "certified ASR without refusal", "with refusal", "the suite breaks", "σ-zero breaks"
    return [
        *markdown_table(["", *(f"seed {run['seed']}" for run in runs)], seeds),
        "",
        *markdown_table(head, changes),
    ]


def _shares(counts: Sequence[int], totals: Sequence[int]) -> list[str]:
    return [f"{count / total:.3f}" for count, total in zip(counts, totals, strict=True)]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    proved: Annotated[int, typer.Option(min=1, help="Test digits to prove something about, the first ones.")] = 500,
    attacked: Annotated[int, typer.Option(min=1, help="Test digits to attack, the first ones.")] = 100,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = CHANGED_PIXELS,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the guard of seed 0; then nothing else is done.")
    ] = None,
) -> None:
    """Train, prove and attack."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if save is not None:
        save_template_guard(save, attacked)
        return
    runs = read_study(output, {"runs": []})["runs"]
    for seed in range(seeds):
        if seed not in [run["seed"] for run in runs]:
            runs.append(run_seed(seed, proved, attacked))
            write_study(output, {"runs": runs}, proof_lines(runs))
    print("\n".join(proof_lines(runs)))


if __name__ == "__main__":
    typer.run(main)
