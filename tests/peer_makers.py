"""Peers' attacks by name, ready to be made for a budget."""

from functools import partial

import numpy as np
import pytest
import torch
from clusterguard.attacks import from_adv_lib, from_art, from_autoattack, from_foolbox, from_torchattacks, get_norm

from benchmarks._support import import_adv_lib

EPS = {"linf": 0.1, "l2": 1.5, "l1": 12.0}
LARGE = {"linf": 0.5, "l2": 12.0, "l1": 120.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def torchattacks(name, norm, /, *, minimises=False, **options):
    def make(budget=EPS, references=None, **how):
        library = pytest.importorskip("torchattacks")
        eps = None if minimises else budget[norm]
        given = options if minimises else {"eps": eps} | options
        return from_torchattacks(partial(getattr(library, name), **given), norm=norm, eps=eps, **how)

    return make


def foolbox(name, norm, /, *, needs_starts=False, **options):
    def make(budget=EPS, references=None, **how):
        library = pytest.importorskip("foolbox")
        starts = {"references": references} if needs_starts else {}
        return from_foolbox(getattr(library.attacks, name)(**options), norm=norm, eps=budget[norm], **starts, **how)

    return make


def art(name, norm, /, **options):
    def make(budget=EPS, references=None, **how):
        library = pytest.importorskip("art.attacks.evasion")
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        silent = {} if name == "FastGradientMethod" else {"verbose": False}
        given = {"norm": order, "eps": budget[norm]} | silent | options
        return from_art(partial(getattr(library, name), **given), norm=norm, eps=budget[norm], **how)

    return make


def adv_lib(name, norm, /, *, takes_eps=False, **options):
    def make(budget=EPS, references=None, **how):
        pytest.importorskip("adv_lib")
        given = options | ({"eps": budget[norm]} if takes_eps else {})
        return from_adv_lib(partial(getattr(import_adv_lib(), name), **given), norm=norm, eps=budget[norm], **how)

    return make


def autoattack(norm):
    def make(budget=EPS, references=None):
        pytest.importorskip("pyautoattack")
        return from_autoattack(norm=norm, eps=budget[norm])

    return make


def check_valid(attack, images, attacked):
    assert attacked.shape == images.shape
    assert attacked.dtype == images.dtype
    assert not attacked.requires_grad
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not torch.equal(attacked, images)
    if attack.eps is not None:
        assert (get_norm(attack.norm).size(attacked - images) <= attack.eps + 1e-5 * (1 + attack.eps)).all()
