"""Evaluation: how often attacks get past a detector, as figures, pages and plots."""

from clusterguard._support import Progress, read_progress, save_progress
from clusterguard.evaluation._evaluate import evaluate
from clusterguard.evaluation._html import to_html
from clusterguard.evaluation._plots import (
    Panel,
    evaluation_figures,
    plot_distances,
    plot_representations,
    star_coordinates,
)
from clusterguard.evaluation._recapture import Breakable, estimate_breakable
from clusterguard.evaluation._results import AttackResult, CertifiedBound, Evaluation
from clusterguard.evaluation._sanity import Sanity

__all__ = [
    "AttackResult",
    "Breakable",
    "CertifiedBound",
    "Evaluation",
    "Panel",
    "Progress",
    "Sanity",
    "estimate_breakable",
    "evaluate",
    "evaluation_figures",
    "plot_distances",
    "plot_representations",
    "read_progress",
    "save_progress",
    "star_coordinates",
    "to_html",
]
