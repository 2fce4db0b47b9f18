"""A training that is judged on other images after every epoch: what is kept, when it stops, and that it resumes."""

import copy

import pytest
import torch
from clusterguard import PGD, AdversarialClusterTrainer, Calibrator, CertifiedTrainer, DetectorTrainer, TrainingOptions
from clusterguard.detectors import ConfidenceDetector
from clusterguard.errors import ConfigurationError, InputError, PersistenceError, TrainingStoppedError
from clusterguard.training import TrainingStep, Validation
from torch import nn
from torch.utils.data import DataLoader, Subset
from trainings import ATTACK, held_out, new_guard, weights


class Scripted(DetectorTrainer):
    """Its weight counts the steps, and its figures are those of a list."""

    figures = (0.1, 0.5, 0.4, 0.5, 0.3, 0.2)

    def training_step(self, images, labels, generator):
        weight = next(self.detector.parameters())
        return TrainingStep(-weight.sum(), torch.tensor(0))

    def validate(self, images, labels, generator):
        value = self.figures[min(len(self.history), len(self.figures) - 1)]
        return {"other": torch.rand(len(labels)), "figure": torch.full((len(labels),), value)}


def scripted(**options):
    detector = ConfidenceDetector(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3)
    with torch.no_grad():
        for weight in detector.parameters():
            weight.zero_()
    optimizer = torch.optim.SGD(list(detector.parameters())[:1], lr=1.0)
    return Scripted(detector, optimizer=optimizer, **options)


def steps_of(trainer):
    return int(next(trainer.detector.parameters())[0, 0].item())


def fit(trainer, blobs, epochs=6, **options):
    batches = [*blobs][:1]
    return trainer.fit(batches, held_out(blobs), epochs=epochs, calibrate=False, progress=False, **options)


@pytest.mark.filterwarnings("ignore:the optimizer lacks")
def test_the_best_epoch_is_kept_and_training_goes_on_from_the_last(blobs):
    trainer = scripted()
    history = fit(trainer, blobs, validation=Validation(held_out(blobs)))
    assert [record.validation["figure"] for record in history] == pytest.approx(Scripted.figures)
    assert steps_of(trainer) == 2  # the first of two equally good ones
    fit(trainer, blobs, epochs=7)
    assert steps_of(trainer) == 7


@pytest.mark.filterwarnings("ignore:the optimizer lacks")
@pytest.mark.parametrize(("patience", "min_gain", "epochs", "best"), [(1, 0, 3, 2), (4, 0, 6, 2), (2, 0.45, 3, 1)])
def test_it_stops_when_nothing_improves(blobs, patience, min_gain, epochs, best):
    trainer = scripted()
    validation = Validation(held_out(blobs), patience=patience, min_gain=min_gain)
    assert len(fit(trainer, blobs, epochs=8, validation=validation)) == epochs
    assert steps_of(trainer) == best
    assert len(fit(trainer, blobs, epochs=9, validation=validation)) == epochs  # it is over


@pytest.mark.filterwarnings("ignore:the optimizer lacks")
def test_averaged_weights_are_what_is_judged_and_kept(blobs):
    trainer = scripted(options=TrainingOptions(average_decay=0.5))
    seen = []
    trainer.validate = lambda images, labels, generator: (
        seen.append(next(trainer.detector.parameters())[0, 0].item()) or {"figure": torch.ones(len(labels))}
    )
    fit(trainer, blobs, epochs=3, validation=Validation([next(iter(held_out(blobs)))]))
    assert seen[1:] == [1.0, 1.5, 2.25]  # after a trial before the training
    assert next(trainer.detector.parameters())[0, 0].item() == 1.0


def trainer_of(guard, **options):
    optimizer = torch.optim.Adam(guard.parameters(), lr=5e-3)
    return AdversarialClusterTrainer(guard, ATTACK, optimizer=optimizer, refresh_every=3, **options)


def test_validation_changes_nothing_but_what_is_kept(blobs):
    ends = []
    for validation in (None, Validation(DataLoader(held_out(blobs).dataset, 60, shuffle=True))):
        torch.manual_seed(0)
        trainer = trainer_of(new_guard(nn.Dropout(0.1)))
        loader = DataLoader(Subset(blobs.dataset, range(180)), 60, shuffle=True)
        history = trainer.fit(loader, held_out(blobs), epochs=3, calibrate=False, progress=False, validation=validation)
        trainer.engine.begin()  # the weights of the last epoch
        ends.append((weights(trainer.guard), [record.loss for record in history]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert [*history[0].validation] == ["accuracy", "accepted_accuracy", "robust_accuracy"]
    values = [*history[-1].validation.values()]
    assert 1 >= values[0] >= values[1] >= values[2] >= 0


def test_the_figures_are_shares_of_all_images(blobs):
    trainer = trainer_of(new_guard())
    loader = DataLoader(Subset(blobs.dataset, range(120)), 60)
    (record,) = trainer.fit(
        loader, held_out(blobs), epochs=1, calibrate=False, progress=False, validation=Validation(held_out(blobs))
    )
    images, labels = held_out(blobs).dataset.tensors
    right = trainer.guard(images).argmax(dim=1) == labels
    accepted = right & (trainer.guard.distances(images).amin(dim=1) <= trainer.thresholds[labels])
    assert record.validation["accuracy"] == pytest.approx(float(right.double().mean()))
    assert record.validation["accepted_accuracy"] == pytest.approx(float(accepted.double().mean()))


@pytest.mark.parametrize("place", ["within an epoch", "after an epoch"])
def test_a_resumed_training_is_bit_identical_and_knows_the_best_epoch(blobs, tmp_path, place):
    def run(file, stop_at=None):
        torch.manual_seed(0)
        trainer = trainer_of(new_guard(), options=TrainingOptions(average_decay=0.9))
        loader = DataLoader(Subset(blobs.dataset, range(180)), 60, shuffle=True)
        validation = Validation(DataLoader(held_out(blobs).dataset, 200, shuffle=True), patience=2)
        stop = None if stop_at is None else lambda: trainer.engine.steps == stop_at
        history = trainer.fit(
            loader,
            held_out(blobs),
            epochs=5,
            calibrate=False,
            progress=False,
            checkpoint=file,
            checkpoint_every=2,
            stop_when=stop,
            validation=validation,
        )
        return weights(trainer.guard), [(record.loss, record.validation) for record in history]

    through = run(tmp_path / "through.pt")
    with pytest.raises(TrainingStoppedError):
        run(tmp_path / "resumed.pt", stop_at=8 if place == "within an epoch" else 6)
    resumed = run(tmp_path / "resumed.pt")
    assert torch.equal(through[0], resumed[0])
    assert through[1] == resumed[1]


@pytest.mark.filterwarnings("ignore:the optimizer lacks")
def test_a_checkpoint_keeps_the_best_weights_and_what_they_were_judged_by(blobs, tmp_path):
    file, validation = tmp_path / "run.pt", Validation(held_out(blobs))
    fit(scripted(), blobs, epochs=3, checkpoint=file, validation=validation)
    again = scripted()
    fit(again, blobs, epochs=6, checkpoint=file, validation=validation)
    assert steps_of(again) == 2
    with pytest.raises(PersistenceError, match="monitor was None, is other"):
        fit(scripted(), blobs, epochs=6, checkpoint=file, validation=Validation(held_out(blobs), monitor="other"))


def test_the_warm_up_and_the_ramp_are_not_waited_for(blobs):
    guard = new_guard()
    trainer = trainer_of(guard, warmup_epochs=2, ramp_epochs=1.5)
    loader = DataLoader(Subset(blobs.dataset, range(60)), 60)
    validation = Validation(DataLoader(Subset(held_out(blobs).dataset, range(60)), 60), "accuracy", patience=1)
    trainer.validate = lambda images, labels, generator: {"accuracy": torch.zeros(len(labels))}
    history = trainer.fit(loader, held_out(blobs), epochs=9, calibrate=False, progress=False, validation=validation)
    assert len(history) == 5  # of full strength are the fourth, the best one, and the fifth


def test_certified_accuracy_is_monitored(blobs):
    guard = new_guard()
    trainer = CertifiedTrainer(guard, eps=0.02, warmup_epochs=1, ramp_epochs=2)
    loader = DataLoader(Subset(blobs.dataset, range(120)), 60)
    validation = Validation(DataLoader(Subset(held_out(blobs).dataset, range(120)), 60))
    history = trainer.fit(loader, held_out(blobs), epochs=4, calibrate=False, progress=False, validation=validation)
    assert [*history[-1].validation][-1] == "certified_accuracy"
    assert history[-1].validation["certified_accuracy"] <= history[-1].validation["accepted_accuracy"]


def test_mistakes_are_found_before_the_first_step(blobs):
    trainer, loader = trainer_of(new_guard()), DataLoader(Subset(blobs.dataset, range(60)), 60)
    before = copy.deepcopy(weights(trainer.guard))
    for validation, error, message in (
        (Validation(held_out(blobs), monitor="val_loss"), ConfigurationError, "among accuracy, accepted_accuracy, rob"),
        (Validation([]), InputError, "validation loader with at least one image"),
        (Validation(blobs.dataset), ConfigurationError, "expected a validation loader of batches, got a data set"),
        (held_out(blobs), ConfigurationError, r"expected validation=Validation\(loader, ...\), got DataLoader"),
    ):
        with pytest.raises(error, match=message):
            trainer.fit(loader, held_out(blobs), epochs=1, calibrate=False, progress=False, validation=validation)
    for options in ({"patience": 0}, {"patience": 1.5}, {"min_gain": -1}, {"min_gain": "a"}):
        with pytest.raises(ConfigurationError, match="expected"):
            Validation(held_out(blobs), **options)
    assert torch.equal(weights(trainer.guard), before)
    with pytest.warns(UserWarning, match="the validation loader gives images that are trained on"):
        trainer.fit(loader, held_out(blobs), epochs=1, calibrate=False, progress=False, validation=Validation(loader))


@pytest.mark.filterwarnings("ignore:classes")
@pytest.mark.filterwarnings("ignore:trained, but not calibrated")
def test_copies_of_training_images_are_noticed_among_those_for_calibration(blobs):
    images, labels = (part[:90].clone() for part in blobs.dataset.tensors)
    loader = DataLoader(Subset(blobs.dataset, range(180)), 60, shuffle=True)
    calibrator = Calibrator(0.2, scarce="pool")
    for copies in ([(images, labels)], [(images[:40], labels[:40]), *held_out(blobs)]):
        trainer = trainer_of(new_guard(), calibrator=calibrator)
        with pytest.warns(UserWarning, match=r"\d+ of 64 calibration images that were compared are trained on"):
            trainer.fit(loader, copies, epochs=1, progress=False)


def test_a_stronger_attack_makes_it_no_more_robust(blobs):
    figures = []
    for eps in (0.05, 0.5):
        torch.manual_seed(0)
        trainer = trainer_of(new_guard())
        trainer.validate(*next(iter(held_out(blobs))), None)
        trainer.attack = PGD(eps=eps, step_size=eps / 2, steps=5, keep="last")
        figures.append(trainer.validate(*next(iter(held_out(blobs))), None)["robust_accuracy"].float().mean())
    assert figures[0] >= figures[1]
