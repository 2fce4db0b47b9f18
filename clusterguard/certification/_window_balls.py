"""Bounds for patches and changed pixels, on costs that are sums over windows of the image."""

import torch
from clusterguard._support import is_changed
from clusterguard.attacks import L0, Norm, Patch
from clusterguard.certification._bounds import ball_in_service, bound_representations
from clusterguard.detection import Arithmetic
from clusterguard.detectors import ClusterGuard, LocalCosts
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad


class WindowBall:
    """All costs of images in which a patch or some pixels change; see `RepresentationBox`.

    Whatever changes in a window, its costs stay in [0, 1], and the costs of all other windows stay as they are. So the
    sum for a direction falls by at most what the windows that a patch meets can fall, at the worst place of the patch.
    For single pixels, the falls of the worst ones are added up, although windows that several pixels meet are then
    counted several times.

    Args:
        guard: guard that `window_parts` takes apart.
        images: (B, C, H, W) in [0, 1].
        norm: norm of the ball.
        radii: (B,) radii in float64: numbers of pixels, or sides of patches.

    Raises:
        ConfigurationError: no bounds are known in this norm.
    """

    def __init__(self, guard: ClusterGuard, images: Tensor, norm: Norm, radii: Tensor) -> None:
        if not isinstance(norm, Patch | L0):
            raise ConfigurationError(
                f"no bounds are known in {norm.name} for costs of windows, only in {Patch.name} and {L0.name}"
            )
        parts = window_parts(guard)
        assert parts is not None
        local, last = parts
        self._norm, self._radii = norm, radii.floor()
        self._windows, self._sides = local.windows(), images.shape[2:]
        self._costs = local.costs(guard.normalize(images.clamp(0, 1))).double().nan_to_num(nan=torch.inf)
        self._weight = last.weight.detach().double()
        bias = torch.zeros_like(self._weight[:, 0]) if last.bias is None else last.bias.detach().double()
        self._center = self._costs.flatten(2).sum(dim=2) @ self._weight.T + bias
        point = bound_representations(guard, ball_in_service(guard, images, torch.zeros_like(radii)))
        self._point = point
        # What is computed of unchanged costs is this far from the exact one, before the change and after it, and so are
        # the falls. Sums of changed costs round like sums of as many ones.
        computed = torch.full_like(point.lower, torch.inf) if point.error is None else point.error
        count = self._costs.shape[2] * self._costs.shape[3]
        arithmetic = Arithmetic.of(torch.float32) if point.arithmetic is None else point.arithmetic
        size = count * self._weight.abs().sum(dim=1) + bias.abs()
        self._error: Tensor = 3 * computed + 2 * arithmetic.gamma(count + len(self._weight) + 2) * size
        each = torch.eye(self._center.shape[1]).to(self._center).expand(len(images), -1, -1)
        self.lower = self._center - self._falls(each)
        self.upper = self._center + self._falls(-each)
        # Numbers that overflow in a window make costs that are not in [0, 1], and the image is refused. All images that
        # there are lie in one ball, whose bounds serve every row; a row with NaN has an error that is not finite.
        cube = bound_representations(guard, ball_in_service(guard, torch.full_like(images[:1], 0.5), radii.new_ones(1)))
        may_overflow = ~(cube.lower + cube.upper + (0 if cube.error is None else cube.error) + self._error).isfinite()
        self.lower = self.lower.masked_fill(may_overflow, -torch.inf)
        self.upper = self.upper.masked_fill(may_overflow, torch.inf)

    @property
    def error(self) -> Tensor:
        """Largest distance from a computed representation to the box, (B, K)."""
        return self._error

    @property
    def arithmetic(self) -> Arithmetic | None:
        """Arithmetic in which the guard computes."""
        return self._point.arithmetic

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest exact ⟨direction, z⟩ over the ball, for directions (B, S, K): (B, S)."""
        return torch.einsum("bsk,bk->bs", directions, self._center) - self._falls(directions)

    def slack(self, directions: Tensor) -> Tensor:
        """How far rounding may take ⟨direction, z⟩ below `lowest`, for directions (B, S, K): (B, S)."""
        return torch.einsum("bsk,bk->bs", directions.abs(), self._error)

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest computed difference z_i − z_p of every coordinate i and that at place p, (B,): (B, K)."""
        count = self._center.shape[1]
        each = torch.eye(count).to(self._center)
        directions = each[None] - one_hot(places.long(), count).to(each)[:, None]
        lowest = self.lowest(directions) - self.slack(directions)
        above: Tensor = lowest.scatter(1, places[:, None].long(), 0.0)
        return above

    def _falls(self, directions: Tensor) -> Tensor:
        """The largest fall of ⟨direction, z⟩ in the ball, for directions (B, S, K): (B, S)."""
        # A cost with a positive weight falls to 0 at most, and one with a negative weight rises to 1.
        weights = directions @ self._weight
        falls = torch.einsum("bsk,bkhw->bshw", weights.clamp_min(0), self._costs)
        falls = falls + torch.einsum("bsk,bkhw->bshw", (-weights).clamp_min(0), 1 - self._costs)
        most = []
        for row, radius in zip(falls, self._radii.long().tolist(), strict=True):
            if isinstance(self._norm, Patch):
                most.append(self._sums(row, radius).flatten(1).amax(dim=1) if radius else row.new_zeros(len(row)))
            else:
                alone = self._sums(row, 1).flatten(1)
                most.append(alone.topk(min(radius, alone.shape[1]), dim=1).values.sum(dim=1))
        # Not more than if all windows changed.
        return torch.minimum(torch.stack(most), falls.flatten(2).sum(dim=2))

    def _sums(self, falls: Tensor, side: int) -> Tensor:
        """The sum of falls (S, h, w) over all windows that a square of this side meets, at each of its places."""
        sums = pad(falls.cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))
        (top, bottom), (left, right) = (
            self._met(side, length, count) for length, count in zip(self._sides, falls.shape[1:], strict=True)
        )
        bands = sums[:, bottom] - sums[:, top]
        return bands[:, :, right] - bands[:, :, left]

    def _met(self, side: int, length: int, count: int) -> tuple[Tensor, Tensor]:
        """The first window that a square of this side meets, and the one behind the last, at each place on one axis."""
        size, stride, padding = self._windows
        first = torch.arange(max(1, length - side + 1), device=self._costs.device)
        last = first + min(side, length) - 1
        begin = (first + padding - size + stride) // stride  # the smallest p with p·stride − padding + size > first
        end = (last + padding) // stride + 1  # behind the largest p with p·stride − padding <= last
        return begin.clamp(0, count), end.clamp(0, count)


def window_parts(guard: ClusterGuard) -> tuple[LocalCosts, nn.Linear] | None:
    """The sum of costs and the last layer of a guard that consists of these; None for another guard."""
    parts = [*guard.encoder._modules.values()] if type(guard.encoder) is nn.Sequential else []
    if [*map(type, parts)] != [LocalCosts, nn.Linear] or any(map(is_changed, (guard.encoder, *parts))):
        return None
    local, last = parts
    assert isinstance(local, LocalCosts)
    assert isinstance(last, nn.Linear)
    return local, last
