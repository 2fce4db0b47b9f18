"""Exports a detector as one graph, images -> labels, distances, is_adversarial, by `torch.export` or as ONNX."""

import copy
import glob
import hashlib
import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from clusterguard._support import (
    check_calibrated,
    check_images,
    check_tensor,
    evaluation_mode,
    is_unicode,
    open_ordinary,
    settle_weights,
    to_eval_mode,
    write_atomically,
)
from clusterguard.deployment._exporters import exporting, quiet
from clusterguard.detection import Calibration, Detection, Evidence, decide
from clusterguard.detection._internal import check_evidence
from clusterguard.detectors import DetectorModule
from clusterguard.detectors._internal import guarded_evidence
from clusterguard.errors import ConfigurationError, MissingDependencyError, PersistenceError, in_one_line
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import one_hot

_LARGEST_GRAPH = 2**31 - 2**24
"""Bytes of weights that fit into protobuf's 2 GiB with room for the rest. More go into a file beside the graph."""
_SMALLEST_TENSOR = 1024  # bytes; smaller tensors stay in the graph, as with ONNX's own tools
_CHUNK = 2**24  # bytes of weights that are read at a time
_RECORD = ("num_classes", "class_names", "false_positive_rate", "method", "calibration")
"""Keys of the metadata that belong to the thresholds."""
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
        NotCalibratedError: the detector has no thresholds.
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
        NotCalibratedError: the detector has no thresholds.
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
    _import("onnx", "onnxscript")
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
    return _write(model, detector, path, card)


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
            NotCalibratedError: the detector has no thresholds.
            ConfigurationError: the path is that of a folder.
            PersistenceError: the file with the weights of the loaded graph is missing or damaged.
        """
        check_calibrated(self.thresholds)
        _check_path(path)
        model = copy.deepcopy(self._model)
        (helper,) = _import("onnx.external_data_helper")
        try:
            helper.load_external_data_for_model(model, str(self._folder))
        except Exception as error:  # errors of ONNX and of the file system have no common base class
            raise PersistenceError(
                f"{self._folder} no longer holds the weights of the graph that was loaded ({in_one_line(error)}); put "
                "their file back, or export the detector again"
            ) from error
        is_described = torch.equal(self.thresholds.cpu(), self._exported_thresholds)
        return _write(model, self, path, self.card if is_described else None)

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
    onnx, onnxruntime = _import("onnx", "onnxruntime")
    try:
        folder = Path(path).absolute().parent
        with open_ordinary(path) as file:
            model = onnx.load(file, load_external_data=False)
        _check_external(model, folder)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        if "clusterguard" not in properties:
            raise ValueError("its metadata do not name clusterguard")
        _check_digests(model, properties, folder)
        thresholds = _open(model)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        detector = OnnxDetector(model, session, thresholds, card=properties.get("card"), folder=folder)
        detector.class_names = json.loads(properties.get("class_names", "null"))
        if "calibration" in properties:
            detector.calibration = Calibration.from_dict(json.loads(properties["calibration"]), thresholds)
    except Exception as error:  # errors of protobuf and onnxruntime have no common base class
        raise PersistenceError(
            f"{path} is missing, damaged, or not written by export_onnx; export the detector again. What went wrong: "
            f"{in_one_line(error)}"
        ) from error
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
            f"expected a DetectorModule, got {type(detector).__name__}; set the thresholds of the detector inside it"
        )
    check_calibrated(detector.thresholds)
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


def _write(model: Any, detector: DetectorModule, path: str | Path, card: str | None = None) -> Path:
    """Turn the input "thresholds" into an initializer, add the record of its calibration, and write the graph."""
    (onnx,) = _import("onnx")
    record = detector.current_record()
    properties = {"clusterguard": version("clusterguard"), "num_classes": str(detector.num_classes)}
    if detector.class_names is not None:
        properties["class_names"] = json.dumps(detector.class_names)
    if card is not None:
        properties["card"] = card
    if record is not None:
        properties |= {
            "false_positive_rate": str(record.false_positive_rate),
            "method": record.method,
            "calibration": json.dumps(record.to_dict()),
        }
    weights = _move_weights_out(model, Path(path).name)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "thresholds"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(detector.thresholds.cpu().numpy(), "thresholds"))
    properties["digest"] = json.dumps(_digests(model, properties, Path()))
    onnx.helper.set_model_props(model, properties)

    def write(file: Path) -> None:
        onnx.save(model, file)
        onnx.checker.check_model(str(file))
        if weights is not None:  # its name holds its hash, so the old pair stays complete until the graph is replaced
            file.with_name(weights).replace(Path(path).with_name(weights))

    written = write_atomically(path, write)
    for old in written.parent.glob(f"{glob.escape(written.name)}.{'[0-9a-f]' * 16}.data"):
        if old.name != weights:
            old.unlink()
    return written


def _move_weights_out(model: Any, name: str) -> str | None:
    """If a graph is too large for one file, mark its weights to be saved in a second one, and return its name."""
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= _SMALLEST_TENSOR]
    if sum(len(tensor.raw_data) for tensor in large) <= _LARGEST_GRAPH:
        return None
    digest = hashlib.sha256()
    for tensor in large:
        digest.update(tensor.raw_data)
    location = f"{name}.{digest.hexdigest()[:16]}.data"
    (helper,) = _import("onnx.external_data_helper")
    for tensor in large:
        helper.set_external_data(tensor, location)
    return location


def _digests(model: Any, properties: dict[str, str], folder: Path) -> dict[str, str]:
    """SHA-256 of a graph's form, of its weights and operations, of its thresholds with their metadata, and its card."""
    weights, thresholds = hashlib.sha256(), hashlib.sha256()
    parts = (*model.graph.node, *model.functions, *model.graph.input, *model.graph.output)
    for message in parts:
        weights.update(message.SerializeToString(deterministic=True))
    # The form leaves out the names of operations, because one damaged bit can turn Relu into Selu.
    form = hashlib.sha256(str(len(parts)).encode())
    for tensor in sorted(model.graph.initializer, key=lambda initializer: str(initializer.name)):
        form.update(f"\n{tensor.name} {tensor.data_type} {[*tensor.dims]}".encode())
        for part in _content(tensor, folder):
            (thresholds if tensor.name == "thresholds" else weights).update(part)
    thresholds.update(json.dumps([properties.get(key) for key in _RECORD]).encode())
    card = hashlib.sha256(json.dumps([properties.get("card"), properties["clusterguard"]]).encode())
    digests = {"form": form, "weights": weights, "thresholds": thresholds, "card": card}
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _content(tensor: Any, folder: Path) -> Iterator[bytes]:
    """The bytes of a tensor, from the graph or from the file beside it."""
    (helper,) = _import("onnx.external_data_helper")
    if tensor.raw_data or not helper.uses_external_data(tensor):
        yield tensor.raw_data or tensor.SerializeToString(deterministic=True)
        return
    place = helper.ExternalDataInfo(tensor)
    with open_ordinary(folder / place.location) as file:
        file.seek(place.offset or 0)
        left = place.length or 0
        while left and (part := file.read(min(left, _CHUNK))):
            yield part
            left -= len(part)


def _check_digests(model: Any, properties: dict[str, str], folder: Path) -> None:
    """Check a graph against its digest, if it has one. If another tool changed its form, its weights may differ."""
    if "digest" not in properties:
        return
    noted, actual = json.loads(properties["digest"]), _digests(model, properties, folder)
    if noted["thresholds"] != actual["thresholds"]:
        raise ValueError("its thresholds, or the record of their calibration, are not those that were exported")
    if noted.get("card", actual["card"]) != actual["card"]:  # graphs of older versions have none
        raise ValueError("its card is not the one that was exported")
    if noted["form"] == actual["form"] and noted["weights"] != actual["weights"]:
        raise ValueError("its weights or operations are not those that were exported")


def _check_external(model: Any, folder: Path) -> None:
    """Check that weights outside of a graph are in plain files beside it, and nowhere else."""
    (helper,) = _import("onnx.external_data_helper")
    for tensor in helper._get_all_tensors(model):
        if not helper.uses_external_data(tensor):
            continue
        name = helper.ExternalDataInfo(tensor).location
        file = folder / name
        if Path(name).name != name or "\\" in name or file.is_symlink():
            raise ValueError(f"its weights are said to be in {name!r}, which is no plain file beside it")
        if not file.is_file():
            raise ValueError(f"its weights are in {name!r}, which is not beside it; put that file there too")


def _open(model: Any) -> Tensor:
    """Turn the initializer "thresholds" into an input, and return its values."""
    (onnx,) = _import("onnx")
    initializer = next(tensor for tensor in model.graph.initializer if tensor.name == "thresholds")
    values = onnx.numpy_helper.to_array(initializer)
    model.graph.initializer.remove(initializer)
    model.graph.input.append(onnx.helper.make_tensor_value_info("thresholds", initializer.data_type, values.shape))
    return torch.tensor(values)


def _import(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise MissingDependencyError(
            f'{" and ".join(names)} are needed for this; run: pip install "clusterguard[export]"'
        ) from error
