"""The command line."""

from clusterguard.cli._app import app
from clusterguard.cli._demo import digit_network
from clusterguard.cli._reports import write_evaluation
from clusterguard.cli._runs import begin_run

__all__ = [
    "app",
    "begin_run",
    "digit_network",
    "write_evaluation",
]
