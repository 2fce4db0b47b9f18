"""What is run: experiments as data, their cells, and the kinds of attacks."""

from benchmarks.experiments._cells import (
    Cell,
    Experiment,
    Profile,
    Section,
    Table,
    Training,
    all_cells,
    digest,
    list_experiments,
    load_experiment,
)
from benchmarks.experiments._kinds import KINDS, Kind, Outcome, PlannedCost, Scene

__all__ = [
    "KINDS",
    "Cell",
    "Experiment",
    "Kind",
    "Outcome",
    "PlannedCost",
    "Profile",
    "Scene",
    "Section",
    "Table",
    "Training",
    "all_cells",
    "digest",
    "list_experiments",
    "load_experiment",
]
