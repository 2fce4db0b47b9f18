import pytest
import torch
from clusterguard import PGD, ClusterGuard, Evidence, success_margin
from clusterguard.attacks import (
    MultiTarget,
    Problem,
    RepelThenMinimise,
    RepresentationMatching,
    Towards,
    find_representation,
    get_norm,
    has_representation,
    margin,
)
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError
from torch import nn

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12}
FINE = {"eps": 0.2, "step_size": 0.01, "steps": 60}


@pytest.fixture
def wide_guard():
    """A linear guard whose representation reaches every class from everywhere in the box."""
    guard = ClusterGuard(nn.Flatten(), num_classes=3, representation_dim=6, example=torch.rand(1, 1, 8, 8))
    linear = guard.encoder[1]
    directions = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(5))).Q.T
    linear.weight.data.copy_(30 * directions)
    linear.bias.data.copy_(-15 * directions.sum(dim=1))  # mid-grey lies at the origin
    guard.thresholds = torch.full((3,), 8.0)
    return guard.eval()


@pytest.fixture
def references(wide_guard):
    """Images of each class, accepted, close to its centre."""
    images, labels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(7)), torch.arange(12) % 3
    others = (labels + 1) % 3
    attack = PGD(eps=1.0, step_size=0.02, steps=60)
    accepted = Towards.accepted(wide_guard, attack(wide_guard, images, others, targets=labels), labels)
    assert len(accepted.labels) == 12
    return accepted


def clean(count=12):
    images = 0.3 + 0.4 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % 3


def margins(detector, images, labels, targets=None):
    return success_margin(detector.evidence(images), detector.thresholds, labels, targets).detach()


def broken(detector, images, labels, targets=None):
    return margins(detector, images, labels, targets) <= 0


def options(norm="linf", eps=None, steps=12):
    eps = NORMS[norm] if eps is None else eps
    return {"norm": norm, "eps": eps, "step_size": eps / 4, "steps": steps}


@pytest.mark.parametrize("norm", NORMS)
def test_matching_with_the_whole_box_returns_an_accepted_image(wide_guard, references, norm):
    images, labels = clean()
    attack = RepresentationMatching(
        references=references, **options(norm, eps=get_norm(norm).largest(images.shape[1:]))
    )
    assert broken(wide_guard, attack(wide_guard, images, labels), labels).all()


@pytest.mark.parametrize("norm", NORMS)
def test_matching_goes_on_from_the_projected_reference_inside_ball_and_box(wide_guard, references, norm):
    images, labels = clean()
    attack = RepresentationMatching(references=references, **options(norm))
    attacked = attack(wide_guard, images, labels)
    started = PGD(start=references, **(options(norm, steps=1) | {"step_size": 1e-9}))(wide_guard, images, labels)
    before, after = (margins(wide_guard, x, labels) for x in (started, attacked))
    assert (after <= before + 1e-4).all()
    assert (after < before).double().mean() > 0.8
    assert (get_norm(norm).size(attacked - images) <= NORMS[norm] * (1 + 1e-5)).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_matching_ends_closer_to_the_reference_in_representation(wide_guard, references):
    images, labels = clean()
    one = Towards(references.images[:1], references.labels[:1])  # so that it is known which
    fitting = labels != one.labels
    images, labels = images[fitting], labels[fitting]
    attack = RepresentationMatching(references=one, **FINE | {"eps": 0.1})
    start = images + (one.images - images).clamp(-0.1, 0.1)
    wanted = wide_guard.represent(one.images)
    before, after = (
        (wide_guard.represent(x) - wanted).norm(dim=1) for x in (start, attack(wide_guard, images, labels))
    )
    assert (after < 0.5 * before).all()


@pytest.mark.parametrize("shift", [1, 2])
def test_matching_aims_at_the_target(wide_guard, references, shift):
    images, labels = clean()
    targets = (labels + shift) % 3
    attack = RepresentationMatching(references=references, **FINE)
    verdict = wide_guard.detect(attack(wide_guard, images, labels, targets=targets))
    assert torch.equal(verdict.labels, targets)
    assert not verdict.is_adversarial.any()


def test_matching_breaks_evidence_without_gradient(wide_guard, references):
    class Rounded:
        """Reports distances in steps of 8, without a gradient, but shows its representations."""

        thresholds, represent = wide_guard.thresholds, wide_guard.represent

        def evidence(self, images):
            distances = (wide_guard.distances(images) / 8).round() * 8
            return Evidence(-distances, distances)

    images, _ = clean()
    labels = wide_guard.distances(images).argmin(1)
    detector = Rounded()
    assert not broken(detector, PGD(**FINE)(detector, images, labels), labels).any()
    starts = references(Problem(detector, images, labels, None, get_norm("linf"), FINE["eps"], margin))
    assert not broken(detector, starts, labels).all()
    attack = RepresentationMatching(references=references, **FINE)
    assert broken(detector, attack(detector, images, labels), labels).all()


def test_without_a_fitting_reference_the_clean_image_comes_back(wide_guard, references):
    images, _ = clean()
    labels = torch.zeros(len(images), dtype=torch.long)
    is_zero = references.labels == 0
    for unfit in (Towards(references.images[is_zero], references.labels[is_zero]), Towards(images[:0], labels[:0])):
        attack = RepresentationMatching(references=unfit, **options())
        assert torch.equal(attack(wide_guard, images, labels), images)


def test_repelling_leads_out_of_a_dip_in_which_pgd_stays():
    """Along mean brightness, representations rise away from the origin, first sideways and then to class 1's centre.

    The detour raises the distance to class 1, so descending it from the dip ends at once.
    """
    knots = torch.tensor([[1.0, 1.0], [3.0, 1.2], [0.0, 10.0]])

    class Dip:
        thresholds = torch.tensor([4.0, 4.0])
        centers = torch.tensor([[10.0, 0.0], [0.0, 10.0]])

        def represent(self, images):
            way = (images.flatten(1).mean(dim=1) - 0.3)[:, None] / 0.1
            early = knots[0] + way * (knots[1] - knots[0])
            late = knots[1] + (way - 1).clamp_max(1) * (knots[2] - knots[1])
            return torch.where(way < 1, early, late)

        def evidence(self, images):
            distances = torch.cdist(self.represent(images), self.centers)
            return Evidence(-distances, distances)

    images, labels = torch.full((2, 1, 4, 4), 0.31), torch.tensor([0, 0])
    detector, setting = Dip(), {"eps": 0.25, "step_size": 0.01, "steps": 40, "norm": "linf"}
    for objective in ("margin", "suspicion"):
        assert not broken(detector, PGD(objective=objective, **setting)(detector, images, labels), labels).any()
    attack = RepelThenMinimise(share=0.5, **setting)
    assert broken(detector, attack(detector, images, labels), labels).all()


@pytest.mark.parametrize("norm", NORMS)
def test_repelling_lowers_the_margin_inside_ball_and_box(wide_guard, norm):
    images, labels = clean()
    attacked = RepelThenMinimise(**options(norm))(wide_guard, images, labels)
    before, after = (margins(wide_guard, x, labels) for x in (images, attacked))
    assert (after <= before).all()
    assert (after < before).double().mean() > 0.8
    assert (get_norm(norm).size(attacked - images) <= NORMS[norm] * (1 + 1e-5)).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@pytest.mark.parametrize("shift", [1, 2])
def test_repelling_aims_at_the_target(wide_guard, shift):
    images, labels = clean()
    targets = (labels + shift) % 3
    attacked = RepelThenMinimise(**FINE)(wide_guard, images, labels, targets=targets)
    assert broken(wide_guard, attacked, labels, targets).all()


def test_the_phases_are_repelling_and_minimising(wide_guard):
    images, labels = clean()
    nothing = RepelThenMinimise(share=0.0, **options())(wide_guard, images, labels)
    assert torch.equal(nothing, PGD(objective="margin", **options())(wide_guard, images, labels))
    apart = RepelThenMinimise(share=1.0, keep="last", **options())(wide_guard, images, labels)
    assert (wide_guard.represent(apart).norm(dim=1) > wide_guard.represent(images).norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["match", "repel"])
def test_stopping_early_breaks_the_same_images(wide_guard, references, kind):
    images, labels = clean(40)
    verdicts = []
    for stop_early in (False, True):
        setting = options(eps=0.07, steps=20) | {"step_size": 0.01, "stop_early": stop_early}
        if kind == "match":
            attack = RepresentationMatching(references=references, **setting)
        else:
            attack = RepelThenMinimise(**setting)
        verdicts.append(broken(wide_guard, attack(wide_guard, images, labels), labels))
    assert torch.equal(verdicts[0], verdicts[1])
    assert 0 < verdicts[0].sum() < 40


@pytest.mark.parametrize("kind", ["match", "repel"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_detector_the_caller_and_the_batch_do_not_matter(wide_guard, references, kind, context):
    wide_guard.train()
    images, labels = clean(7)
    attacks = {
        "match": lambda **more: RepresentationMatching(references=references, **options(), **more),
        "repel": lambda **more: RepelThenMinimise(**options(), **more),
    }
    expected = attacks[kind]()(wide_guard, images, labels)
    with context():
        attacked = attacks[kind](batch_size=3)(wide_guard, images.clone(), labels.clone())
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-5)
    assert not attacked.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in wide_guard.parameters())
    assert all(module.training for module in wide_guard.encoder.modules())


def test_representations_are_found_through_wrappers_and_asked_for_by_name(wide_guard, references, linear_detector):
    images, labels = clean(4)
    for attack in (RepresentationMatching(references=references, **options()), RepelThenMinimise(**options())):
        wrapped = WithThresholds(WithThresholds(wide_guard, wide_guard.thresholds), wide_guard.thresholds)
        assert has_representation(wrapped)
        assert not has_representation(linear_detector)
        assert torch.equal(attack(wrapped, images, labels), attack(wide_guard, images, labels))
        with pytest.raises(ConfigurationError, match=r"expected a detector with represent\(images\).*LinearDetector"):
            attack(linear_detector, images[..., :4, :4], labels % 2)
    with pytest.raises(ConfigurationError, match="got WithThresholds"):
        find_representation(WithThresholds(linear_detector, torch.ones(2)))


def test_they_work_as_any_attack_does(wide_guard, references):
    images, labels = clean(6)
    seen = []
    matching = RepresentationMatching(
        references=references, on_step=lambda step, best: seen.append((step, best)), **options(steps=4)
    )
    matching(wide_guard, images, labels)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    every = MultiTarget(attack=matching)
    assert (every.norm, every.eps) == ("linf", 0.1)
    together = margins(wide_guard, every(wide_guard, images, labels), labels)
    for shift in (1, 2):
        single = matching(wide_guard, images, labels, targets=(labels + shift) % 3)
        assert ((together <= 0) | (margins(wide_guard, single, labels) > 0)).all()
    assert matching(wide_guard, images[:0], labels[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "wrong",
    [{"eps": -1}, {"steps": 0}, {"step_size": 0}, {"norm": "l3"}, {"sparsity": 0}, {"batch_size": 0}, {"share": 1.5}],
)
def test_options_are_checked_at_once(references, wrong):
    with pytest.raises(ConfigurationError, match="expected"):
        RepelThenMinimise(**(options() | wrong))
    if "share" not in wrong:
        with pytest.raises(ConfigurationError, match="expected"):
            RepresentationMatching(references=references, **(options() | wrong))


def test_they_print_and_compare(references):
    attack = RepelThenMinimise(norm="l2", eps=0.5, step_size=0.1)
    assert eval(repr(attack)) == attack
    assert "Towards(12 images of 3 classes)" in repr(RepresentationMatching(references=references, **options()))
