"""The random search that fits a norm."""

from clusterguard.attacks._base import BuiltInAttack
from clusterguard.attacks._norms import get_norm
from clusterguard.attacks._patch_attack import PatchAttack
from clusterguard.attacks._random_search import SparseRS, Square


def make_random_search(norm: str, *, eps: float, queries: int, batch_size: int | None = None) -> BuiltInAttack:
    """The random search that fits a norm: over squares, over single pixels, or over places of a patch.

    Args:
        norm: norm of the ball, a name of `clusterguard.attacks.NORMS`.
        eps: radius of the ball.
        queries: largest number of queries for each image; gradient steps of the search over patches count as well.
        batch_size: number of images to attack at a time, as in `BuiltInAttack`.
    """
    over = get_norm(norm).searched_over
    if over == "patches":
        rounds = max(2, queries // (PatchAttack.proposals + PatchAttack.steps))
        return PatchAttack(eps=eps, rounds=rounds, batch_size=batch_size)
    if over == "pixels":
        return SparseRS(eps=int(eps), queries=queries, batch_size=batch_size)
    return Square(norm=norm, eps=eps, queries=queries, batch_size=batch_size)
