"""Attacks answer within their budgets or refuse, whatever they are given; `fuzzing` says how."""

import contextlib
import copy
import math

import clusterguard as cg
import pytest
import torch
from clusterguard.attacks import get_norm
from clusterguard.errors import ClusterGuardError, InputError
from effort import IS_THOROUGH
from fuzzing import (
    CLASSES,
    DETECTORS,
    SHAPE,
    VerdictsOnly,
    counts,
    draw_detector,
    draw_images,
    draw_labels,
    draw_number,
    draw_targets,
    outcomes,
)
from hypothesis import strategies as st


def brighten(problem, labels, classifier):
    return problem.project(problem.images + 0.1)


FEW = {"steps": 2}
STEP = FEW | {"step_size": 0.05}
IN_NORMS = {
    "PGD": lambda **o: cg.PGD(**STEP, **o),
    "PGD random": lambda **o: cg.PGD(start="random", stop_early=True, batch_size=2, **STEP, **o),
    "PGD diversified": lambda **o: cg.PGD(start="output_diversified", objective="adaptive", **STEP, **o),
    "MIM": lambda **o: cg.attacks.MIM(**STEP, **o),
    "NES": lambda **o: cg.attacks.NES(samples=2, **STEP, **o),
    "APGD": lambda **o: cg.APGD(**FEW, **o),
    "FGSM": lambda **o: cg.FGSM(**o),
    "N-FGSM": lambda **o: cg.attacks.NoisyFGSM(**o),
    "BIM": lambda **o: cg.attacks.BIM(**FEW, **o),
    "fast minimum norm": lambda **o: cg.attacks.FastMinimumNorm(**FEW, **o),
    "PDPGD": lambda **o: cg.attacks.PDPGD(**FEW, **o),
    "σ-zero": lambda norm, eps: cg.attacks.SigmaZero(eps=eps, **FEW),
    "Sparse-PGD": lambda norm, eps: cg.attacks.SparsePGD(eps=eps, **FEW),
    "patch": lambda norm, eps: cg.attacks.PatchAttack(eps=eps, rounds=2, proposals=2, steps=1),
    "orthogonal": lambda **o: cg.attacks.OrthogonalPGD(**STEP, **o),
    "repel": lambda **o: cg.attacks.RepelThenMinimise(**STEP, **o),
    "match": lambda **o: cg.attacks.RepresentationMatching(references=SOME, **STEP, **o),
    "multi-target": lambda **o: cg.attacks.MultiTarget(attack=cg.PGD(**STEP, **o)),
    "random target": lambda **o: cg.attacks.RandomTarget(attack=cg.PGD(**STEP, **o)),
    "mixed": lambda **o: cg.attacks.MixedAttack(attacks=[cg.PGD(**STEP, **o), cg.FGSM(**o)]),
    "peer": lambda **o: cg.attacks.PeerAttack(peer="a step", run=brighten, **o),
    "transfer": lambda **o: cg.attacks.Transfer(surrogate=DETECTORS["guard"], attack=cg.PGD(**STEP, **o)),
    "Square": lambda **o: cg.attacks.Square(queries=5, **o),
    "polish": lambda **o: cg.attacks.Polish(rounds=1, halvings=1, tries=1, proposals=2, steps=1, **o),
    "Boundary": lambda **o: cg.attacks.Boundary(queries=8, **o),
    "Carlini-Wagner": lambda norm, eps: cg.attacks.CarliniWagner(eps=eps, searches=2, steps=2),
    "Sparse-RS": lambda norm, eps: cg.attacks.SparseRS(eps=eps, queries=5),
}
SOME = cg.attacks.Towards(torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(6) % CLASSES)


def attacked(draw, attack):
    """Attack something, and check that what comes back is as an attack's answer must be."""
    count, detector = draw(counts), draw_detector(draw)
    images, labels = draw_images(draw, count), draw_labels(draw, count)
    targets, before = draw_targets(draw, labels), copy.deepcopy(images)
    generator = draw(st.sampled_from([None, torch.Generator().manual_seed(1)]))
    attacked = attack(detector, images, labels, targets=targets, generator=generator)
    assert (attacked.shape, attacked.dtype, attacked.device) == (images.shape, images.dtype, images.device)
    assert torch.equal(images, before)
    assert not attacked.requires_grad
    assert ((attacked >= 0) & (attacked <= 1) | (attacked == images)).all()
    if len(attacked):
        norm, eps = get_norm(attack.norm), getattr(attack, "reach", attack.eps)
        assert (norm.size(attacked - images) <= eps * (1 + 1e-5) + 2e-4 * (images.min() < 0) * SIZE[attack.norm]).all()


# of the box, for images that leave it within the checks' tolerance
SIZE = {"linf": 1, "l2": 4, "l1": 16, "l0": 16, "patch": 4}


def test_every_attack_that_is_built_in_is_tried():
    faces = [getattr(cg.attacks, name) for name in cg.attacks.__all__]
    built_in = {face for face in faces if isinstance(face, type) and cg.attacks.BuiltInAttack in face.__mro__}
    concrete = {attack for attack in built_in if "__final__" in vars(attack)}
    suite = {cg.WorstCaseSuite}  # whose stages are attacks of the table
    assert {type(make(norm="l2", eps=1)) for make in IN_NORMS.values()} == concrete - suite


@pytest.mark.parametrize("name", IN_NORMS)
def test_attacks_answer_or_refuse(name):
    def call(draw):
        norm = draw(st.sampled_from(["linf", "l2", "l1", "l0"]))
        attacked(draw, IN_NORMS[name](norm=norm, eps=draw(st.sampled_from([0.3, 2, 2, draw_number(draw)]))))

    assert {"answered", "refused"} <= outcomes(call, examples=60 if IS_THOROUGH else 30).keys()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("name", IN_NORMS)
def test_attacks_stay_in_odd_budgets(name, norm):
    images, labels = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    for eps in (math.inf, -math.inf, math.nan, -1, 0, 1e-45, 1e30, 1e39, True):
        with contextlib.suppress(ClusterGuardError):
            attack = IN_NORMS[name](norm=norm, eps=eps)
            attacked = attack(DETECTORS["pixels" if name not in ("match", "repel") else "guard"], images, labels)
            assert ((attacked >= 0) & (attacked <= 1)).all(), eps
            reach = getattr(attack, "reach", eps)
            assert (get_norm(attack.norm).size(attacked - images) <= reach).all(), eps


@pytest.mark.parametrize("name", sorted(IN_NORMS.keys() - {"Boundary", "transfer"}))
def test_attacks_that_need_evidence_refuse_verdicts(name):
    attack = IN_NORMS[name](norm="l2", eps=1)
    with pytest.raises(InputError, match=r"evidence\(images\).* got VerdictsOnly"):
        attack(VerdictsOnly(), torch.rand(2, *SHAPE), torch.tensor([0, 1]))
