"""Where results lie: one JSON a cell, weights as safetensors, and a work folder that a killed run goes on from."""

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clusterguard.files import write_atomically
from safetensors.torch import load_file, save_file
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PART = 15 * 2**20  # bytes in a file of weights, so that each stays below 16 MiB
PACKAGES = ("torch", "torchvision", "timm", "clusterguard", "numpy")


class Store:
    """A folder of results.

    Args:
        root: `cells` and `models` in it are worth keeping, `work` is not once all is done.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def work(self, key: str) -> Path:
        """A folder for what an unfinished cell or training needs."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, key: str) -> None:
        """Remove a work folder."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def write_cell(self, key: str, result: Mapping[str, Any]) -> None:
        """Write a cell's result, whole or not at all."""
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(self.root / "cells" / f"{key}.json", lambda file: file.write_text(text))

    def read_cell(self, key: str) -> dict[str, Any] | None:
        """A cell's result, None if there is none."""
        path = self.root / "cells" / f"{key}.json"
        result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return result

    def cell_keys(self) -> set[str]:
        """Keys of all results that are there."""
        return {path.stem for path in (self.root / "cells").glob("*.json")}

    def save_weights(self, key: str, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write weights in parts of at most 15 MiB, and a record beside them, which says that they are complete."""
        parts: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in state.items():
            size += tensor.nbytes
            if size > PART and parts[-1]:
                parts.append({})
                size = tensor.nbytes
            parts[-1][name] = tensor.detach().cpu().clone()  # safetensors wants memory that nobody shares
        for index, part in enumerate(parts):
            write_atomically(self._weights(key, index), partial(save_file, part))
        text = json.dumps({"parts": len(parts), **record}, indent=1) + "\n"
        write_atomically(self._record(key), lambda file: file.write_text(text))

    def has_weights(self, key: str) -> bool:
        """Whether a training is finished."""
        return self._record(key).exists()

    def load_weights(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights and their record, None if they are not complete."""
        if not self.has_weights(key):
            return None
        record: dict[str, Any] = json.loads(self._record(key).read_text())
        state: dict[str, Tensor] = {}
        for index in range(record["parts"]):
            state |= load_file(self._weights(key, index))
        return state, record

    def _record(self, key: str) -> Path:
        return self.root / "models" / f"{key}.json"

    def _weights(self, key: str, index: int) -> Path:
        return self.root / "models" / f"{key}-{index + 1}.safetensors"


def provenance(device: torch.device) -> dict[str, Any]:
    """What made a result: commit, versions and machine."""
    return {
        "commit": _commit(),
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """What people call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _commit() -> str:
    """The commit the benchmark runs at; "+" says that files differ from it."""
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
