"""What a detector accepts, what it proves, and what the suite breaks, as counts."""

from typing import Literal

import torch
from clusterguard import ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.certification import certify
from clusterguard.detection import Verdicts, is_eligible
from clusterguard.detectors import UnanimousDetector
from torch import Tensor

Judge = ClusterGuard | UnanimousDetector
SuiteBudget = Literal["quick", "standard", "thorough"]
Counts = dict[str, int]
_AT_ONCE = 100
_IN_WORDS = {
    "linf": "ℓ∞ {:g}",
    "l2": "ℓ2 {:g}",
    "l1": "ℓ1 {:g}",
    "l0": "{:g} pixels",
    "patch": "a patch of {0:g}×{0:g}",
}


def count_accepted(judge: Judge, images: Tensor, labels: Tensor) -> Counts:
    """How many images (n, C, H, W) a detector labels as in (n,), how many it accepts, and how many both, "eligible"."""
    right = accepted = eligible = 0
    for part, truth in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        verdicts = Verdicts(judge.detect(part), truth)
        right += int((verdicts.detection.labels == truth).sum())
        accepted += int((~verdicts.detection.is_adversarial).sum())
        eligible += int(is_eligible(verdicts).sum())
    return {"images": len(labels), "right": right, "accepted": accepted, "eligible": eligible}


def count_without_proof(judge: Judge, images: Tensor, labels: Tensor, norm: str, eps: float) -> Counts:
    """How many images (n, C, H, W) that are accepted under their labels (n,) have no proof at a radius of a norm."""
    unproved = of = 0
    for part, truth in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        rows = is_eligible(Verdicts(judge.detect(part), truth))
        of += int(rows.sum())
        if rows.any():
            unproved += int((~certify(judge, part[rows], truth[rows], eps=eps, norm=norm).is_secure).sum())
    return {"count": unproved, "of": of}


def count_broken(judge: Judge, images: Tensor, labels: Tensor, norm: str, eps: float, budget: SuiteBudget) -> Counts:
    """How many images (n, C, H, W) that are accepted under their labels (n,) the suite breaks at a radius of a norm."""
    suite = {"suite": WorstCaseSuite(norm, eps=eps, budget=budget)}
    generator = torch.Generator().manual_seed(0)
    report = evaluate(judge, suite, [(images, labels)], generator=generator, sanity_images=0)
    return {"count": report.results[0].success.count, "of": report.results[0].success.total}


def threat_in_words(norm: str, eps: float) -> str:
    """A norm and a radius for people.

    Example:
        >>> threat_in_words("patch", 5), threat_in_words("l0", 1)
        ('a patch of 5×5', '1 pixel')
    """
    words = _IN_WORDS[norm].format(eps)
    return words.removesuffix("s") if eps == 1 else words
