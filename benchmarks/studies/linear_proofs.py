"""What linear bounds prove of the certified guards that ship, beyond what intervals prove.

`python -m benchmarks.studies.linear_proofs` writes its counts to benchmarks/results/linear-proofs.json. On one core of
a CPU it takes about ten minutes.
"""

import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from clusterguard import ClusterGuard, certified_success_rate

from benchmarks._support import write_json
from benchmarks.data import load_data_set
from benchmarks.running import provenance

PROOFS_FILE = Path(__file__).parents[1] / "results" / "linear-proofs.json"
_GUARDS = Path(__file__).parents[2] / "guards"
_RADII = {"mnist-certified": (0.3, 0.4), "mnist-certified-accurate": (0.3, 0.4)}
_METHODS: tuple[Literal["intervals", "linear"], ...] = ("intervals", "linear")


def try_method(
    guard: ClusterGuard, images: int, eps: float, method: Literal["intervals", "linear"]
) -> dict[str, object]:
    """How many of the accepted test digits at the front are not proved, of how many, and the seconds it took."""
    pixels, labels = load_data_set("mnist").open_test().head(images).floats()
    start = time.process_time()
    rate = certified_success_rate(guard, [(pixels, labels)], eps=eps, method=method)
    seconds = round(time.process_time() - start, 1)
    return {"eps": eps, "method": method, "unproved": rate.count, "of": rate.total, "cpu_seconds": seconds}


def main(
    images: Annotated[int, typer.Option(min=1, help="Test digits, the first ones.")] = 1000,
    output: Annotated[Path, typer.Option(help="The JSON file.")] = PROOFS_FILE,
) -> None:
    """Count what is proved with intervals and with linear bounds."""
    torch.set_num_threads(1)
    rows = []
    for name, radii in _RADII.items():
        guard = ClusterGuard.from_pretrained(_GUARDS / name)
        for eps in radii:
            for method in _METHODS:
                rows.append({"guard": name, **try_method(guard, images, eps, method)})
                print(rows[-1])
    content = {"images": images, "provenance": provenance(torch.device("cpu")), "rows": rows}
    write_json(output, content)


if __name__ == "__main__":
    typer.run(main)
