"""Reads and writes the files of ONNX graphs, and the digests that tell whether such a file is damaged."""

import glob
import hashlib
import importlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clusterguard._support import open_ordinary, write_atomically
from clusterguard.detectors import DetectorModule
from clusterguard.errors import MissingDependencyError
from torch import Tensor

_LARGEST_GRAPH = 2**31 - 2**24
"""Bytes of weights that fit into protobuf's 2 GiB with room for the rest. More go into a file beside the graph."""
_SMALLEST_TENSOR = 1024  # bytes; smaller tensors stay in the graph, as with ONNX's own tools
_CHUNK = 2**24  # bytes of weights that are read at a time
_RECORD = ("num_classes", "class_names", "false_positive_rate", "method", "calibration")
"""Keys of the metadata that belong to the thresholds."""


def write_graph(model: Any, detector: DetectorModule, path: str | Path, card: str | None = None) -> Path:
    """Turn the input "thresholds" into an initializer, add the record of its calibration, and write the graph."""
    (onnx,) = import_optional("onnx")
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
        onnx.save(model, file, format="protobuf")  # whatever the name of the file ends in
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
    (helper,) = import_optional("onnx.external_data_helper")
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
    (helper,) = import_optional("onnx.external_data_helper")
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


def check_digests(model: Any, properties: dict[str, str], folder: Path) -> None:
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


def check_external(model: Any, folder: Path) -> None:
    """Check that weights outside of a graph are in plain files beside it, and nowhere else."""
    (helper,) = import_optional("onnx.external_data_helper")
    for tensor in helper._get_all_tensors(model):
        if not helper.uses_external_data(tensor):
            continue
        name = helper.ExternalDataInfo(tensor).location
        file = folder / name
        if Path(name).name != name or "\\" in name or file.is_symlink():
            raise ValueError(f"its weights are said to be in {name!r}, which is no plain file beside it")
        if not file.is_file():
            raise ValueError(f"its weights are in {name!r}, which is not beside it; put that file there too")


def take_thresholds_out(model: Any) -> Tensor:
    """Turn the initializer "thresholds" into an input, and return its values."""
    (onnx,) = import_optional("onnx")
    initializer = next(tensor for tensor in model.graph.initializer if tensor.name == "thresholds")
    values = onnx.numpy_helper.to_array(initializer)
    model.graph.initializer.remove(initializer)
    model.graph.input.append(onnx.helper.make_tensor_value_info("thresholds", initializer.data_type, values.shape))
    return torch.tensor(values)


def import_optional(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        packages = " ".join(dict.fromkeys(name.partition(".")[0] for name in names))
        raise MissingDependencyError(f"this needs another package; run: pip install {packages}") from error
