"""Linear bounds, which follow a direction backwards through a network of ReLUs: tighter than intervals."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from clusterguard.certification._bounds import (
    Proofs,
    ball_in_service,
    bound_representations,
    normalize_box,
    prove,
    run_encoder,
)
from clusterguard.certification._boxes import Box
from clusterguard.certification._interval_activations import followed_activations
from clusterguard.certification._intervals import Interval, differentiated_steps
from clusterguard.certification._steps import Dependent, Step, recorded_steps
from clusterguard.detection import Arithmetic
from clusterguard.detectors import Bounds, ClusterGuard
from clusterguard.errors import ConfigurationError
from torch import Tensor

_LINEAR = {
    *("linear", "conv1d", "conv2d", "conv3d", "batch_norm", "add", "sub", "neg", "mul", "div", "mean", "pad"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout", "dropout2d", "cat", "stack"),
    *("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "permute", "transpose"),
    *("clone", "to", "float", "double"),
}
_ITERATIONS = 60
_LEARNING_RATE = 0.2
_DECAY = 0.95
_FIRST_SLOPE = 0.2
_ROWS = 256  # pairs of an image and a direction that run at once


class _Line(torch.autograd.Function):
    """A ReLU whose gradient is that of a line: below the ReLU where the incoming gradient is positive, above elsewhere.

    So the gradient of a network's output is that of an affine function below the output, everywhere in the box. The
    gradient of `offset` (B,) is by how much the lines lie below the ReLUs at the inputs. The gradient of `rounding`
    (B,) is the sum of the inputs' rounding errors, weighted by absolute gradients.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, offset: Tensor, rounding: Tensor, slope: Tensor, box: Box) -> Tensor:
        outputs = inputs.clamp_min(0)
        ctx.save_for_backward(inputs, outputs, slope)
        ctx.box = box
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs, outputs, slope), box = ctx.saved_tensors, ctx.box
        is_on, is_unstable = (box.lower >= 0).to(inputs), _is_unstable(box)
        width = torch.where(is_unstable, box.upper - box.lower, 1.0)
        below = torch.where(is_unstable, slope, is_on)
        above = torch.where(is_unstable, box.upper / width, is_on)
        start = torch.where(is_unstable, box.lower, 0.0)
        rising, falling = gradients[0].clamp_min(0), gradients[0].clamp_max(0)
        change = rising * (below * inputs - outputs) + falling * (above * (inputs - start) - outputs)
        result = rising * below + falling * above
        return result, _row_sum(change), _row_sum(result.abs() * box.error), None, None


def tighten(guard: ClusterGuard, images: Tensor, labels: Tensor, radii: Tensor, proofs: Proofs) -> Proofs:
    """The proofs of intervals, with linear bounds for those images that intervals do not prove secure.

    Raises:
        ConfigurationError: the network has a step without linear bounds.
    """
    rows = (~proofs.certificate.is_secure).nonzero().squeeze(1)
    if not len(rows):
        return proofs
    with torch.inference_mode(False):  # tensors made in inference mode have no gradients
        box = _TightBox(guard, ball_in_service(guard, images[rows], radii.expand(len(images))[rows]))
        tight = guard.head.bound_distances(box, labels[rows])
    bounds = Bounds(*(whole.index_put((rows,), part) for whole, part in zip(proofs.bounds, tight, strict=True)))
    return prove(guard, proofs.representations, bounds, labels)


class _TightBox:
    """The box of intervals, and the larger of both bounds along a direction; see `RepresentationBox`."""

    def __init__(self, guard: ClusterGuard, ball: Interval) -> None:
        self._intervals, self._lines = bound_representations(guard, ball), LinearBounds(guard, ball)

    @property
    def lower(self) -> Tensor:
        return self._intervals.lower

    @property
    def upper(self) -> Tensor:
        return self._intervals.upper

    @property
    def error(self) -> Tensor | None:
        return self._intervals.error

    @property
    def arithmetic(self) -> Arithmetic | None:
        return self._intervals.arithmetic

    def lowest(self, directions: Tensor) -> Tensor:
        """The smallest ⟨direction, z⟩ over representations z that the guard computes: (B, S, m) -> (B, S)."""
        by_intervals = self._intervals.lowest(directions) - self._intervals.slack(directions)
        return torch.maximum(by_intervals, self._lines.lowest(directions))

    def lowest_above(self, places: Tensor) -> Tensor:
        """The smallest z_i − z_p over representations z that the guard computes: places p (B,) -> (B, m)."""
        return self._intervals.lowest_above(places)

    def slack(self, directions: Tensor) -> Tensor:
        """Zeros (B, S), because `lowest` holds for what the guard computes."""
        return torch.zeros_like(directions[..., 0])


class LinearBounds:
    """Linear bounds on the representations that a guard computes for all images in a box.

    Between two ReLUs, a network is affine, but for rounding. A box before a ReLU holds the numbers that the network
    computes, and its error says how far these may lie from the affine function of the numbers after the ReLU before it.

    Args:
        guard: guard in eval mode, whose network has only ReLUs beside linear steps.
        ball: box of images (B, C, H, W) in float64, with an arithmetic.

    Raises:
        ConfigurationError: the network has a step without linear bounds.

    Reference:
        Zhang et al., "Efficient neural network robustness certification with general activation functions" (2018).
        Xu et al., "Fast and complete: enabling complete verification with massively parallel incomplete verifiers"
        (2021), for slopes that are optimised.
    """

    def __init__(self, guard: ClusterGuard, ball: Interval) -> None:
        self.guard = guard
        box = normalize_box(guard, ball)
        self._ball = _absorb(Box(box.lower, box.upper, error=box.error, arithmetic=box.arithmetic))
        self._boxes: list[Box] = []

        def follow(box: Box) -> Box:
            wide = _absorb(box)
            self._boxes.append(replace(wide, error=box.error))
            return replace(wide, lower=wide.lower.clamp_min(0), upper=wide.upper.clamp_min(0))

        start = Interval(self._ball.lower, self._ball.upper, error=self._ball.error, arithmetic=self._ball.arithmetic)
        with recorded_steps() as self._steps, followed_activations(follow):
            output = run_encoder(guard, start)
        self._output_error = torch.zeros_like(output.lower) if output.error is None else output.error
        _check_linear(self._steps)

    def lowest(self, directions: Tensor) -> Tensor:
        """A lower bound of ⟨direction, z⟩ over computed representations z: directions (B, S, m) -> (B, S)."""
        rows = torch.arange(len(directions), device=directions.device).repeat_interleave(directions.shape[1])
        parts = zip(rows.split(_ROWS), directions.flatten(0, 1).split(_ROWS), strict=True)
        return torch.cat([self._search(*part) for part in parts]).view(directions.shape[:2])

    def _search(self, rows: Tensor, directions: Tensor) -> Tensor:
        """The best bounds (R,) along directions (R, m) that gradient steps on the slopes of lines find.

        Each direction goes with the ball of the image at its position in `rows` (R,).
        """
        boxes, ball = [_take(box, rows) for box in self._boxes], _take(self._ball, rows)
        output_error = (directions.abs() * self._output_error[rows]).sum(dim=1)
        best = directions.new_full(rows.shape, -torch.inf)
        with torch.enable_grad():
            slopes = [torch.full_like(box.lower, _FIRST_SLOPE).requires_grad_() for box in boxes]
            optimizer = torch.optim.Adam(slopes, lr=_LEARNING_RATE)
            for _ in range(_ITERATIONS):
                bounds = self._bound(directions, ball, boxes, slopes) - output_error
                best = torch.where(bounds > best, bounds.detach(), best)
                optimizer.zero_grad()
                torch.autograd.backward(-bounds.nan_to_num(0.0, 0.0, 0.0).sum(), inputs=slopes)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= _DECAY
                for slope in slopes:
                    slope.data.clamp_(0, 1)
        return best

    def _bound(self, directions: Tensor, ball: Box, boxes: Sequence[Box], slopes: Sequence[Tensor]) -> Tensor:
        """Bounds (R,) by lines with these slopes below the ReLUs; differentiable in the slopes."""
        point = ball.center.requires_grad_()
        offset, rounding = (torch.zeros_like(directions[:, 0]).requires_grad_() for _ in range(2))
        left = [*zip(slopes, boxes, strict=True)]

        def follow(here: Box) -> Box:
            outputs: Tensor = _Line.apply(here.lower, offset, rounding, *left.pop(0))  # type: ignore[no-untyped-call]
            return Box(outputs, outputs, arithmetic=here.arithmetic)

        with recorded_steps() as steps, differentiated_steps(), followed_activations(follow):
            output = run_encoder(self.guard, Interval(point, point, arithmetic=ball.arithmetic))
        _check_same(self._steps, steps)
        values = (directions * output.lower).sum(dim=1)
        slope, below, errors = torch.autograd.grad(
            values.sum(), (point, offset, rounding), create_graph=True, materialize_grads=True
        )
        # All this is computed in float64. Each coefficient is a sum of at most as many products as a layer has numbers.
        # The network's own errors count at least one rounding of each product, in its coarser arithmetic.
        terms = 8 * max(part[0].numel() for part in (ball.lower, directions, *(box.lower for box in boxes)))
        share = terms * torch.finfo(torch.float64).eps / ball.arithmetic.unit  # type: ignore[union-attr]
        bounds = values + below - _row_sum(slope.abs() * ball.radius) - (1 + share) * errors
        return bounds.nan_to_num(nan=-torch.inf)


def _check_linear(steps: Sequence[Step]) -> None:
    for step in steps:
        is_product = step.name == "mul" and sum(isinstance(value, Dependent) for value in step.values) > 1
        if step.name != "relu" and (step.name not in _LINEAR or is_product):
            raise ConfigurationError(
                f"no linear bounds are known for {step.name}; they need networks of ReLUs and linear layers. Take "
                "method='intervals'"
            )


def _check_same(steps: Sequence[Step], others: Sequence[Step]) -> None:
    """Refuse a network that takes other steps for a point than for a box."""
    positions = [{id(step): index for index, step in enumerate(run)} for run in (steps, others)]

    def describe(step: Step, index: dict[int, int]) -> list[Any]:
        return [index.get(id(x.maker), -1) if isinstance(x, Dependent) else x for x in step.values]

    described = (
        Step(a.name, a.is_in_place, describe(a, positions[0])).is_like(
            Step(b.name, b.is_in_place, describe(b, positions[1]))
        )
        for a, b in zip(steps, others, strict=False)
    )
    if len(steps) != len(others) or not all(described):
        raise ConfigurationError(
            "no linear bounds are known for this network: it takes other steps for a point than for a box. Take "
            "method='intervals'"
        )


def _absorb(box: Box) -> Box:
    """The box widened by its error, with the error set to 0."""
    error = torch.zeros_like(box.lower) if box.error is None else box.error
    return Box(box.lower - error, box.upper + error, error=torch.zeros_like(error), arithmetic=box.arithmetic)


def _is_unstable(box: Box) -> Tensor:
    """Where a ReLU is on for some numbers of the box, and off for others."""
    return (box.lower < 0) & (box.upper > 0)


def _take(box: Box, rows: Tensor) -> Box:
    error = None if box.error is None else box.error[rows]
    return Box(box.lower[rows], box.upper[rows], error=error, arithmetic=box.arithmetic)


def _row_sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(dim=1)
