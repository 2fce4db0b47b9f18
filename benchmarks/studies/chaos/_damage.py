"""Flipped bits and killed writers: what a reader makes of the files that they leave."""

import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterguard.errors import ClusterGuardError

from benchmarks.studies.chaos._writers import Writer, fresh_folders


def flip_bits(writer: Writer, flips: int, seed: int) -> Counter[str]:
    """Flip one bit at a random place of a random file, again and again, and read.

    The file before, which checkpoints keep beside them, is removed first.

    Returns:
        How often the reader refused the file ("refused"), read what was written ("same"), read something else without
        an error ("silent"), or raised an error that is not ours ("raw error").
    """

    def flip(chance: random.Random, content: bytes) -> bytes:
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    return _damage(writer, flip, flips, seed)


def cut_off(writer: Writer, cuts: int, seed: int) -> Counter[str]:
    """Cut a random file off at a random place, again and again, and read. It returns what `flip_bits` returns."""
    return _damage(writer, lambda chance, content: content[: chance.randrange(len(content))], cuts, seed)


def _damage(writer: Writer, change: Callable[[random.Random, bytes], bytes], times: int, seed: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        folders = fresh_folders(Path(root))
        source = folders()
        _write_alone(writer, source, 0)
        expected = _outcome_of(writer, _copy(source, folders()))
        if isinstance(expected, _Failed):
            raise RuntimeError(f"expected a reader that reads undamaged files, got: {expected}")
        for _ in range(times):
            folder = _copy(source, folders())
            path = chance.choice(_judged_files(writer, folder))
            path.write_bytes(change(chance, path.read_bytes()))
            outcomes[_compare(_outcome_of(writer, folder), [expected], writer)] += 1
            shutil.rmtree(folder)
    return outcomes


def exchange_files(writer: Writer) -> Counter[str]:
    """Put each file of another version in the place of this version's, one at a time, and read.

    Returns:
        What `flip_bits` returns, for kinds of several files. "same" means one of the versions, whole. Nothing if the
        versions of this kind do not differ.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        folders = fresh_folders(Path(root))
        sources = [folders(), folders()]
        for version, source in enumerate(sources):
            _write_alone(writer, source, version)
        good = [_outcome_of(writer, _copy(source, folders())) for source in sources]
        for one, other in (sources, sources[::-1]) if good[0] != good[1] else ():
            files = zip(_judged_files(writer, one), _judged_files(writer, other), strict=True)
            for path, replacement in files:
                folder = _copy(one, folders())
                (folder / path.relative_to(one)).write_bytes(replacement.read_bytes())
                outcomes[_compare(_outcome_of(writer, folder), good, writer)] += 1
    return outcomes


def read_meanwhile(writer: Writer, reads: int, *, writers: int = 1) -> Counter[str]:
    """Read again and again while processes write two versions in turn.

    Returns:
        How often the reader got one of the versions ("same"), an error of ours ("refused"), something else ("silent"),
        or another error ("raw error").
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        folders = fresh_folders(Path(root))
        good = []
        for version in (0, 1):
            folder = folders()
            writer.write(folder, version)
            good.append(_outcome_of(writer, folder))
        folder = folders()
        writer.write(folder, 0)
        children = [_start_writing(writer, folder) for _ in range(writers)]
        try:
            for _ in range(reads):
                outcomes[_compare(_outcome_of(writer, folder), good, writer)] += 1
                time.sleep(0.01)
        finally:
            for child in children:
                _kill(child)
        outcomes[_compare(_outcome_of(writer, folder), good, writer)] += 1
    return outcomes


def kill_writers(writer: Writer, kills: int, seed: int) -> Counter[str]:
    """Kill a process that writes two versions in turn, at random moments, and read.

    Returns:
        How often a reader got one of the versions ("same"), an error of ours ("refused"), something else ("silent"), or
        another error ("raw error"); and "left over", the number of files that a killed writer leaves for good.
    """
    outcomes: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        folders = fresh_folders(Path(root))
        good, seconds, usual = [], 0.0, 0
        for version in (0, 1):
            folder = folders()
            started = time.perf_counter()
            writer.write(folder, version)
            seconds = time.perf_counter() - started
            good.append(_outcome_of(writer, folder))
            if not writer.is_resumed:
                writer.write(folder, version)  # checkpoints keep the file before beside them
            usual = len([*folder.rglob("*")])
        for _ in range(kills):
            folder = folders()
            if not writer.is_resumed:
                writer.write(folder, 0)
            _write_until_killed(writer, folder, chance.uniform(0.01, 1 if writer.is_resumed else 3) * seconds)
            outcomes[_compare(_outcome_of(writer, folder), good, writer)] += 1
            time.sleep(1.1)
            if writer.is_resumed:  # a finished run would write nothing
                for file in filter(Path.is_file, [*folder.iterdir()]):
                    file.unlink()
            writer.write(folder, 1)  # sweeps up what is older than a second
            outcomes["left over"] += max(0, len([*folder.rglob("*")]) - usual)
            shutil.rmtree(folder)
    return outcomes


def _write_until_killed(writer: Writer, folder: Path, seconds: float) -> None:
    child = _start_writing(writer, folder)
    time.sleep(seconds)
    _kill(child)


def _start_writing(writer: Writer, folder: Path) -> int:
    """Start a process that writes two versions in turn, and return its number."""
    child = os.fork()
    if child:
        return child
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        while True:
            for version in (1, 0):
                writer.write(folder, version)
    finally:
        os._exit(1)


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise RuntimeError("expected a writer that writes until it is killed, got one that failed before")


class _Failed(str):
    """What happened instead of a value."""


def _outcome_of(writer: Writer, folder: Path) -> Any:
    """What a reader gets: a value, or what happened instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return writer.read(folder)
    except ClusterGuardError:
        return _Failed("refused")
    except RuntimeError as error:  # the service has no errors of its own
        return _Failed("refused" if "expected the state of a monitor" in str(error) else "raw error")
    except Exception:
        return _Failed("raw error")


def _compare(outcome: Any, good: list[Any], writer: Writer) -> str:
    if isinstance(outcome, _Failed):
        return str(outcome)
    if outcome in good:
        return "same"
    return "refused" if writer.nothing is not None and outcome == writer.nothing else "silent"


def _write_alone(writer: Writer, folder: Path, version: int) -> None:
    """Write a version without the file before, to which a reader of a damaged file would go back."""
    writer.write(folder, version)
    for file in folder.rglob("*.previous"):
        file.unlink()


def _judged_files(writer: Writer, folder: Path) -> list[Path]:
    return [file for name in writer.files for path in sorted(folder.glob(name)) for file in _files(path)]


def _copy(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target, dirs_exist_ok=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
