"""Simulate which share of images is refused if a class has few calibration images: `fit_thresholds(scarce="pool")`.

`python -m benchmarks.studies.pooling` prints the share. Nine classes have about 550 of 5,000 calibration examples each.
The tenth class has 45, and their suspicion is far larger. Each repetition draws calibration examples, fits thresholds,
and counts what they refuse of new examples from the same distribution.
"""

import torch
from clusterguard.detection import fit_shared_threshold, fit_thresholds
from torch import Generator, Tensor

CLASS_SHARES = torch.tensor([0.991 / 9] * 9 + [0.009])
SHIFTS = torch.tensor([0.0] * 9 + [50.0])


def draw_examples(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw examples at random, and return their suspicion and their labels, each (count,)."""
    labels = torch.multinomial(CLASS_SHARES, count, True, generator=generator)
    return torch.randn(count, generator=generator) + SHIFTS[labels], labels


def main(*, rate: float = 0.01, repetitions: int = 300) -> None:
    """Print the share of refused images, for two ways to fit the threshold of the small class.

    One is ``scarce="pool"``. The other gives the small class the threshold that fits all examples together.

    Args:
        rate: false-positive rate that is asked for.
        repetitions: number of repetitions.
    """
    generator = torch.Generator().manual_seed(0)
    rates: dict[str, list[Tensor]] = {"pool": [], "shared with all": []}
    for _ in range(repetitions):
        suspicion, labels = draw_examples(5000, generator)
        fitted = fit_thresholds(suspicion, labels, labels, 10, false_positive_rate=rate, scarce="pool")
        thresholds = {"pool": torch.tensor(fitted.thresholds)}
        thresholds["shared with all"] = thresholds["pool"].clone()
        thresholds["shared with all"][list(fitted.pooled)] = fit_shared_threshold(suspicion, rate)
        suspicion, labels = draw_examples(20_000, generator)
        for name, limits in thresholds.items():
            rates[name].append((suspicion > limits[labels]).double().mean())
    for name, values in rates.items():
        mean, error = torch.stack(values).mean(), torch.stack(values).std() / repetitions**0.5
        print(f"{name}: {mean:.4f} ± {error:.4f} of all images refused, {rate:g} asked for")


if __name__ == "__main__":
    main()
