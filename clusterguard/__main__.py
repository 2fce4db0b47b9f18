"""`python -m clusterguard` is `clusterguard`."""

from clusterguard.cli import app

if __name__ == "__main__":
    app(prog_name="clusterguard")
