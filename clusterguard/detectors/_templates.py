"""A head that compares an image with templates, of which each class has several."""

from typing import final

import torch
from clusterguard._support import check_tensor
from clusterguard.detectors._head_bounds import Bounds, RepresentationBox
from clusterguard.detectors._heads import Head
from clusterguard.errors import ConfigurationError
from einops import rearrange
from torch import Tensor
from torch.nn.functional import one_hot


@final
class NearestTemplate(Head):
    """Takes the representation for costs of templates, m/K of each class, and the smallest cost for the distance.

    The first m/K coordinates of a representation are the costs of the templates of class 0, and so on. Behind one
    linear layer of the pixels, a cost says how badly the image agrees with a template. `make_template_guard` makes such
    a guard, and `TemplateTrainer` trains it so that no pixel adds more than 1 to a cost.

    Args:
        num_classes: number K of classes, at least 2.
        representation_dim: number m of all templates, a multiple of K.

    Raises:
        ConfigurationError: m is no positive multiple of K, or K < 2.

    Reference:
        After Pal, Vidal & Sulam, "Certified robustness against sparse adversarial perturbations via data localization"
        (2024), who take boxes for templates and count the pixels outside of a box.

    Example:
        >>> head = NearestTemplate(num_classes=2, representation_dim=4)
        >>> head.distances(torch.tensor([[9.0, 3.0, 7.0, 5.0]]))
        tensor([[3., 5.]])
    """

    def __init__(self, num_classes: int, representation_dim: int) -> None:
        super().__init__(num_classes, representation_dim)
        if representation_dim % num_classes:
            raise ConfigurationError(
                f"expected representation_dim to be a multiple of num_classes={num_classes}, got {representation_dim}"
            )

    def extra_repr(self) -> str:
        """The values of K and m, which are shown when the module is printed."""
        return f"num_classes={self.num_classes}, representation_dim={self.representation_dim}"

    def distances(self, representations: Tensor) -> Tensor:
        """The smallest cost of the templates of every class, and 0 where it is negative: (B, m) -> (B, K)."""
        return self._costs(representations).amin(dim=2).clamp_min(0)

    def energies(self, representations: Tensor) -> Tensor:
        """Twice the distances: (B, m) -> (B, K)."""
        return 2 * self.distances(representations)

    def adversarial_energy(self, representations: Tensor) -> Tensor:
        """Minus twice the smallest distance: (B, m) -> (B,). The worse all templates fit, the likelier an attack."""
        return -self.energies(representations).amin(dim=1)

    @property
    def packing_radius(self) -> Tensor:
        """0, because templates of different classes may be alike, ()."""
        return torch.zeros(())

    def describe(self) -> str:
        """The number of templates in words, for model cards."""
        return f"{self.representation_dim // self.num_classes} templates for each class"

    def bound_distances(self, box: RepresentationBox, labels: Tensor) -> Bounds:
        """Bounds on computed or exact distances.

        Args:
            box: box of B representations.
            labels: (B,) class labels.
        """
        error = torch.zeros_like(box.lower) if box.error is None else box.error
        lower, upper = box.lower - error, box.upper + error
        nearest, most, column = self.distances(lower), self.distances(upper), labels[:, None].long()
        farthest = most.gather(1, column)
        # The label's distance is at most the cost of any one of its templates. The best one at the centre is taken.
        centers = self._costs((lower + upper) / 2)[torch.arange(len(labels), device=labels.device), labels.long()]
        template = labels.long() * centers.shape[1] + centers.argmin(dim=1)
        above = self._costs(box.lowest_above(template)).amin(dim=2)
        gaps = torch.maximum(above.clamp_max(nearest), nearest - farthest)  # a negative cost counts as 0
        # A lead is a difference of squares, so of distances times their sum, which is between these bounds.
        sums = torch.where(gaps > 0, nearest + nearest.gather(1, column), most + farthest)
        is_label = one_hot(labels.long(), self.num_classes).bool()
        return Bounds(nearest, (gaps * sums).masked_fill(is_label, 0), farthest.squeeze(1))

    def _costs(self, representations: Tensor) -> Tensor:
        check_tensor(representations, "representations", "B", self.representation_dim)
        wide = representations.to(torch.promote_types(representations.dtype, torch.float32))
        return rearrange(wide, "b (k j) -> b k j", k=self.num_classes)
