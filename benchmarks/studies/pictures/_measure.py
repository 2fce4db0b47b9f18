"""What the pictures of the documentation show, measured on the guards that ship."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from clusterguard import APGD, PGD, ClusterGuard, FalsePositiveMonitor, certified_success_rate, evaluate
from clusterguard.deployment import plausible_rate
from clusterguard.detection import fit_thresholds
from torch import Generator, Tensor

from benchmarks.data import load_data_set
from benchmarks.running import load_trained

_GUARDS = Path(__file__).parents[3] / "guards"
RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
PAPER_RADII = (0.1, 0.2, 0.25, 0.3, 0.325, 0.35, 0.375, 0.4, 0.45)  # closer where the guards begin to give way
PAPER_STEP, PAPER_STEPS = 0.01, 100
ASKED = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
_QUARTER = 2500  # of the stream: so many images come before the drift
_SHIFT = 3  # pixels to the right, as if the camera had moved


def measure_radii(images: int) -> list[dict[str, Any]]:
    """How many of the first test digits APGD with 20 steps breaks at each radius, and how many have no proof."""
    batch = load_data_set("mnist").open_test().head(images).floats()
    rows = []
    for name in ("mnist", "mnist-certified"):
        guard = ClusterGuard.from_pretrained(_GUARDS / name)
        for eps in RADII:
            attack = APGD(norm="linf", eps=eps, steps=20)
            generator = Generator().manual_seed(0)
            found = evaluate(guard, attack, [batch], sanity_images=0, generator=generator, precision="bf16").worst_case
            row = {"guard": name, "eps": eps, "broken": found.count, "of": found.total}
            if name == "mnist-certified":
                row["unproved"] = certified_success_rate(guard, [batch], eps=eps).count
            rows.append(row)
    return rows


def measure_paper(images: int) -> list[dict[str, Any]]:
    """How many of the first test digits the paper's PGD breaks at each radius, of Ours and of L-Ben on its network."""
    batch = load_data_set("mnist").open_test().head(images).floats()
    rows = []
    for name in ("ours", "l-ben"):
        detector = load_trained(name)
        for eps in PAPER_RADII:
            attack = PGD(norm="linf", eps=eps, step_size=PAPER_STEP, steps=PAPER_STEPS, keep="last")
            found = evaluate(detector, attack, [batch], sanity_images=0).worst_case
            rows.append({"detector": name, "eps": eps, "broken": found.count, "of": found.total})
    return rows


def measure_service() -> dict[str, Any]:
    """Thresholds asked for and realised, and the monitor's evidence before and after a drift, on all test digits."""
    guard = ClusterGuard.from_pretrained(_GUARDS / "mnist")
    images, labels = load_data_set("mnist").open_test().floats()
    distances, found = _judge(guard, images)
    if guard.calibration is None:
        raise ValueError("expected a guard with its calibration, got one without")
    limit = plausible_rate(guard.calibration)
    before = _refusals(guard, images, labels)
    after = _refusals(guard, images.roll(_SHIFT, -1), labels)
    return {
        "thresholds": [_realised(distances, found, labels, rate) for rate in ASKED],
        "drift": {
            "limit": limit,
            "run_length": 1_000_000,
            "begins": _QUARTER,
            "shift": _SHIFT,
            "rate_before": before.double().mean().item(),
            "rate_after": after.double().mean().item(),
            "unchanged": list(_evidence(limit, before, before)),
            "drifting": list(_evidence(limit, before, after)),
        },
    }


def _judge(guard: ClusterGuard, images: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and labels of images, in batches."""
    verdicts = [guard.detect(batch) for batch in images.split(500)]
    return torch.cat([part.distances for part in verdicts]), torch.cat([part.labels for part in verdicts])


def _refusals(guard: ClusterGuard, images: Tensor, labels: Tensor) -> Tensor:
    """Which of the images that are labelled correctly are refused."""
    distances, found = _judge(guard, images)
    return (distances > guard.thresholds[found])[found == labels]


def _realised(distances: Tensor, found: Tensor, labels: Tensor, rate: float, splits: int = 100) -> dict[str, Any]:
    """Fit thresholds to a random half of the digits, and count what they refuse of the other half, many times."""
    generator = Generator().manual_seed(0)
    rates = []
    for _ in range(splits):
        fit, rest = torch.randperm(len(labels), generator=generator).chunk(2)
        fitted = fit_thresholds(distances[fit], found[fit], labels[fit], 10, false_positive_rate=rate)
        right = rest[found[rest] == labels[rest]]
        limits = torch.tensor(fitted.thresholds)[found[right]]
        rates.append((distances[right] > limits).double().mean())
    low, middle, high = torch.stack(rates).quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return {"asked": rate, "low": low, "mean": torch.stack(rates).mean().item(), "median": middle, "high": high}


def _evidence(limit: float, before: Tensor, after: Tensor, every: int = 50) -> Iterator[float]:
    """The monitor's evidence on a stream of images drawn at random: a quarter before the drift, the rest after it."""
    generator = Generator().manual_seed(0)
    drawn = [
        flags[torch.randint(len(flags), (count,), generator=generator)]
        for flags, count in ((before, _QUARTER), (after, 3 * _QUARTER))
    ]
    monitor = FalsePositiveMonitor(limit, run_length=1_000_000)
    for part in torch.cat(drawn).split(every):
        yield monitor.update(part).evidence
