"""Our exact projection onto the intersection of an l1 ball and the box [0, 1], compared with two others."""

from importlib import import_module

import numpy as np
import torch
from clusterguard.attacks import get_norm

from benchmarks.studies.speed._measure import Comparison

_BATCH, _EPS = 1000, 12.0
_AT_ONCE = 250  # images in a compiled call, so few that intermediate tensors stay in the cache


def project_rows(images: np.ndarray, candidates: np.ndarray, eps: float) -> np.ndarray:
    """Project images (n, D) one by one, by bisection on the multiplier in float64."""
    projected = np.empty_like(images)
    for row, (image, candidate) in enumerate(zip(images, candidates, strict=True)):
        change, low, high = candidate - image, 0.0, np.abs(candidate - image).max()
        for _ in range(50):
            shift = (low + high) / 2
            moved = np.clip(image + np.sign(change) * np.maximum(np.abs(change) - shift, 0), 0, 1)
            low, high = (shift, high) if np.abs(moved - image).sum() > eps else (low, shift)
        projected[row] = np.clip(image + np.sign(change) * np.maximum(np.abs(change) - high, 0), 0, 1)
    return projected


def compare_projections(device: torch.device) -> list[Comparison]:
    """Compare our projection with NumPy image by image, and with that of Foolbox, which is not exact."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_BATCH, 3, 32, 32, generator=generator).to(device)
    candidates = images + 0.05 * torch.randn(_BATCH, 3, 32, 32, generator=generator).to(device)
    changes, norm, wrap = (candidates - images).flatten(1), get_norm("l1"), import_module("eagerpy").astensor
    flat, aims = (part.flatten(1).double().cpu().numpy() for part in (images, candidates))
    onto_ball = import_module("foolbox.attacks.fast_minimum_norm").project_onto_l1_ball

    def ours() -> torch.Tensor:
        return norm.project(images, candidates, _EPS)

    fused = torch.compile(norm.project, dynamic=False)

    def compiled() -> list[torch.Tensor]:
        parts = zip(images.split(_AT_ONCE), candidates.split(_AT_ONCE), strict=True)
        return [fused(part, aimed, _EPS) for part, aimed in parts]

    def numpy() -> torch.Tensor:
        return torch.from_numpy(project_rows(flat, aims, _EPS)).view_as(images)

    def foolbox() -> torch.Tensor:
        shorter: torch.Tensor = onto_ball(wrap(changes), wrap(torch.full((_BATCH,), _EPS, device=device))).raw
        return (images + shorter.view_as(images)).clamp(0, 1)

    def nearest(mine: torch.Tensor, other: torch.Tensor) -> None:
        torch.testing.assert_close(mine.double().cpu(), other, rtol=0, atol=1e-4)

    def no_farther(mine: torch.Tensor, other: torch.Tensor) -> None:
        # Foolbox projects onto the ball and then clips. The result is inside both, but not the nearest point.
        distances = [(projected - candidates).flatten(1).norm(dim=1) for projected in (mine, other)]
        assert (distances[0] <= distances[1] * (1 + 1e-5)).all()

    setting = f"l1 ∩ box, {_BATCH} × 3,072"
    return [
        Comparison(f"{setting}, against NumPy row by row", ours, numpy, target=50, check=nearest),
        Comparison(
            f"{setting}, compiled, {_AT_ONCE} at once, against NumPy row by row",
            compiled,
            numpy,
            target=50,
            check=lambda mine, other: nearest(torch.cat(mine), other),
        ),
        Comparison(f"{setting}, against Foolbox (not exact)", ours, foolbox, target=1, check=no_farther),
    ]
