import pytest
import torch
from clusterguard.attacks import ObjectiveValues, Problem, get_norm
from clusterguard.attacks._auto_pgd import HalvingSteps, SparseSteps, halving_checkpoints
from clusterguard.attacks._objectives import OBJECTIVES

RULES = {"linf": HalvingSteps, "l2": HalvingSteps, "l1": SparseSteps, "l0": HalvingSteps}


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def problem(detector, images, labels, *, norm="linf", eps=0.1):
    return Problem(detector, images, labels, None, get_norm(norm), eps, OBJECTIVES["margin"])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, (22, 41, 57, 70, 80, 87, 93, 99)), (10, (3, 5, 6, 7, 8, 9)), (1, ()), (2, (1,))],
)
def test_checkpoints_are_where_the_paper_puts_them(steps, expected):
    assert halving_checkpoints(steps) == expected


def one_pixel(values, *, eps):
    """A problem of grey images of one pixel; the rules never look at its detector."""
    images = torch.tensor(values)[:, None, None, None]
    return problem(None, images, torch.zeros(len(images), dtype=torch.long), eps=eps)


def evaluation(losses, gradient=None):
    loss = torch.as_tensor(losses)
    gradient = torch.ones(len(loss), 1, 1, 1) if gradient is None else gradient
    return ObjectiveValues(loss, loss, gradient)


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
    expected = torch.tensor([0.5 ** sum(step >= point for point in halving_checkpoints(100)) for step in range(100)])
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
        stepped = rule.step(task, iterates, evaluation([-1.0 if step == 5 else 0.0, -float(step)], gradient))
    assert stepped[0].item() == pytest.approx(0.9 - 0.75 * 0.5)  # half of 2 eps, no momentum
    assert stepped[1].item() == pytest.approx(0.4 - 0.75 * 0.4)  # 2 eps, down to the box


def test_l1_steps_follow_the_sparsity_of_the_best_perturbation():
    image = torch.full((1, 1, 2, 5), 0.5)
    task = problem(None, image, torch.zeros(1, dtype=torch.long), norm="l1", eps=0.1)
    gradient = torch.arange(1.0, 11).view(1, 1, 2, 5)
    rule = SparseSteps(task, image, steps=10)
    moves, sizes = [], []
    best = image - torch.tensor([0.01] * 3 + [0] * 7).view(1, 1, 2, 5)  # three coordinates
    for step in range(30):
        iterates = best if step == 2 else image
        stepped = rule.step(task, iterates, evaluation([0.0 if step == 2 else 1.0], gradient))
        moves.append(stepped - image)
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
        stepped = whole.step(task, iterates, look)
        if step >= 9:
            alone = part.step(
                task.select(chosen), iterates[chosen], ObjectiveValues(*(value[chosen] for value in look))
            )
            assert torch.equal(alone, stepped[chosen])
        iterates = stepped


@pytest.mark.parametrize("norm", RULES)
def test_a_step_never_waits_for_the_device(norm):
    images = torch.empty(4, 1, 8, 8, device="meta")  # has no values, so whatever asks for one fails
    task = problem(None, images, torch.empty(4, dtype=torch.long, device="meta"), norm=norm, eps=2.0)
    rule = RULES[norm](task, images, steps=10)
    for _ in range(10):
        images = rule.step(task, images, evaluation(images.sum((1, 2, 3)), images))
    assert images.shape == (4, 1, 8, 8)
