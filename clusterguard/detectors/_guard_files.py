"""Reads and replaces the files of a saved guard. The files may come from an untrusted source.

While a guard is replaced, its folder always holds a complete guard, the old one or the new one. `config.json` holds a
digest of the weights that belong to it, and a digest of its own content. Saving first writes the new weights to a file
whose name contains their digest, then replaces `config.json`, and then renames the file of weights to
`model.safetensors`. So at every moment `config.json` fits one of the two files of weights. A reader starts again if
`config.json` changed while it was reading.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from clusterguard._support import open_ordinary
from clusterguard.detectors._model_card import MARK
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from safetensors.torch import load
from torch import Tensor

T = TypeVar("T")

FORMAT, FORMAT_VERSION = "clusterguard", 1
WEIGHTS, CARD, CONFIG = "model.safetensors", "README.md", "config.json"
_AGAIN = "download it or save the guard again"
_CARD_DIGEST = "card_sha256"
_DIGEST = "content_sha256"  # name of the digest of everything else in config.json
_LARGEST_JSON = 2**24  # bytes; a guard of 20,000 classes needs a fifth of that
_LARGEST_TO_EXPLAIN = 2**30  # bytes of weights that are hashed only to say what is wrong with them
_DEEPEST_JSON = 50  # levels of lists and dicts
_TRIES = 20  # number of times that a reader starts again
_NAMED = re.compile(r"model-[0-9a-f]{64}\.safetensors")
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class WeightsFile:
    """An open file of weights. Its contents are read only when a method needs them.

    Args:
        path: path of the file, for messages.
        stream: the open file. It stays the same file when another file replaces it at the path.
        sha256: digest in `config.json` of the weights that it was saved with.
    """

    path: Path
    stream: BinaryIO
    sha256: object

    def blanks(self) -> dict[str, Tensor]:
        """Zeros with the names, shapes and data types of the tensors in the file, which take almost no memory."""
        return {
            name: torch.zeros((), dtype=_DTYPES[entry["dtype"]]).expand(entry["shape"])
            for name, entry in self.header()[1].items()
        }

    def read(self) -> dict[str, Tensor]:
        """Read all tensors. This takes twice the memory of the file for a moment, and then once.

        Raises:
            PersistenceError: the file has another digest than expected, or is no file of safetensors.
        """
        self.stream.seek(0)
        content = self._read(self._size())
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self._another()
        try:
            return load(content)
        except Exception as error:  # safetensors raises errors of its own and of Python
            raise PersistenceError(f"{self.path} is no safetensors file ({in_one_line(error)}); {_AGAIN}") from error

    def read_thresholds(self) -> Tensor:
        """Read the thresholds (K,) of the guard, after checking that the file is not damaged."""
        self.check_digest()
        start, header = self.header()
        entry = header["thresholds"]
        if entry["dtype"] != "F32" or len(entry["shape"]) != 1:
            raise ValueError(f"expected thresholds (K,) of float32 in {self.path}")
        begin, end = entry["data_offsets"]
        self.stream.seek(start + begin)
        return torch.frombuffer(bytearray(self._read(end - begin)), dtype=torch.float32)

    def check_digest(self) -> None:
        """Check the digest of the file in small parts, which takes no memory.

        Raises:
            PersistenceError: the file has another digest than expected.
        """
        digest, left = hashlib.sha256(), self._size()
        self.stream.seek(0)
        while left > 0 and (part := self._read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        if digest.hexdigest() != self.sha256:
            raise self._another()

    def _another(self) -> PersistenceError:
        return PersistenceError(
            f"{self.path} is not the file that {CONFIG} was saved with: damaged, cut off, replaced, or from an "
            f"interrupted save; {_AGAIN}"
        )

    def _read(self, count: int) -> bytes:
        try:
            return self.stream.read(count)
        except OSError as error:
            raise PersistenceError(f"{self.path} cannot be read ({in_one_line(error)}); {_AGAIN}") from error

    def _size(self) -> int:
        return os.fstat(self.stream.fileno()).st_size

    def header(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Read the position at which data begin, and the data type, shape and position of each tensor by its name.

        Raises:
            PersistenceError: the file is damaged, or its tensors do not have the size of the file.
        """
        self.stream.seek(0)
        length = int.from_bytes(self._read(8), "little")
        try:
            if not 0 < length <= min(_LARGEST_JSON, self._size() - 8):
                raise ValueError("its header is too long")
            header = read_json(self._read(length))
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
            if self._size() < _LARGEST_TO_EXPLAIN:
                self.check_digest()  # raises another error if the file is damaged
            raise PersistenceError(f"{self.path} is no safetensors file ({in_one_line(error)}); {_AGAIN}") from error
        return 8 + length, header


def read_guard(folder: Path, use: Callable[[dict[str, Any], WeightsFile], T]) -> T:
    """Call a function with the config and the weights of a saved guard, and return its result.

    Args:
        folder: folder of the guard.
        use: function of the config and the weights. If it raises a `PersistenceError` because the guard was saved again
            in the meantime, it is called again with the new files.

    Raises:
        PersistenceError: a file is missing, damaged, foreign or too new, or `use` raised the error.
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
    """Read `config.json`.

    Raises:
        PersistenceError: the file is missing or damaged, does not describe a guard, or has a newer format.
    """
    try:
        with _open(file) as stream:
            config = read_json(stream.read(_LARGEST_JSON + 1))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
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


def read_card(folder: Path) -> tuple[str | None, list[str]]:
    """Read the model card of a saved guard.

    Returns:
        The text, which is None if there is no file or one that is no model card of a guard; and a list of doubts about
        it in words, with at most one entry.
    """
    file = folder / CARD
    try:
        with open_ordinary(file) as stream:
            content = stream.read(_LARGEST_JSON + 1)
    except FileNotFoundError:
        return None, []
    except (OSError, PersistenceError) as error:
        return None, [f"the model card is left out ({in_one_line(error)})"]
    if MARK.encode() not in content or len(content) > _LARGEST_JSON:
        return None, [f"{file} is left out, because it is no model card that clusterguard wrote"]
    noted, doubts = read_config(folder / CONFIG).get(_CARD_DIGEST), []
    if noted not in (None, hashlib.sha256(content).hexdigest()):  # older versions noted none
        doubts = [f"{file} was edited, or is of another version of this guard; make sure that it describes this one"]
    return content.decode(errors="replace"), doubts


def digest_of_config(config: Mapping[str, Any]) -> str:
    """The digest of a config's content, whatever its layout."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_json(text: bytes) -> Any:
    """Parse a text in JSON of limited size and depth.

    Raises:
        ValueError: the text is too large or too deeply nested, or is no JSON.
        RecursionError: the text is so deeply nested that Python cannot parse it.
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
    """Write a guard into a folder, and replace an older one if there is any.

    Args:
        folder: path of the folder, which is created.
        config: contents of `config.json` without the digest of the weights.
        weights: contents of the file of safetensors.
        card: text of `README.md`.

    Raises:
        ConfigurationError: the config is too large or too deeply nested to be read again.
        PersistenceError: a file cannot be written, for example because the disk is full.
    """
    digest = hashlib.sha256(weights).hexdigest()
    content = {**config, "weights_sha256": digest, _CARD_DIGEST: hashlib.sha256(card.encode()).hexdigest()}
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _replace(folder, digest, ((WEIGHTS, weights), (CONFIG, data), (CARD, card.encode())))
    except OSError as error:
        raise PersistenceError(
            f"the guard could not be written to {folder} ({in_one_line(error)}); make room, or choose another folder, "
            "and save it again"
        ) from error


def _replace(folder: Path, digest: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write the files of a guard, whose weights have this digest, and move them to their places."""
    _sweep(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
            for name, body in files:
                _write_to_disk(Path(staging) / name, body)
            named = folder / _named_by(digest)
            (Path(staging) / WEIGHTS).replace(named)
            (Path(staging) / CONFIG).replace(folder / CONFIG)
            named.replace(folder / WEIGHTS)
            (Path(staging) / CARD).replace(folder / CARD)
    finally:
        _sweep(folder)


def check_overwritable(folder: Path) -> None:
    """Check that no file of another program would be overwritten in a folder.

    Raises:
        PersistenceError: the path is that of a file, or another program has written a file whose name a guard needs.
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
    """Open a file for reading.

    Raises:
        PersistenceError: the file is missing, cannot be read, or is a folder, a pipe or a device.
    """
    try:
        return open_ordinary(file)  # links are followed, because caches of downloads consist of links
    except PersistenceError as error:
        raise PersistenceError(f"{error}; {_AGAIN}") from None
    except FileNotFoundError as error:
        inside = sorted(file.parent.glob(f"*/{CONFIG}"))
        advice = f"is {inside[0].parent} meant?" if inside else _AGAIN
        raise PersistenceError(f"expected {file.name} in {file.parent}, found none; {advice}") from error
    except OSError as error:
        raise PersistenceError(f"{file} is damaged or cannot be read ({in_one_line(error)}); {_AGAIN}") from error


@contextmanager
def _open_weights(folder: Path, sha256: object) -> Iterator[WeightsFile]:
    """Open the file of weights for the block.

    While a guard is being saved, or after a save was interrupted, the name of this file contains the digest. Otherwise
    it is `model.safetensors`.
    """
    named = _named_by(sha256)
    path, stream = folder / WEIGHTS, None
    if _NAMED.fullmatch(named):  # the digest comes from a file and must not lead to another folder
        with suppress(PersistenceError):  # usually there is no such file
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
        os.fsync(written.fileno())  # otherwise a crash of the machine could leave an empty file under the new name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder, on systems with locks that end with their process."""
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
    """Remove files that interrupted saves have left, except for the weights that `config.json` belongs to."""
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
        if _NAMED.fullmatch(file.name) and file.name != _named_by(kept) and _is_left_by_a_save(file):
            with suppress(OSError):
                file.unlink()


def _is_left_by_a_save(file: Path) -> bool:
    """Whether a file holds a guard's weights whose digest is in its name. Any other may be another program's."""
    with suppress(PersistenceError):
        if not file.is_symlink() and _are_our_weights(file):
            with _open(file) as stream:
                weights = WeightsFile(file, stream, file.stem.removeprefix("model-"))
                weights.check_digest()
                return True
    return False
