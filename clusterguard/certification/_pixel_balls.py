"""Bounds in norms other than l∞, on representations that are linear in the pixels."""

import torch
from clusterguard._support import is_changed
from clusterguard.attacks import Norm
from clusterguard.certification._bounds import (
    Proofs,
    ball_in_service,
    bound_representations,
    prove,
)
from clusterguard.certification._intervals import Interval
from clusterguard.certification._window_balls import WindowBall, window_parts
from clusterguard.detection import Arithmetic
from clusterguard.detectors import Bounds, ClusterGuard
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

_AT_ONCE = 2**24  # slopes, each of one function at one pixel, that are sorted at once
_ROOM = 2.0**-51  # share of a sum of float64 that its rounding may take, for each of its terms


class PixelBall:
    """All representations of images in a ball in any norm, as heads ask for them; see `RepresentationBox`.

    The network must be linear in the pixels. The norm bounds how far a linear function can fall in a ball, exactly in
    all norms but l2, and so do these bounds.

    Args:
        guard: guard whose encoder is one linear layer of the pixels.
        images: (B, C, H, W) in [0, 1].
        norm: norm of the ball.
        radii: (B,) radii in float64.

    Raises:
        ConfigurationError: the network is another one, or no bounds are known in this norm.
    """

    def __init__(self, guard: ClusterGuard, images: Tensor, norm: Norm, radii: Tensor) -> None:
        layer = linear_layer_of(guard)
        self._images, self._norm, self._radii = images.double(), norm, radii
        # In the whole cube are all images that a ball can hold, so rounding is at most what it is there.
        self._cube = bound_representations(guard, ball_in_service(guard, images, torch.ones_like(radii)))
        normalize = guard.normalize
        mean, std = (part.double().view(-1, 1, 1) for part in (normalize.mean, normalize.std))
        self._slopes = layer.weight.detach().double().unflatten(1, images.shape[1:]) / std
        bias = torch.zeros_like(self._slopes[:, 0, 0, 0]) if layer.bias is None else layer.bias.detach().double()
        self._bias = bias - (self._slopes * mean).flatten(1).sum(dim=1)
        size = self._slopes.flatten(1).abs().sum(dim=1) * (1 + mean.abs().max()) + self._bias.abs()
        computed = torch.full_like(self._cube.lower, torch.inf) if self._cube.error is None else self._cube.error
        self._error: Tensor = _ROOM * layer.in_features * size + computed
        self._center = self._images.flatten(1) @ self._slopes.flatten(1).T + self._bias
        self.lower = self._center - self._falls(self._slopes)
        self.upper = self._center + self._falls(-self._slopes)

    @property
    def error(self) -> Tensor:
        """Largest distance from a computed representation to the box, (B, m)."""
        return self._error

    @property
    def arithmetic(self) -> Arithmetic | None:
        """Arithmetic in which the guard computes."""
        return self._cube.arithmetic

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest exact ⟨direction, z⟩ over the ball, for directions (B, S, m): (B, S)."""
        along = torch.einsum("bsm,bm->bs", directions, self._center)
        slopes = (directions @ self._slopes.flatten(1)).unflatten(2, self._images.shape[1:])
        falls = [
            self._norm.largest_fall(slopes[:, index], self._images, self._radii) for index in range(directions.shape[1])
        ]
        return along - torch.stack(falls, dim=1) if falls else along

    def slack(self, directions: Tensor) -> Tensor:
        """How far rounding may take ⟨direction, z⟩ below `lowest`, for directions (B, S, m): (B, S)."""
        return torch.einsum("bsm,bm->bs", directions.abs(), self._error)

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest computed difference z_i − z_p of every coordinate i and that at place p, (B,): (B, m)."""
        at_place = self._center.gather(1, places[:, None])
        falls = [self._falls_of(index, self._slopes - self._slopes[place]) for index, place in enumerate(places)]
        lowest = self._center - at_place - torch.stack(falls)
        lowest = lowest - self._error - self._error.gather(1, places[:, None])
        above: Tensor = lowest.scatter(1, places[:, None], 0.0)
        return above

    def _falls(self, slopes: Tensor) -> Tensor:
        """The largest fall of S functions with slopes (S, C, H, W) around every image: (B, S)."""
        return torch.stack([self._falls_of(index, slopes) for index in range(len(self._images))])

    def _falls_of(self, index: int, slopes: Tensor) -> Tensor:
        """The largest fall of S functions with slopes (S, C, H, W) around one image: (S,)."""
        image, radius = self._images[index], self._radii[index]
        parts = slopes.split(max(1, _AT_ONCE // slopes[0].numel()))
        return torch.cat(
            [self._norm.largest_fall(part, image.expand_as(part), radius.expand(len(part))) for part in parts]
        )


def linear_layer_of(guard: ClusterGuard) -> nn.Linear:
    """The only layer of a guard whose encoder is linear in the pixels.

    Raises:
        ConfigurationError: the encoder is another one.
    """
    # `children` would leave out a layer that is applied twice.
    parts = [*guard.encoder._modules.values()] if type(guard.encoder) is nn.Sequential else []
    if [*map(type, parts)] == [nn.Flatten, nn.Linear] and not any(map(is_changed, (guard.encoder, *parts))):
        flatten, layer = parts
        if isinstance(layer, nn.Linear) and vars(flatten).items() >= {"start_dim": 1, "end_dim": -1}.items():
            return layer
    raise ConfigurationError(
        "no bounds are known for this network in norms other than linf; they need one linear layer of the pixels, as "
        "make_template_guard makes it, or costs of windows, as make_local_guard makes them"
    )


def bound_in_norm(guard: ClusterGuard, images: Tensor, labels: Tensor, norm: Norm, radii: Tensor) -> Proofs:
    """Bounds on the guard's outputs for every image in a ball of any norm, and what they prove.

    Raises:
        ConfigurationError: no bounds are known for the network in this norm.
    """
    ball = (WindowBall if window_parts(guard) else PixelBall)(guard, images, norm, radii)
    bounds = guard.head.bound_distances(ball, labels)
    box = Interval(ball.lower, ball.upper, error=ball.error, arithmetic=ball.arithmetic)
    # A pixel that is not finite is refused whatever its ball holds; nothing is proved of it.
    is_finite = images.isfinite().flatten(1).all(dim=1)
    proofs = prove(guard, box, Bounds(*bounds), labels)
    return proofs._replace(certificate=type(proofs.certificate)(*(part & is_finite for part in proofs.certificate)))
