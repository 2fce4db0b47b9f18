"""Turn results of one JSON file a cell into one JSON Lines file a training, and compare every value.

    python -m benchmarks.migrate OLD_CELLS NEW_ROOT

To repeat the comparison: take OLD_CELLS (benchmarks/results/cells) from the commit before the results were moved.
"""

import json
import sys
from pathlib import Path

from benchmarks.cells import all_cells
from benchmarks.store import Store


def migrate(old: Path, root: Path) -> int:
    """Write every result of a folder of the old kind to a store, read it back, and compare."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(old.glob("*.json"))}
    cells = {cell.key: cell for _, cell in all_cells("cpu")}
    for key, result in results.items():
        store = Store(root, "cpu")
        if store.read_cell(key) is None:
            store.write_cell(cells[key], result)
    store = Store(root, "cpu")
    assert store.cell_keys() == set(results)
    for key, result in results.items():
        assert json.dumps(store.read_cell(key), sort_keys=True) == json.dumps(result, sort_keys=True), key
    return len(results)


if __name__ == "__main__":
    print(f"{migrate(Path(sys.argv[1]), Path(sys.argv[2]))} results are equal, value by value")
