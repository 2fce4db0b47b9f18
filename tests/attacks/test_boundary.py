import pytest
import torch
from clusterguard import Detection, decide
from clusterguard.attacks import Boundary, Towards, get_norm
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from torch import nn

NORMS = ["l2", "linf"]


class Judge:
    """Gives labels and refusals, has nothing else, and counts the images it was asked about."""

    def __init__(self, detector):
        self._detector, self.asked = detector, 0

    def detect(self, images):
        self.asked += len(images)
        verdict = decide(self._detector.evidence(images), self._detector.thresholds)
        return verdict._replace(distances=torch.full_like(verdict.distances, torch.nan))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def broken(detector, attacked, labels, targets=None):
    verdict = decide(detector.evidence(attacked), detector.thresholds)
    return is_broken(Verdicts(verdict, labels)) & (
        verdict.labels != labels if targets is None else verdict.labels == targets
    )


@pytest.fixture
def linear_cases(linear_detector):
    """Mid-box images of both classes, how far each is from the other class in l2 and linf, and references."""
    images = 0.5 + 0.02 * torch.randn(16, 1, 4, 4, generator=seeded(3))
    weight = linear_detector.weight.detach().flatten()
    activation = images.flatten(1) @ weight - linear_detector.bias
    needed = {"l2": activation.abs() / weight.norm(), "linf": activation.abs() / weight.abs().sum()}
    references = torch.rand(40, 1, 4, 4, generator=seeded(4))
    labels = (references.flatten(1) @ weight > linear_detector.bias).long()
    return images, (activation > 0).long(), needed, Towards(references, labels)


@pytest.fixture
def cases(small_guard):
    images = torch.rand(24, 1, 8, 8, generator=seeded())
    return images, small_guard(images).argmax(1)  # the guard finds classes 0 and 1 only


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_the_closest_image_found_is_near_the_closed_form_optimum(linear_detector, linear_cases, norm, targeted):
    images, labels, needed, references = linear_cases
    attack = Boundary(norm=norm, eps=torch.inf, queries=1500, references=references)
    targets = 1 - labels if targeted else None
    attacked = attack(linear_detector, images, labels, targets=targets, generator=seeded())
    distance = get_norm(norm).size(attacked - images)
    assert broken(linear_detector, attacked, labels, targets).all()
    assert (distance >= needed[norm] * (1 - 1e-3)).all()
    assert (distance <= needed[norm] * 1.25).all()


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_found_within_eps_comes_back_clean(linear_detector, linear_cases, norm):
    images, labels, needed, references = linear_cases
    eps = needed[norm].median().item()
    attack = Boundary(norm=norm, eps=eps, queries=1000, references=references)
    attacked = attack(linear_detector, images, labels, generator=seeded())
    hits = broken(linear_detector, attacked, labels)
    assert hits[needed[norm] < 0.8 * eps].all()
    assert not hits[needed[norm] > eps].any()
    assert torch.equal(attacked[~hits], images[~hits])
    assert (get_norm(norm).size(attacked - images) <= eps).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_verdicts_are_all_it_asks_for(small_guard, cases, norm, targeted):
    images, labels = cases
    targets = 1 - labels if targeted else None
    judge = Judge(small_guard)
    attack = Boundary(norm=norm, eps=torch.inf, queries=120)
    attacked = attack(judge, images, labels, targets=targets, generator=seeded())
    assert broken(small_guard, attacked, labels, targets).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert judge.asked == len(images) * 120
    assert torch.equal(attacked, attack(small_guard, images, labels, targets=targets, generator=seeded()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", [1, 2])
def test_targets_are_aimed_at(norm, target):
    class Halves:
        """Class 1 is a bright upper half, class 2, farther away, a bright lower half."""

        def detect(self, images):
            upper, lower = images[:, :, :4].flatten(1).mean(1), images[:, :, 4:].flatten(1).mean(1)
            scores = torch.stack([torch.full_like(upper, 0.05), 2 * (upper - 0.5), lower - 0.5], dim=1)
            return Detection(scores.argmax(1), scores.amax(1), torch.zeros_like(upper, dtype=torch.bool))

    images, labels = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    bright = torch.full((3, 1, 8, 8), 0.6)
    bright[1, :, :4], bright[2, :, 4:] = 0.9, 0.9
    attack = Boundary(norm=norm, eps=torch.inf, queries=200, references=Towards(bright, torch.tensor([1, 1, 2])))
    targets = torch.full_like(labels, target)
    attacked = attack(Halves(), images, labels, targets=targets, generator=seeded())
    assert torch.equal(Halves().detect(attacked).labels, targets)


def test_a_detector_without_detect_is_asked_for_evidence(linear_detector, linear_cases):
    images, labels, _, references = linear_cases
    attack = Boundary(eps=torch.inf, queries=80, references=references)
    expected = attack(Judge(linear_detector), images, labels, generator=seeded())
    assert not hasattr(linear_detector, "detect")
    assert torch.equal(attack(linear_detector, images, labels, generator=seeded()), expected)


@pytest.mark.parametrize("queries", [1, 2, 3, 7, 30, 101])
def test_no_image_costs_more_queries_than_allowed(linear_detector, linear_cases, queries):
    images, labels, _, references = linear_cases
    for row in range(4):
        judge = Judge(linear_detector)
        attack = Boundary(eps=torch.inf, queries=queries, references=references)
        attack(judge, images[row : row + 1], labels[row : row + 1], generator=seeded())
        assert judge.asked == queries


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_breaks_the_same_images_with_fewer_queries(linear_detector, linear_cases, norm):
    images, labels, needed, references = linear_cases
    eps = needed[norm].median().item()
    verdicts, asked = [], []
    for stop_early in (False, True):
        judge = Judge(linear_detector)
        attack = Boundary(norm=norm, eps=eps, queries=600, references=references, stop_early=stop_early)
        verdicts.append(broken(linear_detector, attack(judge, images, labels, generator=seeded()), labels))
        asked.append(judge.asked)
    assert torch.equal(verdicts[0], verdicts[1])
    assert 0 < verdicts[0].sum() < len(images)
    assert asked[1] < 0.9 * asked[0]


def test_an_image_without_a_start_does_not_fail_the_others(small_guard, cases):
    images, labels = cases
    targets = 1 - labels
    targets[:5] = 2  # nothing in the batch is accepted as class 2
    attacked = Boundary(eps=torch.inf, queries=40)(small_guard, images, labels, targets=targets)
    assert torch.equal(attacked[:5], images[:5])
    assert broken(small_guard, attacked, labels, targets)[5:].all()


@pytest.mark.parametrize("given", [False, True])
def test_without_any_start_images_come_back_unchanged(small_guard, cases, given):
    images, labels = (part[:1] for part in cases)
    judge = Judge(small_guard)
    attack = Boundary(eps=torch.inf, references=Towards(images[:0], labels[:0]) if given else None)
    assert torch.equal(attack(judge, images, labels), images)
    assert judge.asked == 1


def test_references_that_are_not_accepted_are_passed_over(linear_detector, linear_cases):
    images, labels, _, references = linear_cases
    lies = Towards(torch.cat([images, references.images]), torch.cat([1 - labels, references.labels]))
    attacked = Boundary(eps=torch.inf, queries=200, references=lies)(linear_detector, images, labels)
    assert broken(linear_detector, attacked, labels).all()


def test_what_is_refused_is_neither_start_nor_success(linear_detector, linear_cases):
    images, labels, _, references = linear_cases
    linear_detector.thresholds = torch.full((2,), -torch.inf)
    attacked = Boundary(eps=torch.inf, queries=100, references=references)(linear_detector, images, labels)
    assert torch.equal(attacked, images)


def test_images_that_are_wrong_already_stay_as_they_are(small_guard, cases):
    images, labels = cases
    accepted = ~small_guard.detect(images).is_adversarial
    attacked = Boundary(eps=torch.inf, queries=50)(small_guard, images, 1 - labels)
    assert torch.equal(attacked[accepted], images[accepted])
    assert 0 < accepted.sum() < len(images)


def test_equal_generators_give_equal_results(small_guard, cases):
    attack = Boundary(eps=torch.inf, queries=100)
    runs = [attack(small_guard, *cases, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 1), (2, 1, 7)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_shape_and_doubles(norm, shape):
    class Bright:
        def detect(self, images):
            mean = images.flatten(1).mean(1)
            return Detection((mean > 0.5).long(), mean, torch.zeros_like(mean, dtype=torch.bool))

    images = torch.rand(6, *shape, generator=seeded(), dtype=torch.float64)
    images, labels = torch.cat([0.4 * images, 1 - 0.4 * images]), (torch.arange(12) >= 6).long()
    attacked = Boundary(norm=norm, eps=torch.inf, queries=60)(Bright(), images, labels)
    assert attacked.dtype == torch.float64
    assert torch.equal(Bright().detect(attacked).labels, 1 - labels)


def test_a_judge_that_is_a_module_is_asked_in_eval_mode(small_guard, cases):
    class Module(nn.Dropout):
        def detect(self, images):
            assert not self.training
            return small_guard.detect(images)

    module = Module()
    Boundary(eps=1.0, queries=20)(module, *cases)
    assert module.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(24, 1, 8, 8) + 1}, r"\[0, 1\]"),
        ({"images": torch.full((24, 1, 8, 8), torch.nan)}, "finite images"),
        ({"labels": -torch.ones(24, dtype=torch.long)}, "labels from 0"),
        ({"labels": torch.ones(3, dtype=torch.long)}, r"shape \(24,\)"),
    ],
)
def test_bad_input_is_named_before_a_judge_is_asked(small_guard, cases, change, message):
    judge = Judge(small_guard)
    with pytest.raises(InputError, match=message):
        Boundary(eps=1.0)(judge, **({"images": cases[0], "labels": cases[1]} | change))
    assert judge.asked == 0


def test_an_uncalibrated_detector_is_named(small_guard, cases):
    small_guard.reset_calibration()
    with pytest.raises(NotCalibratedError, match="Calibrator"):
        Boundary(eps=1.0)(small_guard, *cases)


@pytest.mark.parametrize("options", [{"eps": -1}, {"queries": 0}, {"starts": 0}, {"norm": "l1"}, {"batch_size": 0}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        Boundary(**({"eps": 0.1} | options))


@pytest.mark.parametrize(
    ("targets", "message"), [([0, 1], "targets that differ"), ([1], r"shape \(2,\)"), ([1, -1], "from 0")]
)
def test_wrong_targets_are_named_for_an_object_with_verdicts_only(small_guard, targets, message):
    class VerdictsOnly:
        detect = small_guard.detect

    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 0])
    with pytest.raises(InputError, match=message):
        Boundary(eps=1.0)(VerdictsOnly(), images, labels, targets=torch.tensor(targets))
