import pytest
import torch
from clusterguard import FGSM, PGD, Evidence
from clusterguard.attacks import MIM, MultiTarget, Towards, from_adv_lib
from clusterguard.detection import Verdicts, is_broken
from clusterguard.errors import ConfigurationError
from peer_makers import LARGE, adv_lib, art, autoattack, check_valid, foolbox, seeded, torchattacks
from torch import nn


def broken(guard, attacked, labels):
    return is_broken(Verdicts(guard.detect(attacked), labels))


SLOW = pytest.mark.slow
AIMED = {
    "torchattacks FGSM": torchattacks("FGSM", "linf"),
    "torchattacks PGD": torchattacks("PGD", "linf", alpha=0.03, steps=20),
    "torchattacks PGDL2": torchattacks("PGDL2", "l2", alpha=0.5, steps=20),
    "torchattacks CW": torchattacks("CW", "l2", minimises=True, c=100, lr=0.1, steps=60),
    "torchattacks Square": torchattacks("Square", "linf", n_queries=100),
    "adv-lib APGD": adv_lib("apgd", "linf", takes_eps=True, norm=torch.inf, n_iter=10, loss_function="ce"),
    "adv-lib DDN": adv_lib("ddn", "l2", steps=20, levels=None),
    "adv-lib PDPGD": adv_lib("pdpgd", "l1", norm=1, num_steps=40),
    "Foolbox LinfPGD": foolbox("LinfPGD", "linf", steps=20),
    "Foolbox L2PGD": foolbox("L2PGD", "l2", steps=20),
    "Foolbox L1PGD": foolbox("L1PGD", "l1", steps=20),
    "Foolbox SparseL1": foolbox("SparseL1DescentAttack", "l1", steps=20),
    "Foolbox L2CarliniWagner": foolbox(
        "L2CarliniWagnerAttack", "l2", binary_search_steps=2, steps=60, stepsize=0.1, initial_const=10.0
    ),
    "Foolbox DDN": foolbox("DDNAttack", "l2", steps=40),
    "Foolbox LInfFMN": foolbox("LInfFMNAttack", "linf", steps=20),
    "Foolbox L2FMN": foolbox("L2FMNAttack", "l2", steps=20),
    "Foolbox L1FMN": foolbox("L1FMNAttack", "l1", steps=20),
    "Foolbox Boundary": foolbox("BoundaryAttack", "l2", needs_starts=True, steps=100),
    "Foolbox HopSkipJump": foolbox(
        "HopSkipJumpAttack",
        "l2",
        needs_starts=True,
        steps=2,
        initial_gradient_eval_steps=20,
        max_gradient_eval_steps=50,
    ),
    "ART PGD": art("ProjectedGradientDescent", "linf", eps_step=0.05, max_iter=20),
    "ART PGD l2": art("ProjectedGradientDescent", "l2", eps_step=0.5, max_iter=20),
    "ART AutoPGD": art("AutoProjectedGradientDescent", "linf", eps_step=0.02, max_iter=20, nb_random_init=1),
}
UNAIMED = {
    "torchattacks APGD": torchattacks("APGD", "linf", steps=20),
    "torchattacks APGDT": torchattacks("APGDT", "linf", steps=5),
    "torchattacks FAB": torchattacks("FAB", "linf", steps=10),
    "ART Square": art("SquareAttack", "linf", max_iter=50, nb_restarts=1),
}
LONG = {
    "torchattacks AutoAttack": torchattacks("AutoAttack", "linf"),
    "torchattacks AutoAttack l2": torchattacks("AutoAttack", "l2", norm="L2"),
    "AutoAttack": autoattack("linf"),
    "AutoAttack l2": autoattack("l2"),
    "AutoAttack l1": autoattack("l1"),
}
EVERY = [
    *(pytest.param(make, id=name) for name, make in (AIMED | UNAIMED).items()),
    *(pytest.param(make, id=name, marks=SLOW) for name, make in LONG.items()),
]


@pytest.mark.parametrize("make", EVERY)
def test_peers_attack_a_guard_as_a_classifier(trained_guard, images, labels, references, make, capsys):
    attack = make(references=references)
    attacked = attack(trained_guard, images, labels, generator=seeded())
    check_valid(attack, images, attacked)
    before, after = (scores_margin(trained_guard, x, labels) for x in (images, attacked))
    assert (after[after != before] < before[after != before]).double().mean() > 0.9
    assert capsys.readouterr().out == ""


def scores_margin(guard, images, labels):
    """The true class's score minus the best wrong one's, which is what attacks on a classifier lower."""
    scores = guard.evidence(images).class_scores.detach()
    right = scores.gather(1, labels[:, None])
    return right.squeeze(1) - scores.scatter(1, labels[:, None], -torch.inf).amax(1)


@pytest.mark.parametrize("make", AIMED.values(), ids=AIMED)
def test_peers_aim_at_the_target_in_a_rejecting_classifier(trained_guard, images, labels, references, make):
    attack = make(LARGE, references, rejecting=True)
    targets = (labels + 1) % 10
    attacked = attack(trained_guard, images, labels, targets=targets, generator=seeded())
    check_valid(attack, images, attacked)
    hits = broken(trained_guard, attacked, labels) & (trained_guard.detect(attacked).labels == targets)
    # Foolbox keeps SparseL1 off pixels at 0 and 1 as if it always ascended, so there its targeted mode hardly works.
    assert hits.double().mean() > 0.05 or "SparseL1" in attack.peer


@pytest.mark.parametrize("make", UNAIMED.values(), ids=UNAIMED)
@pytest.mark.parametrize("rejecting", [False, True])
def test_a_peer_without_a_targeted_mode_says_so(trained_guard, images, labels, make, rejecting):
    targets = None if rejecting else (labels + 1) % 10
    with pytest.raises(ConfigurationError, match="takes no targets"):
        make(rejecting=rejecting)(trained_guard, images, labels, targets=targets)


def test_autoattack_takes_no_targets(trained_guard, images, labels):
    with pytest.raises(ConfigurationError, match="takes no targets"):
        autoattack("linf")()(trained_guard, images, labels, targets=(labels + 1) % 10)


def test_without_targets_a_rejecting_attack_tries_every_wrong_class(trained_guard, images, labels):
    images, labels = images[:15], labels[:15]
    blind, seeing = (
        torchattacks("PGD", "linf", alpha=0.02, steps=15, random_start=False)(rejecting=rejecting)
        for rejecting in (False, True)
    )
    counts = [broken(trained_guard, attack(trained_guard, images, labels), labels).sum() for attack in (blind, seeing)]
    assert counts[1] > counts[0]
    every = MultiTarget(attack=seeing)
    assert torch.equal(seeing(trained_guard, images, labels), every(trained_guard, images, labels))


@pytest.mark.filterwarnings("ignore:LinearSearchBlendedUniformNoiseAttack")
def test_decision_based_attacks_need_accepted_images_to_start_from(trained_guard, images, labels, references):
    make = foolbox("HopSkipJumpAttack", "l2", needs_starts=True, steps=1, initial_gradient_eval_steps=5)
    targets = (labels + 1) % 10
    with pytest.raises(ConfigurationError, match="init_attack failed"):
        make(LARGE, rejecting=True)(trained_guard, images, labels, targets=targets)
    without_three = Towards(references.images[references.labels != 3], references.labels[references.labels != 3])
    attack = make(LARGE, without_three, rejecting=True)
    attacked = attack(trained_guard, images, labels, targets=targets, generator=seeded())
    moved = (attacked != images).flatten(1).any(1)
    assert torch.equal(moved, targets != 3)


class Scores(nn.Module):
    """A detector that refuses nothing and whose class scores are exactly what a peer sees, for their smallest is 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))
        self.thresholds = torch.full((4,), torch.inf)

    def evidence(self, images):
        scores = self.layers(images) * 3
        return Evidence(scores - scores.detach().amin(1, keepdim=True), torch.zeros_like(scores))


CE = {"objective": "cross_entropy"}
LAST = {"steps": 8, "keep": "last"} | CE
LINF = {"linf": 0.1}, PGD(norm="linf", eps=0.1, step_size=0.03, **LAST)
L2 = {"l2": 0.5}, PGD(norm="l2", eps=0.5, step_size=0.15, **LAST)
L1 = {"l1": 2.0}, PGD(norm="l1", eps=2.0, step_size=0.25, sparsity=None, **LAST)
SPARSE = {"l1": 2.0}, PGD(norm="l1", eps=2.0, step_size=0.25, sparsity=1e-9, **LAST)
MOMENTUM = {"linf": 0.1}, MIM(norm="linf", eps=0.1, step_size=0.03, decay=1.0, **LAST)
ONE_STEP = {"linf": 0.1}, FGSM(norm="linf", eps=0.1, **CE)
SAME = {
    "torchattacks PGD": (torchattacks("PGD", "linf", alpha=0.03, steps=8, random_start=False), *LINF),
    "Foolbox LinfPGD": (foolbox("LinfPGD", "linf", abs_stepsize=0.03, steps=8, random_start=False), *LINF),
    "ART PGD": (art("ProjectedGradientDescent", "linf", eps_step=0.03, max_iter=8, num_random_init=0), *LINF),
    "torchattacks PGDL2": (torchattacks("PGDL2", "l2", alpha=0.15, steps=8, random_start=False), *L2),
    "Foolbox L2PGD": (foolbox("L2PGD", "l2", abs_stepsize=0.15, steps=8, random_start=False), *L2),
    "ART PGD l2": (art("ProjectedGradientDescent", "l2", eps_step=0.15, max_iter=8, num_random_init=0), *L2),
    "Foolbox L1PGD": (foolbox("L1PGD", "l1", abs_stepsize=0.25, steps=8, random_start=False), *L1),
    "ART PGD l1": (art("ProjectedGradientDescent", "l1", eps_step=0.25, max_iter=8, num_random_init=0), *SPARSE),
    "torchattacks MIFGSM": (torchattacks("MIFGSM", "linf", alpha=0.03, steps=8, decay=1.0), *MOMENTUM),
    "ART MIM": (art("MomentumIterativeMethod", "linf", eps_step=0.03, max_iter=8, decay=1.0), *MOMENTUM),
    "torchattacks FGSM": (torchattacks("FGSM", "linf"), *ONE_STEP),
    "Foolbox FGSM": (foolbox("LinfFastGradientAttack", "linf"), *ONE_STEP),
    "ART FGSM": (art("FastGradientMethod", "linf"), *ONE_STEP),
}


@pytest.mark.parametrize(
    ("name", "targeted"),
    [(name, targeted) for name in SAME for targeted in (False, True) if name != "Foolbox FGSM" or not targeted],
)
def test_the_same_attack_takes_the_same_steps(name, targeted):
    make, budget, ours = SAME[name]
    detector, labels = Scores(), torch.arange(12) % 4
    images = 0.3 + 0.4 * torch.rand(12, 1, 8, 8, generator=seeded())  # the box does not bind
    targets = (labels + 1) % 4 if targeted else None
    theirs = make(budget)(detector, images, labels, targets=targets)
    expected = ours(detector, images, labels, targets=targets)
    assert (expected - images).abs().max() > 0.01
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rejecting", [True, False])
def test_an_attack_that_cannot_aim_is_refused_instead_of_giving_images_back(trained_guard, images, labels, rejecting):
    def untargeted(model, pictures, goal, *, targeted):
        return pictures if targeted else 1 - pictures

    attack = from_adv_lib(untargeted, norm="linf", eps=0.1, rejecting=rejecting)
    targets = None if rejecting else (labels + 1) % 10
    with pytest.raises(ConfigurationError, match=r"aim at classes.*rejecting=False"):
        attack(trained_guard, images, labels, targets=targets, generator=seeded())
    plain = from_adv_lib(untargeted, norm="linf", eps=0.1)
    assert not torch.equal(plain(trained_guard, images, labels, generator=seeded()), images)
