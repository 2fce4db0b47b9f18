"""Training makes guards of which much can be proved; what is certified no attack breaks."""

import copy
import math

import clusterguard
import pytest
import torch
from certifiable import guard_of
from clusterguard import (
    APGD,
    Calibrator,
    CertifiedTrainer,
    ClusterGuard,
    certified_success_rate,
    certify,
    decide,
    success_margin,
)
from clusterguard.certification import Interval, bound
from clusterguard.certification._internal import Box
from clusterguard.errors import ConfigurationError
from clusterguard.samples import load_digits
from clusterguard.training import initialise
from clusterguard.training._bound_terms import balance_loss, batch_statistics, stability_loss, tightness_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHAPE = 2, 6, 6
CALIBRATION = DataLoader(load_digits("calibration"), batch_size=500)
TEST = load_digits("test")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(), nn.Flatten())
    guard = ClusterGuard(body, 10, example=torch.rand(1, 1, 28, 28))
    digits = TensorDataset(*(part[:3000] for part in load_digits("train").tensors))
    loader = DataLoader(digits, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(guard.parameters(), 4e-3)
    trainer = CertifiedTrainer(guard, eps=0.1, optimizer=optimizer, ramp_epochs=3, calibrator=Calibrator(scarce="pool"))
    trainer.fit(loader, CALIBRATION, epochs=7, progress=False)
    return guard.eval()


def test_a_certified_guard_keeps_what_it_promises(trained):
    images, labels = (part[:300] for part in TEST.tensors)
    verdict = trained.detect(images)
    good = (verdict.labels == labels) & ~verdict.is_adversarial
    proved = certify(trained, images, labels, eps=0.1)
    assert good.float().mean() > 0.85
    assert (proved.is_secure & good).sum() > 0.6 * good.sum()
    attack = APGD(norm="linf", eps=0.1, steps=20, start="random")
    attacked = attack(trained, images, labels, generator=torch.Generator().manual_seed(0))
    evidence = trained.evidence(attacked)
    assert not (success_margin(evidence, trained.thresholds, labels)[proved.is_secure] <= 0).any()
    after = decide(evidence, trained.thresholds)
    assert not (after.is_adversarial | (after.labels != labels))[proved.is_kept].any()


def test_the_certified_rate_is_above_what_an_attack_finds_and_grows_with_the_radius(trained):
    batches = [tuple(part[:200] for part in TEST.tensors), tuple(part[200:300] for part in TEST.tensors)]
    rates = [certified_success_rate(trained, batches, eps=eps) for eps in (0.0, 0.05, 0.1, 0.3)]
    assert rates[0].count == 0
    assert [rate.count for rate in rates] == sorted(rate.count for rate in rates)
    assert len({rate.total for rate in rates}) == 1
    report = clusterguard.evaluate(trained, APGD(norm="linf", eps=0.1, steps=10), batches, sanity_images=0)
    assert report.results[0].success.count <= rates[2].count
    assert report.results[0].success.total == rates[2].total


def test_initial_weights_keep_the_width_of_intervals_and_leave_other_layers_alone():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 50, 3),
        nn.BatchNorm2d(50),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 400),
        nn.ReLU(),
        nn.Linear(400, 9),
    ]
    model = nn.Sequential(*layers).eval()
    statistics = copy.deepcopy(model[1].state_dict())
    initialise(model)
    assert all(torch.equal(statistics[name], value) for name, value in model[1].state_dict().items())
    assert not any(layer.bias.any() for layer in (model[0], model[4], model[6]))
    box = Interval(*(torch.full((4, *SHAPE), end) for end in (0.4, 0.6)))
    widths = [(bounds.upper - bounds.lower).mean().item() for bounds in (model[:3](box), model[:6](box))]
    assert all(0.1 < width < 0.4 for width in widths)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [initialise(model, generator=generator) or model[4].weight.clone() for generator in generators]
    assert torch.equal(*drawn)


def test_without_bounds_the_loss_is_that_of_benign_images_and_with_them_that_of_the_worst(monkeypatch):
    guard = guard_of(dtype=torch.float32).train()
    images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    options = {"eps": 0.2, "center_weight": 0.5, "temperature": 2.0, "ramp_epochs": 2, "bound_weight": 0.4}
    trainer = CertifiedTrainer(guard, warmup_epochs=1, **options)
    distances = guard.distances(images).square()
    spread = distances.gather(1, labels[:, None]).mean() / 2
    benign = nn.functional.cross_entropy(-distances / 4, labels) + 0.5 * spread
    monkeypatch.setattr(type(trainer), "epochs_done", 0.5)
    torch.testing.assert_close(trainer.training_step(images, labels, None).loss, benign)
    monkeypatch.setattr(type(trainer), "epochs_done", 2.0)  # half the radius, half the weight
    worst = bound(guard, images, labels, eps=0.1).leads
    expected = 0.8 * benign + 0.2 * nn.functional.cross_entropy(-worst / 4, labels)
    step = trainer.training_step(images, labels, None)
    torch.testing.assert_close(step.loss, expected)
    assert step.successes == ((worst < 0).sum(dim=1) > 0).sum()
    assert all(module.training for module in guard.modules())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_small_balls_lie_where_an_attack_goes_and_within_the_whole_ball(monkeypatch, share):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    guard = ClusterGuard(body, 3, example=torch.rand(4, 1, 2, 2)).train()
    images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    trainer = CertifiedTrainer(guard, eps=0.2, bound_radius=0.05, warmup_epochs=0)
    monkeypatch.setattr(type(trainer), "_grown", share)
    bounded = []

    def watch(seen, centers, given, *, eps):
        bounded.append((centers, eps))
        return bound(seen, centers, given, eps=eps)

    monkeypatch.setattr("clusterguard.training._certified.bound", watch)
    step = trainer.training_step(images, labels, torch.Generator().manual_seed(0))
    step.loss.backward()
    assert guard.encoder[0][1].num_batches_tracked == 1  # of the benign batch alone
    ((centers, radius),) = bounded
    assert radius == pytest.approx(share * 0.05)
    moved = (centers - images).abs()
    assert moved.max() > 0.9 * share * 0.15
    assert moved.max() <= share * 0.15 * (1 + 1e-5)
    assert ((centers >= 0) & (centers <= 1)).all()
    guard.eval()
    loss = [nn.functional.cross_entropy(guard.head.logits(guard.represent(x)), labels) for x in (images, centers)]
    assert loss[1] > loss[0]
    assert all(parameter.grad is not None for parameter in guard.parameters())


def test_of_a_guard_trained_on_small_balls_branches_prove_more_than_intervals():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.ReLU(), nn.Flatten())
    guard = ClusterGuard(body, 10, example=torch.rand(1, 1, 28, 28))
    digits = TensorDataset(*(part[:1000] for part in load_digits("train").tensors))
    loader = DataLoader(digits, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(guard.parameters(), 4e-3)
    options = {"eps": 0.05, "ramp_epochs": 2, "optimizer": optimizer}
    trainer = CertifiedTrainer(guard, bound_radius=0.02, **options)
    trainer.fit(loader, CALIBRATION, epochs=4, calibrate=False, progress=False)
    guard.thresholds = torch.full((10,), 100.0)
    few = [(TEST.tensors[0][:40], TEST.tensors[1][:40])]
    left = [
        certified_success_rate(guard, few, eps=0.05, method=method, branches=100).count
        for method in ("intervals", "branching")
    ]
    assert left[1] < left[0]


@pytest.mark.parametrize(
    "option",
    [
        {"eps": 0.0},
        {"eps": 1.5},
        {"bound_weight": 0.0},
        {"warmup_epochs": -1},
        {"ramp_epochs": math.inf},
        {"center_weight": -1.0},
        {"temperature": 0.0},
        {"regularization": -1.0},
        {"stability_weight": math.nan},
        {"bound_radius": 0.0},
        {"bound_radius": 0.2},
        {"bound_radius": "0.1"},
        {"eps": "0.1"},
        {"ramp_epochs": None},
    ],
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        CertifiedTrainer(guard_of(), **{"eps": 0.1, **option})


def test_a_network_without_bounds_is_refused_at_the_first_step_and_not_half_trained():
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), 2, example=torch.rand(1, 1, 2, 2))
    before = copy.deepcopy(guard.encoder.state_dict())
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 2), batch_size=4)
    with pytest.raises(ConfigurationError, match="layer_norm"):
        CertifiedTrainer(guard, eps=0.1, warmup_epochs=5).fit(loader, loader, epochs=6, calibrate=False, progress=False)
    assert all(torch.equal(before[name], value) for name, value in guard.encoder.state_dict().items())


def normalized_guard():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    guard = ClusterGuard(body, 3, example=torch.rand(1, 1, 4, 4), center_scale=1.0)
    initialise(guard)
    return guard.train()


def test_bounds_in_training_use_the_statistics_of_the_benign_batch_and_are_those_of_a_later_proof(monkeypatch):
    guard, images, labels = normalized_guard(), torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    layer = guard.encoder.get_submodule(next(n for n, m in guard.encoder.named_modules() if type(m) is nn.BatchNorm2d))
    trainer = CertifiedTrainer(guard, eps=0.1, ramp_epochs=0, warmup_epochs=0, bound_weight=1.0, center_weight=0.0)
    monkeypatch.setattr(type(trainer), "epochs_done", 1.0)
    loss = trainer.training_step(images, labels, None).loss
    assert layer.num_batches_tracked == 1
    layer.momentum = None  # running statistics become those of one batch
    layer.reset_running_stats()
    with torch.no_grad():
        guard.represent(images)
        values = {}
        hook = layer.register_forward_pre_hook(lambda _, inputs: values.update(inputs=inputs[0]))
        guard.represent(images)
        hook.remove()
        layer.running_var.copy_(values["inputs"].var(dim=(0, 2, 3), correction=0))
        worst = bound(guard.eval(), images, labels, eps=0.1).leads
    torch.testing.assert_close(loss, nn.functional.cross_entropy(-worst / 2, labels))


def test_gradients_of_bounds_pass_through_the_statistics_of_the_batch(monkeypatch):
    guard, images, labels = normalized_guard().double(), torch.rand(12, 1, 4, 4).double(), torch.arange(12) % 3
    trainer = CertifiedTrainer(guard, eps=0.1, ramp_epochs=0, warmup_epochs=0, bound_weight=1.0, center_weight=0.0)
    monkeypatch.setattr(type(trainer), "epochs_done", 1.0)
    weight = next(guard.parameters())
    trainer.training_step(images, labels, None).loss.backward()
    direction = torch.randn_like(weight)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
            ends.append(trainer.training_step(images, labels, None).loss)
            weight -= step * direction
    torch.testing.assert_close((weight.grad * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)


class ByKeyword(nn.BatchNorm2d):
    def __call__(self, images):
        return super().__call__(input=images)


def test_statistics_of_a_layer_that_is_called_by_keyword_are_noted():
    layer, images = ByKeyword(2), torch.rand(5, 2, 3, 3)
    with batch_statistics(layer) as statistics:
        layer(images)
    torch.testing.assert_close(statistics[layer][0], images.mean(dim=(0, 2, 3)))


def box_of(center, radius):
    return Box(torch.tensor(center) - radius, torch.tensor(center) + radius)


def test_terms_of_the_loss_ask_for_tight_balanced_and_stable_intervals():
    tight, wide = box_of([1.0, -1.0], 0.1), box_of([1.0, -1.0], 0.8)
    assert tightness_loss(torch.tensor(0.2), [tight]) == 0
    torch.testing.assert_close(tightness_loss(torch.tensor(0.2), [tight, wide]), torch.tensor(0.375))
    assert balance_loss([tight]) == 0  # as much above 0 as below
    assert balance_loss([box_of([9.0, -1.0], 0.1)]) > 0.5
    assert balance_loss([box_of([9.0, 1.0], 0.1)]) == 0  # no ReLU is off, so that there is no ratio
    assert stability_loss([tight]) < stability_loss([wide]) < stability_loss([box_of([0.0, 0.0], 0.8)])


def test_the_terms_join_the_loss_while_the_radius_grows(monkeypatch):
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    losses = {}
    for name in (None, "regularization", "stability_weight"):
        torch.manual_seed(0)
        trainer = CertifiedTrainer(
            normalized_guard(), eps=0.4, ramp_epochs=2, warmup_epochs=0, **{name: 0.5} if name else {}
        )
        for epoch in (1.0, 2.0):
            monkeypatch.setattr(type(trainer), "epochs_done", epoch)
            losses[name, epoch] = trainer.training_step(images, labels, None).loss
    assert losses["regularization", 1.0] > losses[None, 1.0]
    assert losses["regularization", 2.0] == losses[None, 2.0]
    assert losses["stability_weight", 2.0] != losses[None, 2.0]
