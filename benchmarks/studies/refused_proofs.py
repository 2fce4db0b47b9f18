"""What refusal adds to certificates in ℓ∞: proofs with thresholds and without, at several rates of false positives.

`python -m benchmarks.studies.refused_proofs` fits thresholds to the calibration images of MNIST, and counts proofs on
the first test digits, for the guards that ship with certificates in l∞. It takes a few minutes of one core. Counts and
a table go to benchmarks/results/refused-proofs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clusterguard import Calibrator, ClusterGuard
from clusterguard.certification import certify
from clusterguard.detection import Verdicts, is_eligible
from torch import Tensor

from benchmarks._support import keep_freed_memory, markdown_table, without_refusal
from benchmarks.data import FloatBatches, Images, load_data_set
from benchmarks.running import RESULTS, write_study

REFUSED_PROOFS = RESULTS / "refused-proofs"
_FOLDERS = Path(__file__).parents[2] / "guards"
_GUARDS = ("mnist-certified", "mnist-certified-accurate")
_RATES = (0.01, 0.05, 0.1, 0.2, 0.4)
_RADII = (0.3, 0.4)
_AT_ONCE = 500


def count_with_and_without(
    guard: ClusterGuard, calibration: Images, images: Tensor, labels: Tensor, rate: float
) -> dict[str, Any]:
    """Fit thresholds for a rate of false positives, and count proofs of the images that it then accepts.

    Args:
        guard: guard with known bounds, whose thresholds are changed.
        calibration: benign images to fit thresholds to.
        images: (n, C, H, W).
        labels: (n,) true labels.
        rate: rate of false positives.
    """
    Calibrator(rate).fit(guard, FloatBatches(calibration, _AT_ONCE), progress=False)
    rows = is_eligible(Verdicts(guard.detect(images), labels))
    accepted = images[rows], labels[rows]

    def proved(judge: ClusterGuard, eps: float) -> int:
        return int(certify(judge, *accepted, eps=eps).is_secure.sum())

    accepting = without_refusal(guard)
    return {
        "rate": rate,
        "threshold": round(float(guard.thresholds.mean()), 2),
        "accepted": int(rows.sum()),
        "with_refusal": {f"{eps:g}": proved(guard, eps) for eps in _RADII},
        "without_refusal": {f"{eps:g}": proved(accepting, eps) for eps in _RADII},
    }


def refusal_lines(counts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The table in Markdown."""
    radii = [f"proved at {eps:g}, with and without refusal" for eps in _RADII]
    lines: list[tuple[object, ...]] = []
    for guard, rows in counts.items():
        for row in rows:
            pairs = [f"{row['with_refusal'][f'{eps:g}']}, {row['without_refusal'][f'{eps:g}']}" for eps in _RADII]
            lines.append((f"`{guard}`", f"{row['rate']:.0%}", row["threshold"], row["accepted"], *pairs))
    return markdown_table(("guard", "benign images refused", "mean threshold", "accepted, label right", *radii), lines)


def main(
    images: Annotated[int, typer.Option(min=1, help="Test digits to prove something about, the first ones.")] = 1000,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = REFUSED_PROOFS,
) -> None:
    """Count proofs, and write counts and table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    data = load_data_set("mnist")
    batch = data.open_test().head(images).floats()
    counts: dict[str, list[dict[str, Any]]] = {}
    for name in _GUARDS:
        guard = ClusterGuard.from_pretrained(_FOLDERS / name)
        counts[name] = [count_with_and_without(guard, data.calibration, *batch, rate) for rate in _RATES]
    write_study(output, {"images": images, "guards": counts}, refusal_lines(counts))
    print("\n".join(refusal_lines(counts)))


if __name__ == "__main__":
    typer.run(main)
