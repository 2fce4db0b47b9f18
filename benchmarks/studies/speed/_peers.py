"""The same attacks by torchattacks, Foolbox, ART and adv-lib."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._support import import_adv_lib

PEER_NAMES = ("torchattacks", "Foolbox", "ART", "adv-lib")
AttackCall = Callable[[], Tensor]


def build_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, norm: str, eps: float, step: float, steps: int
) -> dict[str, AttackCall]:
    """Make PGD with each library that has it for the norm, by the name of the library.

    All start at the image, take the same steps and return the last iterate.

    Args:
        model: classifier that maps images in [0, 1] to logits.
        images: (B, C, H, W) images to attack.
        labels: (B,) their labels.
        norm: "linf", "l2" or "l1".
        eps: radius.
        step: length of a step.
        steps: number of steps.
    """
    torchattacks, foolbox = import_module("torchattacks"), import_module("foolbox")
    shown = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.L1PGD}[norm]
    of_foolbox = kind(abs_stepsize=step, steps=steps, random_start=False)
    attacks: dict[str, AttackCall] = {
        "Foolbox": lambda: of_foolbox(shown, images, labels, epsilons=eps)[1],
        "ART": _run_art(
            model, images, labels, "ProjectedGradientDescent", norm=norm, eps=eps, eps_step=step, max_iter=steps
        ),
    }
    if name := {"linf": "PGD", "l2": "PGDL2"}.get(norm):
        theirs = getattr(torchattacks, name)(model, eps=eps, alpha=step, steps=steps, random_start=False)
        attacks["torchattacks"] = lambda: theirs(images, labels)
    if name := {"linf": "pgd_linf"}.get(norm):
        options = {"steps": steps, "random_init": False, "absolute_step_size": step}
        attacks["adv-lib"] = partial(getattr(import_adv_lib(), name), model, images, labels, eps, **options)
    return attacks


def build_apgd(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int) -> dict[str, AttackCall]:
    """Make APGD in linf with the cross-entropy with each library, by the name of the library.

    The arguments are those of `build_pgd`.
    """
    theirs = import_module("torchattacks").APGD(model, norm="Linf", eps=eps, steps=steps, loss="ce")
    options = {"n_iter": steps, "loss_function": "ce", "best_loss": True}
    return {
        "torchattacks": lambda: theirs(images, labels),
        "ART": _run_art(
            model,
            images,
            labels,
            "AutoProjectedGradientDescent",
            norm="linf",
            eps=eps,
            eps_step=2 * eps,
            max_iter=steps,
            nb_random_init=1,
            loss_type="cross_entropy",
        ),
        "adv-lib": partial(import_adv_lib().apgd, model, images, labels, eps, float("inf"), **options),
    }


def _run_art(model: nn.Module, images: Tensor, labels: Tensor, name: str, *, norm: str, **options: Any) -> AttackCall:
    classification, evasion = import_module("art.estimators.classification"), import_module("art.attacks.evasion")
    kind = "gpu" if images.is_cuda else "cpu"
    shape = tuple(images.shape[1:])
    estimator = classification.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, 10, clip_values=(0.0, 1.0), device_type=kind
    )
    order = {"linf": "inf", "l2": 2, "l1": 1}[norm]
    attack = getattr(evasion, name)(estimator, norm=order, batch_size=len(images), verbose=False, **options)
    one_hot = nn.functional.one_hot(labels, 10).cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images.cpu().numpy(), y=one_hot)).to(images.device)
