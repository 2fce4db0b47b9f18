"""The command `clusterguard`, which can be interrupted in one line already while its imports run.

The module lies outside the package, because importing anything from the package imports torch, which takes seconds.
"""

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_usual: dict[int, Any] = {}  # the handlers of signals that end the process for now


def main() -> None:
    """Run the command line. Signals that the caller ignores, as `nohup` does, stay ignored."""
    _heed_signals()
    from clusterguard.cli import app

    while _usual:
        signal.signal(*_usual.popitem())
    app(prog_name="clusterguard")


def _heed_signals() -> None:
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN and number not in _usual:
            _usual[number] = handler
            signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


# Of `python -m clusterguard.cli`, the package is imported before any of its modules runs.
_of_python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
if sys.argv[:1] == ["-m"] and _of_python[-1:] in (["clusterguard.cli"], ["-mclusterguard.cli"]):
    _heed_signals()
