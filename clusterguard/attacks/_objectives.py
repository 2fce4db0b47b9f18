"""What an attacker minimises, one number per example: names for options, functions for the curious."""

from typing import Protocol

from clusterguard.detection import Evidence, check_goal, success_margin
from clusterguard.errors import ConfigurationError
from torch import Tensor
from torch.nn import functional


class Objective(Protocol):
    """What an attack makes smaller: any callable with this signature, such as the functions below."""

    def __call__(self, evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None, /) -> Tensor:
        """The loss of each example; never summed over the batch.

        Args:
            evidence: of B images, K classes.
            thresholds: (K,).
            labels: (B,) true labels.
            targets: (B,) wrong labels aimed at; None means that any wrong label will do.

        Returns:
            (B,), smaller is closer to success.
        """
        ...


def suspicion(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Suspicion of the target, or of the wrong class where it is smallest: for a guard the nearest wrong distance.

    The nearest wrong class is chosen anew at every call, as the paper's adaptive attack does.

    Reference:
        arXiv 2012.03483, equations 17 to 19.
    """
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        return evidence.suspicion.scatter(1, labels[:, None].long(), float("inf")).amin(dim=1)
    return evidence.suspicion.gather(1, targets[:, None].long()).squeeze(1)


def margin(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The success margin itself: at most 0 iff the attack has succeeded."""
    return success_margin(evidence, thresholds, labels, targets)


def logit(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """The best rival's score minus the target's; untargeted, the true class's minus the best wrong one's.

    It does not look at thresholds.

    Reference:
        Carlini & Wagner, "Towards evaluating the robustness of neural networks" (2017).
    """
    check_goal(evidence, thresholds, labels, targets)
    scores = evidence.class_scores
    if targets is None:
        own = scores.gather(1, labels[:, None].long()).squeeze(1)
        return own - scores.scatter(1, labels[:, None].long(), -float("inf")).amax(dim=1)
    aimed = scores.gather(1, targets[:, None].long()).squeeze(1)
    return scores.scatter(1, targets[:, None].long(), -float("inf")).amax(dim=1) - aimed


def cross_entropy(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Cross-entropy of the class scores to the target, or minus that to the true label. It does not see thresholds."""
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        return -functional.cross_entropy(evidence.class_scores, labels.long(), reduction="none")
    return functional.cross_entropy(evidence.class_scores, targets.long(), reduction="none")


def adaptive(evidence: Evidence, thresholds: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Equation 7: a classification loss (`logit`) plus the detection metric of the class that is aimed at.

    Reference:
        arXiv 2012.03483, equation 7 and Table 1.
    """
    check_goal(evidence, thresholds, labels, targets)
    if targets is None:
        aimed = evidence.class_scores.scatter(1, labels[:, None].long(), -float("inf")).argmax(dim=1)
    else:
        aimed = targets.long()
    metric = evidence.suspicion.gather(1, aimed[:, None]).squeeze(1)
    return logit(evidence, thresholds, labels, targets) + metric


OBJECTIVES: dict[str, Objective] = {
    "suspicion": suspicion,
    "margin": margin,
    "logit": logit,
    "cross_entropy": cross_entropy,
    "adaptive": adaptive,
}


def get_objective(objective: str | Objective) -> Objective:
    """The objective of that name, or the callable itself.

    Raises:
        ConfigurationError: an unknown name.
    """
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise ConfigurationError(f"expected an objective among {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective]
