"""The command line."""

from clusterguard.cli._app import app
from clusterguard.cli._demo import digit_network

__all__ = [
    "app",
    "digit_network",
]
