"""A detector of several detectors accepts what all of them accept under one label, and inherits all of their proofs."""

import copy
import itertools

import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, WorstCaseSuite, certify, evaluate
from clusterguard.certification import certified_radius, certified_success_rate
from clusterguard.deployment import export_onnx, export_program, load_onnx
from clusterguard.detectors import ConfidenceDetector, UnanimousDetector, WithThresholds, make_template_guard
from clusterguard.errors import ConfigurationError, NotCalibratedError
from clusterguard.training import TemplateTrainer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


def images_of(count, seed=0, side=4):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def guard_of(seed, *, thresholds=None, names=None):
    """A guard for three classes with random weights."""
    torch.manual_seed(seed)
    guard = ClusterGuard(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), 3, example=images_of(1), class_names=names
    )
    distances = guard.distances(images_of(200)).detach().amin(dim=1)
    guard.thresholds = distances.quantile(0.8).expand(3).clone() if thresholds is None else torch.tensor(thresholds)
    return guard.eval()


def templates_of(seed):
    """A guard of templates for three bands of light."""
    labels = torch.arange(60) % 3
    images = 0.4 * images_of(60, seed)
    images += 0.6 * (torch.arange(4) == labels[:, None])[:, None, :, None]
    guard = make_template_guard([(images, labels)], 3, templates=2)
    TemplateTrainer(guard, pixels=2).fit([(images, labels)] * 20, [], epochs=3, calibrate=False, progress=False)
    guard.thresholds = guard.distances(images).detach().gather(1, labels[:, None]).quantile(0.9).expand(3).clone()
    return guard, images, labels


@given(
    st.integers(0, 99),
    st.sampled_from([None, [torch.inf] * 3, [9.0, -1.0, 30.0], [-torch.inf, 20.0, 20.0]]),
    st.integers(2, 3),
)
def test_it_accepts_what_all_members_accept_under_one_label(seed, thresholds, count):
    members = [guard_of(seed), *(guard_of(seed + index, thresholds=thresholds) for index in range(1, count))]
    images = images_of(100, seed)
    images[:3] = torch.tensor([torch.nan, -0.5, 0.5]).view(3, 1, 1, 1)
    verdicts = [member.detect(images, check=False) for member in members]
    labels = torch.stack([verdict.labels for verdict in verdicts])
    accepted = torch.stack([~verdict.is_adversarial for verdict in verdicts]).all(dim=0) & (labels == labels[0]).all(
        dim=0
    )
    verdict = UnanimousDetector(*members).detect(images, check=False)
    assert torch.equal(verdict.is_adversarial, ~accepted)
    assert torch.equal(verdict.labels[accepted], labels[0, accepted])


def test_a_proof_about_one_member_is_a_proof():
    member, images, labels = templates_of(0)
    other = guard_of(1)
    together = UnanimousDetector(other, member)
    for norm, eps in (("linf", 0.02), ("l0", 1), ("patch", 2), ("l1", 0.5)):
        proofs = [certify(member, images, labels, eps=eps, norm=norm)]
        if norm == "linf":
            proofs.append(certify(other, images, labels, eps=eps))
        proof = certify(together, images, labels, eps=eps, norm=norm)
        assert torch.equal(proof.is_secure, torch.stack([one.is_secure for one in proofs]).any(dim=0))
        assert proof.is_secure.sum() > 0
        kept = torch.stack([one.is_kept for one in proofs]).all(dim=0) & (norm == "linf")
        assert torch.equal(proof.is_kept, kept)  # whether the other member accepts is not known in other norms
    radii = torch.stack([certified_radius(part, images, labels) for part in (other, member)])
    assert torch.equal(certified_radius(together, images, labels), radii.amax(dim=0))
    rate = certified_success_rate(together, [(images, labels)], eps=1, norm="l0")
    assert rate.total == int(
        (~together.detect(images).is_adversarial & (together.detect(images).labels == labels)).sum()
    )


def test_no_image_in_the_ball_breaks_what_is_proved():
    member, images, labels = templates_of(2)
    together = UnanimousDetector(member, guard_of(3))
    secure = certify(together, images, labels, eps=1, norm="l0").is_secure
    assert secure.sum() > 0
    for place, value in itertools.product(range(16), (0.0, 0.5, 1.0)):
        changed = images.flatten(1).clone()
        changed[:, place] = value
        verdict = together.detect(changed.view_as(images))
        assert not (~verdict.is_adversarial & (verdict.labels != labels) & secure).any()


def test_proofs_need_thresholds_that_let_in_nothing_more():
    member, images, labels = templates_of(4)
    together = UnanimousDetector(member, guard_of(5))
    secure = certify(together, images, labels, eps=1, norm="l0").is_secure
    together.thresholds = torch.tensor([-1.0, 0.0, -0.5])
    proof = certify(together, images, labels, eps=0.01)
    assert not proof.is_kept[labels != 1].any()
    assert torch.equal(certify(together, images, labels, eps=1, norm="l0").is_secure, secure)
    together.thresholds = torch.tensor([0.0, 0.1, 0.0])
    for prove in (certify, certified_radius):
        with pytest.raises(ConfigurationError, match="at most 0"):
            prove(together, images, labels, **({"eps": 0.01} if prove is certify else {}))


def test_without_bounds_the_reason_of_a_member_is_given():
    classifier = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, mean=[0.5], std=[0.5])
    classifier.thresholds = torch.full((3,), 2.0)
    images, labels = images_of(4), torch.tensor([0, 1, 2, 0])
    assert certify(UnanimousDetector(classifier, guard_of(0)), images, labels, eps=0.0).is_secure.shape == (4,)
    with pytest.raises(ConfigurationError, match="nothing else has bounds"):
        certify(UnanimousDetector(classifier, copy.deepcopy(classifier)), images, labels, eps=0.0)
    with pytest.raises(ConfigurationError, match="no bounds are known for this network in norms other than linf"):
        certify(UnanimousDetector(guard_of(0), guard_of(1)), images, labels, eps=1, norm="l0")
    spied = UnanimousDetector(guard_of(0), guard_of(1))
    spied.evidence = spied.members[0].evidence
    with pytest.raises(ConfigurationError, match="of its own"):
        certify(spied, images, labels, eps=0.0)

    class Own(UnanimousDetector):
        def evidence(self, images):
            return self.detectors[0].evidence(1 - images)

    with pytest.raises(ConfigurationError, match="of its own"):
        certify(Own(guard_of(0), guard_of(1)), images, labels, eps=0.0)


def test_what_is_kept_is_accepted_also_where_a_member_never_accepts_another_class():
    first = guard_of(0, thresholds=[99.0] * 3)
    images = images_of(8)
    labels = first.detect(images).labels
    others = [-torch.inf if index != labels[0] else 99.0 for index in range(3)]
    together = UnanimousDetector(first, guard_of(0, thresholds=others))
    kept = certify(together, images, labels, eps=0.0).is_kept
    verdict = together.detect(images)
    assert kept[0]
    assert (~verdict.is_adversarial & (verdict.labels == labels))[kept].all()


def test_members_fit_together_and_are_calibrated():
    first = guard_of(0, names=["a", "b", "c"])
    with pytest.raises(ConfigurationError, match="at least two"):
        UnanimousDetector(first)
    with pytest.raises(ConfigurationError, match="Linear"):
        UnanimousDetector(first, nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="same classes"):
        UnanimousDetector(first, ClusterGuard(nn.Flatten(), 2, example=images_of(1)))
    with pytest.raises(ConfigurationError, match="same classes"):
        UnanimousDetector(first, guard_of(1, names=["a", "c", "b"]))
    with pytest.raises(NotCalibratedError):
        UnanimousDetector(first, ClusterGuard(nn.Flatten(), 3, example=images_of(1)))
    together = UnanimousDetector(first, guard_of(1))
    assert together.class_names == ("a", "b", "c")
    assert together.is_calibrated
    nested = UnanimousDetector(guard_of(2), together)
    first.reset_calibration()
    assert not together.is_calibrated
    assert together.detect(images_of(20), check=False).is_adversarial.all()
    for detector in (together, nested):
        with pytest.raises(NotCalibratedError):
            detector.detect(images_of(20))
        with pytest.raises(NotCalibratedError):
            export_program(detector, images_of(2))
    together.reset_calibration()
    with pytest.raises(NotCalibratedError):
        certify(together, images_of(2), torch.tensor([0, 1]), eps=0.0)
    with pytest.raises(ConfigurationError, match="same images"):
        UnanimousDetector(guard_of(0), guard_of(1).double())
    with pytest.raises(ConfigurationError, match="same images"):
        UnanimousDetector(guard_of(0), ClusterGuard(nn.Flatten(), 3, example=images_of(1, side=3)))


def test_a_member_that_is_replaced_still_counts_and_modes_are_those_of_members():
    strict, lax = guard_of(0, thresholds=[0.0] * 3), guard_of(1, thresholds=[1e9] * 3)
    together = UnanimousDetector(lax, strict)
    assert not any(module.training for module in together.modules())
    together.members[1] = WithThresholds(strict, torch.zeros(3))
    assert together.detect(images_of(20), check=False).is_adversarial.all()


def test_everything_else_takes_it_as_it_is(tmp_path):
    member, images, labels = templates_of(6)
    together = UnanimousDetector(member, guard_of(7, thresholds=[50.0] * 3))
    labels = torch.where(together.detect(images).is_adversarial, labels, together.detect(images).labels)
    suite = WorstCaseSuite("l0", eps=2, budget="quick")
    report = evaluate(together, {"suite": suite}, [(images[:6], labels[:6])], sanity_images=0)
    proved = certified_success_rate(together, [(images[:6], labels[:6])], eps=2, norm="l0")
    assert report.results[0].success.count <= proved.count
    verdict = together.detect(images)
    export_onnx(together, tmp_path / "graph.onnx", images[:2])
    for other in (
        load_onnx(tmp_path / "graph.onnx").detect(images),
        export_program(together, images[:2]).module()(images),
    ):
        assert torch.equal(torch.as_tensor(other[0]), verdict.labels)
        assert torch.equal(torch.as_tensor(other[2]), verdict.is_adversarial)
    copied = copy.deepcopy(together)
    copied.load_state_dict(together.state_dict())
    assert torch.equal(copied.detect(images).distances, verdict.distances)
    Calibrator(0.3).fit(together, [(images, labels)], progress=False)
    assert together.is_calibrated
