"""Storage of results.

The results of a training are one JSON Lines file, and its weights are safetensors. Unfinished cells have work folders.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clusterguard.errors import PersistenceError, in_one_line
from clusterguard.evaluation import read_progress, save_progress
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from benchmarks._support import write_atomically
from benchmarks.experiments import Cell, Profile, digest

RESULTS = Path(__file__).parents[1] / "results"
_LARGEST_FILE = 15 * 2**20  # bytes in a file of weights, so that each file stays below 16 MiB
_DIGEST_AND_MORE = re.compile('"digest": "[0-9a-f]{12}(?!"?$)')  # no killed write ends like that
_PACKAGES = ("torch", "torchvision", "timm", "clusterguard", "numpy")


class Store:
    """A folder of results.

    ``cells/<dataset>/<profile>/<recipe>-seed<n>-<key>.jsonl`` holds all results of one training: the record of the
    training first, then one line for each cell. A training that was run again adds a second record. Each cell names
    the record that it belongs to. Every line ends with a digest of its content.

    Args:
        root: folder of the store. Its folders `cells` and `models` hold results. Its folder `work` can be removed once
            everything is done.
        profile: profile whose folder new results are written to. Results of all profiles are read.
    """

    def __init__(self, root: Path, profile: Profile = "full") -> None:
        self.root = root
        self.profile = profile
        self._read: dict[Path, tuple[tuple[int, int], dict[str, dict[str, Any]]]] = {}

    def work(self, key: str) -> Path:
        """The work folder of an unfinished cell or training, which is made if it does not exist."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove_work(self, key: str) -> None:
        """Remove the work folder of a finished cell or training."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def write_cell(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Append the result of a cell to the file of its training. A killed write leaves a line that is not read.

        Args:
            cell: cell that the result belongs to.
            result: values of JSON by name. The one named "training" is the record of the training.
        """
        training = cell.training
        folder = self.root / "cells" / training.dataset / self.profile
        file = folder / f"{training.recipe}-seed{training.seed}-{training.key}.jsonl"
        record = {"training": result.get("training")}
        lines = [] if any(line == record for line in _lines(file)) else [record]
        rest = {name: value for name, value in result.items() if name != "training"}
        lines.append({"cell": cell.key, "trained": digest(record), **rest})
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as handle:  # the lines of two processes that append do not mix
            handle.seek(0, os.SEEK_END)
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                handle.write(b"" if handle.read(1) == b"\n" else b"\n")
            handle.write("".join(_sealed(line) for line in lines).encode())
            handle.flush()
            os.fsync(handle.fileno())

    def read_cell(self, key: str) -> dict[str, Any] | None:
        """Read the result of a cell. None if there is none.

        Raises:
            PersistenceError: a file of results is damaged.
        """
        return next((results[key] for results in self._results() if key in results), None)

    def read_cells(self) -> dict[str, dict[str, Any]]:
        """Read all results, by the key of the cell. This is faster than many calls of `read_cell`."""
        return {key: result for results in reversed([*self._results()]) for key, result in results.items()}

    def cell_keys(self) -> set[str]:
        """The keys of all cells that have a result."""
        return {key for results in self._results() for key in results}

    def _results(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The results of each file by the key of the cell. A file is read again only if it has changed."""
        for file in sorted((self.root / "cells").rglob("*.jsonl")):
            status = file.stat()
            state = status.st_mtime_ns, status.st_size
            if file not in self._read or self._read[file][0] != state:
                self._read[file] = state, _by_cell(file)
            yield self._read[file][1]

    def save_weights(self, key: str, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the weights of a training, in files of at most 15 MiB, and then its record.

        The record is written last, so that its presence says that the weights are complete.
        """
        parts: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in state.items():
            size += tensor.nbytes
            if size > _LARGEST_FILE and parts[-1]:
                parts.append({})
                size = tensor.nbytes
            parts[-1][name] = tensor.detach().cpu().clone()  # safetensors refuses tensors that share memory
        digests = []
        for index, part in enumerate(parts):
            content = save(part)
            write_atomically(self._weights(key, index), partial(Path.write_bytes, data=content))
            digests.append(sha256(content).hexdigest())
        whole = {"parts": len(parts), "sha256": digests, **record}
        text = json.dumps({**whole, "digest": digest(whole)}, indent=1) + "\n"
        write_atomically(self._record(key), lambda file: file.write_text(text))

    def has_weights(self, key: str) -> bool:
        """Whether a training is finished."""
        return self._record(key).exists()

    def load_weights(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read weights and their record. None if the weights are not complete.

        Older records have no digests of the weights or of themselves, so that damage may stay unnoticed.

        Raises:
            PersistenceError: a file is damaged or missing.
        """
        if not self.has_weights(key):
            return None
        try:
            record: dict[str, Any] = json.loads(self._record(key).read_text())
            is_sealed = "digest" in record or "sha256" in record
            if is_sealed and record.pop("digest") != digest(record):
                raise ValueError(f"{self._record(key).name} has another digest")
            digests = record.get("sha256", [None] * record["parts"])
            state: dict[str, Tensor] = {}
            for index, digest_then in zip(range(record["parts"]), digests, strict=True):
                content = self._weights(key, index).read_bytes()
                if digest_then not in (None, sha256(content).hexdigest()):
                    raise ValueError(f"{self._weights(key, index).name} has another digest")
                state |= load(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise PersistenceError(
                f"the weights of the record {self._record(key)} are damaged ({in_one_line(error)}); restore the files, "
                "or delete the record and train again"
            ) from error
        return state, record

    def _record(self, key: str) -> Path:
        return self.root / "models" / f"{key}.json"

    def _weights(self, key: str, index: int) -> Path:
        return self.root / "models" / f"{key}-{index + 1}.safetensors"


def save_chunk(file: Path, outcome: Mapping[str, Any]) -> None:
    """Keep the outcome of an attack on some images of a cell until the cell is done."""
    save_progress(file, "chunk of a cell", outcome)


def read_chunk(file: Path, device: torch.device) -> dict[str, Any]:
    """Read the outcome that `save_chunk` wrote.

    Raises:
        PersistenceError: the file is missing, damaged, or of an older version.
    """
    chunk = read_progress(file, "chunk of a cell", hint="delete it to attack its images again", device=device)
    if chunk is None:
        raise PersistenceError(f"{file} is missing; run again")
    return chunk.state


def _sealed(line: dict[str, Any]) -> str:
    """A line of a file of results, with a digest of its content at the end.

    Raises:
        PersistenceError: a number is NaN or infinite, which JSON does not have.
    """
    try:
        return json.dumps(line | {"digest": digest(line)}, allow_nan=False) + "\n"
    except ValueError as error:
        raise PersistenceError(f"expected finite numbers in the result of {line.get('title', 'a cell')}") from error


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of results, without their digests. Lines whose write was killed are left out.

    Raises:
        PersistenceError: a line is damaged.
    """
    if not file.exists():
        return
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        if not text.endswith('"}') and not _DIGEST_AND_MORE.search(text):
            continue  # every complete line ends with its digest
        try:
            line: dict[str, Any] = json.loads(text)
            is_whole = line.pop("digest") == digest(line)
        except (ValueError, KeyError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise PersistenceError(
                f"{file}, line {number}, is damaged; restore the file, or delete the line and run again"
            )
        yield line


def _by_cell(file: Path) -> dict[str, dict[str, Any]]:
    """The results in a file by the keys of their cells, each with the record of its training."""
    records, results = dict[str, Any](), dict[str, dict[str, Any]]()
    for line in _lines(file):
        if "training" in line:
            records[digest(line)] = line["training"]
            continue
        key, record = line.pop("cell"), line.pop("trained")
        if record not in records:
            raise PersistenceError(
                f"{file} lacks the record of a training; restore the file, or delete it and run again"
            )
        results[key] = {"training": records[record], **line}
    return results


def provenance(device: torch.device) -> dict[str, Any]:
    """The commit, the versions of packages and the device that produce a result."""
    return {
        "commit": _commit(),
        "versions": {package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The name of the device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _commit() -> str:
    """The commit of the checkout. A "+" behind it says that files have been changed since."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=12",
        "--exclude=*",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
