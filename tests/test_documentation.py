"""Everything public is in the reference, and says what goes in, in which shape, and what comes out.

What counts as said, where a docstring need not be long:

- A parameter stands in Args, the class's for a constructor. A docstring without Args, such as one line, may name it in
  its text instead, or give its shape before an arrow if it is the only one: ``(B, m) -> (B, K)``.
- The shape of a tensor stands there too: ``(B, C, H, W)``, ``(n,)``, the word scalar, or "as in `another`".
- What is returned stands in Returns or behind an arrow, or is what the summary names: that begins with an article, a
  shape or a question word then ("The", "(B,)", "Whether"), not with an imperative.
- Fields of a dataclass stand in Args or Attributes, those of a NamedTuple in Attributes.
- Whatever overrides something, or has the parameters of a protocol's call, may leave all of this to that.
- Top-level names have an example that runs, or say whose example shows them, but for records that functions return.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args

import clusterguard
import pytest
from clusterguard.attacks import Attack, Objective
from griffe import Docstring
from torch import Tensor

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
DIRECTIVES = [
    address for page in REFERENCE.glob("*.md") for address in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]
SHAPE = re.compile(r"\([^()]*,[^()]*\)|\(\)|\bscalar\b|as in `")
NAMES_WHAT_IT_RETURNS = re.compile(r"(The|An?|All|What|Whether|How|Which|Where|Those|One|No)\b|\([A-Zn]")
PACKAGES = ("assurance", "attacks", "certification", "deployment", "detection", "detectors", "evaluation", "training")
CALLS = [Attack.__call__, Objective.__call__]


@dataclass(frozen=True)
class Public:
    """Something that users may call: where it is found, and the class that holds it."""

    name: str
    thing: Any
    owner: type | None = None

    def __str__(self) -> str:
        return self.name.removeprefix("clusterguard.")

    @property
    def text(self) -> str:
        return inspect.cleandoc(self.thing.__doc__ or "")

    @property
    def is_property(self) -> bool:
        return self.owner is not None and isinstance(vars(self.owner).get(self.thing.__name__), property)

    @property
    def parameters(self) -> dict[str, Any]:
        """What a caller hands over, by name, with its annotation."""
        if isinstance(self.thing, type) and (
            issubclass(self.thing, BaseException) or getattr(self.thing, "_is_protocol", False)
        ):
            return inspect.get_annotations(self.thing)
        if is_dataclass(self.thing):
            return {field.name: field.type for field in fields(self.thing) if field.init}
        if self.is_property or (
            isinstance(self.thing, type) and not {"_fields", "__init__"} & {*vars(self.thing)}  # its ancestor's
        ):
            return {}
        given = inspect.signature(self.thing).parameters.items()
        return {name: argument.annotation for name, argument in given if name not in ("self", "cls")}

    def entries(self, kind: str) -> dict[str, str]:
        """The entries of Args, "parameters", or of Attributes, as the site reads them."""
        docstring = Docstring(self.text, parser="google", parser_options={"warnings": False})
        return {
            entry.name.lstrip("*"): entry.description
            for part in docstring.parsed
            if part.kind.value == kind
            for entry in part.value
        }

    def has(self, attribute: str) -> bool:
        """Whether a class has an attribute, says of which type it is, or sets it when it is made."""
        ours = [base for base in inspect.getmro(self.thing) if is_ours(base) or base is self.thing]
        made = [inspect.getsource(base) for base in ours if "__init__" in vars(base) and not is_dataclass(base)]
        return (
            hasattr(self.thing, attribute)
            or any(attribute in inspect.get_annotations(base) for base in ours)
            or any(re.search(rf"self\.{attribute}\b.* = ", source) for source in made)
        )

    def says_of(self, parameter: str) -> list[str]:
        """What is said of a parameter or field, here and where it may be left to."""
        entries = self.entries("parameters") | self.entries("attributes")
        words = parameter.replace("_", "[_ ]")
        is_in_text = re.search(rf"\b{words}\b", self.text) or (len(self.parameters) == 1 and "->" in self.text)
        itself = [entries[parameter]] if parameter in entries else [self.text] if not entries and is_in_text else []
        return itself + [said for model in self.models for said in model.says_of(parameter)]

    @property
    def says_what_it_returns(self) -> bool:
        return (
            inspect.signature(self.thing).return_annotation in (None, "None")
            or bool(re.search(r"Returns:|->", self.text) or NAMES_WHAT_IT_RETURNS.match(self.text))
            or any(model.says_what_it_returns for model in self.models)
        )

    @property
    def models(self) -> "list[Public]":
        """What it may leave its documentation to."""
        holder = self.thing if self.owner is None else self.owner
        bases = [base for base in inspect.getmro(holder)[1:] if is_ours(base)] if isinstance(holder, type) else []
        if self.owner is None:
            sources = [Public(home(base), base) for base in bases]
        else:
            name = self.thing.__name__
            sources = [Public(f"{home(base)}.{name}", vars(base)[name], base) for base in bases if name in vars(base)]
        if inspect.isfunction(self.thing) and self.thing not in CALLS:
            same = [call for call in CALLS if {*Public("", call).parameters} == {*self.parameters}]
            sources += [Public(home(call), call) for call in same]
        return sources

    @property
    def is_record(self) -> bool:
        """A class of values alone, which other functions make."""
        return isinstance(self.thing, type) and bool(self.entries("attributes")) and not self.entries("parameters")


def home(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def is_ours(thing: Any) -> bool:
    return str(thing.__module__).startswith("clusterguard.")


def everything_public() -> Iterator[Public]:
    """Top-level names, classes of every package, what the reference names; their methods, and their ancestors'."""
    top = {f"clusterguard.{name}" for name in clusterguard.__all__}
    classes = {
        f"clusterguard.{package}.{name}"
        for package in PACKAGES
        for name, thing in vars(resolve(f"clusterguard.{package}")).items()
        if isinstance(thing, type)
    }
    waiting, seen = sorted({*top, *classes, *DIRECTIVES}), set()
    while waiting:
        name = waiting.pop(0)
        thing = resolve(name)
        if isinstance(thing, ModuleType):
            members = [value for value in vars(thing).values() if getattr(value, "__module__", None) == thing.__name__]
            waiting += [home(value) for value in members if callable(value) and not value.__name__.startswith("_")]
        elif home(thing) not in seen:
            seen.add(home(thing))
            yield Public(home(thing), thing)
            for base in thing.__mro__ if isinstance(thing, type) else ():
                if is_ours(base):
                    waiting.append(home(base))
            for member, value in vars(thing).items() if isinstance(thing, type) else ():
                value = getattr(value, "__func__", value)  # classmethod
                if (inspect.isfunction(value) or isinstance(value, property)) and (
                    not member.startswith("_") or (member == "__call__")
                ):
                    yield Public(f"{home(thing)}.{member}", getattr(value, "fget", value), thing)


def resolve(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return getattr(resolve(parent), last)


SECTIONS = ("Args", "Attributes", "Example", "Raises", "Reference", "Returns", "Warns", "Yields")
HEADS = re.compile(rf"^(?!(?:{'|'.join(SECTIONS)}):)([A-Z]\w+):$", flags=re.MULTILINE)


def faults(public: Public, *, example: bool) -> list[str]:
    """What the docstring of something public lacks."""
    if not re.match(r"\S.*?[.:]", public.text, flags=re.DOTALL):
        return ["a sentence that says what it is"]
    missing = [f"a section that the site knows instead of {head}" for head in HEADS.findall(public.text)]
    for name, annotation in public.parameters.items():
        said = public.says_of(name)
        if not said:
            missing.append(f"what {name} is")
        elif is_tensor(annotation) and not any(map(SHAPE.search, said)):
            missing.append(f"the shape of {name}")
    missing += [f"{name}, which it says it has" for name in public.entries("attributes") if not public.has(name)]
    if inspect.isfunction(public.thing) and not public.is_property and not public.says_what_it_returns:
        missing.append("what it returns")
    if example and not re.search(r">>>|Example:\s+See `", public.text):
        missing.append("an example that runs")
    return missing


def is_tensor(annotation: Any) -> bool:
    return annotation is Tensor or (isinstance(annotation, UnionType) and Tensor in get_args(annotation))


PUBLIC = {str(public): public for public in everything_public()}


@pytest.mark.parametrize("public", PUBLIC.values(), ids=str)
def test_docstrings_say_what_goes_in_and_what_comes_out(public):
    is_top_level = getattr(clusterguard, public.thing.__name__, None) is public.thing
    missing = faults(public, example=is_top_level and not public.is_record)
    assert not missing


def test_everything_public_is_in_the_reference():
    named = [resolve(name) for name in DIRECTIVES]

    def is_named(public: Public) -> bool:
        """As itself, with the class that holds it, or with the module that it is in."""
        module = importlib.import_module((public.owner or public.thing).__module__)
        return any(thing in (public.thing, public.owner, module) for thing in named)

    assert not [str(public) for public in PUBLIC.values() if not is_named(public)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_hands_on_to_users_is_in_the_reference(package):
    """What only the other packages use stands in its `_internal.py`."""
    module = resolve(f"clusterguard.{package}")
    known = {name.rpartition(".")[2] for name in DIRECTIVES}
    assert {name for name in module.__all__ if callable(value := getattr(module, name)) and is_ours(value)} <= known


def test_the_reference_names_nothing_twice():
    objects = [home(thing) for name in DIRECTIVES if not isinstance(thing := resolve(name), ModuleType)]
    modules = [name for name in DIRECTIVES if isinstance(resolve(name), ModuleType)]
    inside = [name for name in objects if any(name.startswith(f"{module}.") for module in modules)]
    assert sorted(set(objects)) == sorted(objects)
    assert not inside


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(file: Path) -> list[str]:
    """Links of a Markdown file, by Markdown or HTML, to files or headings that are not there."""
    text = re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]*`", "", file.read_text())
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:href|src)=\"([^\"]+)\"|^\[[^\]]+\]: *(\S+)", text, re.MULTILINE):
        target = "".join(link)
        path, _, anchor = target.partition("#")
        aim = file.parent / path if path else file
        if re.match(r"[a-z]+:", target):
            continue
        headings = re.findall(r"^#+ (.*)$", aim.read_text(), re.MULTILINE) if anchor and aim.is_file() else []
        if not aim.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    return broken


# Pages for readers of the repository, which the site does not hold, or only in part.
OUTSIDE_THE_SITE = [
    *sorted(ROOT.glob("*.md")),
    *(
        ROOT / folder / "README.md"
        for folder in ("benchmarks", "benchmarks/studies/speed", "clusterguard/data", "examples/serve")
    ),
]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_files_that_pages_include_are_named_as_the_site_reads_them(page):
    """A formatter that takes the line for Python moves its parts, and the page shows the line instead of the file."""
    for line in page.read_text().splitlines():
        if re.match(r"\s*-+\s*8\s*<", line):
            assert re.fullmatch(r'--8<-- "[\w./:-]+"', line)


@pytest.mark.parametrize("file", OUTSIDE_THE_SITE, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_of_pages_outside_the_site_lead_somewhere(file):
    assert not broken_links(file)


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "# One heading: `code`, too\n[a](README.md) [b](#one-heading-code-too) [c](https://example.org) `[no](link)`\n"
        '[d](gone.md) [e](#two) [f](README.md#three "title") <img src="gone.png"> [g](/gone)\n\n[h]: gone/\n'
    )
    assert broken_links(page) == ["gone.md", "#two", "README.md#three", "gone.png", "/gone", "gone/"]


def well_said(images: Tensor, eps: float) -> Tensor:
    """Do something.

    Args:
        images: (B, C, H, W).
        eps: a radius.

    Returns:
        The images.

    Example:
        >>> well_said(1, 2)
    """


def without_shape(images: Tensor | None) -> Tensor:
    """The images."""


def unsaid(images: Tensor) -> Tensor:
    """Do something."""


def misspelt() -> None:
    """Do something.

    Raise:
        ValueError: always.
    """


def silent(images): ...


@dataclass
class BadRecord:
    """A record.

    Attributes:
        count: how many.
    """

    count: int
    total: int


@dataclass
class RenamedRecord:
    """A record.

    Attributes:
        count: how many.
        sum: of all.
    """

    count: int
    total: int = 0


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (well_said, []),
        (RenamedRecord, ["what total is", "sum, which it says it has", "an example that runs"]),
        (without_shape, ["the shape of images", "an example that runs"]),
        (unsaid, ["what images is", "what it returns", "an example that runs"]),
        (silent, ["a sentence that says what it is"]),
        (misspelt, ["a section that the site knows instead of Raise", "an example that runs"]),
        (BadRecord, ["what total is", "an example that runs"]),
    ],
)
def test_this_test_can_fail(thing, expected):
    assert faults(Public(home(thing), thing), example=True) == expected
