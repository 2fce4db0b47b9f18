"""Shared by the commands: options, errors as one line, results on stdout, and everything else on stderr."""

import json
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from clusterguard.errors import ClusterGuardError, NotCalibratedError, TrainingStoppedError
from typer.core import TyperGroup

if TYPE_CHECKING:
    import torch
    from clusterguard.detectors import ClusterGuard


class Commands(TyperGroup):
    """Prints errors that are raised on purpose, and errors of files, as one line of text. A signal is one line, too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the arguments."""
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _in_one_line():
            return super().invoke(ctx)


class _Signalled(KeyboardInterrupt):  # it is no error, as Ctrl-C is none
    """SIGTERM or SIGHUP, which end a command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _in_one_line() -> Iterator[None]:
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_in_options(str(message))}\n"
    try:
        with _ended_by(_raise_signalled, "SIGTERM", "SIGHUP"):
            yield
    except BrokenPipeError:
        raise  # the reader of the result closed the pipe, which is no error
    except (ClusterGuardError, OSError) as error:
        say(f"error: {_in_options(' '.join(str(error).split()))}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        with suppress(OSError):  # after SIGHUP the terminal may be gone
            say("interrupted")
        raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from error
    finally:
        warnings.formatwarning = usual


def _raise_signalled(number: int, _: object) -> NoReturn:
    raise _Signalled(number)


@contextmanager
def _ended_by(handler: Callable[[int, Any], Any], *names: str) -> Iterator[Callable[[], None]]:
    """Handle signals during the block, except those that are ignored, and yield a function that no longer does."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()  # signals can be handled nowhere else
    heeded = [number for number in numbers if is_main and signal.getsignal(number) is not signal.SIG_IGN]
    usual = {number: signal.signal(number, handler) for number in heeded}

    def restore() -> None:
        for number, before in usual.items():
            signal.signal(number, before)

    try:
        yield restore
    finally:
        restore()


def _in_options(text: str) -> str:
    """A message of the library in the words of the command line."""
    return re.sub(r"\b(scarce|method)='(\w+)'", r"--\1 \2", text)


GuardFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a guard.")]
Data = Annotated[
    str,
    typer.Option(
        help="The built-in 'digits', or a folder PATH with PATH/train, PATH/calibration and PATH/test, each with one "
        "subfolder per class. If PATH holds the classes directly, --seed of the training splits it 60:20:20."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="Device such as cpu or cuda:1; by default a GPU if there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side in pixels; by default as trained, else 28 for digits and 224 for folders."),
]
Channels = Annotated[
    int | None,
    typer.Option(min=1, max=3, help="Channels, 1 or 3; by default as trained, else 1 for digits and 3 for folders."),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out images that cannot be read, and say how many, instead of failing."
    ),
]


def known_norm(name: str) -> str:
    """Check the name of a norm. This imports torch, which `--help` should not wait for, so it happens only here."""
    from clusterguard.attacks import NORMS

    if name not in NORMS:
        raise typer.BadParameter(f"expected {', '.join(NORMS)}, got {name!r}")
    return name


NormOption = Annotated[
    str,
    typer.Option(callback=known_norm, metavar="NORM", help="Norm that bounds the attack: linf, l2, l1, l0 or patch."),
]
Eps = Annotated[float, typer.Option(min=0, help="Radius of the attack, for pixels in [0, 1].")]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bf16"],
    typer.Option(help="Precision of attacks and training; auto: bf16 where it is faster and finds the same."),
]
RateOption = Annotated[
    float, typer.Option(help="Share of benign images that may be refused in each class, such as 0.01.")
]
MethodOption = Annotated[
    Literal["conformal", "quantile"],
    typer.Option(help="conformal keeps the rate for any number of images; quantile is the paper's."),
]
ScarceOption = Annotated[
    Literal["error", "pool"],
    typer.Option(
        help="For classes with too few images: an error, or a shared threshold; the rate then holds on average."
    ),
]


def say(text: str) -> None:
    """Print a message to stderr, so that stdout holds only the result."""
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Escape characters with which a name of a file or class could control the terminal, or that cannot be encoded."""
    usual = "\n\t\N{NO-BREAK SPACE}"
    return "".join(one if one.isprintable() or one in usual else one.encode("unicode_escape").decode() for one in text)


@contextmanager
def stopped_by_signals(checkpoint: Path, done: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Context in which Ctrl-C, SIGTERM or SIGHUP stops a training after its present step, so that nothing is lost.

    A second signal stops it at once.

    Args:
        checkpoint: path of the training's checkpoint.
        done: function that says how far the training is.

    Yields:
        The function to pass to `fit` as ``stop_when``.
    """
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        restore()

    with _ended_by(receive, "SIGINT", "SIGTERM", "SIGHUP") as restore:
        try:
            yield lambda: bool(received)
        except (KeyboardInterrupt, TrainingStoppedError) as error:
            kept = "run the same command with --resume to go on" if checkpoint.exists() else "nothing was done yet"
            with suppress(OSError):
                say(f"interrupted after {done()}: {kept}")
            number = received[0] if received else getattr(error, "number", signal.SIGINT)
            raise typer.Exit(128 + number) from error


def stderr_is_a_terminal() -> bool:
    """Whether stderr is a terminal, so that somebody can see progress bars. In a log they are noise."""
    return sys.stderr.isatty()


def show(as_json: bool, result: Any, text: str) -> None:
    """Print the result as JSON for a machine, or as text for a person."""
    from clusterguard.evaluation._internal import to_json_value

    typer.echo(json.dumps(to_json_value(result), indent=2, allow_nan=False) if as_json else printable(text))


def find_device(name: str | None) -> "torch.device":
    """The device with this name. The default is a GPU if there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name, torch built without it, or no such GPU
        raise typer.BadParameter(f"expected a device such as cpu or cuda, got {name!r}, which is not there") from error


def check_suffixes(paths: list[Path], *expected: str) -> None:
    """Refuse files with an unknown suffix, before hours of work."""
    for path in paths:
        if path.suffix not in expected:
            raise typer.BadParameter(f"expected a file that ends in {' or '.join(expected)}, got {path}")


def refuse_uncalibrated(guard: "ClusterGuard", folder: str | Path, data: str = "DATA") -> None:
    """Refuse a guard without thresholds, with the command that fits them.

    Args:
        guard: guard that was read from a folder.
        folder: that folder.
        data: what the command takes as data.

    Raises:
        NotCalibratedError: it has no thresholds.
    """
    if not guard.is_calibrated:
        raise NotCalibratedError(f"{folder} has no thresholds yet; run: clusterguard calibrate {folder} --data {data}")
