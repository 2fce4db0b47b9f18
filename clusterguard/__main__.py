"""`python -m clusterguard` is `clusterguard`."""

from clusterguard.cli import app

app(prog_name="clusterguard")
