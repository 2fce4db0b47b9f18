"""Makes `python -m clusterguard.cli` the same as `clusterguard`."""

from clusterguard.cli._app import app

if __name__ == "__main__":
    app(prog_name="clusterguard")
