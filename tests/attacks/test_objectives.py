import pytest
import torch
from clusterguard import PGD, Evidence, success_margin
from clusterguard.attacks import get_objective
from clusterguard.attacks._objectives import OBJECTIVES
from clusterguard.errors import ConfigurationError
from hypothesis import given
from hypothesis import strategies as st


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, suspicion = torch.randn(2, 6, 4, generator=generator)
    labels = torch.randint(0, 4, (6,), generator=generator)
    return Evidence(scores, suspicion), torch.rand(4, generator=generator), labels


@given(st.integers(0, 50), st.sampled_from(sorted(OBJECTIVES)), st.booleans())
def test_objectives_are_per_example(seed, name, targeted):
    evidence, thresholds, labels = random_case(seed)
    targets = (labels + 1) % 4 if targeted else None
    objective = get_objective(name)
    together = objective(evidence, thresholds, labels, targets)
    for row in range(6):
        part = slice(row, row + 1)
        alone = objective(
            Evidence(*(value[part] for value in evidence)),
            thresholds,
            labels[part],
            targets[part] if targeted else None,
        )
        torch.testing.assert_close(alone, together[part])


@given(st.integers(0, 50))
def test_objectives_by_definition(seed):
    evidence, thresholds, labels = random_case(seed)
    scores, suspicion = evidence
    for row, label in enumerate(labels.tolist()):
        wrong = [index for index in range(4) if index != label]
        expected = {
            "suspicion": min(suspicion[row, index] for index in wrong),
            "logit": scores[row, label] - max(scores[row, index] for index in wrong),
            "cross_entropy": scores[row].log_softmax(0)[label],
            "margin": success_margin(evidence, thresholds, labels)[row],
        }
        rival = max(wrong, key=lambda index: scores[row, index].item())
        expected["adaptive"] = expected["logit"] + suspicion[row, rival]
        for name, value in expected.items():
            torch.testing.assert_close(get_objective(name)(evidence, thresholds, labels, None)[row], value)


@given(st.integers(0, 50))
def test_targeted_objectives_fall_as_the_target_gets_likelier(seed):
    evidence, thresholds, labels = random_case(seed)
    targets = (labels + 1) % 4
    nudge = torch.nn.functional.one_hot(targets, 4)
    likelier = Evidence(evidence.class_scores + 2 * nudge, evidence.suspicion - 2 * nudge)
    for objective in OBJECTIVES.values():
        before, after = (objective(case, thresholds, labels, targets) for case in (evidence, likelier))
        assert (after <= before).all()


def test_a_callable_is_an_objective(small_guard):
    def brighter(evidence, thresholds, labels, targets):
        return evidence.suspicion[:, 0]

    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([1, 2, 1])
    attacked = PGD(eps=0.1, step_size=0.05, steps=3, keep="last", objective=brighter)(small_guard, images, labels)
    assert (small_guard.distances(attacked)[:, 0] < small_guard.distances(images)[:, 0]).all()


def test_unknown_names_are_refused():
    with pytest.raises(ConfigurationError, match="suspicion, margin"):
        get_objective("x")
