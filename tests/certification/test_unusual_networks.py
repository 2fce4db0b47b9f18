"""Certificates of networks that remember, reshape, compile or branch, and of no image at all."""

import copy
import math
from collections import defaultdict, deque

import pytest
import torch
from clusterguard import ClusterGuard, certified_success_rate, certify
from clusterguard.certification import Interval, bound, certified_radius
from clusterguard.certification._internal import check_bounds
from clusterguard.errors import ConfigurationError
from torch import nn

LABELS = torch.tensor([0, 1, 0])


def images(count=3):
    return torch.rand(count, 1, 2, 2)


def around(body, threshold=5.0):
    guard = ClusterGuard(body, 2, example=images()).eval()
    guard.thresholds = torch.full((2,), threshold)
    return guard


class Remembering(nn.Module):
    """Keeps its last activations, and scales by a statistic of the first batch that it saw."""

    def __init__(self, is_scaled):
        super().__init__()
        self.linear, self.scale, self.is_scaled = nn.Linear(4, 4), None, is_scaled
        self.register_buffer("last", None)

    def forward(self, values):
        values = self.last = self.activations = self.linear(values.flatten(1))
        if not self.is_scaled:
            return values
        if self.scale is None:
            self.scale = values.abs().amax()
        return values / self.scale


@pytest.mark.parametrize("is_scaled", [False, True])
def test_certifying_leaves_nothing_behind_in_a_network_that_remembers(is_scaled):
    guard, batch = around(Remembering(is_scaled)), images()
    for part in guard.modules():
        if isinstance(part, Remembering):
            part.scale = None  # as before the first batch
    try:
        certify(guard, batch, LABELS, eps=0.01)
    except ConfigurationError:
        assert is_scaled
    kept = [value for part in guard.modules() for value in (*vars(part).values(), *part._buffers.values())]
    assert not any(isinstance(value, Interval) for value in kept)
    assert copy.deepcopy(guard).detect(batch).labels.tolist() == guard.detect(batch).labels.tolist()


class Collecting(nn.Module):
    """Keeps activations in whatever can hold them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.all, self.recent = ["first"], deque(["first"], maxlen=1)
        self.by_name = {"first": 1, "lists": defaultdict(list)}
        self.pair = ([], {})

    def forward(self, values):
        values = self.linear(values.flatten(1))
        self.all.insert(0, values)
        self.recent.append(values)
        self.by_name["first"] = self.by_name["last"] = values
        self.by_name["lists"]["linear"].append(values)
        self.pair[0].append(values)
        self.pair[1].update(last=values)
        return values


def test_bounds_leave_nothing_behind_in_a_networks_lists_and_dicts():
    guard, batch = around(Collecting()), images()
    (network,) = [part for part in guard.modules() if isinstance(part, Collecting)]
    guard.detect(batch)
    containers = [network.all, network.recent, network.by_name, network.by_name["lists"], *network.pair]
    containers.append(network.by_name["lists"]["linear"])
    before = [copy.copy(container) for container in containers]
    bound(guard, batch, LABELS, eps=0.01)
    assert [*map(repr, containers)] == [*map(repr, before)]
    assert network.by_name["lists"]["linear"] is containers[-1]
    certify(guard, batch, LABELS, eps=0.01)
    assert copy.deepcopy(guard).detect(batch).labels.tolist() == guard.detect(batch).labels.tolist()


class Viewed(nn.Module):
    """Flattens as most networks do, which fails on a batch of no image."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, values):
        return self.linear(values.view(values.size(0), -1))


def test_where_nothing_is_proved_and_where_there_is_nothing_to_prove():
    guard, batch = around(Viewed(), threshold=100.0), images()
    wrong = 1 - guard.detect(batch).labels
    nothing = certify(guard, batch, wrong, eps=1.0)
    assert not (nothing.is_secure | nothing.is_kept).any()
    assert certified_success_rate(guard, [(batch, 1 - wrong)], eps=1.0).total == 3
    assert certify(guard, images(0), LABELS[:0], eps=0.1).is_secure.tolist() == []
    assert certified_radius(guard, images(0), LABELS[:0]).tolist() == []


class Compiled(nn.Module):
    """A function that a compiler takes whole or not at all."""

    def __init__(self):
        super().__init__()
        self.activation = torch.compile(lambda values: torch.relu(values) * 1.5, backend="eager", fullgraph=True)

    def forward(self, values):
        return self.activation(values.flatten(1))


def test_an_error_of_a_compiler_is_one_of_ours():
    with pytest.raises(ConfigurationError, match="no bounds are known for this network"):
        certify(around(Compiled()), images(), LABELS, eps=0.1)


def test_a_branch_on_the_type_is_found_on_every_image_whose_radius_is_proved():
    class Rare(nn.Module):
        def forward(self, values):
            values = values.flatten(1)
            if isinstance(values, Interval):
                return values
            return values + 100.0 * (values[:, :1] == 0.125).to(values.dtype)

    many = torch.rand(40, 1, 2, 2)
    many[17, 0, 0, 0] = 0.125
    guard = around(Rare(), threshold=0.5)
    with pytest.raises(ConfigurationError):
        certified_radius(guard, many, torch.zeros(40, dtype=torch.int64))


class OwnError(Exception):
    """An error of a network's own kind, as run-time type checkers raise."""


class Checking(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, values):
        if not isinstance(values, torch.Tensor):
            raise self.error
        return values.flatten(1)


class Choosy(nn.Module):
    """Takes no batch of another size than that of the example."""

    def forward(self, values):
        if values.shape[0] != 3:
            raise OwnError("three images,\nplease")
        return values.flatten(1)


@pytest.mark.parametrize("error", [OwnError("no tensor"), StopIteration(), OSError(2, "gone"), Warning("a\nb")])
@pytest.mark.parametrize("use", [certify, bound, check_bounds])
def test_whatever_a_network_raises_is_the_cause_of_an_error_of_ours(error, use):
    with pytest.raises(ConfigurationError, match=r"^no bounds are known for this network: [^\n]*$") as raised:
        use(around(Checking(error)), images(), LABELS, eps=0.01)
    assert type(raised.value.__cause__) is type(error)


def test_an_error_of_a_network_about_other_batches_is_one_of_ours():
    with pytest.raises(ConfigurationError, match="three images, please") as raised:
        certify(around(Choosy(), threshold=100.0), images(), LABELS, eps=0.01)
    assert isinstance(raised.value.__cause__, OwnError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("full")])
def test_what_says_nothing_about_a_network_is_handed_on(error):
    with pytest.raises(type(error)):
        certify(around(Checking(error)), images(), LABELS, eps=0.01)


class WithBuffer(nn.Module):
    """Has a number in another precision, and may use it."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use
        self.register_buffer("extra", torch.full((4,), 0.1, dtype=torch.float64))

    def forward(self, values):
        return self.use(self.layer(values.flatten(1)), self.extra)


def test_a_number_in_another_precision_matters_only_where_it_is_used():
    guard, batch = around(WithBuffer(lambda values, extra: values), threshold=100.0), images()
    proved = certify(guard, batch, guard.detect(batch).labels, eps=0.0)
    assert proved.is_kept.all()
    (network,) = [part for part in guard.modules() if isinstance(part, WithBuffer)]
    network.use = lambda values, extra: values * extra[0]
    certify(guard, batch, guard.detect(batch).labels, eps=0.0)
    network.use = lambda values, extra: (values * extra).to(values.dtype)
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        certify(guard, batch, LABELS, eps=0.0)


@pytest.mark.parametrize("pixel", [math.inf, -math.inf, math.nan])
def test_nothing_is_proved_of_an_image_with_a_pixel_that_is_not_finite(pixel):
    guard, batch = around(nn.Flatten(), threshold=100.0), images()
    labels = guard.detect(batch).labels
    expected = certify(guard, batch, labels, eps=1e-4)
    batch[1, 0, 0, 0] = pixel
    for part, other in zip(certify(guard, batch, labels, eps=1e-4), expected, strict=True):
        assert part.tolist() == [other[0], False, other[2]]
    assert certified_radius(guard, batch, labels)[1] == 0


class OfOthers(nn.Module):
    """Changes an image by something that depends on the others, and is 0 for most batches."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, values):
        values = values.flatten(1)
        return values + self.change(values)


def contrast(values):
    return torch.relu(nn.functional.linear(values.mean(0, keepdim=True), torch.tensor([[1.0, -1.0, -1.0, 1.0]])) - 1.5)


def the_image_before(values):
    columns = values.transpose(0, 1).unsqueeze(1)  # (4, 1, B), so that a convolution moves along the batch
    moved = nn.functional.conv1d(nn.functional.pad(columns, (1, 0)), torch.tensor([[[1.0, 0.0]]]))
    return torch.relu(moved.squeeze(1).transpose(0, 1) - 0.99)


@pytest.mark.parametrize("change", [contrast, the_image_before])
def test_a_network_that_mixes_images_is_refused_though_none_of_these_change(change):
    guard, batch = around(OfOthers(change), threshold=100.0), torch.full((5, 1, 2, 2), 0.5)
    with pytest.raises(ConfigurationError, match="mixes the images of a batch, because the bounds"):
        certify(guard, batch, torch.zeros(5).long(), eps=0.01)


def test_a_network_that_draws_numbers_and_hardly_uses_them_is_refused():
    guard, batch = around(OfOthers(lambda values: float(torch.rand(()) > 0.999_999)), threshold=100.0), images()
    for use in (lambda: certify(guard, batch, LABELS, eps=0.0), lambda: check_bounds(guard, batch, LABELS, eps=0.1)):
        with pytest.raises(ConfigurationError, match="moves a global random state"):
            use()
