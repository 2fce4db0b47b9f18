"""The guards of the comparison, with the radii at which attacks break some images but not all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clusterguard import ClusterGuard, DetectorModule
from clusterguard.samples import load_digits
from torch import Tensor

from benchmarks.data import load_data_set
from benchmarks.running import RESULTS, load_trained

_ROOT = Path(__file__).parents[3]
_REFERENCES = 1000  # test digits that references are chosen from, beside those attacked


@dataclass(frozen=True)
class Case:
    """A guard of the comparison.

    Attributes:
        title: what tables call it.
        load: function that loads the guard.
        radii: radius by norm.
        small_digits: whether it is attacked on the digits that the package brings, and not on MNIST's test set.
    """

    title: str
    load: Callable[[], DetectorModule]
    radii: dict[str, float]
    small_digits: bool = False

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Test images (n, 1, 28, 28) and labels (n,), enough to choose `count` accepted ones and references from."""
        if self.small_digits:
            images, labels = load_digits("test").tensors
            return images, labels
        return load_data_set("mnist").open_test().head(count + _REFERENCES).floats()


def _kept_demo() -> ClusterGuard:
    """The guard of one `make demo`, kept because each kind of processor trains a slightly different one."""
    return ClusterGuard.from_pretrained(RESULTS / "peers" / "demo-guard")


def _shipped(name: str) -> ClusterGuard:
    return ClusterGuard.from_pretrained(_ROOT / "guards" / name)


_CERTIFIED = {"linf": 0.4, "l2": 1.0, "l1": 4.0, "l0": 4.0, "patch": 3.0}
_ON_SMALL_CNN = {"linf": 0.3, "l2": 1.5, "l1": 8.0, "l0": 8.0, "patch": 5.0}
CASES = {
    "demo": Case("demo", _kept_demo, {"linf": 0.2, "l2": 2.0, "l1": 15.0, "l0": 10.0, "patch": 5.0}, small_digits=True),
    "mnist-certified": Case("certified", lambda: _shipped("mnist-certified"), _CERTIFIED),
    "mnist-certified-accurate": Case("certified, accurate", lambda: _shipped("mnist-certified-accurate"), _CERTIFIED),
    "mnist": Case("Ours, SmallCNN", lambda: _shipped("mnist"), _ON_SMALL_CNN),
    "l-ben": Case("L-Ben, SmallCNN", lambda: load_trained("l-ben"), _ON_SMALL_CNN),
}
