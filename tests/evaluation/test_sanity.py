import pytest
import torch
from clusterguard import PGD, Evidence, WorstCaseSuite, evaluate
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def loader(small_guard):
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, small_guard(images).argmax(1)), batch_size=25)


def warnings(detector, attacks, loader):
    report = evaluate(detector, attacks, loader, generator=torch.Generator().manual_seed(0))
    assert report.sanity is not None
    return report.sanity, " | ".join(report.sanity.warnings)


def test_an_honest_evaluation_raises_no_alarm(small_guard, loader):
    sanity, text = warnings(small_guard, PGD(eps=0.1, step_size=0.02, steps=60, objective="margin"), loader)
    rates = [rate.value for _, rate in sanity.by_eps]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert "whole box" not in text
    assert "gradients are" not in text
    assert sanity.black_box.value <= sanity.white_box.value
    assert [rate.value for rate in sanity.by_step] == sorted(rate.value for rate in sanity.by_step)


class Masked(torch.nn.Module):
    """The same decisions, but scores rounded so coarsely that gradients vanish: obfuscation."""

    def __init__(self, guard):
        super().__init__()
        self.guard = guard
        self.thresholds = guard.thresholds

    def evidence(self, images):
        distances = self.guard.distances(images)
        rounded = (distances * 1000).round() / 1000 + 0 * distances
        return Evidence(-rounded, rounded)


def test_masked_gradients_raise_the_alarm(small_guard, loader):
    sanity, text = warnings(Masked(small_guard), PGD(eps=0.1, step_size=0.02, steps=20), loader)
    assert sanity.zero_gradients > 0.9
    assert "exactly 0" in text
    assert "gradients are masked" in text


def test_a_weak_attack_raises_the_alarm(small_guard, loader):
    def weak(detector, images, labels, **_):
        return images

    weak.norm, weak.eps = "linf", 0.1
    _, text = warnings(small_guard, weak, loader)
    assert "too weak" in text


def test_a_suite_whose_last_stage_still_breaks_images_has_not_converged(small_guard, loader, monkeypatch):
    def run(*names):
        attack = PGD(eps=0.1, step_size=0.05, steps=3, objective="margin")
        monkeypatch.setattr(WorstCaseSuite, "stages", lambda *_: dict.fromkeys(names, attack))
        return warnings(small_guard, {"suite": WorstCaseSuite("linf", eps=0.1)}, loader)[1]

    assert "suite has not converged: its last stage, only one, still broke" in run("only one")
    assert "converged" not in run("first", "in vain")


def test_without_a_stated_budget_there_is_no_probe(small_guard, loader):
    assert evaluate(small_guard, lambda detector, images, labels, **_: images, loader).sanity is None
    assert evaluate(small_guard, PGD(eps=0.1, step_size=0.02), loader, sanity_images=0).sanity is None


def test_the_probe_takes_images_that_can_be_broken_from_all_of_a_sorted_loader(small_guard, loader):
    images, labels = loader.dataset.tensors
    order = labels.argsort()
    wrong = torch.arange(50) < 10
    labels = torch.where(wrong, (labels[order] + 1) % 3, labels[order])  # the first ones count in no success rate
    batches = [(images[order], labels)]

    def idle(detector, images, labels, **_):
        return images

    idle.norm, idle.eps = "linf", 0.1
    report = evaluate(small_guard, idle, batches, sanity_images=12)
    assert report.sanity.images == 12
    assert evaluate(small_guard, idle, batches, sanity_images=500).sanity.images == report.results[0].success.total
