"""On a linear detector the smallest successful perturbation has a closed form in every norm: attacks must reach it."""

import pytest
import torch
from clusterguard import APGD, PGD, success_margin
from clusterguard.attacks import MIM, PDPGD, FastMinimumNorm, SigmaZero, SparsePGD, get_norm

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def smallest_perturbations(detector, images, labels, norm):
    """(B,) By duality |w·x − b| / ‖w‖_dual, while the box does not bind; for l0 by adding up the best pixels."""
    weight = detector.weight.detach().flatten()
    activation = images.flatten(1) @ weight - detector.bias
    if norm != "l0":
        return activation.abs() / weight.norm(p=DUAL[norm])
    uphill = (weight > 0) != (labels[:, None] == 1)  # whether a pixel must get brighter
    room = torch.where(uphill, 1 - images.flatten(1), images.flatten(1))
    gains = (weight.abs() * room).sort(dim=1, descending=True).values.cumsum(dim=1)
    return 1 + (gains < activation.abs()[:, None]).sum(dim=1)


@pytest.fixture(params=["linf", "l2", "l1", "l0"])
def case(request, linear_detector):
    """A norm, images that need different amounts of it, and how much each needs."""
    norm, weight = request.param, linear_detector.weight.detach().flatten()
    linear_detector.bias = 0.5 * weight.sum().item()
    # Where only the ball shall bind, images stay close to the boundary; pixels come whole, so there they are far.
    spread = 0.3 if norm == "l0" else 0.02
    images = 0.5 + spread * torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    images = (images + (0.25 * weight.sign().view(1, 4, 4) if norm == "l0" else 0)).clamp(0, 1)
    labels = (images.flatten(1) @ weight > linear_detector.bias).long()
    return norm, images, labels, smallest_perturbations(linear_detector, images, labels, norm)


def minimum_norm_attacks(norm, **options):
    """The attacks for the smallest perturbation, in the norms that they know."""
    sparse = norm == "l0"
    return {
        "fast minimum norm": FastMinimumNorm(norm=norm, steps=100, step_size=10.0 if sparse else 1.0, **options),
        **(
            {"σ-zero": SigmaZero(steps=300, **options)} if sparse else {"PDPGD": PDPGD(norm=norm, steps=200, **options)}
        ),
    }


def attacks(norm, eps):
    step = {"linf": eps / 5, "l2": eps / 5, "l1": eps / 2, "l0": 20.0}[norm]
    options = {"norm": norm, "eps": eps}
    return {
        **{
            f"PGD {objective}": PGD(step_size=step, steps=30, objective=objective, **options)
            for objective in ("suspicion", "margin", "logit", "cross_entropy")
        },
        "MIM": MIM(step_size=step, steps=30, objective="margin", **options),
        "APGD": APGD(steps=60, **options),
        "APGD in its own ball only": APGD(steps=60, large_radii=False, **options),
        **({"Sparse-PGD": SparsePGD(eps=eps, steps=60)} if norm == "l0" else {}),
        **minimum_norm_attacks(norm, eps=eps),
    }


@pytest.mark.parametrize("name", attacks("linf", 1.0) | attacks("l0", 1.0))
@pytest.mark.parametrize("targeted", [False, True])
def test_success_exactly_above_the_optimum(linear_detector, case, name, targeted):
    norm, images, labels, needed = case
    eps = needed.float().median().item() + (norm == "l0") / 2  # half a pixel more buys nothing
    if name not in attacks(norm, eps):
        pytest.skip("of another norm")
    attack = attacks(norm, eps)[name]
    attacked = attack(linear_detector, images, labels, targets=1 - labels if targeted else None)
    broken = success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0
    clear = (needed - eps).abs() > 1e-3 * eps
    assert torch.equal(broken[clear], (needed <= eps)[clear])
    assert 5 < broken[clear].sum() < clear.sum() - 5
    assert (get_norm(norm).size(attacked - images) <= eps).all()


@pytest.mark.parametrize("name", ["fast minimum norm", "PDPGD", "σ-zero"])
def test_the_nearest_success_is_hardly_larger_than_the_smallest_perturbation(linear_detector, case, name):
    norm, images, labels, needed = case
    attack = minimum_norm_attacks(norm, eps=get_norm(norm).largest(images.shape[1:]), keep="nearest").get(name)
    if attack is None:
        pytest.skip("of another norm")
    attacked = attack(linear_detector, images, labels)
    assert (success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0).all()
    excess = get_norm(norm).size(attacked - images) / needed
    assert excess.min() > 1 - 1e-3
    assert excess.mean() < 1.03
