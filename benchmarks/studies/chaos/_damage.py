"""Flipped bits and killed writers: what a reader makes of the files that they leave."""

import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
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
    outcomes: Counter[str] = Counter()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        folders = fresh_folders(Path(root))
        source = folders()
        writer.write(source, 0)
        for file in source.rglob("*.previous"):
            file.unlink()
        expected = _outcome_of(writer, _copy(source, folders()))
        if isinstance(expected, str):
            raise RuntimeError(f"expected a reader that reads undamaged files, got: {expected}")
        for _ in range(flips):
            folder = _copy(source, folders())
            path = chance.choice([path for name in writer.files for path in _files(folder / name)])
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            outcomes[_compare(_outcome_of(writer, folder), [expected])] += 1
            shutil.rmtree(folder)
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
            usual = len([*folder.rglob("*")])
            good.append(_outcome_of(writer, folder))
        for _ in range(kills):
            folder = folders()
            if not writer.is_resumed:
                writer.write(folder, 0)
            _write_until_killed(writer, folder, chance.uniform(0.01, 1 if writer.is_resumed else 3) * seconds)
            outcomes[_compare(_outcome_of(writer, folder), good)] += 1
            time.sleep(1.1)
            writer.write(folder, 1)  # sweeps up what is older than a second
            outcomes["left over"] += max(0, len([*folder.rglob("*")]) - usual)
            shutil.rmtree(folder)
    return outcomes


def _write_until_killed(writer: Writer, folder: Path, seconds: float) -> None:
    child = os.fork()
    if not child:
        try:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            while True:
                for version in (1, 0):
                    writer.write(folder, version)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise RuntimeError("expected a writer that writes until it is killed, got one that failed before")


def _outcome_of(writer: Writer, folder: Path) -> Any:
    """What a reader gets: a value, or the name of what happened instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return writer.read(folder)
    except ClusterGuardError:
        return "refused"
    except RuntimeError as error:  # the service has no errors of its own
        return "refused" if "expected the state of a monitor" in str(error) else "raw error"
    except Exception:
        return "raw error"


def _compare(outcome: Any, good: list[Any]) -> str:
    if isinstance(outcome, str):
        return outcome
    return "same" if outcome in good else "silent"


def _copy(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target, dirs_exist_ok=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
