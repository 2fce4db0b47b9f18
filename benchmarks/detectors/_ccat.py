"""Confidence-calibrated adversarial training: the larger a perturbation is, the lower the confidence should be.

Stutz et al. train against momentum PGD with backtracking. Here, training takes the attack of the experiment, with their
objective and their start. As in their paper, the attack on the finished detector maximises the confidence of a wrong
class.
"""

from dataclasses import replace

import torch
from clusterguard import PGD
from clusterguard.attacks import Problem, get_norm
from clusterguard.detectors import WithThresholds
from clusterguard.training import TrainingStep
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, one_hot

from benchmarks.detectors._recipe import with_loss
from benchmarks.detectors._vanilla import VANILLA
from benchmarks.detectors._vanilla import vanilla_loss as benign_loss

RHO = 10  # power with which confidence falls, as in Stutz et al.


def start_of_any_size(problem: Problem) -> Tensor:
    """The start of Stutz et al. Each image is left as it is with probability ½, or else perturbed at random.

    The size of the perturbation is a random share of the radius.
    """
    share = torch.empty_like(problem.images[:, 0, 0, 0]).uniform_(-1, 1, generator=problem.generator).clamp_min(0)
    return problem.norm.random_start(problem.images, problem.eps * share, problem.generator)


def soft_targets(labels: Tensor, sizes: Tensor, eps: float, num_classes: int) -> Tensor:
    """The soft labels (B, K) for labels (B,) and perturbations of sizes (B,).

    They are λ · one-hot + (1 − λ) · uniform with λ = (1 − min(1, size / ε))^ρ.
    """
    share = (sizes / max(eps, torch.finfo(sizes.dtype).tiny)).clamp_max(1)  # without a budget nothing is perturbed
    certain = (1 - share)[:, None] ** RHO
    return certain * one_hot(labels, num_classes) + (1 - certain) / num_classes


def ccat_loss(
    detector: WithThresholds, images: Tensor, labels: Tensor, attack: PGD | None, generator: Generator | None
) -> TrainingStep:
    """Cross-entropy on a benign half of the batch, and to soft targets on an attacked half."""
    if attack is None:
        return benign_loss(detector, images, labels, attack, generator)
    half, classes = (len(labels) + 1) // 2, len(detector.thresholds)
    attack = replace(attack, objective="suspicion", start=start_of_any_size, keep="last")
    attacked = attack(detector, images[half:], labels[half:], generator=generator)
    sizes = get_norm(attack.norm).size(attacked - images[half:])
    targets = torch.cat([one_hot(labels[:half], classes), soft_targets(labels[half:], sizes, attack.eps, classes)])
    logits = detector.evidence(torch.cat([images[:half], attacked])).class_scores
    right = logits.argmax(dim=1) == labels
    # The record counts whole batches, so each half is counted for the other one, too.
    correct = right[:half].sum() * len(labels) // half
    successes = (~right[half:]).sum() * len(labels) // max(1, len(labels) - half)
    return TrainingStep(cross_entropy(logits, targets.to(logits.dtype)), correct, successes)


CCAT = with_loss(
    replace(
        VANILLA,
        title="CCAT",
        reference="Stutz et al., Confidence-calibrated adversarial training (2020)",
        training_name="ccat",
        attacked=True,
        objective="suspicion",
    ),
    ccat_loss,
)
