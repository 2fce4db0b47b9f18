"""Threads that share one guard: whether their verdicts are right, and whether the guard stays as it was."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from clusterguard import PGD

from benchmarks.studies.chaos._writers import make_guard, make_images


def share_between_threads(*, threads: int, batches: int, train: bool) -> Counter[str]:
    """Let threads detect, attack and take evidence with one guard at the same time.

    Args:
        threads: number of threads.
        batches: number of batches of each thread.
        train: whether the guard is in train mode meanwhile.

    Returns:
        The number of batches ("batches"), of batches with other verdicts than alone ("wrong"), and of tensors and flags
        of the guard that were changed ("changed").
    """
    guard = make_guard().train(train)
    images, labels = make_images(50)
    attack = PGD(eps=0.1, step_size=0.05, steps=3)
    alone = guard.detect(images), attack(guard, images, labels)
    before = {name: tensor.clone() for name, tensor in guard.state_dict().items()}
    modes = [module.training for module in guard.modules()]

    def work(thread: int) -> int:
        wrong = 0
        for batch in range(batches):
            if (thread + batch) % 4:
                wrong += not all(map(torch.equal, guard.detect(images), alone[0]))
            else:
                wrong += not torch.equal(attack(guard, images, labels), alone[1])
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        wrong = sum(pool.map(work, range(threads)))
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in guard.state_dict().items())
    changed += sum(now != then for now, then in zip([m.training for m in guard.modules()], modes, strict=True))
    return Counter({"batches": threads * batches, "wrong": wrong, "changed": changed})
