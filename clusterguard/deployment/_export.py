"""Exports a detector as one graph, images -> labels, distances, is_adversarial, by `torch.export` or as ONNX."""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from clusterguard._support import (
    check_deployable,
    check_images,
    check_tensor,
    evaluation_mode,
    is_unicode,
    open_ordinary,
    settle_weights,
    to_eval_mode,
)
from clusterguard.deployment._exporters import exporting, quiet
from clusterguard.deployment._graph_files import (
    check_digests,
    check_external,
    import_optional,
    take_thresholds_out,
    write_graph,
)
from clusterguard.detection import Calibration, Detection, Evidence, decide
from clusterguard.detection._internal import check_evidence
from clusterguard.detectors import DetectorModule
from clusterguard.detectors._internal import drop_infinite_thresholds, guarded_evidence
from clusterguard.errors import ConfigurationError, NotCalibratedError, PersistenceError, in_one_line
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import one_hot

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def export_program(detector: DetectorModule, example: Tensor | None = None) -> ExportedProgram:
    """Export a detector with its thresholds by `torch.export`.

    The graph holds copies of all tensors, so training or calibrating the detector later does not change it.

    Args:
        detector: calibrated detector.
        example: (B, C, H, W) images in [0, 1]. C, H and W become part of the graph, and B stays free. None takes the
            detector's `image_shape` or, if that is not set, the size that a timm backbone was configured for.

    Returns:
        A program that maps images to labels, distances and is_adversarial, each (B,), as `detect` does in eval mode.
        It is torch's own and needs nothing of this library, so images of another size, channel count or dtype get
        torch's errors: an AssertionError such as "Guard failed: images.size()[2] == 28", or a RuntimeError.

    Raises:
        NotCalibratedError: a threshold is missing or infinite.
        InputError: the example has a wrong shape, dtype or range.
        ConfigurationError: there is no example, and neither the detector nor a timm backbone tells the size of the
            images; or the detector's evidence for an image differs between calls or with its batch; or torch.export
            cannot follow its network.

    Warns:
        UserWarning: the detector's `image_shape` is "any", but a graph has one fixed shape.

    Example:
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), num_classes=2)
        >>> guard.thresholds = torch.tensor([12.0, 12.0])
        >>> program = export_program(guard, torch.rand(1, 1, 4, 4))
        >>> labels, distances, is_adversarial = program.module()(torch.rand(7, 1, 4, 4))
        >>> labels.shape
        torch.Size([7])
    """
    decision, images = _prepare(detector, example)
    with exporting():
        return torch.export.export(decision, (images,), dynamic_shapes=({0: Dim("batch")},), strict=False)


def export_onnx(
    detector: DetectorModule, path: str | Path, example: Tensor | None = None, *, card: str | None = None
) -> Path:
    """Export a detector with its thresholds as an ONNX file.

    Args:
        detector: calibrated detector in float32 or float16.
        path: path of the file. If anything fails, an older file there is kept. Weights of more than 2 GiB do not fit
            into it. They go into a second file beside it, with the same name followed by a part of their hash and
            ``.data``. Always move and copy both files together.
        example: (B, C, H, W) images as in `export_program`.
        card: text about the detector for users of the graph, such as the model card of a saved guard.

    Returns:
        The path. The graph maps "images" to "labels", "distances" and "is_adversarial". Its initializer "thresholds" is
        the only part that depends on calibration. Its metadata hold the record of the calibration, the names of the
        classes, the card, and digests of weights, thresholds and card that `load_onnx` checks.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        NotCalibratedError: a threshold is missing or infinite.
        InputError: the example has a wrong shape, dtype or range.
        ConfigurationError: as in `export_program`; or the detector has another precision, the path is that of a folder,
            or the card is no text.

    Warns:
        UserWarning: as in `export_program`.

    Example:
        >>> import tempfile
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), num_classes=2)
        >>> guard.thresholds = torch.tensor([12.0, 12.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(guard, f"{folder}/guard.onnx", torch.rand(1, 1, 4, 4)).name
        'guard.onnx'
    """
    import_optional("onnx", "onnxscript")
    _check_path(path)
    if card is not None and not (isinstance(card, str) and is_unicode(card)):
        raise ConfigurationError(f"expected a card that is a text which UTF-8 can encode, got {type(card).__name__}")
    decision, images = _prepare(detector, example)
    if images.dtype not in _DTYPES.values():
        raise ConfigurationError(
            f"expected a detector in float32 or float16, got {images.dtype}; export "
            "copy.deepcopy(detector).float() and calibrate the graph, because its distances will differ"
        )
    thresholds, shapes = detector.thresholds.cpu(), ({0: Dim("batch")}, None)
    with exporting():
        program = torch.export.export(
            decision.cpu(), (images.cpu(), thresholds), dynamic_shapes=shapes, strict=False
        ).run_decompositions({torch.ops.aten.clamp_min.default: _clamp_min})
        names: dict[str, Any] = {"input_names": ["images", "thresholds"], "output_names": Detection._fields}
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # they hold stack traces with paths of this machine
    del model.graph.value_info[:]
    for value in [model.graph.input[0], *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return write_graph(model, detector, path, card)


@final
class OnnxDetector(DetectorModule):
    """A detector that `export_onnx` wrote and onnxruntime runs. `load_onnx` makes it.

    It detects and can be calibrated like any other detector. The graph returns only the suspicion of an image's label,
    so the evidence for other classes is a placeholder, and it has no gradients. Run attacks on the detector that was
    exported instead. `image_shape` is the (C, H, W) of the images that the graph takes, and `card` is the text that was
    exported with it. Saving the graph with other thresholds leaves out the card, because it describes the old ones.

    Args:
        model: ONNX graph that takes the thresholds as an input.
        session: onnxruntime session that runs the graph.
        thresholds: (K,) thresholds, one per label.
        card: text about the detector; None if there is none.
        folder: folder of a file with weights that are not in the graph.

    Example:
        See `load_onnx`.
    """

    def __init__(
        self, model: Any, session: Any, thresholds: Tensor, *, card: str | None = None, folder: Path = Path()
    ) -> None:
        (images, *_) = session.get_inputs()
        super().__init__(len(thresholds), image_shape=tuple(images.shape[1:]))
        self.thresholds, self._exported_thresholds = thresholds, thresholds.clone()
        self.card = card
        self._model, self._session, self._folder = model, session, folder
        self._shape, self._dtype = images.shape[1:], _DTYPES[images.type]
        self.has_dynamic_scales = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
        self.training = False

    def train(self, mode: bool = True) -> "OnnxDetector":
        """Do nothing, because a graph has no train mode.

        Args:
            mode: as in `nn.Module.train`.

        Returns:
            The detector itself.
        """
        return self

    def check_image_shape(self, images: Tensor) -> None:
        """Check that images have the shape that the graph was exported for. This shape cannot be changed.

        Args:
            images: (B, C, H, W) images.

        Raises:
            InputError: they have another shape.
        """
        check_tensor(images, "images, as the graph was exported for,", "B", *self._shape)

    def evidence(self, images: Tensor) -> Evidence:
        """The class scores and suspicion (B, K) of images (B, C, H, W), for which `decide` agrees with the graph."""
        # With infinite thresholds, the graph refuses only images whose evidence is not finite.
        labels, distances, not_finite = self._run(images, torch.full_like(self.thresholds, torch.inf))
        is_label = one_hot(labels, self.num_classes).bool()
        best = torch.where(not_finite, torch.inf, 1.0)
        return Evidence(torch.where(is_label, best[:, None], 0.0), distances[:, None].expand_as(is_label))

    def save(self, path: str | Path) -> Path:
        """Write the graph with its present thresholds.

        Args:
            path: path of the file to write.

        Returns:
            The path.

        Raises:
            NotCalibratedError: a threshold is missing or infinite.
            ConfigurationError: the path is that of a folder.
            PersistenceError: the file with the weights of the loaded graph is missing or damaged.
        """
        check_deployable(self.thresholds)
        _check_path(path)
        model = copy.deepcopy(self._model)
        (helper,) = import_optional("onnx.external_data_helper")
        try:
            helper.load_external_data_for_model(model, str(self._folder))
        except Exception as error:  # errors of ONNX and of the file system have no common base class
            raise PersistenceError(
                f"{self._folder} no longer holds the weights of the graph that was loaded ({in_one_line(error)}); put "
                "their file back, or export the detector again"
            ) from error
        is_described = torch.equal(self.thresholds.cpu(), self._exported_thresholds)
        return write_graph(model, self, path, self.card if is_described else None)

    def _run(self, images: Tensor, thresholds: Tensor) -> Detection:
        check_tensor(thresholds, "thresholds", self.num_classes)
        feeds = {"images": images.detach().to("cpu", self._dtype).contiguous(), "thresholds": thresholds.cpu()}
        outputs = self._session.run(Detection._fields, {name: array.numpy() for name, array in feeds.items()})
        return Detection(*(torch.from_numpy(array).to(images.device) for array in outputs))


def load_onnx(
    path: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",), spinning: bool = True
) -> OnnxDetector:
    """Load a graph that `export_onnx` wrote, also after quantisation, as a detector that can be calibrated again.

    Digests in the metadata verify that weights, thresholds and card are the ones that were written, bit by bit. Two
    cases are exceptions. Graphs of older versions have no digest and are loaded without this check. If another tool has
    changed the operations or data types of a graph, its thresholds are checked, but its weights are not.

    Args:
        path: path of the file.
        providers: execution providers of onnxruntime, the preferred one first.
        spinning: whether onnxruntime's threads stay awake for the next images, which takes the cores from whatever else
            runs there; False in a service.

    Returns:
        The detector with the thresholds of the file and the record of their calibration.

    Raises:
        MissingDependencyError: onnx or onnxruntime is not installed.
        PersistenceError: the file, or the file with its weights, is missing, damaged, or not from `export_onnx`.

    Warns:
        UserWarning: a threshold of the file is infinite; the detector is then not calibrated.

    Example:
        >>> import tempfile
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), num_classes=2)
        >>> guard.thresholds = torch.tensor([12.0, 12.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_onnx(guard, f"{folder}/guard.onnx", torch.rand(1, 1, 4, 4))
        ...     detector = load_onnx(path)
        ...     detector.thresholds = torch.tensor([9.0, 9.0])  # or Calibrator(0.01).fit(detector, loader)
        ...     load_onnx(detector.save(path)).thresholds
        tensor([9., 9.])
    """
    onnx, onnxruntime = import_optional("onnx", "onnxruntime")
    try:
        folder = Path(path).absolute().parent
        with open_ordinary(path) as file:
            model = onnx.load(file, format="protobuf", load_external_data=False)
        check_external(model, folder)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        if "clusterguard" not in properties:
            raise ValueError("its metadata do not name clusterguard")
        check_digests(model, properties, folder)
        thresholds = take_thresholds_out(model)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        detector = OnnxDetector(model, session, thresholds, card=properties.get("card"), folder=folder)
        detector.class_names = json.loads(properties.get("class_names", "null"))
        if "calibration" in properties:
            detector.calibration = Calibration.from_dict(json.loads(properties["calibration"]), thresholds)
    except FileNotFoundError as error:
        raise PersistenceError(f"there is no file {error.filename or path}, which load_onnx needs") from error
    except Exception as error:  # errors of protobuf and onnxruntime have no common base class
        raise PersistenceError(
            f"{path} is missing, damaged, or not written by export_onnx; export the detector again. What went wrong: "
            f"{in_one_line(error)}"
        ) from error
    drop_infinite_thresholds(detector, path)
    return detector


class _Decision(nn.Module):
    """The module that is exported: a detector followed by `decide`."""

    def __init__(self, detector: DetectorModule) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, thresholds: Tensor | None = None) -> tuple[Tensor, ...]:
        scores, suspicion = guarded_evidence(self.detector, images)
        # Torch treats a NaN as the largest score, but other runtimes do not. Infinity is refused as well.
        scores = scores.masked_fill(scores.isnan(), torch.inf)
        return tuple(
            decide(Evidence(scores, suspicion), self.detector.thresholds if thresholds is None else thresholds)
        )


def _prepare(detector: DetectorModule, example: Tensor | None) -> tuple[_Decision, Tensor]:
    """A frozen copy in eval mode and two blank images for it. With one image, export would fix B to 1."""
    if not isinstance(detector, DetectorModule):
        raise ConfigurationError(
            f"expected a DetectorModule such as a guard, got {type(detector).__name__}; pass the detector itself, not "
            "its program or a wrapper, whose thresholds can be set on the detector inside"
        )
    check_deployable(detector.thresholds)
    if not detector.is_calibrated:
        raise NotCalibratedError("expected finite thresholds of all members of the detector; fit them with Calibrator")
    if example is not None:
        check_images(example)
    with evaluation_mode(detector) as seen:  # no other thread changes the mode while it is copied
        decision = _Decision(copy.deepcopy(seen)).requires_grad_(False)
    to_eval_mode(decision)
    settle_weights(decision)
    like = next((weight for weight in decision.parameters() if weight.is_floating_point()), detector.thresholds)
    images = like.new_zeros(2, *(_configured_shape(detector) if example is None else example.shape[1:]))
    noise = torch.rand(8, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    with quiet(), torch.no_grad():
        decision(images)  # work that a detector does only at its first batch must not become part of the graph
        check_evidence(decision.detector, noise)
    if detector.image_shape == "any":
        warnings.warn(
            f"this detector takes images of every shape, but the graph will take those of shape {(*images.shape[1:],)} "
            "alone; bring images to that shape, or export one graph for each shape",
            stacklevel=3,
        )
    return decision, images


def _check_path(path: str | Path) -> None:
    if not is_unicode(str(path)):
        raise ConfigurationError(f"expected a path in UTF-8, which graphs need, got {str(path)!r}; choose another name")
    if Path(path).is_dir():
        raise ConfigurationError(
            f"expected the path of a file, got the folder {path}; name a file in it, such as {Path(path, 'guard.onnx')}"
        )


def _configured_shape(detector: DetectorModule) -> tuple[int, ...]:
    if isinstance(detector.image_shape, tuple):
        return detector.image_shape
    for module in detector.modules():
        settings = getattr(module, "pretrained_cfg", None)
        if isinstance(settings, dict) and "input_size" in settings:
            size = getattr(getattr(module, "patch_embed", None), "img_size", None) or settings["input_size"][1:]
            return (getattr(module, "in_chans", 3), *size)
    raise ConfigurationError("this detector does not tell the size of its images; pass example=images, a batch of them")


def _clamp_min(values: Tensor, smallest: float) -> Tensor:
    # ONNX does not define Clip for NaN, and onnxruntime turns +inf into a finite number. Both must stay as they are,
    # because otherwise images with such evidence would be accepted.
    return torch.where(values < smallest, smallest, values)
