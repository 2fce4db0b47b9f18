"""The attacks of the comparison: our suite, our PGD, the peers, and attacks that are held back."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

from clusterguard import PGD, WorstCaseSuite
from clusterguard.attacks import (
    Attack,
    PeerAttack,
    Towards,
    from_adv_lib,
    from_art,
    from_autoattack,
    from_foolbox,
    from_torchattacks,
    get_norm,
)

from benchmarks._support import import_adv_lib
from benchmarks.studies.peers._held_back import EveryPlace, RectanglesAndPGD

SUITE, PLAIN = "suite", "PGD, objective of the paper"
THOROUGH, HELD_BACK = "suite, thorough", "held back"
OUR_ATTACKS = (SUITE, PLAIN, THOROUGH)


class Peer(NamedTuple):
    """An attack of another library, with settings that a determined user would take.

    Attributes:
        library: "torchattacks", "Foolbox", "ART" or "adv-lib".
        attack: name of its class or function.
        options: arguments for it.
        aimed: whether the attack can aim at a class. If so, it sees the guard as a classifier with one more class for
            refused images, and it tries all wrong classes. Otherwise it sees distances only, at the temperature where
            cross-entropy works best.
        starts: whether the attack has to begin at accepted images of other classes.
    """

    library: str
    attack: str
    options: dict[str, Any]
    aimed: bool = True
    starts: bool = False


def _of_linf(eps: float) -> list[Peer]:
    return [
        Peer("torchattacks", "PGD", {"eps": eps, "alpha": eps / 10, "steps": 100}),
        Peer("torchattacks", "APGD", {"eps": eps, "steps": 100}, aimed=False),
        Peer("torchattacks", "FAB", {"eps": eps, "steps": 50}, aimed=False),
        Peer("torchattacks", "Square", {"eps": eps, "n_queries": 1000}),
        Peer("torchattacks", "AutoAttack", {"eps": eps}, aimed=False),
        Peer("Foolbox", "LinfPGD", {"steps": 100}),
        Peer("Foolbox", "LInfFMNAttack", {"steps": 100}),
        *_of_art(eps),
        Peer("ART", "SquareAttack", {"max_iter": 1000}, aimed=False),
        Peer("adv-lib", "apgd", {"eps": eps, "norm": float("inf"), "n_iter": 100, "loss_function": "ce"}),
        Peer("adv-lib", "fmn", {"norm": float("inf"), "steps": 100}),
    ]


def _of_l2(eps: float) -> list[Peer]:
    carlini_wagner = {"binary_search_steps": 5, "steps": 100, "stepsize": 0.05, "initial_const": 1.0}
    return [
        Peer("torchattacks", "PGDL2", {"eps": eps, "alpha": eps / 10, "steps": 100}),
        Peer("torchattacks", "CW", {"c": 10, "lr": 0.05, "steps": 200}),
        Peer("torchattacks", "AutoAttack", {"norm": "L2", "eps": eps}, aimed=False),
        Peer("Foolbox", "L2PGD", {"steps": 100}),
        Peer("Foolbox", "L2CarliniWagnerAttack", carlini_wagner),
        Peer("Foolbox", "DDNAttack", {"steps": 100}),
        Peer("Foolbox", "L2FMNAttack", {"steps": 100}),
        Peer("Foolbox", "BoundaryAttack", {"steps": 1000}, starts=True),
        Peer("Foolbox", "HopSkipJumpAttack", {"steps": 10, "max_gradient_eval_steps": 200}, starts=True),
        *_of_art(eps),
        Peer("adv-lib", "ddn", {"steps": 100, "levels": None}),
        Peer("adv-lib", "fmn", {"norm": 2, "steps": 100}),
        Peer("adv-lib", "alma", {"num_steps": 200, "distance": "l2", "init_lr_distance": eps / 2}),
    ]


def _of_l1(eps: float) -> list[Peer]:
    elastic_net = {"binary_search_steps": 4, "steps": 100, "initial_stepsize": 0.05, "initial_const": 1.0}
    return [
        Peer("Foolbox", "L1PGD", {"steps": 100}),
        Peer("Foolbox", "SparseL1DescentAttack", {"steps": 100}),
        Peer("Foolbox", "L1FMNAttack", {"steps": 100}),
        Peer("Foolbox", "EADAttack", elastic_net),
        *_of_art(eps)[:1],
        Peer("adv-lib", "apgd", {"eps": eps, "norm": 1, "n_iter": 100, "loss_function": "ce"}),
        Peer("adv-lib", "fmn", {"norm": 1, "steps": 100}),
        Peer("adv-lib", "pdpgd", {"norm": 1, "num_steps": 300}),
        Peer("adv-lib", "alma", {"num_steps": 200, "distance": "l1", "init_lr_distance": eps / 2}),
    ]


def _of_l0(eps: float) -> list[Peer]:
    return [
        Peer("torchattacks", "JSMA", {"theta": 1.0, "gamma": eps / 784}),
        Peer("torchattacks", "OnePixel", {"pixels": int(eps), "steps": 10, "popsize": 10}),
        Peer("torchattacks", "Pixle", {"max_iterations": 20, "restarts": 10}, aimed=False),
        Peer("Foolbox", "L0FMNAttack", {"steps": 100}),
        Peer("adv-lib", "sigma_zero", {"num_steps": 300}, aimed=False),
        Peer("adv-lib", "fmn", {"norm": 0, "steps": 100}),
        Peer("adv-lib", "pdpgd", {"norm": 0, "num_steps": 300}),
        Peer("adv-lib", "vfga", {"max_iter": int(eps)}),
    ]


def _of_art(eps: float) -> list[Peer]:
    step = {"eps_step": eps / 10, "verbose": False}
    return [
        Peer("ART", "ProjectedGradientDescent", {"max_iter": 100, **step}),
        Peer("ART", "AutoProjectedGradientDescent", {"max_iter": 50, **step}),
    ]


PEERS: dict[str, Callable[[float], list[Peer]]] = {
    "linf": _of_linf,
    "l2": _of_l2,
    "l1": _of_l1,
    "l0": _of_l0,
    "patch": lambda eps: [],  # no peer searches for the place of a patch on every image by itself
}


def build_peer(peer: Peer, norm: str, eps: float, references: Towards) -> PeerAttack:
    """Wrap a peer so that it can be called like an attack of clusterguard.

    Args:
        peer: attack of another library.
        norm: name of the norm.
        eps: radius.
        references: accepted images that some attacks begin at.
    """
    budget: dict[str, Any] = {"norm": norm, "eps": eps, "rejecting": peer.aimed}
    if peer.library == "Foolbox":
        attack = getattr(import_module("foolbox.attacks"), peer.attack)(**peer.options)
        return from_foolbox(attack, references=references if peer.starts else None, **budget)
    if peer.library == "adv-lib":
        return from_adv_lib(partial(getattr(import_adv_lib(), peer.attack), **peer.options), **budget)
    if peer.library == "torchattacks":
        factory = partial(getattr(import_module("torchattacks"), peer.attack), **peer.options)
        return replace(from_torchattacks(factory, **budget), temperature=0.3)
    order = {} if get_norm(norm).grain else {"norm": get_norm(norm).order, "eps": eps}
    factory = partial(getattr(import_module("art.attacks.evasion"), peer.attack), **order, **peer.options)
    return replace(from_art(factory, **budget), temperature=0.3)


def build_all(norm: str, eps: float, references: Towards) -> dict[str, Attack]:
    """Make our suite, our PGD, all peers and the held-back attack for one norm and radius, by name."""
    known = get_norm(norm)
    step_size = known.step_size(eps, references.images.shape[1:], share=0.1)
    over_patches = known.searched_over == "patches"
    attacks: dict[str, Attack] = {
        SUITE: build_suite(norm, eps, references),
        PLAIN: PGD(norm=norm, eps=eps, step_size=step_size, steps=100),
        HELD_BACK: EveryPlace(side=int(eps)) if over_patches else RectanglesAndPGD(norm=norm, eps=eps),
    }
    for peer in PEERS[norm](eps):
        attacks[f"{peer.library} {peer.attack}"] = build_peer(peer, norm, eps, references)
    if not known.grain:
        attacks["AutoAttack"] = replace(from_autoattack(norm=norm, eps=eps), temperature=0.3)
    return attacks


def build_suite(
    norm: str,
    eps: float,
    references: Towards,
    *,
    budget: Literal["standard", "thorough"] = "standard",
) -> WorstCaseSuite:
    """Our suite, which starts from accepted images that are not attacked."""
    known = references.images, references.labels
    return WorstCaseSuite(norm, eps=eps, budget=budget, references=known)
