"""Linear bounds, which follow a direction backwards through a network of ReLUs: tighter than intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from clusterguard.certification._bounds import errors_of_network, normalize_box, run_encoder
from clusterguard.certification._boxes import Box
from clusterguard.certification._interval_activations import followed_activations
from clusterguard.certification._intervals import Interval, differentiated_steps
from clusterguard.certification._steps import Dependent, Step, recorded_steps
from clusterguard.detectors import ClusterGuard
from clusterguard.errors import ConfigurationError
from torch import Tensor

_LINEAR = {
    *("linear", "conv1d", "conv2d", "conv3d", "batch_norm", "add", "sub", "neg", "mul", "div", "mean", "pad"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout", "dropout2d", "cat", "stack"),
    *("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "permute", "transpose"),
    *("clone", "to", "float", "double"),
}
_ITERATIONS, _LEARNING_RATE = 60, 0.2
_DECAY = 0.95
_FIRST_SLOPE = 0.2
_ROWS = 256  # pairs of an image and a direction that run at once


class _Line(torch.autograd.Function):
    """A ReLU whose gradient is that of a line: below the ReLU where the incoming gradient is positive, above elsewhere.

    So the gradient of a network's output is that of an affine function below the output, everywhere in the box. `push`
    times the input is subtracted from the output of the network; it is at least 0 wherever the branch allows an input.
    The gradient of `offset` (B,) is by how much the lines lie below the ReLUs at the inputs. The gradient of `rounding`
    (B,) is the sum of the inputs' rounding errors, weighted by absolute gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, offset: Tensor, rounding: Tensor, slope: Tensor, push: Tensor, box: Box
    ) -> Tensor:
        outputs = inputs.clamp_min(0)
        ctx.save_for_backward(inputs, outputs, slope, push)
        ctx.box = box
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs, outputs, slope, push), box = ctx.saved_tensors, ctx.box
        is_on, is_unstable = (box.lower >= 0).to(inputs), _is_unstable(box)
        width = torch.where(is_unstable, box.upper - box.lower, 1.0)
        below = torch.where(is_unstable, slope, is_on)
        above = torch.where(is_unstable, box.upper / width, is_on)
        start = torch.where(is_unstable, box.lower, 0.0)
        rising, falling = gradients[0].clamp_min(0), gradients[0].clamp_max(0)
        change = rising * (below * inputs - outputs) + falling * (above * (inputs - start) - outputs) - push * inputs
        line = rising * below + falling * above
        result = line - push
        # Where the line and the push cancel, the difference itself is rounded, in float64.
        cancelled = 2 * torch.finfo(inputs.dtype).eps / box.arithmetic.unit * (line.abs() + push.abs())
        return result, _row_sum(change), _row_sum((result.abs() + cancelled) * box.error), None, None, None


@dataclass(frozen=True)
class Branches:
    """Parts of balls in which some inputs of ReLUs have a known sign, and what the best bound of each part came from.

    Together, all branches of an image hold every number that the guard computes for an image of the ball.

    Args:
        rows: (R,) image that each branch belongs to.
        bounds: (R,) largest bound so far.
        signs: for each layer of ReLUs, (R, …): 1 where inputs are at least 0, -1 where they are at most 0, 0 elsewhere.
        slopes: for each layer, slopes of the lines below the ReLUs.
        pushes: for each layer, multipliers of the known signs, at least 0.
        choices: (R,) the ReLU, counted through all layers, whose line above gave away the most; -1 if none gave
            anything away.
    """

    rows: Tensor
    bounds: Tensor
    signs: Sequence[Tensor]
    slopes: Sequence[Tensor]
    pushes: Sequence[Tensor]
    choices: Tensor

    def __getitem__(self, rows: Tensor) -> "Branches":
        def take(layers: Sequence[Tensor]) -> list[Tensor]:
            return [layer[rows] for layer in layers]

        signs, slopes, pushes = take(self.signs), take(self.slopes), take(self.pushes)
        return Branches(self.rows[rows], self.bounds[rows], signs, slopes, pushes, self.choices[rows])

    @staticmethod
    def join(parts: Sequence["Branches"]) -> "Branches":
        """All branches of several collections."""

        def layers(name: str) -> list[Tensor]:
            return [torch.cat(layer) for layer in zip(*(getattr(part, name) for part in parts), strict=True)]

        rows, bounds, choices = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "bounds", "choices")
        )
        return Branches(rows, bounds, layers("signs"), layers("slopes"), layers("pushes"), choices)

    def split(self) -> "Branches":
        """Two branches in place of each, in which the chosen ReLU is on and off."""
        both = self[torch.arange(len(self.rows), device=self.rows.device).repeat(2)]
        on = torch.arange(len(both.rows), device=self.rows.device) < len(self.rows)
        first = 0
        for signs in both.signs:
            flat = signs.flatten(1)
            is_chosen = torch.arange(flat.shape[1], device=flat.device) == (both.choices - first)[:, None]
            sign = torch.where(on, 1.0, -1.0).to(flat)[:, None]
            signs.copy_(torch.where(is_chosen, sign, flat).view_as(signs))
            first += flat.shape[1]
        return both


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
        self._steps, self._boxes, output = _run(guard, self._ball)
        self._output_error = torch.zeros_like(output.lower) if output.error is None else output.error
        _check_linear(self._steps)
        _check_batch_axis(guard, self._ball, self._boxes)

    def lowest(self, directions: Tensor) -> Tensor:
        """A lower bound of ⟨direction, z⟩ over computed representations z: directions (B, S, m) -> (B, S)."""
        rows = torch.arange(len(directions), device=directions.device).repeat_interleave(directions.shape[1])
        parts = zip(rows.split(_ROWS), directions.flatten(0, 1).split(_ROWS), strict=True)
        bounds = [self.improve(self.whole(part), along).bounds for part, along in parts]
        return torch.cat(bounds).view(directions.shape[:2])

    def whole(self, rows: Tensor) -> Branches:
        """For each image at a position in `rows` (R,), the one branch that is its whole ball."""
        signs, slopes, pushes = (
            [torch.full_like(box.lower[rows], value) for box in self._boxes] for value in (0.0, _FIRST_SLOPE, 0.0)
        )
        bounds = self._ball.lower.new_full(rows.shape, -torch.inf)
        return Branches(rows, bounds, signs, slopes, pushes, torch.full_like(rows, -1))

    def improve(
        self, branches: Branches, directions: Tensor, *, iterations: int = _ITERATIONS, rate: float = _LEARNING_RATE
    ) -> Branches:
        """The same branches, with better bounds along directions (R, m) that gradient steps find."""
        boxes, ball = self._parts(branches)
        best = branches.bounds
        with torch.enable_grad():
            slopes, pushes = (
                [part.clone().requires_grad_() for part in parts] for parts in (branches.slopes, branches.pushes)
            )
            learned = [*slopes, *(push for push, signs in zip(pushes, branches.signs, strict=True) if signs.any())]
            optimizer = torch.optim.Adam(learned, lr=rate) if learned else None
            for iteration in range(iterations):
                now = replace(branches, slopes=slopes, pushes=pushes)
                bounds, incoming, _ = self._bound(directions, ball, boxes, now)
                best = torch.where(bounds > best, bounds.detach(), best)
                if optimizer is None or iteration == iterations - 1:
                    break
                optimizer.zero_grad()
                with errors_of_network():
                    torch.autograd.backward(-bounds.nan_to_num(0.0, 0.0, 0.0).sum(), inputs=learned)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= _DECAY
                for slope, push in zip(slopes, pushes, strict=True):
                    slope.data.clamp_(0, 1)
                    push.data.clamp_(min=0)
        slopes, pushes = ([part.detach() for part in parts] for parts in (slopes, pushes))
        choices = _choose(boxes, incoming) if boxes else branches.choices
        return replace(branches, bounds=best, slopes=slopes, pushes=pushes, choices=choices)

    def corners(self, branches: Branches, directions: Tensor) -> Tensor:
        """The corner of each ball at which the affine function below ⟨direction, z⟩ is smallest, as signs (R, …)."""
        boxes, ball = self._parts(branches)
        with torch.enable_grad():
            return -self._bound(directions, ball, boxes, branches)[2].sign()

    def _parts(self, branches: Branches) -> tuple[list[Box], Box]:
        """The boxes before the ReLUs in each branch, and the balls of the branches."""
        pairs = zip(self._boxes, branches.signs, strict=True)
        return [_cut(_take(box, branches.rows), signs) for box, signs in pairs], _take(self._ball, branches.rows)

    def _bound(
        self, directions: Tensor, ball: Box, boxes: Sequence[Box], branches: Branches
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Bounds (R,) by the lines of branches, differentiable in their slopes and pushes.

        Returns:
            The bounds, the gradients that come into each layer of ReLUs, and that of the images.
        """
        point = ball.center.requires_grad_()
        offset, rounding = (torch.zeros_like(directions[:, 0]).requires_grad_() for _ in range(2))
        pushes = [signs * push for signs, push in zip(branches.signs, branches.pushes, strict=True)]
        left, after = [*zip(branches.slopes, pushes, boxes, strict=True)], []

        def follow(here: Box) -> Box:
            line = left.pop(0)
            if here.lower.shape != line[0].shape:
                raise _other_axis()
            outputs: Tensor = _Line.apply(here.lower, offset, rounding, *line)  # type: ignore[no-untyped-call]
            after.append(outputs)
            return Box(outputs, outputs, arithmetic=here.arithmetic)

        with recorded_steps() as steps, differentiated_steps(), followed_activations(follow):
            output = run_encoder(self.guard, Interval(point, point, arithmetic=ball.arithmetic))
        _check_same(self._steps, steps)
        values = (directions * output.lower).sum(dim=1)
        with errors_of_network():
            slope, change, errors, *incoming = torch.autograd.grad(
                values.sum(), (point, offset, rounding, *after), create_graph=True, materialize_grads=True
            )
        errors = errors + (directions.abs() * self._output_error[branches.rows]).sum(dim=1)
        # All this is computed in float64. Each coefficient is a sum of at most as many products as a layer has numbers.
        # The network's own errors count at least one rounding of each product, in its coarser arithmetic.
        terms = 8 * max(part[0].numel() for part in (ball.lower, directions, *(box.lower for box in boxes)))
        share = terms * torch.finfo(torch.float64).eps / ball.arithmetic.unit  # type: ignore[union-attr]
        bounds = values + change - _row_sum(slope.abs() * ball.radius) - (1 + share) * errors
        return bounds.nan_to_num(nan=-torch.inf), [part.detach() for part in incoming], slope.detach()


def _run(guard: ClusterGuard, ball: Box) -> tuple[list[Step], list[Box], Interval]:
    """The steps of a network, the boxes before its ReLUs, and its output, for balls of normalised images."""
    boxes: list[Box] = []

    def follow(box: Box) -> Box:
        wide = _absorb(box)
        boxes.append(replace(wide, error=box.error))
        return replace(wide, lower=wide.lower.clamp_min(0), upper=wide.upper.clamp_min(0))

    start = Interval(ball.lower, ball.upper, error=ball.error, arithmetic=ball.arithmetic)
    with recorded_steps() as steps, followed_activations(follow):
        output = run_encoder(guard, start)
    return steps, boxes, output


def _check_batch_axis(guard: ClusterGuard, ball: Box, boxes: Sequence[Box]) -> None:
    """Refuse a network in which a ReLU gets numbers whose first axis is not that of the images.

    The axis must grow with the number of images, and no other may.
    """
    count = len(ball.lower)
    _, longer, _ = _run(guard, _take(ball, torch.arange(count + 1, device=ball.device) % count))
    for box, other in zip(boxes, longer, strict=True):
        if len(box.lower) != count or other.lower.shape != (count + 1, *box.lower.shape[1:]):
            raise _other_axis()


def _other_axis() -> ConfigurationError:
    return ConfigurationError(
        "no linear bounds are known for this network: a ReLU gets numbers whose first axis is not that of the images. "
        "Take method='intervals'"
    )


def _cut(box: Box, signs: Tensor) -> Box:
    """The part of a box that has these signs."""
    lower = torch.where(signs > 0, box.lower.clamp_min(0), box.lower)
    return replace(box, lower=lower, upper=torch.where(signs < 0, box.upper.clamp_max(0), box.upper))


def _choose(boxes: Sequence[Box], incoming: Sequence[Tensor]) -> Tensor:
    """The ReLU of each branch (R,) whose line above gives away the most, as `Branches.choices` counts them.

    Lines below are left out, because gradient steps choose their slopes.
    """
    given = []
    for box, gradient in zip(boxes, incoming, strict=True):
        width = (box.upper - box.lower).clamp_min(torch.finfo(box.lower.dtype).tiny)
        lost = gradient.clamp_max(0) * box.lower * box.upper / width
        given.append(torch.where(_is_unstable(box), lost, 0.0).flatten(1))
    most, places = torch.cat(given, dim=1).max(dim=1)
    return torch.where(most > 0, places, -1)


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
