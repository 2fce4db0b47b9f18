"""Writes results: reports of an evaluation, and a guard to the folder that it was loaded from."""

from pathlib import Path
from typing import Any

from clusterguard._support import write_atomically
from clusterguard.detectors import ClusterGuard
from clusterguard.detectors._internal import CONFIG, read_config
from clusterguard.errors import PersistenceError
from clusterguard.evaluation import Evaluation, to_html


def write_evaluation(result: Evaluation, path: str | Path) -> Path:
    """Write the report of an evaluation as JSON, Markdown or HTML, completely or not at all.

    Args:
        result: what `evaluate` returned.
        path: path whose suffix is ".json", ".md" or ".html".

    Returns:
        The path.

    Raises:
        PersistenceError: the file cannot be written.
    """
    if Path(path).suffix == ".md":
        return write_atomically(path, lambda file: file.write_text(result.to_markdown() + "\n", encoding="utf-8"))
    if Path(path).suffix == ".json":
        result.to_json(path)
        return Path(path)
    return to_html(result, path)


def save_again(guard: ClusterGuard, folder: Path, config: dict[str, Any], **options: Any) -> None:
    """Save a guard to the folder that it was loaded from, unless another process has saved one there since.

    Args:
        guard: guard that `load_named_guard` or `open_guard` returned.
        folder: folder that it was loaded from.
        config: config that was returned with it.
        **options: further options of `save_pretrained`.

    Raises:
        PersistenceError: the folder holds another config now, or cannot be read or written.
    """
    if read_config(folder / CONFIG) != config:
        raise PersistenceError(
            f"{folder} was saved by another process while this command ran, and stays as that process left it; run "
            "this command again"
        )
    guard.save_pretrained(folder, training=config["training"], **options)
