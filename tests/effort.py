"""How long random tests search: a part of it by default, all of it where `make test-all` asks for it."""

import os

from clusterguard.attacks._suite import Effort

IS_THOROUGH = os.environ.get("CLUSTERGUARD_TESTS") == "thorough"
FEW_STEPS = Effort(steps=5, restarts=1, targets=2, queries=20)  # for tests of what is done with a suite


def examples(thorough: int) -> int:
    """A quarter of these examples, but at least 20, unless the run is thorough."""
    return thorough if IS_THOROUGH else max(20, thorough // 4)
