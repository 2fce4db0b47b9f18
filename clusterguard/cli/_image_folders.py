"""Folders of images with one subfolder per class: their parts, ignored files, copies, and a summary."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from clusterguard._support import is_unicode, open_ordinary
from clusterguard.deployment import read_image
from clusterguard.deployment._internal import FORMATS
from clusterguard.errors import InputError, PersistenceError
from tqdm.auto import tqdm

Part = Literal["train", "calibration", "test"]
SHARES: dict[Part, float] = {"train": 0.6, "calibration": 0.2, "test": 0.2}
_NAMES: dict[Part, str] = {
    "train": "train training trn",
    "calibration": "calibration calib cal validation valid val vld dev",
    "test": "test testing tst eval evaluation",
}
PARTS: dict[str, Part] = {name: part for part, names in _NAMES.items() for name in names.split()}
_AFFIX = r"(?:data|set|images?|imgs?|pictures?|photos?|samples?|split|[\W\d_])*"  # as in "01_train" and "ValDataSet"
_NAME_OF_PART = re.compile(f"{_AFFIX}({'|'.join(PARTS)}){_AFFIX}")
_PART_AND_MORE = re.compile(rf"(|.*[\W\d_])({'|'.join(PARTS)})(|[\W\d_].*)")
_SUFFIXES = ".jpg .jpeg .jpe .jif .jfif .pjp .pjpeg .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm"
SUFFIXES = {*_SUFFIXES.split(), *([".avif"] if "AVIF" in FORMATS else [])}
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
Classes = dict[str, list[str]]


class _Tree(NamedTuple):
    """The visible images and subfolders of a folder, both sorted by name."""

    images: list[str]
    folders: dict[str, "_Tree"]

    def below(self) -> list[str]:
        return self.images + [path for subtree in self.folders.values() for path in subtree.below()]


@dataclass(frozen=True)
class ImageFolder:
    """The images of a data set by part and class. `open_folder` makes it.

    Attributes:
        root: folder of the data set.
        is_divided: whether the folder holds one folder per part. Otherwise `open_folder` has divided the images.
        parts: paths of the images, by part and class.
        passed_over: number of files that are ignored, by reason.
        unreadable: paths of images that were left out because they cannot be read.
    """

    root: Path
    is_divided: bool
    parts: Mapping[Part, Classes]
    passed_over: Mapping[str, int]
    unreadable: tuple[str, ...] = ()

    def samples(self, part: Part) -> list[tuple[str, int]]:
        """The paths and labels of a part. Labels follow the sorted names of its classes.

        Raises:
            InputError: there is no such part, or one of its classes has no image.
        """
        if part not in self.parts:
            raise InputError(
                f"expected one subfolder of images per class in {self.root / part}, or in a folder with another usual "
                f"name ({_NAMES[part].replace(' ', ', ')}), got none"
            )
        empty = [name for name, paths in self.parts[part].items() if not paths]
        if empty or not self.parts[part]:
            where = "" if self.is_divided else f" for {part}, which is {SHARES[part]:.0%} of the files"
            raise InputError(
                f"expected one subfolder of images per class in {self.root}{where}, got no image of "
                f"{', '.join(empty) or 'any class'}; {self._advice()}"
            )
        return [(path, label) for label, paths in enumerate(self.parts[part].values()) for path in paths]

    def _advice(self) -> str:
        outside = self.passed_over.get("in no class", 0)
        if outside and not any(self.parts.values()):
            return f"{outside} images lie directly in the folder; move them into a subfolder for each class"
        return "add images, or remove the folder"


def open_folder(root: Path, seed: int, *, skip_unreadable: bool = False) -> ImageFolder:
    """Find the parts and classes in a folder. Images are decoded only with `skip_unreadable`.

    Folders named `train`, `calibration` and `test`, or by another usual name, are parts if they hold folders of images.
    Upper and lower case do not matter, nor do numbers and words such as `data`, `set` or `images` around the name, nor
    do other words that all folders share, as in `train_rgb` and `test_rgb`. If such a folder holds images directly, it
    is a class of that name. If there are no parts, a hash of the seed and the content of an image decides to which part
    the image belongs. So copies of an image stay together. If a class has copies and this would leave it without images
    in some part, names of files decide instead of contents.

    Args:
        root: path of the folder.
        seed: seed of the division.
        skip_unreadable: whether to read every image and leave out those that `read_image` refuses. The parts of all
            other images stay the same.

    Returns:
        The images of the folder. Hidden files and other files are only counted.

    Raises:
        InputError: there are two folders for one part, or parts beside classes, or folders by other names that look
            like parts, since they hold the same classes, or everything lies one folder deeper, or the name of a class
            cannot be encoded as UTF-8.
    """
    passed_over: Counter[str] = Counter()
    tree = _scan(root, passed_over, ())
    divided = _find_parts(root, tree, passed_over)
    passed_over["in no class"] += len(tree.images)
    unreadable: list[str] = []
    sort = partial(_readable_classes, unreadable) if skip_unreadable else _classes
    parts: dict[Part, Classes]
    if divided:
        parts = {part: sort(tree.folders[name]) for part, name in divided.items()}
    else:
        parts = {part: {name: [] for name in tree.folders} for part in SHARES}
        for name, paths in sort(tree).items():
            for path, part in zip(paths, _divide(paths, root, seed), strict=True):
                parts[part][name].append(path)
    _check_names(root, sorted({name for classes in parts.values() for name in classes}))
    passed_over["unreadable"] = len(unreadable)
    return ImageFolder(root, bool(divided), parts, +passed_over, tuple(unreadable))


def _check_names(root: Path, names: list[str]) -> None:
    """Refuse names of classes that no text file could hold, and those that a person takes for the same class."""
    first: dict[str, str] = {}
    for name in names:
        if not is_unicode(name):
            raise InputError(f"expected names of classes in UTF-8, got the folder {name!r} in {root}; rename it")
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise InputError(
                f"expected classes of different names in {root}, got {other!r} and {name!r}, which differ in upper and "
                "lower case or in the encoding of accents alone; put their images into one folder, or rename one"
            )


def _scan(folder: str | Path, passed_over: Counter[str], above: tuple[str, ...]) -> _Tree:
    images, folders = [], {}
    above += (os.path.realpath(folder),)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name, suffix = entry.name.lower(), Path(entry.name).suffix.lower()
        if Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir():
            if name.startswith(".") or name in _SYSTEM_FOLDERS:
                passed_over["hidden"] += sum(len(files) for _, _, files in os.walk(entry.path))
            elif os.path.realpath(entry.path) in above:
                passed_over["links to a folder that they are in"] += 1
            else:
                folders[entry.name] = _scan(entry.path, passed_over, above)
        elif name.startswith(".") or name in _SYSTEM_FILES:
            passed_over["hidden"] += 1
        elif suffix in SUFFIXES and (entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())):
            images.append(entry.path)  # a broken link too, so that reading it raises an error
        else:
            passed_over[suffix or "without a suffix"] += 1
    return _Tree(images, folders)


def _find_parts(root: Path, tree: _Tree, passed_over: Counter[str]) -> dict[Part, str]:
    """The folders that are parts, which have a usual name and hold folders of images."""
    filled = {name: subtree for name, subtree in tree.folders.items() if subtree.below()}
    matches = {name: _NAME_OF_PART.fullmatch(name.casefold()) for name in filled}
    named = {name: PARTS[match[1]] for name, match in matches.items() if match} or _parts_with_one_addition(filled)
    nested = {name for name in named if any(subtree.below() for subtree in filled[name].folders.values())}
    if not nested:
        for name, subtree in filled.items():
            if (
                len(filled) == 1
                and not subtree.images
                and sum(bool(sub.below()) for sub in subtree.folders.values()) > 1
            ):
                raise InputError(f"expected several classes in {root}, got {name} alone; pass {root / name} instead")
        _check_classes(root, filled)
        return {}
    for name in nested:
        if filled[name].images:
            raise InputError(
                f"expected {root / name} to hold images, as a class, or one subfolder per class, as a part; got both: "
                f"move {filled[name].images[0]} into a class"
            )
    foreign = [name for name in filled if name not in named]
    if foreign:
        raise InputError(
            f"expected folders of parts or folders of classes in {root}, got both: {', '.join(sorted(nested))} hold "
            f"folders of images, as parts do, beside {', '.join(foreign)}; move one kind elsewhere"
        )
    parts: dict[Part, str] = {}
    for name in sorted(nested):
        if named[name] in parts:
            raise InputError(
                f"expected one folder for {named[name]} in {root}, got {parts[named[name]]} and {name}; move one "
                "elsewhere"
            )
        parts[named[name]] = name
    for name in set(named) - nested:  # for instance test images without labels
        passed_over["in no class"] += len(filled[name].images)
    return {part: parts[part] for part in SHARES if part in parts}


def _parts_with_one_addition(filled: Collection[str]) -> dict[str, Part]:
    """The parts of names such as `train_rgb` and `test_rgb`, which differ in nothing but the name of a part."""
    matches = {name: _PART_AND_MORE.fullmatch(name.casefold()) for name in filled}
    named = {name: PARTS[match[2]] for name, match in matches.items() if match}
    around = {(match[1], match[3]) for match in matches.values() if match}
    return named if len(named) == len(filled) > 1 and len(around) == 1 else {}


def _check_classes(root: Path, filled: dict[str, _Tree]) -> None:
    """Refuse folders that hold folders of the same names, which are more likely parts with classes than classes."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, subtree in filled.items():
        inner = tuple(sub for sub in subtree.folders if subtree.folders[sub].below())
        if len(inner) > 1 and not subtree.images:
            alike.setdefault(inner, []).append(name)
    for inner, names in alike.items():
        if len(names) > 1:
            raise InputError(
                f"expected one folder per class in {root}, got {' and '.join(names[:2])}, which hold folders of the "
                f"same names ({listed_paths(inner, 5)}); if they are parts of the data, rename them to "
                f"{', '.join(SHARES)}; if they are classes, move their images out of the inner folders"
            )


def _classes(tree: _Tree) -> Classes:
    return {name: subtree.below() for name, subtree in tree.folders.items()}


def _readable_classes(unreadable: list[str], tree: _Tree) -> Classes:
    """The classes without images that cannot be read. The paths of such images are added to `unreadable`."""
    classes = _classes(tree)
    bad = {path for path, result in _examine_all(_paths(classes)).items() if isinstance(result, InputError)}
    unreadable += sorted(bad)
    return {name: [path for path in paths if path not in bad] for name, paths in classes.items()}


def _divide(paths: list[str], root: Path, seed: int) -> list[Part]:
    digests = [_file_digest(path) for path in paths]
    parts = [_part_of(digest, seed) for digest in digests]
    if len(set(parts)) < len(SHARES) and len(set(digests)) < len(digests):
        return [_part_of(os.fsencode(Path(path).relative_to(root)), seed) for path in paths]
    return parts


def _part_of(identity: bytes, seed: int) -> Part:
    digest = hashlib.sha256(f"{seed}/".encode() + identity).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < SHARES["train"]:
        return "train"
    return "calibration" if position < SHARES["train"] + SHARES["calibration"] else "test"


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, PersistenceError) as error:
        raise InputError(f"expected an image, got {path}, which cannot be read: {error}; remove it") from error


def _file_size(path: str) -> int:
    with _named(path):
        return Path(path).stat().st_size


def _file_digest(path: str) -> bytes:
    with _named(path):
        status = Path(path).stat()
        return _digest_of_content(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**20)
def _digest_of_content(path: str, size: int, changed: int) -> bytes:
    with open_ordinary(path) as file:
        return hashlib.sha256(file.read()).digest()


@dataclass(frozen=True)
class Summary:
    """What `summarise` found out about a folder of images.

    Attributes:
        counts: number of images by part and class.
        sizes: smallest and largest width and height, as two pairs (width, height).
        modes: number of images by Pillow's name for the way in which pixels are stored.
        doubts: number of images by the property that other programs may show differently.
        passed_over: number of files that are ignored, by reason.
        warnings: sentences about copies and about images that are suspiciously dark.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    modes: dict[str, int] = field(default_factory=dict)
    doubts: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        def listed(counts: Mapping[str, int]) -> str:
            shown = [f"{name} {count}" for name, count in list(counts.items())[:20]]
            return ", ".join([*shown, "…"] if len(counts) > 20 else shown)

        small, large = (f"{width}×{height}" for width, height in self.sizes)
        lines = [f"{part:12}{sum(classes.values())} images: {listed(classes)}" for part, classes in self.counts.items()]
        lines.append(f"{'sizes':12}{small if small == large else f'{small} to {large}'} pixels")
        lines.append(f"{'modes':12}{listed(self.modes)}")
        lines += [f"{'note':12}{count} with {doubt}" for doubt, count in self.doubts.items()]
        lines += [f"{'passed over':12}{listed(self.passed_over)}"] if self.passed_over else []
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


class _ImageFacts(NamedTuple):
    size: tuple[int, int]
    mode: str
    doubts: tuple[str, ...]
    brightest: int
    digest: bytes


def _examine(path: str) -> _ImageFacts | InputError:
    try:
        status = Path(path).stat()
    except OSError:
        return _examine_version(path, -1, -1)  # reading the file will raise an error that says what is wrong
    return _examine_version(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**20)
def _examine_version(path: str, size: int, changed: int) -> _ImageFacts | InputError:
    try:
        image, mode, doubts = read_image(path)
    except InputError as error:
        return InputError(str(error))  # the old error's traceback would keep the file's content in memory
    brightest = image.convert("L").getextrema()[1]
    pixels = image.convert("RGB")
    digest = hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()
    return _ImageFacts(image.size, mode, doubts, int(brightest), digest)  # type: ignore[arg-type]


def _examine_all(paths: list[str]) -> dict[str, _ImageFacts | InputError]:
    """The facts about each image, or the error that reading it raised. A terminal shows a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(_examine, paths), total=len(paths), desc="reading", disable=None, leave=False)
        return dict(zip(paths, bar, strict=True))


def summarise(folder: ImageFolder, *, say: Callable[[str], None]) -> Summary:
    """Read every image once before a training, which would find damaged images late and copies never.

    Args:
        folder: folder whose parts are examined.
        say: function that prints the summary.

    Returns:
        The summary.

    Raises:
        InputError: images cannot be read. The message names the first ones.
    """
    paths = [path for classes in folder.parts.values() for path in _paths(classes)]
    results = _examine_all(paths)
    good = {path: facts for path, facts in results.items() if isinstance(facts, _ImageFacts)}
    bad = {path: error for path, error in results.items() if isinstance(error, InputError)}
    if bad:
        others = f", the others: {listed_paths([*bad][1:], 9)}" if len(bad) > 1 else ""
        raise InputError(
            f"{next(iter(bad.values()))} ({len(bad)} of {len(paths)} images are not read{others}); --skip-unreadable "
            "leaves them out"
        )
    warnings = _describe_copies(folder.parts, lambda path: good[path].digest)
    deep = [facts.brightest for facts in good.values() if facts.mode.startswith("I")]
    if deep and max(deep) < 32:
        warnings.append(
            f"none of the {len(deep)} images of 16 bits uses more than an eighth of their range, so they are read as "
            "almost black; cameras of 12 bits write such files: multiply the pixels if white is a smaller number"
        )
    widths, heights = zip(*(facts.size for facts in good.values()), strict=True)
    summary = Summary(
        {part: {name: len(paths) for name, paths in classes.items()} for part, classes in folder.parts.items()},
        ((min(widths), min(heights)), (max(widths), max(heights))),
        dict(Counter(facts.mode for facts in good.values()).most_common()),
        dict(Counter(doubt for facts in good.values() for doubt in facts.doubts).most_common()),
        dict(folder.passed_over),
        tuple(warnings),
    )
    say(str(summary))
    return summary


def listed_paths(paths: Sequence[str], count: int = 10) -> str:
    """The first `count` paths as text, for a message."""
    return ", ".join([*paths[:count], *(["…"] if len(paths) > count else [])])


def find_copies(folder: ImageFolder | None, part: Part) -> list[str]:
    """Warn of files in a part that are exact copies of files in the training part.

    Only files whose size occurs in both parts are read, so this is cheap enough for every command.

    Args:
        folder: folder of images; None stands for data without files, which has no copies.
        part: name of the part, "calibration" or "test".

    Returns:
        Warnings as sentences; an empty list if there are no copies.
    """
    if folder is None or not {part, "train"} <= set(folder.parts):
        return []
    samples: dict[Part, Classes] = {name: folder.parts[name] for name in ("train", part)}
    sizes = {name: {path: _file_size(path) for path in _paths(classes)} for name, classes in samples.items()}
    shared = set.intersection(*(set(by_path.values()) for by_path in sizes.values()))
    alike = {
        part: {name: [path for path in paths if sizes[part][path] in shared] for name, paths in classes.items()}
        for part, classes in samples.items()
    }
    return _describe_copies(alike, _file_digest)


def digests_by_class(folder: ImageFolder, part: Part) -> list[str]:
    """A line with class and SHA-256 for each file of a part, sorted, whatever the files and their folder are called."""
    samples = folder.parts[part].items()
    return sorted(f"{_file_digest(path).hex()}  {name}\n" for name, paths in samples for path in paths)


def _paths(classes: Classes) -> list[str]:
    return [path for paths in classes.values() for path in paths]


def _describe_copies(parts: Mapping[Part, Classes], digest: Callable[[str], bytes]) -> list[str]:
    first: dict[bytes, tuple[str, str, Part]] = {}
    copies: dict[tuple[Part, Part], list[tuple[str, str]]] = {}
    contradictions: list[tuple[str, str]] = []
    every = [(part, name, path) for part, classes in parts.items() for name, paths in classes.items() for path in paths]
    for part, name, path in every:
        original, original_name, original_part = first.setdefault(digest(path), (path, name, part))
        if original_part != part:
            copies.setdefault((part, original_part), []).append((path, original))
        if original_name != name:
            contradictions.append((path, original))
    sentences = [
        f"{len(pairs)} copies of {other} images among those for {part}, such as {pairs[0][0]} of {pairs[0][1]}; what "
        "is measured on copies does not hold for other images: remove them from one of the two"
        for (part, other), pairs in copies.items()
    ]
    if contradictions:
        path, original = contradictions[0]
        sentences.append(
            f"{len(contradictions)} copies of images in another class, such as {path} of {original}; keep each in one"
        )
    return sentences
