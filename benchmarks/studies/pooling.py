"""False-positive rates with ``scarce="pool"`` on simulated suspicion: `python -m benchmarks.studies.pooling`.

Nine classes have about 550 of 5,000 calibration examples each, the tenth has 45 with a far larger suspicion. New
examples are drawn from the same mix, and the thresholds are fitted anew each time.
"""

import torch
from clusterguard.detection import fit_threshold, fit_thresholds
from torch import Generator, Tensor

SHARES = torch.tensor([0.991 / 9] * 9 + [0.009])
SHIFTS = torch.tensor([0.0] * 9 + [50.0])


def draw_examples(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the suspicion and the labels of examples, (count,) each."""
    labels = torch.multinomial(SHARES, count, True, generator=generator)
    return torch.randn(count, generator=generator) + SHIFTS[labels], labels


def main(*, rate: float = 0.01, repetitions: int = 300) -> None:
    """Print the mean rate over all classes, with pooled thresholds and with a threshold shared with all classes."""
    generator = torch.Generator().manual_seed(0)
    rates: dict[str, list[Tensor]] = {"pool": [], "shared with all": []}
    for _ in range(repetitions):
        suspicion, labels = draw_examples(5000, generator)
        fitted = fit_thresholds(suspicion, labels, labels, 10, false_positive_rate=rate, scarce="pool")
        thresholds = {"pool": torch.tensor(fitted.thresholds)}
        thresholds["shared with all"] = thresholds["pool"].clone()
        thresholds["shared with all"][list(fitted.pooled)] = fit_threshold(suspicion, rate)
        suspicion, labels = draw_examples(20_000, generator)
        for name, limits in thresholds.items():
            rates[name].append((suspicion > limits[labels]).double().mean())
    for name, values in rates.items():
        mean, error = torch.stack(values).mean(), torch.stack(values).std() / repetitions**0.5
        print(f"{name}: {mean:.4f} ± {error:.4f} of all images refused, {rate:g} asked for")


if __name__ == "__main__":
    main()
