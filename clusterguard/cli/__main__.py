"""Makes `python -m clusterguard.cli` the same as `clusterguard`."""

from clusterguard_command import main

if __name__ == "__main__":
    main()
