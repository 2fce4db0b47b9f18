"""Another code of a user's own, and other settings inside it, are noticed when a training is resumed."""

import re
from dataclasses import dataclass
from types import FunctionType

import pytest
import torch
from clusterguard.training._descriptions import describe, describe_detector, describe_steps, differences, doubts
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR
from trainings import new_guard

SCALE = 0.1


class Keeping:
    """An attack of a user's own that keeps its setting to itself, and does not print it."""

    factor = 1.0

    def __init__(self, scale):
        self._scale, self._lock, self.extra = scale, object(), object()

    def __repr__(self):
        return "Keeping()"

    def __call__(self, detector, images, labels, **_):
        return images + self._scale * self.factor


class InSlots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


@dataclass
class Settings:
    scale: float = 0.1

    def __call__(self, images):
        return images + self.scale


class Layer(nn.Module):
    def __init__(self, scale=1):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        return images * self.scale


def another(cls, **members):
    """A class of the same name with other members."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **members})


def helper(images):
    return images.round()


def helped(images):
    return helper(images) + SCALE


def with_others(**others):
    """The function `helped` in a module where other names are bound to other values."""
    return FunctionType(helped.__code__, {**globals(), **others})


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        (lambda images: images + 1, lambda images: images - 1, "code"),
        (lambda images: images.round(), lambda images: images.relu(), "code"),
        (lambda images: images.to("cpu"), lambda images: images.to("cuda"), "code"),
        (Keeping(0.1), another(Keeping, __call__=lambda *_, **__: None)(0.1), "code"),
        (Settings(), another(Settings, __call__=lambda *_: None)(), "code"),
        (Layer, another(Layer, forward=lambda *_: None), "code"),
        (helped, with_others(helper=lambda images: images.relu()), "code"),
        (helped, with_others(SCALE=0.2), "SCALE was 0.1, is 0.2"),
        (Keeping(0.1), another(Keeping, factor=2.0)(0.1), "factor was 1, is 2"),
        (Keeping(0.1), Keeping(0.2), "_scale was 0.1, is 0.2"),
        (InSlots(0.1), InSlots(0.2), "scale was 0.1, is 0.2"),
        (nn.Dropout(0.1), nn.Dropout(0.2), r"printed was 'Dropout\(p=0.1"),
        (Layer(1), Layer(2), "scale was 1, is 2"),
    ],
)
def test_other_code_of_a_users_own_and_other_settings_in_it_are_noticed(one, other, change):
    before, same, now = (describe({"attack": value}) for value in (one, one, other))
    assert before == same
    (difference,) = differences(before, now) + doubts(before, now)
    assert re.search(rf"attack\.{change}", difference)


def test_names_of_variables_and_documentation_are_no_other_code():
    def one(images):
        """Add."""
        return images + 1

    def other(pictures):
        """Another text."""
        return pictures + 1

    assert [*describe({"": one}).values()][1:] == [*describe({"": other}).values()][1:]


def test_another_layer_of_a_users_own_is_noticed_by_its_code():
    layers = Layer(), another(Layer, forward=lambda _, images: -images)()
    before, now = (describe_detector(new_guard(layer)) for layer in layers)
    (doubt,) = doubts(before, now)
    assert re.match(r"detector\.encoder\.0\.3\.code in Python \S+ was '\w+', is '\w+'", doubt)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda optimizer, size: StepLR(optimizer, size), r"scheduler\.step_size was 1, is 2"),
        (
            lambda optimizer, size: SequentialLR(optimizer, [StepLR(optimizer, size) for _ in range(2)], [5]),
            r"scheduler\.0\.step_size was 1, is 2",
        ),
        (
            lambda optimizer, size: LambdaLR(optimizer, lambda epoch: size),
            r"scheduler\.lr_lambdas\.0\.size was 1, is 2",
        ),
    ],
)
def test_settings_of_a_scheduler_are_compared_but_may_depend_on_the_number_of_epochs(make, change):
    def described(size):
        optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return describe_steps(optimizer, make(optimizer, size))

    assert described(1) == described(1)
    assert not differences(described(1), described(2))
    assert re.search(change, "; ".join(doubts(described(1), described(2))))
