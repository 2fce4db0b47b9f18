import pytest
import torch
from clusterguard import Boundary, Towards, decide
from clusterguard.attacks.norms import get_norm
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.metrics import is_broken


class Judge:
    """Gives verdicts and has nothing else."""

    def __init__(self, guard):
        self._guard, self.asked = guard, 0

    def detect(self, images):
        self.asked += len(images)
        return self._guard.detect(images)


@pytest.fixture
def cases(small_guard):
    small_guard.thresholds = torch.full((3,), 30.0)  # every class has accepted images to start from
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    references = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    accepted = Towards.accepted(small_guard, references, small_guard(references).argmax(1))
    return images, small_guard(images).argmax(1), accepted


def broken(guard, attacked, labels):
    return is_broken(decide(guard.evidence(attacked), guard.thresholds), labels)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_verdicts_alone_are_enough_and_are_counted(small_guard, cases, norm):
    images, labels, references = cases
    eps = {"l2": 1.0, "linf": 0.4}[norm]
    judge = Judge(small_guard)
    attack = Boundary(norm=norm, eps=eps, queries=300, references=references)
    attacked = attack(judge, images, labels, generator=torch.Generator().manual_seed(0))
    assert judge.asked <= 300 * len(images)
    hits = broken(small_guard, attacked, labels)
    assert hits.double().mean() > 0.5
    assert (get_norm(norm).size(attacked - images) <= eps).all()
    unchanged = (attacked == images).flatten(1).all(dim=1)
    assert (hits | unchanged).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_the_distance_found_is_close_to_the_closed_form_optimum(linear_detector):
    images = 0.5 + 0.02 * torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    weight = linear_detector.weight.detach()
    activation = images.flatten(1) @ weight.flatten() - linear_detector.bias
    labels = (activation > 0).long()
    optimum = activation.abs() / weight.norm()
    far = torch.stack([0.5 + 0.4 * sign * weight[0] / weight.abs().max() for sign in (-1, 1)])[:, None]
    attack = Boundary(norm="l2", eps=10.0, queries=3000, references=Towards(far, torch.tensor([0, 1])))
    attacked = attack(linear_detector, images, labels, generator=torch.Generator().manual_seed(0))
    assert broken(linear_detector, attacked, labels).all()
    assert ((attacked - images).flatten(1).norm(dim=1) <= 1.25 * optimum + 1e-6).all()


def test_an_image_without_a_start_does_not_fail_the_others(small_guard, cases):
    images, labels, references = cases
    only = references.labels == references.labels.mode().values
    same = Towards(references.images[only], references.labels[only])
    attacked = Boundary(eps=2.0, queries=200, references=same)(small_guard, images, labels)
    stuck = labels == references.labels.mode().values
    assert torch.equal(attacked[stuck], images[stuck])
    assert broken(small_guard, attacked, labels)[~stuck].any()


def test_without_references_the_images_serve_each_other(small_guard, cases):
    images, labels, _ = cases
    assert broken(small_guard, Boundary(eps=2.0, queries=200)(small_guard, images, labels), labels).any()


def test_targets_are_aimed_at(small_guard, cases):
    images, labels, references = cases
    for target in references.labels.unique():
        rows = labels != target
        targets = target.expand(int(rows.sum()))
        attack = Boundary(eps=3.0, queries=200, references=references)
        attacked = attack(small_guard, images[rows], labels[rows], targets=targets)
        moved = (attacked != images[rows]).flatten(1).any(dim=1)
        assert moved.any()
        assert (small_guard.detect(attacked).labels[moved] == target).all()


def test_equal_generators_give_equal_results(small_guard, cases):
    images, labels, references = cases
    attack = Boundary(eps=2.0, queries=100, references=references)
    runs = [attack(small_guard, images, labels, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_bad_input_is_named_for_a_judge_too(small_guard, cases):
    images, labels, _ = cases
    with pytest.raises(InputError, match="finite"):
        Boundary(eps=1.0)(Judge(small_guard), images * torch.nan, labels)
    with pytest.raises(InputError, match="labels"):
        Boundary(eps=1.0)(Judge(small_guard), images, labels - 5)


@pytest.mark.parametrize("options", [{"norm": "l1"}, {"eps": -1}, {"queries": 0}, {"starts": 0}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        Boundary(**({"eps": 0.1} | options))
