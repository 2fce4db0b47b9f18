"""Files of `torch.export` that hold a detector, with a digest of weights and thresholds."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from clusterguard._support import check_archive, digest_of, no_warnings, open_ordinary, write_atomically
from clusterguard.deployment._export import export_program
from clusterguard.detectors import DetectorModule
from clusterguard.errors import PersistenceError, in_one_line
from torch import Tensor
from torch.export import ExportedProgram

_RECORD = "clusterguard.json"  # name of the record in the archive


def save_program(detector: DetectorModule, path: str | Path, example: Tensor | None = None) -> Path:
    """Export a detector with its thresholds by `torch.export`, and write it to a file.

    `torch.export.load` reads the file without this library, but does not notice damage. `load_program` does.

    Args:
        detector: calibrated detector.
        path: path of the file, which usually ends in ``.pt2``. If anything fails, an older file there is kept.
        example: (B, C, H, W) images as in `export_program`.

    Returns:
        The path.

    Raises:
        NotCalibratedError: a threshold is missing or infinite.
        InputError: the example has a wrong shape, dtype or range.
        ConfigurationError: as in `export_program`.
        PersistenceError: the file cannot be written, for example because the disk is full.

    Warns:
        UserWarning: as in `export_program`.

    Example:
        See `load_program`.
    """
    program = export_program(detector, example)
    record = json.dumps({"clusterguard": version("clusterguard"), "digest": _digest(program)})
    return write_atomically(path, lambda file: torch.export.save(program, file, extra_files={_RECORD: record}))


def load_program(path: str | Path) -> ExportedProgram:
    """Read a file that `save_program` wrote, after checking that it is not damaged.

    The digest is against accidents. Whoever can write the file can also write its digest, and torch's reader is not
    made for files from strangers.

    Args:
        path: path of the file.

    Returns:
        The program, as `export_program` returns it.

    Raises:
        PersistenceError: the file is missing, damaged, or not from `save_program`.

    Example:
        >>> import tempfile
        >>> from clusterguard import ClusterGuard
        >>> guard = ClusterGuard(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8)), num_classes=2)
        >>> guard.thresholds = torch.tensor([12.0, 12.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_program(guard, f"{folder}/guard.pt2", torch.rand(1, 1, 4, 4))
        ...     labels, distances, is_adversarial = load_program(path).module()(torch.rand(7, 1, 4, 4))
        >>> labels.shape
        torch.Size([7])
    """
    extra = {_RECORD: ""}
    try:
        with open_ordinary(path) as file:
            check_archive(file, path)
            with no_warnings.on():  # about how torch stores tensors, which the caller cannot change
                program = torch.export.load(file, extra_files=extra)
        if json.loads(extra[_RECORD])["digest"] != _digest(program):
            raise ValueError("its weights or thresholds are not those that were exported")
    except Exception as error:  # errors of zipfile and of torch's reader have no common base class
        raise PersistenceError(
            f"{path} is missing, damaged, or not written by save_program; export the detector again. What went wrong: "
            f"{in_one_line(error)}"
        ) from error
    return program


def _digest(program: ExportedProgram) -> str:
    """A digest of all tensors of a program, and of its operations."""
    tensors = {**program.state_dict, **program.constants}
    plain = {name: value for name, value in sorted(tensors.items()) if isinstance(value, Tensor)}
    operations = [f"{node.op} {node.target}" for node in program.graph.nodes]
    return digest_of([plain, operations])
