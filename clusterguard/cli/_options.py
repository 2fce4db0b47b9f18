"""What the commands share: options, errors as one line, results on stdout and everything else on stderr."""

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from clusterguard.errors import ClusterGuardError, TrainingStoppedError
from typer.core import TyperGroup

if TYPE_CHECKING:
    import torch
    from clusterguard.training import EpochRecord


class Commands(TyperGroup):
    """Errors that are raised on purpose, and those of files, become one line of text."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        usual = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read the result has seen enough
        except (ClusterGuardError, OSError) as error:
            say(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(130) from error
        finally:
            warnings.formatwarning = usual


Guard = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a guard.")]
Data = Annotated[
    str,
    typer.Option(
        help="'digits', which are built in; or a folder: PATH/train, PATH/calibration and PATH/test with one subfolder "
        "a class, or the classes in PATH itself, which is then split 60:20:20, by --seed of the training."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; a GPU if there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side in pixels; as trained, else 28 for digits and 224 for folders.")
]
Channels = Annotated[
    int | None, typer.Option(min=1, max=3, help="1 or 3; as trained, else 1 for digits, 3 for folders.")
]
SkipUnreadable = Annotated[
    bool,
    typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and say how many; else an error."),
]
Norm = Annotated[Literal["linf", "l2", "l1", "l0"], typer.Option(help="In which the attack is bounded.")]
Eps = Annotated[float, typer.Option(min=0, help="Radius of the attack, pixels in [0, 1].")]
Rate = Annotated[float, typer.Option(help="Share of benign images that may be refused, per class, such as 0.01.")]
Method = Annotated[
    Literal["conformal", "quantile"],
    typer.Option(help="conformal holds the rate at every number of images; quantile is the paper's."),
]
Scarce = Annotated[
    Literal["error", "pool"],
    typer.Option(help="Classes with too few images: an error, or a shared threshold, bounded on average."),
]


def say(text: str) -> None:
    """Messages go to stderr, so that stdout holds the result and nothing else."""
    typer.echo(printable(text), err=True)


def say_epoch(record: "EpochRecord", *, epochs: int) -> None:
    """One line on an epoch of a training."""
    say(
        f"epoch {record.epoch}/{epochs}: loss {record.loss:.3f}, accuracy {record.accuracy:.3f}, "
        f"attack success {record.attack_success_rate:.3f}, {record.seconds:.0f} s"
    )


def printable(text: str) -> str:
    """A text whose names of files and classes can neither steer a terminal nor fail to be encoded."""
    usual = "\n\t\N{NO-BREAK SPACE}"
    return "".join(own if own.isprintable() or own in usual else own.encode("unicode_escape").decode() for own in text)


@contextmanager
def stopped_by_signals(checkpoint: Path, done: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Training that Ctrl-C or SIGTERM ends after its present step, with nothing lost; a second one ends it at once.

    Args:
        checkpoint: of the training.
        done: says how far it is.

    Yields:
        What to give to `fit` as ``stop_when``.
    """
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    usual = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    except (KeyboardInterrupt, TrainingStoppedError) as error:
        kept = "run the same command with --resume to go on" if checkpoint.exists() else "nothing was done yet"
        say(f"interrupted after {done()}: {kept}")
        raise typer.Exit(128 + (received or [signal.SIGINT])[0]) from error
    finally:
        restore()


def is_watched() -> bool:
    """Whether progress bars have anybody to look at them; in a log they are noise."""
    return sys.stderr.isatty()


def show(as_json: bool, result: Any, text: str) -> None:
    """The result, for a machine or for a person."""
    from clusterguard.evaluation import plain

    typer.echo(json.dumps(plain(result), indent=2, allow_nan=False) if as_json else printable(text))


def find_device(name: str | None) -> "torch.device":
    """The device of that name, if it is there."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such name; torch was built without it; no such GPU
        raise typer.BadParameter(f"expected a device such as cpu or cuda, got {name!r}, which is not there") from error


def check_suffixes(paths: list[Path], *expected: str) -> None:
    """Before hours of work: files whose kind is known by their ending."""
    for path in paths:
        if path.suffix not in expected:
            raise typer.BadParameter(f"expected a file that ends in {' or '.join(expected)}, got {path}")
