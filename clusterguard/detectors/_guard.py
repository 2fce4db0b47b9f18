"""ClusterGuard, the module that users work with: a backbone followed by a head such as a Gaussian mixture."""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from clusterguard._support import (
    CompiledCall,
    NetworkCall,
    call_uncompiled,
    check_images,
    copy_module,
    is_traced,
    names_in_eval_mode,
    to_eval_mode,
)
from clusterguard.detection import Evidence
from clusterguard.detectors._backbone_recipes import describe_backbone
from clusterguard.detectors._backbones import (
    KeptLogits,
    adapt_backbone,
    check_module,
    choose_normalization,
    choose_num_classes,
    find_class_names,
    find_num_classes,
)
from clusterguard.detectors._base import DetectorModule, ImageShape, Normalize, valid_images
from clusterguard.detectors._folders import OtherHeadError, find_folder, load_guard, save_guard
from clusterguard.detectors._heads import GaussianClusters, Head
from clusterguard.detectors._known_heads import HEADS
from clusterguard.detectors._model_card import CardDetails, EvaluationForCard
from clusterguard.detectors._networks import run_network
from clusterguard.errors import ConfigurationError, InputError, in_one_line
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

_USUAL_LOGIT = 10  # usual logit of the label that a trained classifier gives to an image
_KNOWS_NOTHING = "its new classifier knows nothing yet, so train the guard before use"


class ClusterGuard(DetectorModule, ModelHubMixin):
    """An image classifier that notices adversarial examples. It can replace the classifier that it wraps.

    The classifier of the backbone is replaced by a layer with m outputs, the representation. An image gets the label of
    the closest of K classes. It is refused if its distance to this class is larger than the threshold. The head says
    what the distance is: that of the paper has a Gaussian cluster for each class, and takes the Euclidean distance to
    its centre. If the backbone is a classifier of K classes, the new layer starts with its weights, and the nearest
    cluster is that of the largest logit. So a new guard gives every image the label that it had before. Fit its
    thresholds with `Calibrator`. Only training with `AdversarialClusterTrainer` makes it notice adversarial examples
    that were made against it.

    A new guard is in eval mode, and training leaves it in eval mode. If the backbone is in train mode but some of its
    modules are in eval mode, such as a frozen BatchNorm, these stay in eval mode while the guard is trained. Their
    names are in `frozen`.

    Args:
        backbone: timm model, torchvision classification model, image classifier of transformers, or any module that
            maps images to (B, D). It is copied with its weights, and the original is not changed. Wrappers that compute
            the same as the model inside them are left out: `nn.DataParallel`, a compiled or averaged model, an
            `nn.Sequential` that only normalises images before the model, and a module that only calls the model.
        num_classes: number K of classes; None takes the number that the backbone has.
        representation_dim: width m of the representation, a multiple of K; None means K.
        center_scale: scale M of the class centres, which lie at M on each of their m/K coordinates and at 0 on all
            others; None means 10.
        mean: mean per channel, subtracted from images in [0, 1]. None takes what the backbone was trained with: timm's
            configuration of the model, ImageNet's mean for torchvision, that of the image processor for transformers,
            and 0 for other modules.
        std: standard deviation per channel, by which images are divided after that. None is as for `mean`, with 1 for
            other modules.
        classifier: use of the backbone's classifier. With "keep", the new layer starts with its weights, and the
            representation with its logits times M/10, without an offset that all logits share. The factor is M/10
            because the largest logit of a trained classifier is about 10. A module that returns K numbers is taken for
            a classifier. With "new", the last layer starts with random weights. "auto" means "keep" where possible.
        head: module that compares representations with classes; it is copied. None takes the `GaussianClusters` of the
            paper, made with `representation_dim` and `center_scale`. A head that is passed does not allow these two
            options. With a head of another class than `GaussianClusters`, no classifier is kept.
        example: (B, C, H, W) images for a module whose output width cannot be found without running it. Their shape
            becomes the `image_shape`, unless one is passed.
        image_shape: shape (C, H, W) of the images that the guard takes; images of another shape are an error. None
            takes the shape of the example, or else that of the first images that the guard is trained or calibrated on.
            "any" allows all shapes.
        class_names: K different names in the order of the labels, which are saved and exported with the guard; None
            takes those of the configuration of a transformers model, if there are any.

    Raises:
        ConfigurationError: an option cannot work, num_classes is None and the backbone does not tell it either, or the
            classifier should be kept and cannot be.
        InputError: the example has another shape than image_shape.
        UnsupportedBackboneError: the backbone has no classifier to replace and no (B, D) output, or its weights cannot
            be trained here.

    Warns:
        UserWarning: the classifier is lost, because num_classes differs from the number that the backbone has or one
            linear layer cannot stand for it; or the normalisation or classifier of a model inside the backbone is not
            found because the module around this model may do more than call it.

    Reference:
        arXiv 2012.03483, section 3.2 and figure 4.

    Example:
        >>> import torch
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), num_classes=10)
        >>> guard(torch.rand(4, 1, 28, 28)).shape  # logits, like any classifier
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
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        classifier: Literal["auto", "keep", "new"] = "auto",
        head: Head | None = None,
        example: Tensor | None = None,
        image_shape: ImageShape | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(backbone, DetectorModule):
            raise ConfigurationError(
                f"expected a classifier or a network, got a {type(backbone).__name__}, which is a detector already; "
                "use it as it is, make a copy with copy.deepcopy(guard), or pass the model that it was made from"
            )
        if classifier not in ("auto", "keep", "new"):
            raise ConfigurationError(f'expected classifier to be "auto", "keep" or "new", got {classifier!r}')
        if classifier == "keep" and head and type(head) is not GaussianClusters:
            raise ConfigurationError(
                f'expected GaussianClusters as the head beside classifier="keep", got {type(head).__name__}'
            )
        replaced = f"the guard has as many classes as you asked for, and {_KNOWS_NOTHING}"
        wanted = _num_classes_of(head, num_classes, representation_dim, center_scale)
        classes = choose_num_classes(backbone, wanted, consequence=replaced)
        super().__init__(classes, image_shape=image_shape)
        self.class_names = find_class_names(backbone, classes) if class_names is None else class_names
        self.normalize = Normalize(*choose_normalization(backbone, mean, std))
        scale = 10.0 if center_scale is None else center_scale
        self.head = copy_module(head) if head else GaussianClusters(classes, representation_dim, center_scale=scale)
        shape = self.image_shape if isinstance(self.image_shape, tuple) else None
        self.encoder = self._adapt(backbone, classifier, example, shape)
        self._join_encoder()
        self._encode: NetworkCall = call_uncompiled
        if example is not None:
            self.learn_image_shape(example)
        if self.encoder.training:  # then a module in eval mode was frozen on purpose
            self.frozen = names_in_eval_mode(self)
        to_eval_mode(self)

    def _adapt(
        self, backbone: nn.Module, classifier: str, example: Tensor | None, shape: tuple[int, int, int] | None
    ) -> nn.Module:
        """Make the encoder, which keeps the logits of a classifier if that is wanted and possible."""
        keep, dim = None, self.head.representation_dim
        if type(self.head) is GaussianClusters and classifier != "new":
            keep = KeptLogits(self.num_classes, float(self.head.center_scale) / _USUAL_LOGIT)
        encoder, had_classifier, keeps = adapt_backbone(backbone, dim, keep=keep, example=example, image_shape=shape)
        if classifier == "keep" and not keeps:
            raise ConfigurationError(
                f"expected a classifier of {self.num_classes} classes whose last layer is linear, got a "
                f'{type(backbone).__name__} without one; leave out classifier="keep", and train the guard before use'
            )
        if keep and had_classifier and not keeps and find_num_classes(backbone) == self.num_classes:
            warnings.warn(
                f"expected a classifier whose last layer is linear, got a {type(backbone).__name__} that has another "
                f"one; {_KNOWS_NOTHING}",
                stacklevel=3,
            )
        return encoder

    def _join_encoder(self) -> None:
        """Put the parts around the encoder on its devices, and normalise in the data type of its first layer."""
        weights = [weight for weight in self.encoder.parameters() if weight.is_floating_point()]
        if weights:
            self.normalize.to(weights[0])
            self.head.to(weights[-1].device)
            self.thresholds = self.thresholds.to(weights[-1].device)

    def represent(self, images: Tensor) -> Tensor:
        """The representation z: images (B, C, H, W) in [0, 1] -> (B, m)."""
        normalised = self.normalize(images)
        self.check_image_shape(images)
        try:
            return run_network(partial(self._encode, self.encoder), normalised)
        except InputError:
            self._refuse_mixed_types()
            raise

    def _refuse_mixed_types(self) -> None:
        """Refuse a guard of which only a part was cast to another data type."""
        ours, others = _types_of(self.normalize), _types_of(self.encoder)
        if others and not ours & others:
            ours_listed, others_listed = (" and ".join(sorted(map(str, types))) for types in (ours, others))
            raise ConfigurationError(
                f"expected a guard of one data type, got one whose encoder has {others_listed} and whose other parts "
                f"have {ours_listed}; convert the whole guard, as guard.float() does, and calibrate it again"
            )

    def forward(self, images: Tensor) -> Tensor:
        """The head's logits: images (B, C, H, W) in [0, 1] -> (B, K). Their softmax is the posterior of the classes.

        With the paper's head, the largest logit is that of the label. Another head may have energies that are not
        squared distances. Its largest logit may then be that of another class than the label, which has the smallest
        distance.

        Raises:
            InputError: pixels are outside of [0, 1], for instance because the images were normalised already. This is
                not checked in train mode, nor for images that require gradients, because it would cost time in every
                step of a training or an attack.
        """
        if not (self.training or is_traced() or getattr(images, "requires_grad", False)):
            check_images(images)
        return self.head.logits(self.represent(images))

    def distances(self, images: Tensor) -> Tensor:
        """The distance to every class: images (B, C, H, W) in [0, 1] -> (B, K); +inf for images that are not valid."""
        visible, is_valid = valid_images(images)
        return self.head.distances(self.represent(visible)).masked_fill(~is_valid, torch.inf)

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores −d and the suspicion d of images (B, C, H, W), where d (B, K) are the distances."""
        distances = self.distances(images)
        return Evidence(-distances, distances)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder in place with `torch.compile`, which speeds up detection, attacks and training.

        Saving and exporting work as before. Copies of the guard are not compiled, and `certify` takes only such a copy.
        Move the guard to its device first. The first gradient is compared with the eager one, because torch.compile
        silently gives some networks wrong gradients. Attacks then fail, and the guard looks robust.

        Args:
            *args: positional arguments of `torch.compile`.
            **kwargs: keyword arguments of `torch.compile`; ``mode="reduce-overhead"`` uses CUDA graphs, which help
                small batches on a GPU.

        Raises:
            ConfigurationError: a gradient is wrong. It is raised when the first gradient is taken, not here.

        Example:
            >>> import torch
            >>> guard = ClusterGuard(nn.Flatten(), num_classes=2, example=torch.rand(1, 1, 2, 2))
            >>> guard.compile(backend="eager")
            >>> guard.distances(torch.rand(5, 1, 2, 2)).shape
            torch.Size([5, 2])
        """
        self._encode = CompiledCall(*args, **kwargs)  # module.compile() silently skips an nn.Sequential

    def save_pretrained(  # type: ignore[override]  # the Hub's version has other options and returns an address
        self,
        save_directory: str | Path,
        *,
        training: Mapping[str, Any] | None = None,
        evaluation: EvaluationForCard | None = None,
        card: CardDetails | None = None,
        config: Mapping[str, Any] | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the guard as a folder: `model.safetensors`, `config.json`, and a model card in `README.md`.

        If saving is killed at any moment, the folder holds the old guard or the new one. Whoever reads the folder while
        it is being written gets one of the two.

        Args:
            save_directory: path of the folder. An older guard in it is replaced, and other files stay.
            training: record of the training, in types that JSON has; it is saved unchanged.
            evaluation: result of `evaluate` for this guard with its present thresholds and weights. Its figures go into
                the card.
            card: details to add to the model card: a licence, and the code that builds the backbone.
            config: the same as `training`, under the name that `push_to_hub` uses.
            model_card_kwargs: dict ``{"evaluation": ..., "card": ...}``, with which `push_to_hub` passes these two.

        Raises:
            PersistenceError: the folder holds another model's files.
            ConfigurationError: JSON cannot represent the training, the training is too large, or the evaluation is
                of other thresholds or weights.

        Warns:
            UserWarning: the backbone cannot be rebuilt from a recipe, so loading will need the module. Models of timm,
                torchvision and transformers can be rebuilt, and so can an `nn.Sequential` of torch's layers.

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
        records: dict[str, Any] = {"training": config if training is None else training}
        records |= {"evaluation": evaluation, "card": card}
        of_head = _plain_options(self.head)
        named = {"type": type(self.head).__qualname__, "description": self.head.describe(), "options": of_head}
        options: dict[str, Any] = {
            "num_classes": self.num_classes,
            "head": named,
            **{name: of_head[name] for name in ("representation_dim", "center_scale") if name in of_head},
            "mean": self.normalize.mean.flatten().tolist(),
            "std": self.normalize.std.flatten().tolist(),
        }
        shape = self.image_shape if isinstance(self.image_shape, tuple) else None
        recipe = describe_backbone(self.encoder, self.head.representation_dim, shape)
        records.update(model_card_kwargs or {})
        save_guard(self, Path(save_directory), backbone=recipe, options=options, **records)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the Hub's version accepts any option
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
    ) -> Self:
        """Load a guard that `save_pretrained` or `push_to_hub` wrote.

        The folder may come from an untrusted source. No code in it is run, nothing else is downloaded, and a network is
        only built if the file has enough weights for it.

        Args:
            pretrained_model_name_or_path: path of a folder, or an id on the Hugging Face Hub.
            backbone: module that the guard was made with; its weights do not matter. None rebuilds it from
                `config.json`.
            head: head that the guard was made with, needed unless it is one of this library. Its tensors are replaced
                by the saved ones.
            example: (B, C, H, W) images as in `ClusterGuard`, if the backbone needs them.
            revision: branch, tag or commit on the Hub.
            token: token for the Hub; None takes that of the user who is logged in.
            cache_dir: folder in which downloads are kept.
            force_download: whether to download the guard even if a copy is in the cache.
            local_files_only: whether to use the cache only, and never connect to the Hub.

        Returns:
            The guard, on the CPU and in eval mode. Its tensors equal the saved ones bit by bit, and the record of its
            calibration is restored.

        Raises:
            PersistenceError: the guard is missing, damaged, foreign, too new, or does not fit the backbone.
            UnsupportedBackboneError: the backbone is no module.

        Warns:
            UserWarning: thresholds are infinite; the guard is then not calibrated.

        Example:
            See `save_pretrained`.
        """
        if backbone is not None:
            check_module(backbone)
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
                classifier="new",  # its weights are read afterwards
                example=None if example is None else example.to(_device_of(module, example)),
                image_shape=options.get("image_shape"),  # guards of version 0.1 have no image_shape
            ),
            folder,
            backbone=backbone,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        old, new = f"{prefix}clusters.", f"{prefix}head."  # the name of the head in guards of version 0.1
        for name in [name for name in state_dict if name.startswith(old)]:
            state_dict[new + name.removeprefix(old)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *others)


def _types_of(module: nn.Module) -> set[torch.dtype]:
    """The floating-point types of a module's parameters and buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _device_of(module: nn.Module, example: Tensor) -> torch.device:
    """The device of a module's parameters, which is the meta device while a saved guard is tested."""
    return next(module.parameters(), example).device


def _num_classes_of(head: Head | None, num_classes: int | None, *options: object) -> int | None:
    """The number of classes, which a given head decides. With a given head, options of the paper's head are refused."""
    if head is None:
        return num_classes
    if not isinstance(head, Head):
        raise ConfigurationError(f"expected a head that is a clusterguard.detectors.Head, got {type(head).__name__}")
    if any(option is not None for option in options):
        raise ConfigurationError(
            "expected representation_dim and center_scale, or a head, got both; pass such options to the head instead"
        )
    if num_classes not in (None, head.num_classes):
        raise ConfigurationError(f"expected num_classes as the head has, {head.num_classes}, got {num_classes}")
    return head.num_classes


def _plain_options(head: Head) -> dict[str, Any]:
    """The options of a head, with the types that they will have when they are read from JSON.

    Raises:
        ConfigurationError: JSON cannot represent an option.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(head.options(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"expected options() of the head {type(head).__name__} to hold numbers, strings, lists and dicts that JSON "
            f"has, got {in_one_line(error)}; learned values belong to its state dict"
        ) from None
    return plain


def _head_options(options: Mapping[str, Any], head: Head | None) -> dict[str, Any]:
    """Options of `ClusterGuard` that rebuild the head of a saved guard."""
    saved = options.get("head", {})
    name = saved.get("type", GaussianClusters.__qualname__)
    if head is not None and type(head).__qualname__ == name:
        before, now = saved.get("options", {}), _plain_options(head)
        changed = [f"{key} {before[key]!r}, now {now.get(key)!r}" for key in before if before[key] != now.get(key)]
        if changed:
            raise OtherHeadError(
                f"this guard was saved with a head of other options ({', '.join(changed)}), so its distances were "
                "others; pass a head that was made with the same options as head="
            )
        return {"head": head}
    if head is not None or name not in HEADS:
        raise OtherHeadError(
            f"this guard was saved with the head {name}; pass a head that was made like it as head= to "
            "ClusterGuard.from_pretrained, which the command line cannot do"
        )
    if HEADS[name] is not GaussianClusters:
        return {"head": HEADS[name](options["num_classes"], options["representation_dim"])}
    return {"representation_dim": options["representation_dim"], "center_scale": options["center_scale"]}
