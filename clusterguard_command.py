"""The command `clusterguard`, which can be interrupted in one line already while its imports run.

The module lies outside the package, because importing anything from the package imports torch, which takes seconds.
"""

import os
import signal
from contextlib import suppress
from typing import NoReturn

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run the command line. Signals that the caller ignores, as `nohup` does, stay ignored."""
    usual = {number: signal.getsignal(number) for number in _SIGNALS}
    heeded = [number for number, handler in usual.items() if handler is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _end)
    from clusterguard.cli import app

    for number in heeded:
        signal.signal(number, usual[number])
    app()


def _end(number: int, _: object) -> NoReturn:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
