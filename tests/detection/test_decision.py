import pytest
import torch
from clusterguard import Evidence, decide, success_margin
from clusterguard.detection import class_margins
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Few distinct values, so that ties, infinities and NaN meet all the time.
VALUES = st.sampled_from([-torch.inf, -2.0, -1e-38, 0.0, 1e-38, 1.0, 1.0 + 1e-7, 3.5, torch.inf, torch.nan])


@st.composite
def evidence_and_thresholds(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    array = hnp.arrays("float32", shape, elements=VALUES.map(lambda value: float(torch.tensor(value))))
    scores, suspicion = torch.from_numpy(draw(array)), torch.from_numpy(draw(array))
    thresholds = torch.from_numpy(
        draw(hnp.arrays("float32", shape[1], elements=VALUES.map(lambda value: float(torch.tensor(value)))))
    )
    return Evidence(scores, suspicion), thresholds


@given(evidence_and_thresholds())
def test_a_margin_of_at_most_zero_means_exactly_accepted_as_that_class(case):
    evidence, thresholds = case
    labels, _, is_adversarial = decide(evidence, thresholds)
    accepted_as = torch.nn.functional.one_hot(labels, len(thresholds)).bool() & ~is_adversarial[:, None]
    assert torch.equal(class_margins(evidence, thresholds) <= 0, accepted_as)


@given(evidence_and_thresholds(), st.data())
def test_success_is_acceptance_under_a_wrong_label(case, data):
    evidence, thresholds = case
    count, classes = evidence.class_scores.shape
    true = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    labels, _, is_adversarial = decide(evidence, thresholds)
    assert torch.equal(success_margin(evidence, thresholds, true) <= 0, (labels != true) & ~is_adversarial)
    targets = (true + 1) % classes
    targeted = success_margin(evidence, thresholds, true, targets)
    assert torch.equal(targeted <= 0, (labels == targets) & ~is_adversarial)


@given(evidence_and_thresholds())
def test_everything_that_is_not_finite_is_refused(case):
    evidence, thresholds = case
    finite = evidence.class_scores.isfinite().all(1) & evidence.suspicion.isfinite().all(1)
    detection = decide(evidence, thresholds)
    assert detection.is_adversarial[~finite].all()
    assert detection.is_adversarial[thresholds[detection.labels].isnan()].all()


def test_an_infinite_threshold_accepts_what_is_finite():
    evidence = Evidence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1e30, 0.0]]))
    assert not decide(evidence, torch.full((2,), torch.inf)).is_adversarial.any()


def test_a_threshold_accepts_its_own_value():
    evidence = Evidence(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    assert not decide(evidence, torch.tensor([2.0, 0.0])).is_adversarial.any()


def test_margin_by_hand():
    distances = torch.tensor([[3.0, 4.0, 9.0]])
    margins = class_margins(Evidence(-distances, distances), torch.tensor([2.0, 5.0, 5.0]))
    torch.testing.assert_close(margins, torch.tensor([[1.0, 1.0, 6.0]]))


@pytest.mark.parametrize("rival", [0, 2])
def test_the_margin_keeps_its_gradient_on_a_tie(rival):
    scores = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    margins = class_margins(Evidence(scores, torch.zeros(1, 3)), torch.full((3,), torch.inf))
    (gradient,) = torch.autograd.grad(margins[0, rival], scores)
    assert gradient[0, rival] < 0
