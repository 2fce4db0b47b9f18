"""`python -m clusterguard.cli` is `clusterguard`."""

from clusterguard.cli._app import app

if __name__ == "__main__":
    app(prog_name="clusterguard")
