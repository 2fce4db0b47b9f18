"""Starts towards accepted images choose among several references by their margin after the projection."""

import pytest
import torch
from clusterguard import Evidence
from clusterguard.attacks import Problem, Towards, get_norm, get_objective
from clusterguard.errors import ConfigurationError
from torch import nn


class FirstPixel(nn.Module):
    """Calls an image class 1 by its first pixel and class 2 by its last; accepts everything."""

    thresholds = torch.full((3,), torch.inf)

    def evidence(self, images):
        pixels = images.flatten(1)
        scores = torch.stack([torch.full_like(pixels[:, 0], 0.6), pixels[:, 0], pixels[:, -1]], dim=1)
        return Evidence(scores, torch.zeros_like(scores))


def start(tries, targets=None, labels=(1, 1, 2)):
    # The nearest reference reaches class 1 by several pixels, of which an l1 ball leaves little; the next by one.
    references = torch.tensor([[0.7, 0.4, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.9, 0.9]]).view(3, 1, 1, 4)
    images = torch.zeros(1, 1, 1, 4)
    problem = Problem(
        FirstPixel(), images, torch.tensor([0]), targets, get_norm("l1"), 0.7, get_objective("margin"), None
    )
    return problem, Towards(references, torch.tensor(labels), tries=tries)(problem)


def test_the_nearest_may_be_the_worse_start():
    problem, nearest = start(1)
    _, chosen = start(2)
    assert problem.margin(nearest) > 0 >= problem.margin(chosen)
    torch.testing.assert_close(chosen, torch.tensor([[[[0.7, 0.0, 0.0, 0.0]]]]))


def test_targets_and_labels_are_respected():
    _, chosen = start(3, targets=torch.tensor([2]))
    assert chosen[0, 0, 0, 3] > 0
    _, none = start(3, labels=(0, 0, 0))  # there is no image of a wrong class
    assert not none.any()


def test_one_is_the_least_number_of_tries():
    with pytest.raises(ConfigurationError, match="tries of at least 1"):
        Towards(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), tries=0)
