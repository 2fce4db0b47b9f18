"""Files with the report of an evaluation."""

from pathlib import Path

from clusterguard._support import write_atomically
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
