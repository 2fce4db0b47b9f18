"""The files of a saved guard: how they are read from strangers, and replaced without a moment that has no guard.

`config.json` tells the digest of the weights that belong to it, and that of its own content. A save writes the weights
under a name made of their digest, then replaces `config.json`, then moves the weights to `model.safetensors`. So at
every moment `config.json` and one of the two files belong together, and a reader who saw the files change starts again.
"""

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from clusterguard.detectors._model_card import MARK
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from safetensors.torch import load
from torch import Tensor

T = TypeVar("T")

FORMAT, FORMAT_VERSION = "clusterguard", 1
WEIGHTS, CARD, CONFIG = "model.safetensors", "README.md", "config.json"
_AGAIN = "download it or save the guard again"
_DIGEST = "content_sha256"  # of everything else in config.json
_LARGEST_JSON, _DEEPEST_JSON = 2**24, 50  # of a guard of 20,000 classes a fifth of that
_TRIES = 20
_NAMED = re.compile(r"model-[0-9a-f]{64}\.safetensors")
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that is open; what is in it is read when it is asked for.

    Args:
        path: path of the file, for messages.
        stream: open file; it stays the same when another one gets its name.
        sha256: digest of the file that `config.json` was saved with.
    """

    path: Path
    stream: BinaryIO
    sha256: object

    def blanks(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and data types that the file has, each of one value, so without their memory."""
        return {
            name: torch.zeros((), dtype=_DTYPES[entry["dtype"]]).expand(entry["shape"])
            for name, entry in self.header()[1].items()
        }

    def read(self) -> dict[str, Tensor]:
        """All tensors; as much memory as the file is large, twice for a moment."""
        self.stream.seek(0)
        content = self.stream.read(self._size())
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self._another()
        try:
            return load(content)
        except Exception as error:  # safetensors has an error of its own, and passes on Python's
            raise PersistenceError(f"{self.path} is no safetensors file ({in_one_line(error)}); {_AGAIN}") from error

    def read_thresholds(self) -> Tensor:
        """The thresholds (K,) of the guard, if the file is undamaged."""
        self.check_digest()
        start, header = self.header()
        entry = header["thresholds"]
        if entry["dtype"] != "F32" or len(entry["shape"]) != 1:
            raise ValueError(f"expected thresholds (K,) of float32 in {self.path}")
        begin, end = entry["data_offsets"]
        self.stream.seek(start + begin)
        return torch.frombuffer(bytearray(self.stream.read(end - begin)), dtype=torch.float32)

    def check_digest(self) -> None:
        """Make sure that it is the file that `config.json` was saved with, without taking memory."""
        digest, left = hashlib.sha256(), self._size()
        self.stream.seek(0)
        while left > 0 and (part := self.stream.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        if digest.hexdigest() != self.sha256:
            raise self._another()

    def _another(self) -> PersistenceError:
        return PersistenceError(
            f"{self.path} is not the file that {CONFIG} was saved with: damaged, cut off, replaced, or from an "
            f"interrupted save; {_AGAIN}"
        )

    def _size(self) -> int:
        return os.fstat(self.stream.fileno()).st_size

    def header(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Where data begin, and for each tensor its dtype, shape and place, which are those of a file of this size."""
        self.stream.seek(0)
        length = int.from_bytes(self.stream.read(8), "little")
        try:
            if not 0 < length <= min(_LARGEST_JSON, self._size() - 8):
                raise ValueError("its header is too long")
            header = read_json(self.stream.read(length))
            header.pop("__metadata__", None)
            sizes = [
                _DTYPES[entry["dtype"]].itemsize * math.prod(entry["shape"])
                for entry in header.values()
                if all(type(side) is int and side >= 0 for side in entry["shape"])
            ]
            places = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
            if sizes != places or sum(sizes) != self._size() - 8 - length:
                raise ValueError("its tensors have other sizes than it has room for")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            self.check_digest()  # a damaged file is called that
            raise PersistenceError(f"{self.path} is no safetensors file ({in_one_line(error)}); {_AGAIN}") from error
        return 8 + length, header


def read_guard(folder: Path, use: Callable[[dict[str, Any], WeightsFile], T]) -> T:
    """Call a function with the config and the weights of a saved guard, and return its result.

    Args:
        folder: folder of the guard. If the guard is saved again meanwhile and `use` fails for that, it is called again.
        use: function of the config and the weights.

    Raises:
        PersistenceError: a file is missing, damaged, foreign or too new; or of `use`.
    """
    tries_left = _TRIES
    while True:
        before, tries_left = _identity(folder / CONFIG), tries_left - 1
        try:
            config = read_config(folder / CONFIG)
            with _open_weights(folder, config.get("weights_sha256")) as weights:
                return use(config, weights)
        except PersistenceError:
            if not tries_left or _identity(folder / CONFIG) == before:
                raise


def read_config(file: Path) -> dict[str, Any]:
    """What `config.json` holds, if it is a guard's and of a format that is known."""
    try:
        with _open(file) as stream:
            config = read_json(stream.read(_LARGEST_JSON + 1))
    except (ValueError, RecursionError, MemoryError) as error:
        raise PersistenceError(f"{file} is damaged or cannot be read ({in_one_line(error)}); {_AGAIN}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PersistenceError(f"{file} describes no guard; choose a folder that save_pretrained wrote")
    version_there = config.get("format_version")
    if type(version_there) is not int or not 1 <= version_there <= FORMAT_VERSION:
        raise PersistenceError(
            f"expected format version {FORMAT_VERSION} or older in {file}, got {repr(version_there)[:50]}; "
            "upgrade clusterguard"
        )
    if config.pop(_DIGEST, None) not in (None, digest_of_config(config)):  # 0.1 wrote none
        raise PersistenceError(
            f"{file} was edited or damaged after it was saved; {_AGAIN}, or delete {_DIGEST} in it if it was you"
        )
    return config


def digest_of_config(config: Mapping[str, Any]) -> str:
    """The digest of a config's content, whatever its layout."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_json(text: bytes) -> Any:
    """What a text in JSON says, if it is neither large nor deep.

    Raises:
        ValueError: it is, or it is no JSON.
        RecursionError: it is so deep that Python gave up.
    """
    if len(text) > _LARGEST_JSON:
        raise ValueError(f"expected at most {_LARGEST_JSON} bytes of JSON, got more")
    value = json.loads(text)
    level, depth = [part for part in [value] if isinstance(part, dict | list)], 0
    while level:
        level = [
            part for container in level for part in (container.values() if isinstance(container, dict) else container)
        ]
        level = [part for part in level if isinstance(part, dict | list)]
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(f"expected JSON of at most {_DEEPEST_JSON} levels, got more")
    return value


def write_guard(folder: Path, config: Mapping[str, Any], weights: bytes, card: str) -> None:
    """Replace the guard in a folder, or write its first one.

    Args:
        folder: path of the folder, which is created.
        config: contents of `config.json` without the digest of the weights.
        weights: contents of the file of safetensors.
        card: text of `README.md`.

    Raises:
        ConfigurationError: a config that could not be read again.
    """
    digest = hashlib.sha256(weights).hexdigest()
    content = {**config, "weights_sha256": digest}
    text = json.dumps(content, allow_nan=False)
    try:
        whole = {**content, _DIGEST: digest_of_config(read_json(text.encode()))}  # JSON has no tuples
        data = json.dumps(whole, indent=2).encode() + b"\n"
        read_json(data)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"expected training, evaluation and names that {CONFIG} has room for, got more ({in_one_line(error)}); "
            "leave some out"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _sweep(folder)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
                for name, body in ((WEIGHTS, weights), (CONFIG, data), (CARD, card.encode())):
                    _write_to_disk(Path(staging) / name, body)
                named = folder / _named_by(digest)
                (Path(staging) / WEIGHTS).replace(named)
                (Path(staging) / CONFIG).replace(folder / CONFIG)
                named.replace(folder / WEIGHTS)
                (Path(staging) / CARD).replace(folder / CARD)
        finally:
            _sweep(folder)


def refuse_foreign(folder: Path) -> None:
    """Nothing that clusterguard did not write is overwritten.

    Raises:
        PersistenceError: the folder is a file, or holds another program's file under one of our names.
    """
    if folder.exists() and not folder.is_dir():
        raise PersistenceError(f"expected a folder, got the file {folder}; choose another name")
    for name, is_ours in ((CARD, _is_our_text), (CONFIG, _is_our_text), (WEIGHTS, _are_our_weights)):
        file = folder / name
        if file.exists() and not (file.is_file() and is_ours(file)):
            raise PersistenceError(f"{file} is not clusterguard's; choose another folder, or remove that file")


def _is_our_text(file: Path) -> bool:
    mark = MARK if file.name == CARD else f'"format": "{FORMAT}"'
    with _open(file) as stream:
        return mark.encode() in stream.read(_LARGEST_JSON)


def _are_our_weights(file: Path) -> bool:
    try:
        with _open(file) as stream:
            return {"thresholds", "normalize.mean", "normalize.std"} <= {*WeightsFile(file, stream, None).header()[1]}
    except PersistenceError:
        return False


def _open(file: Path) -> BinaryIO:
    """A file that is missing, cannot be read, or whose place a pipe or a device has, is an error of ours."""
    try:
        if stat.S_ISREG(file.stat().st_mode):  # of what a link leads to: caches of downloads are made of links
            return file.open("rb")
    except FileNotFoundError as error:
        inside = sorted(file.parent.glob(f"*/{CONFIG}"))
        advice = f"is {inside[0].parent} meant?" if inside else _AGAIN
        raise PersistenceError(f"expected {file.name} in {file.parent}, found none; {advice}") from error
    except OSError as error:
        raise PersistenceError(f"{file} is damaged or cannot be read ({in_one_line(error)}); {_AGAIN}") from error
    raise PersistenceError(f"expected an ordinary file, got a folder, a pipe or a device in {file}; {_AGAIN}")


@contextmanager
def _open_weights(folder: Path, sha256: object) -> Iterator[WeightsFile]:
    """Under the name made of their digest if a save is under way or was interrupted, else `model.safetensors`."""
    named = _named_by(sha256)
    path, stream = folder / WEIGHTS, None
    if _NAMED.fullmatch(named):  # and leads to no other folder
        with suppress(PersistenceError):  # it is usually missing, or has just been moved
            stream = _open(folder / named)
            path = folder / named
    with stream or _open(path) as opened:
        yield WeightsFile(path, opened, sha256)


def _named_by(sha256: object) -> str:
    return f"model-{sha256}.safetensors"


def _identity(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _write_to_disk(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with file.open("rb") as written:
        os.fsync(written.fileno())  # or a crash of the machine could leave an empty file under the new name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One save at a time, where the system has a lock that ends with its process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what interrupted saves left, but the weights that `config.json` tells."""
    for staging in folder.glob(".saving.????????"):
        if staging.is_dir() and not staging.is_symlink():
            with suppress(OSError):
                for name in (WEIGHTS, CARD, CONFIG):
                    (staging / name).unlink(missing_ok=True)
                staging.rmdir()
    try:
        kept = read_config(folder / CONFIG).get("weights_sha256") if (folder / CONFIG).exists() else None
    except PersistenceError:
        return
    for file in folder.glob("model-*.safetensors"):
        if _NAMED.fullmatch(file.name) and file.name != _named_by(kept):
            with suppress(OSError):
                file.unlink()
