from dataclasses import replace

import pytest
import torch
from clusterguard import (
    PGD,
    AdversarialClusterTrainer,
    Calibrator,
    ClusterGuard,
    Evidence,
    Towards,
    decide,
    success_margin,
)
from clusterguard.attacks.auto_pgd import APGD, HalvingSteps, SparseSteps, checkpoints
from clusterguard.attacks.loop import Evaluation, Problem
from clusterguard.attacks.norms import L1, get_norm
from clusterguard.attacks.objectives import OBJECTIVES
from clusterguard.errors import ConfigurationError
from clusterguard.metrics import is_broken, is_eligible
from clusterguard.samples import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 12}
DIGIT_NORMS = {"linf": 0.1, "l2": 1.2, "l1": 8.0, "l0": 8}
RULES = {"linf": HalvingSteps, "l2": HalvingSteps, "l1": SparseSteps, "l0": HalvingSteps}


def margins(detector, images, labels, targets=None):
    with torch.no_grad():
        return success_margin(detector.evidence(images), detector.thresholds, labels, targets)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def problem(detector, images, labels, *, norm="linf", eps=0.1):
    return Problem(detector, images, labels, None, get_norm(norm), eps, OBJECTIVES["margin"])


@pytest.fixture(scope="session")
def digit_guard():
    torch.manual_seed(0)
    data = TensorDataset(*(part[:1000] for part in load_digits("train").tensors))
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
    guard = ClusterGuard(backbone, num_classes=10, example=data[0][0][None])
    trainer = AdversarialClusterTrainer(
        guard,
        PGD(eps=0.1, step_size=0.05, steps=3, keep="last"),
        optimizer=torch.optim.Adam(guard.parameters(), lr=3e-3),
        warmup_epochs=2,
    )
    calibration = DataLoader(load_digits("calibration"), batch_size=500)
    loader = DataLoader(data, batch_size=100, shuffle=True)
    trainer.fit(loader, calibration, epochs=6, calibrate=False, progress=False)
    Calibrator(false_positive_rate=0.05).fit(guard, calibration, progress=False)
    return guard.eval()


@pytest.fixture(scope="session")
def eligible_digits(digit_guard):
    images, labels = (part[:110] for part in load_digits("test").tensors)
    eligible = is_eligible(digit_guard.detect(images), labels)
    return images[eligible], labels[eligible]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, (22, 41, 57, 70, 80, 87, 93, 99)), (10, (3, 5, 6, 7, 8, 9)), (1, ()), (2, (1,))],
)
def test_checkpoints_are_where_the_paper_puts_them(steps, expected):
    assert checkpoints(steps) == expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["image", "random", "output_diversified"])
@pytest.mark.parametrize("scale", [0, 1, 1000])
def test_the_result_is_inside_ball_and_box(small_guard, norm, start, scale):
    images, eps = rand(6, 1, 8, 8), NORMS[norm] * scale
    attacked = APGD(norm=norm, eps=eps, steps=12, start=start, keep="last")(small_guard, images, torch.arange(6) % 3)
    assert (get_norm(norm).size(attacked - images) <= eps).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad


@pytest.mark.parametrize("norm", DIGIT_NORMS)
@pytest.mark.parametrize("steps", [20, 40])
def test_it_is_at_least_as_strong_as_pgd(digit_guard, eligible_digits, norm, steps):
    images, labels = eligible_digits
    options = {"norm": norm, "eps": DIGIT_NORMS[norm], "steps": steps}
    step_size = options["eps"] / (1 if norm == "l0" else 10)
    ours, theirs = (
        margins(digit_guard, attack(digit_guard, images, labels), labels)
        for attack in (APGD(**options), PGD(step_size=step_size, objective="margin", **options))
    )
    assert 5 < (ours <= 0).sum() < len(images) - 5  # else the comparison says nothing
    assert (ours <= 0).sum() >= (theirs <= 0).sum() - 1
    assert ours.mean() <= theirs.mean()


@pytest.mark.parametrize("norm", DIGIT_NORMS)
def test_the_result_is_never_worse_than_the_start(digit_guard, eligible_digits, norm):
    images, labels = eligible_digits
    references = Towards.accepted(digit_guard, *(part[:300] for part in load_digits("calibration").tensors))
    eps = 3 * DIGIT_NORMS[norm]
    found = APGD(norm=norm, eps=eps, steps=10, start=references, objective="logit")(digit_guard, images, labels)
    start = references(problem(digit_guard, images, labels, norm=norm, eps=eps))
    assert (margins(digit_guard, found, labels) <= margins(digit_guard, start, labels) + 1e-5).all()


def one_pixel(values, *, eps):
    """A problem of grey images of one pixel; the rules never look at its detector."""
    images = torch.tensor(values)[:, None, None, None]
    return problem(None, images, torch.zeros(len(images), dtype=torch.long), eps=eps)


def evaluation(losses, gradient=None):
    loss = torch.as_tensor(losses)
    gradient = torch.ones(len(loss), 1, 1, 1) if gradient is None else gradient
    return Evaluation(loss, loss, gradient)


def step_sizes_after(losses, *, eps=0.1):
    """(N, B) step sizes over 2 eps at each of the steps, for losses (N, B)."""
    task = one_pixel([0.5] * losses.shape[1], eps=eps)
    rule, seen = HalvingSteps(task, task.images, steps=len(losses)), []
    for row in losses:
        rule.step(task, task.images, evaluation(row))
        seen.append(rule.step_size.flatten() / (2 * eps))
    return torch.stack(seen)


def test_steps_halve_at_every_checkpoint_of_a_plateau_and_never_while_the_loss_falls():
    falling = torch.arange(100.0, 0, -1)
    sizes = step_sizes_after(torch.stack([torch.ones(100), falling, -falling], dim=1))
    expected = torch.tensor([0.5 ** sum(step >= point for point in checkpoints(100)) for step in range(100)])
    torch.testing.assert_close(sizes, torch.stack([expected, torch.ones(100), expected], dim=1))


@pytest.mark.parametrize(("failures", "halved"), [(4, False), (5, True)])
def test_steps_halve_where_fewer_than_three_in_four_lower_the_loss(failures, halved):
    changes = torch.full((99,), -1.0)
    changes[41 : 41 + failures] = 0.5  # of the 16 steps between the checkpoints at 41 and 57
    losses = torch.cat([torch.zeros(1), changes.cumsum(0)])[:, None]
    sizes = step_sizes_after(losses)
    assert sizes[56].item() == 1
    assert sizes[57].item() == (0.5 if halved else 1)


def test_steps_halve_where_neither_they_nor_the_best_loss_have_changed():
    # From a start that nothing beats, each step lowers the loss; after a halving the next checkpoint lets it be.
    losses = torch.cat([torch.zeros(1), torch.arange(200.0, 101, -1)])[:, None]
    sizes = step_sizes_after(losses).squeeze(1)
    assert [sizes[point].item() for point in (21, 22, 41, 57, 70, 80)] == [1, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(("falls", "halved"), [(14, True), (15, False)])
def test_after_going_back_a_step_is_measured_against_the_best(falls, halved):
    window = torch.full((18,), 1.0)
    window[:falls] = -1.0  # of the 19 steps from 22 to 41, of which 14.25 must lower the loss
    after = torch.cat([torch.tensor([150.0]), 150 + window.cumsum(0), torch.zeros(58)])  # lower than at 22, above 0
    losses = torch.cat([torch.zeros(1), torch.arange(200.0, 178, -1), after])[:, None]
    sizes = step_sizes_after(losses)
    assert sizes[22].item() == sizes[40].item() == 0.5
    assert sizes[41].item() == (0.25 if halved else 0.5)


def test_one_step_and_momentum_by_hand():
    task = one_pixel([0.5], eps=0.4)
    rule = HalvingSteps(task, task.images, steps=100)
    first = rule.step(task, task.images, evaluation([2.0]))
    assert first.item() == pytest.approx(0.1)  # 0.5 - 0.8, projected
    second = rule.step(task, first, evaluation([1.0], -torch.ones(1, 1, 1, 1)))
    assert second.item() == pytest.approx(0.1 + 0.75 * (0.9 - 0.1) + 0.25 * (0.1 - 0.5))


def test_a_halved_image_goes_on_from_its_best_iterate_with_its_gradient():
    task = one_pixel([0.5, 0.5], eps=0.5)
    rule = HalvingSteps(task, task.images, steps=100)
    for step in range(23):
        # The first image is best at step 5, at 0.9, where alone its gradient is positive; the second always improves.
        iterates = torch.tensor([0.9 if step == 5 else 0.2, 0.4]).view(2, 1, 1, 1)
        gradient = torch.tensor([1.0 if step == 5 else -1.0, 1.0]).view(2, 1, 1, 1)
        found = rule.step(task, iterates, evaluation([-1.0 if step == 5 else 0.0, -float(step)], gradient))
    assert found[0].item() == pytest.approx(0.9 - 0.75 * 0.5)  # half of 2 eps, no momentum
    assert found[1].item() == pytest.approx(0.4 - 0.75 * 0.4)  # 2 eps, down to the box


def test_l1_steps_follow_the_sparsity_of_the_best_perturbation():
    image = torch.full((1, 1, 2, 5), 0.5)
    task = problem(None, image, torch.zeros(1, dtype=torch.long), norm="l1", eps=0.1)
    gradient = torch.arange(1.0, 11).view(1, 1, 2, 5)
    rule = SparseSteps(task, image, steps=10)
    moves, sizes = [], []
    best = image - torch.tensor([0.01] * 3 + [0] * 7).view(1, 1, 2, 5)  # three coordinates
    for step in range(30):
        iterates = best if step == 2 else image
        found = rule.step(task, iterates, evaluation([0.0 if step == 2 else 1.0], gradient))
        moves.append(found - image)
        sizes.append(rule.step_size.item())
    assert (moves[0] != 0).sum() == 2  # a fifth of the coordinates to begin with
    torch.testing.assert_close(moves[0].flatten()[-2:], torch.full((2,), -0.05))
    # At step 4 it restarts from the best with 3 / 1.5 coordinates and the whole radius, and is projected.
    expected = task.project(best - 0.05 * (torch.arange(10) >= 8).view(1, 1, 2, 5))
    torch.testing.assert_close(moves[4], expected - image)
    # From then on the sparsity stays, so steps shrink down to a tenth.
    assert sizes[4::4] == pytest.approx([0.1 / 1.5**look for look in range(6)] + [0.01])


@pytest.mark.parametrize("norm", RULES)
def test_rules_go_on_as_before_for_the_images_that_stay(norm):
    images, labels, chosen = rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.long), torch.tensor([3, 1])
    generator = torch.Generator().manual_seed(1)
    task = problem(None, images, labels, norm=norm, eps=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    whole, part = (RULES[norm](task, images, steps=20) for _ in range(2))
    iterates = images
    for step in range(20):
        look = evaluation(torch.randn(5, generator=generator), torch.randn(5, 1, 4, 4, generator=generator))
        if step < 9:
            part.step(task, iterates, look)
        if step == 9:
            part.select(chosen)
        found = whole.step(task, iterates, look)
        if step >= 9:
            alone = part.step(task.select(chosen), iterates[chosen], Evaluation(*(value[chosen] for value in look)))
            assert torch.equal(alone, found[chosen])
        iterates = found


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_batch(small_guard, norm):
    images, labels = rand(7, 1, 8, 8), torch.arange(7) % 3
    attack = APGD(norm=norm, eps=NORMS[norm], steps=25)
    together = attack(small_guard, images, labels)
    apart = torch.cat([attack(small_guard, images[i : i + 1], labels[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, replace(attack, batch_size=3)(small_guard, images, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_breaks_the_same_images(small_guard, norm):
    images = rand(60, 1, 8, 8)
    labels = small_guard(images).argmax(1)
    attack = APGD(norm=norm, eps=0.7 * NORMS[norm], steps=40)
    verdicts = [
        is_broken(decide(small_guard.evidence(found), small_guard.thresholds), labels)
        for found in (run(small_guard, images, labels) for run in (attack, replace(attack, stop_early=True)))
    ]
    assert torch.equal(*verdicts)
    assert 0 < verdicts[0].sum() < 60


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_aims_at_the_target(small_guard, norm):
    images, labels = rand(30, 1, 8, 8), torch.zeros(30, dtype=torch.long)
    attack = APGD(norm=norm, eps=NORMS[norm], steps=20)
    found = [attack(small_guard, images, labels, targets=torch.full_like(labels, target)) for target in (1, 2)]
    for own, other, target in ((found[0], found[1], 1), (found[1], found[0], 2)):
        before, after, elsewhere = (
            margins(small_guard, x, labels, torch.full_like(labels, target)) for x in (images, own, other)
        )
        assert (after < before).double().mean() > 0.9
        assert (after < elsewhere).double().mean() > 0.9


def test_l1_reports_the_steps_in_the_ball_itself(small_guard):
    seen = []
    attack = APGD(norm="l1", eps=3.0, steps=20, on_step=lambda step, margins: seen.append((step, margins)))
    labels = torch.arange(5) % 3
    attacked = attack(small_guard, rand(5, 1, 8, 8), labels)
    assert [step for step, _ in seen] == list(range(12, 21))
    torch.testing.assert_close(seen[-1][1], margins(small_guard, attacked, labels))


def test_l1_goes_from_larger_balls_to_its_own_and_no_image_leaves_before_that(small_guard, monkeypatch):
    radii, sizes = [], []
    project, evidence = L1.project, type(small_guard).evidence

    def record_radius(self, images, candidates, eps):
        radii.append(eps)
        return project(self, images, candidates, eps)

    def record_size(self, images):
        if images.requires_grad:
            sizes.append(len(images))
        return evidence(self, images)

    monkeypatch.setattr(L1, "project", record_radius)
    monkeypatch.setattr(type(small_guard), "evidence", record_size)
    images = rand(20, 1, 8, 8)
    attack = APGD(norm="l1", eps=3.0, steps=40, stop_early=True)
    attack(small_guard, images, small_guard(images).argmax(1))
    assert [radius for radius, before in zip(radii, [None, *radii], strict=False) if radius != before] == [9, 6, 3]
    assert sizes[:24] == [20] * 24
    assert min(sizes[24:]) < 20


def test_larger_balls_do_not_lose_a_success_at_the_start():
    """Broken in a small disc around `inside`; elsewhere the loss falls along the second pixel, to success at 0.3."""
    inside = torch.tensor([0.6, 0.5]).view(1, 1, 1, 2)

    class Lured:
        thresholds = torch.zeros(2)

        def evidence(self, images):
            first, second = (images - 0.5).flatten(1).unbind(1)
            in_disc = (images - inside).flatten(1).norm(dim=1) < 0.02
            suspicion = torch.where(in_disc, -0.01, 1.0) - 4 * second
            return Evidence(torch.stack([0 * first, 0 * first + 1], 1), torch.stack([0 * first, suspicion], 1))

    image, label = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    attack = APGD(norm="l1", eps=0.1, steps=20, start=lambda problem: problem.project(inside))
    assert margins(Lured(), attack(Lured(), image, label), label) <= 0
    assert margins(Lured(), replace(attack, start="image")(Lured(), image, label), label) > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_it_costs_the_gradients_that_it_says(small_guard, monkeypatch, norm, steps):
    gradients, evidence = [], type(small_guard).evidence

    def count(self, images):
        gradients.append(images.requires_grad)
        return evidence(self, images)

    monkeypatch.setattr(type(small_guard), "evidence", count)
    APGD(norm=norm, eps=NORMS[norm], steps=steps)(small_guard, rand(2, 1, 8, 8), torch.arange(2))
    assert sum(gradients) == steps
    assert len(gradients) <= steps + 5


def test_doubles_stay_doubles(small_guard):
    for norm, eps in NORMS.items():
        attack = APGD(norm=norm, eps=eps, steps=10)
        assert attack(small_guard.double(), rand(2, 1, 8, 8).double(), torch.tensor([0, 1])).dtype == torch.float64


def test_an_image_whose_evidence_is_not_finite_does_not_fail_the_batch(small_guard, monkeypatch):
    evidence = type(small_guard).evidence

    def break_one(self, images):
        found = evidence(self, images)
        broken = images.flatten(1).sum(1, keepdim=True) < 1  # only the black image
        return type(found)(*(torch.where(broken, torch.nan, part) for part in found))

    images, labels = rand(3, 1, 8, 8), torch.arange(3)
    expected = APGD(eps=0.01, steps=10)(small_guard, images, labels)
    images[1] = 0
    monkeypatch.setattr(type(small_guard), "evidence", break_one)
    attacked = APGD(eps=0.01, steps=10)(small_guard, images, labels)
    torch.testing.assert_close(attacked[::2], expected[::2])
    assert attacked.isfinite().all()


@pytest.mark.parametrize("norm", RULES)
def test_a_step_never_waits_for_the_device(norm):
    images = torch.empty(4, 1, 8, 8, device="meta")  # has no values, so whatever asks for one fails
    task = problem(None, images, torch.empty(4, dtype=torch.long, device="meta"), norm=norm, eps=2.0)
    rule = RULES[norm](task, images, steps=10)
    for _ in range(10):
        images = rule.step(task, images, evaluation(images.sum((1, 2, 3)), images))
    assert images.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("options", [{"eps": -1}, {"steps": 0}, {"norm": "l3"}, {"objective": "x"}, {"start": "x"}])
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        APGD(**({"eps": 0.1} | options))


def test_it_prints_and_compares():
    attack = APGD(norm="l1", eps=0.5, steps=3, start="random", large_radii=False)
    assert eval(repr(attack)) == attack
    assert attack != APGD(norm="l1", eps=0.5, steps=3, start="random")
