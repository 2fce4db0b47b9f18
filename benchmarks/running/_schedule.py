"""The order in which cells run within a time budget."""

import time
from collections.abc import Iterable

from benchmarks.experiments import Cell
from benchmarks.running._attacking import pair_goals
from benchmarks.running._clock import OutOfTimeError
from benchmarks.running._plan import attack_cost
from benchmarks.running._runner import run_cell
from benchmarks.running._training import Trainings


def run_cells(cells: Iterable[Cell], trainings: Trainings) -> list[Cell]:
    """Run cells until they are done or the time of the trainings' clock is up, and print a line after each.

    Near the end of the budget, cells that can still be finished come first. The next run resumes a cell that this one
    does not finish.

    Args:
        cells: cells without a result.
        trainings: source of the detectors, with the clock and the store of results.

    Returns:
        The cells that are left.
    """
    left = list(cells)
    count, groups = len(left), pair_goals(left)
    pace: dict[str, float] = {}  # seconds of one pass, by network
    try:
        while groups:
            trainings.clock.check()
            fitting = (group for group in groups if pace.get(_model(group), 0) * _cost(group) <= trainings.clock.left)
            group = next(fitting, groups[0])
            was_trained, begun = trainings.store.has_weights(group[0].training.key), time.perf_counter()
            for index, cell in enumerate(group):
                started = time.perf_counter()
                run_cell(cell, trainings, *group[index + 1 :])
                left.remove(cell)
                seconds = time.perf_counter() - started
                print(f"[{count - len(left)}/{count}] {cell.title}: {seconds:.1f} s", flush=True)
            groups.remove(group)
            if was_trained:
                pace[_model(group)] = (time.perf_counter() - begun) / _cost(group)
    except OutOfTimeError:
        pass  # what is finished is kept
    return left


def _model(group: tuple[Cell, ...]) -> str:
    return group[0].training.model


def _cost(group: tuple[Cell, ...]) -> int:
    return sum(map(attack_cost, group))
