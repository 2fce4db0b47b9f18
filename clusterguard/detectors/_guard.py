"""ClusterGuard: a backbone and the Gaussian mixture behind it, the module that users hold."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from clusterguard._support import Call, CompiledCall, call, copy_module, names_in_eval_mode, to_eval_mode
from clusterguard.detection import Evidence
from clusterguard.detectors._backbones import choose_normalization, choose_num_classes, make_encoder
from clusterguard.detectors._base import DetectorModule, ImageShape, Normalize, run_network, valid_images
from clusterguard.detectors._folders import describe_backbone, find_folder, load_guard, save_guard
from clusterguard.detectors._heads import GaussianClusters, Head
from clusterguard.detectors._model_card import Measured
from clusterguard.errors import ConfigurationError
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class ClusterGuard(DetectorModule, ModelHubMixin):
    """An image classifier that notices adversarial examples: a drop-in for the classifier it wraps.

    The backbone's classifier is replaced by one with m outputs, the representation. An image is labelled by the
    closest of K Gaussian clusters and refused if it lies further from that cluster's centre than the threshold.
    Untrained it knows nothing: fine-tune it with `AdversarialClusterTrainer`, then fit thresholds with
    `Calibrator`.

    A new guard is in eval mode, and training leaves it in eval mode. Modules that are in eval mode within a backbone in
    train mode, such as a frozen BatchNorm, stay in eval mode while the guard is trained; they are named in `frozen`.

    Args:
        backbone: any timm model, any torchvision classification model, or any module that maps images to (B, D).
            It is copied, with its weights; the original stays as it is. Wrappers that compute the same as the model in
            them are left out: `nn.DataParallel`, a compiled or averaged model, an `nn.Sequential` that only normalises
            first, a module that only calls the model.
        num_classes: K; None takes the backbone's own number of classes.
        representation_dim: m, a multiple of K; None means K.
        center_scale: M, how far the class centres lie from the origin, along each of their m/K coordinates; None
            means 10.
        mean: per channel, subtracted from images in [0, 1]; None takes what the backbone was trained with
            (timm: its configuration; torchvision: ImageNet's; other modules: nothing).
        std: per channel, the divisor after that.
        head: what compares representations with classes; it is copied. None takes `GaussianClusters`, the paper's, of
            the two options above, which go with that alone.
        example: (B, C, H, W) images for a module whose output width cannot be found without running it. Their shape
            becomes the `image_shape`, unless one is given.
        image_shape: (C, H, W) of the images that the guard takes; images of another shape are an error. None takes
            that of the example or else of the first images that it is trained or calibrated on, "any" leaves it free.
        class_names: K different names in the order of the labels, which go where the guard goes; None if they are not
            known.

    Raises:
        ConfigurationError: an option that cannot work, or num_classes neither given nor found.
        InputError: an example of another shape than image_shape.
        UnsupportedBackboneError: the backbone has no classifier to replace and no (B, D) output, or weights that
            cannot be trained here.

    Warns:
        UserWarning: num_classes differs from the backbone's own, or a model's normalisation or classifier is lost
            because what stands around it does not compute the same.

    Reference:
        arXiv 2012.03483, section 3.2 and figure 4.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), num_classes=10)
        >>> guard(torch.rand(4, 1, 28, 28)).shape  # logits, as any classifier
        torch.Size([4, 10])
        >>> guard.distances(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        *,
        representation_dim: int | None = None,
        center_scale: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: Head | None = None,
        example: Tensor | None = None,
        image_shape: ImageShape | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        replaced = "the guard replaces that classifier anyway, and tells as many classes apart as it was told to"
        wanted = _num_classes_of(head, num_classes, representation_dim, center_scale)
        classes = choose_num_classes(backbone, wanted, consequence=replaced)
        super().__init__(classes, image_shape=image_shape)
        self.class_names = class_names
        self.normalize = Normalize(*choose_normalization(backbone, mean, std))
        scale = 10.0 if center_scale is None else center_scale
        self.head = copy_module(head) if head else GaussianClusters(classes, representation_dim, center_scale=scale)
        shape = self.image_shape if isinstance(self.image_shape, tuple) else None
        self.encoder = make_encoder(backbone, self.head.representation_dim, example=example, image_shape=shape)
        self._encode: Call = call
        if example is not None:
            self.learn_image_shape(example)
        if self.encoder.training:  # so what is in eval mode within it was put there on purpose
            self.frozen = names_in_eval_mode(self)
        to_eval_mode(self)

    def represent(self, images: Tensor) -> Tensor:
        """The representation z: images (B, C, H, W) in [0, 1] -> (B, m)."""
        normalised = self.normalize(images)
        self.check_image_shape(images)
        return run_network(partial(self._encode, self.encoder), normalised)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: images (B, C, H, W) in [0, 1] -> (B, K). Their softmax is the mixture's posterior."""
        return self.head.logits(self.represent(images))

    def distances(self, images: Tensor) -> Tensor:
        """Distance to every class centre: images (B, C, H, W) in [0, 1] -> (B, K), +inf for images to be refused."""
        visible, is_valid = valid_images(images)
        return self.head.distances(self.represent(visible)).masked_fill(~is_valid, torch.inf)

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores −d and suspicion d of images (B, C, H, W) in [0, 1], d (B, K) the distances."""
        distances = self.distances(images)
        return Evidence(-distances, distances)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run the encoder through `torch.compile`, in place: detection, attacks and training all gain.

        Saving and exporting work as before; copies are not compiled. Call it on the device where the guard shall stay.
        The first time a gradient is taken it is compared with the eager one: torch.compile gives some networks wrong
        gradients without a word, and then attacks fail and the guard looks robust.

        Args:
            *args: of `torch.compile`.
            **kwargs: of `torch.compile`; ``mode="reduce-overhead"`` takes CUDA graphs, for small batches on a GPU.

        Raises:
            ConfigurationError: not here, but at the first gradient, if it is wrong.

        Example:
            >>> import torch
            >>> guard = ClusterGuard(nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 2, 2))
            >>> guard.compile(backend="eager")
            >>> guard.distances(torch.rand(5, 1, 2, 2)).shape
            torch.Size([5, 2])
        """
        self._encode = CompiledCall(*args, **kwargs)  # module.compile() skips nn.Sequential silently

    def save_pretrained(  # type: ignore[override]  # the Hub's version takes options of its own and returns an address
        self,
        save_directory: str | Path,
        *,
        training: Mapping[str, Any] | None = None,
        evaluation: Measured | None = None,
        config: Mapping[str, Any] | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the guard as a folder: `model.safetensors`, `config.json`, and a model card in `README.md`.

        An interrupted save leaves the old guard, or a folder that `from_pretrained` refuses, never a mixture.

        Args:
            save_directory: the folder; an older guard in it is replaced, other files stay.
            training: how it was trained, anything that JSON has; recorded as it is.
            evaluation: what `evaluate` found about this guard at these thresholds; its figures go into the card.
            config: the name under which `push_to_hub` hands over `training`.
            model_card_kwargs: in which `push_to_hub` hands over ``{"evaluation": ...}``.

        Raises:
            PersistenceError: the folder holds another model's files.
            ConfigurationError: training that JSON has no words for, or an evaluation at other thresholds.

        Warns:
            UserWarning: nothing rebuilds the backbone, so loading will need the module. Models of timm and torchvision
                can be rebuilt, and so can an `nn.Sequential` of torch's own layers.

        Example:
            >>> import tempfile, torch
            >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU())
            >>> guard, images = ClusterGuard(backbone, num_classes=10), torch.rand(4, 1, 28, 28)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     guard.save_pretrained(folder, training={"epochs": 30})
            ...     again = ClusterGuard.from_pretrained(folder)
            >>> torch.equal(again.distances(images), guard.distances(images))
            True
        """
        records: dict[str, Any] = {"training": config if training is None else training, "evaluation": evaluation}
        options = {
            "num_classes": self.num_classes,
            "head": {"type": type(self.head).__qualname__, "description": self.head.describe()},
            **self.head.options(),
            "mean": self.normalize.mean.flatten().tolist(),
            "std": self.normalize.std.flatten().tolist(),
        }
        shape = self.image_shape if isinstance(self.image_shape, tuple) else None
        recipe = describe_backbone(self.encoder, self.head.representation_dim, shape)
        records.update(model_card_kwargs or {})
        save_guard(self, Path(save_directory), backbone=recipe, options=options, **records)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the Hub's version takes any option
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: nn.Module | None = None,
        head: Head | None = None,
        example: Tensor | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "Self":
        """The guard that `save_pretrained` or `push_to_hub` wrote, on the CPU, in eval mode, calibration restored.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hugging Face Hub.
            backbone: the module the guard was made with, weights aside; None rebuilds it from `config.json`.
            head: the head it was made with, unless that is the paper's; its tensors are replaced by the saved ones.
            example: as in `ClusterGuard`, if that module needed one.
            revision: on the Hub: a branch, tag or commit.
            token: for the Hub; None takes the one that is logged in.
            cache_dir: where downloads are kept.
            force_download: fetch it even if it is there.
            local_files_only: do not ask the Hub.

        Returns:
            The guard; its tensors are the saved ones, bit by bit.

        Raises:
            PersistenceError: it is missing, damaged, foreign, too new, or does not fit the backbone.

        Example:
            See `save_pretrained`.
        """
        folder = find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return load_guard(
            lambda module, options: cls(
                module,
                options["num_classes"],
                **_head_options(options, head),
                mean=options["mean"],
                std=options["std"],
                example=example,
                image_shape=options.get("image_shape"),  # guards of version 0.1 do not tell it
            ),
            folder,
            backbone=backbone,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        old, new = f"{prefix}clusters.", f"{prefix}head."  # guards of version 0.1 had no other head
        for name in [name for name in state_dict if name.startswith(old)]:
            state_dict[new + name.removeprefix(old)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *others)


def _num_classes_of(head: Head | None, num_classes: int | None, *own: object) -> int | None:
    """K as it was asked for; options of the paper's head beside another one are refused."""
    if head is None:
        return num_classes
    if not isinstance(head, Head):
        raise ConfigurationError(f"expected a head that is a clusterguard.detectors.Head, got {type(head).__name__}")
    if any(option is not None for option in own):
        raise ConfigurationError(
            "expected representation_dim and center_scale, or a head, got both; give the head its own"
        )
    if num_classes not in (None, head.num_classes):
        raise ConfigurationError(f"expected num_classes as the head has, {head.num_classes}, got {num_classes}")
    return head.num_classes


def _head_options(options: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """What makes the head of a saved guard again."""
    name = options.get("head", {}).get("type", GaussianClusters.__qualname__)
    if head is not None and type(head).__qualname__ == name:
        return {"head": head}
    if head is not None or name != GaussianClusters.__qualname__:
        raise ConfigurationError(f"this guard was saved with the head {name}; pass one as it was made with as head=")
    return {"representation_dim": options["representation_dim"], "center_scale": options["center_scale"]}
