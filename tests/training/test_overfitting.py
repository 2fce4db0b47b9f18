"""Catastrophic overfitting: what counts as such, and what it is undone to, also in a training that is resumed."""

from dataclasses import replace

import pytest
import torch
from clusterguard import PGD, AdversarialClusterTrainer, DetectorTrainer, TrainingOptions
from clusterguard.attacks import APGD, FGSM, MixedAttack, MultiTarget, NoisyFGSM, shorten_steps
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import ConfigurationError, PersistenceError, TrainingStoppedError
from clusterguard.training import OverfittingCheck, TrainingStep, Validation
from torch import nn
from torch.utils.data import DataLoader, Subset
from trainings import held_out, new_guard, weights

IMAGES, LABELS = torch.eye(2).repeat(50, 1).view(100, 1, 1, 2), torch.arange(100) % 2


class Brighter(nn.Module):
    """Tells which of two pixels is brighter, and counts in its one weight how far steps have gone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images):
        if self.training:
            self.seen += 1
        return 2 * images.flatten(1) + 0 * self.weight


class Scripted(DetectorTrainer):
    """Each epoch has two steps of length 1 in the same direction."""

    def training_step(self, images, labels, generator):
        logits = self.detector(images)
        return TrainingStep(logits.sum() * 0 - self.detector.classifier.weight.sum(), torch.tensor(0))

    @property
    def weight(self):
        return self.detector.classifier.weight.item()


def scripted(**options):
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)} | options
    return Scripted(ConfidenceDetector(Brighter(), 2), **options)


def fit(trainer, rates, **options):
    """Train while the attack of the check has these success rates, one after each epoch."""

    def attack(detector, images, labels, *, generator=None):
        share = rates[len(trainer.history)]
        broken = torch.arange(len(images)) < round(share * len(images))
        return torch.where(broken[:, None, None, None], images.flip(3), images)

    chosen = {name: options.pop(name) for name in ("max_rise", "step_factor", "rate_factor") if name in options}
    check = OverfittingCheck([(IMAGES, LABELS)], attack, **chosen)
    batches = [(IMAGES[:50], LABELS[:50]), (IMAGES[50:], LABELS[50:])]
    options = {"epochs": len(rates), "calibrate": False, "progress": False, "overfitting": check} | options
    return trainer.fit(batches, batches, **options)


def test_an_epoch_whose_rate_rises_too_far_above_the_lowest_is_undone():
    rates, seen = [0.9, 0.5, 0.6, 0.7, 0.71, 0.7, 0.4, 0.61], []
    trainer = scripted()
    history = fit(trainer, rates, on_epoch_end=lambda _: seen.append(trainer.weight))
    assert [record.returned_to for record in history] == [None, None, None, None, 4, None, None, 7]
    assert [record.check_success_rate for record in history] == pytest.approx(rates)
    assert seen == [2, 4, 6, 8, 8, 9, 10, 10]
    assert trainer.weight == 10  # an undone last epoch is not what is kept
    assert trainer.step_factor == 0.75**2


def test_moments_averages_and_statistics_go_back_and_the_schedule_goes_on():
    def run(rates):
        trainer = scripted(
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1.0),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            options=TrainingOptions(average_decay=0.5),
        )
        states = []

        def note(record):
            states.append([trainer.engine.snapshot(), trainer.optimizer.param_groups[0]["lr"]])

        fit(trainer, rates, on_epoch_end=note)
        return states

    (good, first), (undone, second) = run([0.1, 0.9])
    assert (first, second) == (0.5, 0.25)
    assert {*good["detector"]} >= {"classifier.weight", "classifier.seen"}
    for part in ("detector", "average"):
        names = {name for name in good[part] if "thresholds" not in name}
        assert all(torch.equal(good[part][name], undone[part][name]) for name in names)
    assert good["moments"][0].keys() == undone["moments"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, undone["moments"][0][name]) for name, value in good["moments"][0].items())
    other = run([0.1, 0.2])[1][0]
    assert not torch.equal(good["detector"]["classifier.weight"], other["detector"]["classifier.weight"])


def test_the_line_says_it(capsys):
    fit(scripted(), [0.1, 0.9], progress=True)
    lines = capsys.readouterr().err
    assert "success of the check's attack 0.900" in lines
    assert "epoch 2 has overfitted catastrophically; training goes on from the weights of epoch 1" in lines


def test_an_undone_epoch_is_never_the_best_one():
    class Judged(Scripted):
        def validate(self, images, labels, generator):
            return {"weight": torch.full((len(images),), self.weight)}

    trainer = Judged(ConfidenceDetector(Brighter(), 2), optimizer=lambda weights: torch.optim.SGD(weights, lr=1.0))
    history = fit(trainer, [0.1, 0.9, 0.9], validation=Validation([(0.9 * IMAGES, LABELS)], patience=2))
    assert [record.validation["weight"] for record in history] == [2, 2, 2]
    assert trainer.weight == 2
    assert trainer._best.epoch == 1


ATTACK = PGD(eps=0.1, step_size=0.03, steps=3, start="random")


@pytest.mark.filterwarnings("ignore:.*Make sure that it is the same one")  # the attack holds the trainer
@pytest.mark.parametrize("stop_at", [4, 5])
def test_a_resumed_training_is_bit_identical(blobs, tmp_path, stop_at):
    def run(file, stop_at=None):
        torch.manual_seed(0)
        guard = new_guard(nn.BatchNorm1d(16))
        trainer = AdversarialClusterTrainer(
            guard,
            NoisyFGSM(eps=0.05),
            optimizer=torch.optim.Adam(guard.parameters(), lr=0.05),
            options=TrainingOptions(average_decay=0.9),
            refresh_every=2,
        )
        loader = DataLoader(Subset(blobs.dataset, range(120)), 60, shuffle=True)

        def attack(detector, images, labels, *, generator=None):
            if len(trainer.history) in (1, 2):  # overfits in the second and the third epoch
                return images.roll(1, dims=0)  # images of the class before
            return ATTACK(detector, images, labels, generator=generator)

        history = trainer.fit(
            loader,
            held_out(blobs),
            epochs=4,
            calibrate=False,
            progress=False,
            checkpoint=file,
            checkpoint_every=1,
            stop_when=None if stop_at is None else lambda: trainer.engine.steps == stop_at,
            overfitting=OverfittingCheck([*held_out(blobs)][:1], attack, max_rise=0.05),
        )
        return weights(guard), [(record.loss, record.check_success_rate, record.returned_to) for record in history]

    through = run(tmp_path / "through.pt")
    assert [to for *_, to in through[1]] == [None, 1, 1, None]
    with pytest.raises(TrainingStoppedError):
        run(tmp_path / "resumed.pt", stop_at)
    resumed = run(tmp_path / "resumed.pt")
    assert torch.equal(through[0], resumed[0])
    assert through[1] == resumed[1]


def test_the_check_changes_no_random_number(blobs):
    def run(**options):
        torch.manual_seed(0)
        guard = new_guard(nn.Dropout(0.1))
        trainer = AdversarialClusterTrainer(guard, NoisyFGSM(eps=0.1))
        loader = DataLoader(Subset(blobs.dataset, range(120)), 60, shuffle=True)
        trainer.fit(loader, held_out(blobs), epochs=2, calibrate=False, progress=False, **options)
        return weights(guard)

    few = DataLoader(held_out(blobs).dataset, 60, shuffle=True)
    assert torch.equal(run(), run(overfitting=OverfittingCheck(few, ATTACK, max_rise=0.99)))


def test_a_checkpoint_of_another_check_is_refused(tmp_path):
    fit(scripted(), [0.1], checkpoint=tmp_path / "run.pt")
    with pytest.raises(PersistenceError, match=r"overfitting.max_rise was 0.2, is 0.3"):
        fit(scripted(), [0.1, 0.1], checkpoint=tmp_path / "run.pt", max_rise=0.3)


def test_steps_are_shortened_wherever_they_are():
    pgd, noisy = PGD(eps=0.4, step_size=0.1), NoisyFGSM(eps=0.4)
    assert shorten_steps(pgd, 0.5) == replace(pgd, step_size=0.05)
    assert shorten_steps(shorten_steps(noisy, 0.5), 0.5) == NoisyFGSM(eps=0.4, step_size=0.1)
    assert shorten_steps(MultiTarget(attack=pgd), 0.5).attack.step_size == 0.05
    mixed = shorten_steps(MixedAttack(attacks=(pgd, FGSM(eps=0.1))), 0.5)
    assert mixed.attacks == (replace(pgd, step_size=0.05), FGSM(eps=0.1))
    for without in (APGD(eps=0.1), shorten_steps):
        assert shorten_steps(without, 0.5) is without or shorten_steps(without, 0.5) == without


@pytest.mark.parametrize(
    "options",
    [{"max_rise": 0.0}, {"max_rise": 1}, {"step_factor": 0}, {"rate_factor": 1.5}, {"attack": PGD}, {"loader": 3}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigurationError, match="expected"):
        OverfittingCheck(**{"loader": [(IMAGES, LABELS)], "attack": ATTACK} | options)
    with pytest.raises(ConfigurationError, match="an OverfittingCheck"):
        scripted().fit([(IMAGES, LABELS)], [(IMAGES, LABELS)], epochs=1, overfitting=ATTACK)
