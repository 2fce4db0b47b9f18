"""Draw the digits that ship with the package: `python -m benchmarks.data.build_sample MNIST_RAW_FOLDER`."""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._support import write_atomically

_SEED = 2012_03483
_SIZES = {"train": 6_000, "calibration": 1_500, "test": 1_000}
_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_OUTPUT = Path(__file__).parents[2] / "clusterguard" / "data"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes as an array, after checking that it is the original file."""
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != _MD5[path.name]:
        raise SystemExit(f"{path} is not the original MNIST file: its md5 differs from {_MD5[path.name]}")
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def draw_stratified(labels: NDArray[np.uint8], size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw examples at random so that every class keeps its share.

    Shares are rounded by the method of largest remainders.

    Args:
        labels: classes (n,) of the examples to draw from.
        size: number of examples to draw.
        generator: source of randomness.

    Returns:
        The indices (size,) of the drawn examples, in random order.
    """
    exact = np.bincount(labels) * size / len(labels)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact)[: size - counts.sum()]] += 1
    drawn = [
        generator.choice(np.flatnonzero(labels == index), count, replace=False) for index, count in enumerate(counts)
    ]
    return generator.permutation(np.concatenate(drawn))


def main(raw: Path) -> None:
    """Draw the sample from the raw files of MNIST in a folder, and write it into the package."""
    generator = np.random.default_rng(_SEED)
    train_images, train_labels = (
        read_idx(raw / "train-images-idx3-ubyte"),
        read_idx(raw / "train-labels-idx1-ubyte"),
    )
    test_images, test_labels = (
        read_idx(raw / "t10k-images-idx3-ubyte"),
        read_idx(raw / "t10k-labels-idx1-ubyte"),
    )
    both = draw_stratified(train_labels, _SIZES["train"] + _SIZES["calibration"], generator)
    calibration = both[draw_stratified(train_labels[both], _SIZES["calibration"], generator)]
    train = np.setdiff1d(both, calibration)
    generator.shuffle(train)
    indices = {
        "train": train,
        "calibration": calibration,
        "test": draw_stratified(test_labels, _SIZES["test"], generator),
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    for split, chosen in indices.items():
        images, labels = (test_images, test_labels) if split == "test" else (train_images, train_labels)
        arrays |= {
            f"{split}_images": images[chosen],
            f"{split}_labels": labels[chosen],
            f"{split}_indices": chosen.astype(np.int32),
        }

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    output = write_atomically(_OUTPUT / "digits.npz", write)
    print(json.dumps({"bytes": output.stat().st_size, "seed": _SEED, "sizes": {k: len(v) for k, v in indices.items()}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
