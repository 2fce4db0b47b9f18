"""Makes a guard whose templates begin as images of a loader."""

from collections.abc import Sequence

import torch
from clusterguard._support import check_images, check_labels, check_numbers
from clusterguard.detection import Loader, Pairs, Unpack
from clusterguard.detectors._guard import ClusterGuard
from clusterguard.detectors._templates import NearestTemplate
from clusterguard.errors import ConfigurationError, InputError
from torch import Tensor, nn
from torch.nn import functional

_CONTRAST = 0.5  # of the first templates; 1 is the most that a template may have


def make_template_guard(
    loader: Loader,
    num_classes: int,
    *,
    templates: int = 50,
    class_names: Sequence[str] | None = None,
    unpack: Unpack | None = None,
) -> ClusterGuard:
    """Make a guard that compares images with templates, pixel by pixel, and that has certificates in l0 and l1.

    A template gives each value of an image a cost that is linear in it. At first each template is one of the images,
    slightly blurred: a pixel costs more the farther it is from that of the template. `TemplateTrainer` then trains the
    templates, which this guard needs before use.

    Such a guard suits small images whose objects have one size and place, such as digits. It does not suit photos.

    Args:
        loader: batches of images (B, C, H, W) in [0, 1] and labels (B,), with at least `templates` images of each
            class; the first ones are taken.
        num_classes: number K of classes, at least 2.
        templates: number of templates of each class, positive. The time of certificates grows with it.
        class_names: names of the classes, as in `ClusterGuard`.
        unpack: function that finds images and labels in batches of another form.

    Returns:
        A guard with a `NearestTemplate` head, whose encoder is one linear layer of the pixels.

    Raises:
        ConfigurationError: there are too few classes or templates.
        InputError: images or labels have a wrong shape, dtype or range, or a class has too few images.

    Example:
        >>> images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 2
        >>> guard = make_template_guard([(images, labels)], num_classes=2, templates=3)
        >>> guard.head
        NearestTemplate(num_classes=2, representation_dim=6)
        >>> guard.distances(images).shape
        torch.Size([40, 2])
    """
    check_numbers(whole=True, num_classes=num_classes, templates=templates)
    if templates < 1:
        raise ConfigurationError(f"expected at least 1 template of each class, got {templates}")
    head = NearestTemplate(num_classes, num_classes * templates)
    images = _first_of_each_class(loader, num_classes, templates, unpack)
    guard = ClusterGuard(
        nn.Flatten(), head=head, mean=0.5, std=1.0, example=images[:1], class_names=class_names, classifier="new"
    )
    _, layer = guard.encoder.children()
    assert isinstance(layer, nn.Linear)
    smooth = functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    with torch.no_grad():
        layer.weight.copy_(_CONTRAST * (1 - 2 * smooth).flatten(1))
    project_templates(layer, images.shape[1])
    return guard


def project_templates(layer: nn.Linear, channels: int) -> None:
    """Make every cost at least 0, and let no pixel add more than 1 to it, for pixels that are shifted by -0.5.

    Args:
        layer: layer from the pixels to the costs of templates, which is changed in place.
        channels: number of channels of a pixel, which share what it may add.
    """
    with torch.no_grad():
        layer.weight.clamp_(-1 / channels, 1 / channels)
        layer.bias.copy_(torch.maximum(layer.bias, layer.weight.abs().sum(dim=1) / 2))


def _first_of_each_class(loader: Loader, num_classes: int, count: int, unpack: Unpack | None) -> Tensor:
    """The first images of every class, class by class: (K·count, C, H, W)."""
    chosen: list[list[Tensor]] = [[] for _ in range(num_classes)]
    shapes: set[tuple[int, ...]] = set()
    for images, labels in Pairs(loader, unpack):
        check_images(images)
        check_labels(labels, images, num_classes)
        for label, group in enumerate(chosen):
            group.extend(images[labels.to(images.device) == label][: count - len(group)])
        shapes |= {tuple(images.shape[1:])}
        if len(shapes) > 1:
            raise InputError(f"expected images of one shape, got {sorted(shapes)}; resize or crop them")
        if all(len(group) == count for group in chosen):
            return torch.stack([image for group in chosen for image in group])
    short = [f"{label} has {len(group)}" for label, group in enumerate(chosen) if len(group) < count]
    raise InputError(
        f"expected {count} images of each class for its templates, but class {', class '.join(short[:5])}; pass more "
        "images, or ask for fewer templates"
    )
