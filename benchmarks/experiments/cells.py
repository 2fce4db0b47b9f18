"""Experiments as data: TOML files in, cells out; a cell is one detector under one attack."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from clusterguard.errors import ConfigurationError

from benchmarks.data.fetch import CHECKSUMS
from benchmarks.detectors import RECIPES
from benchmarks.experiments.kinds import KINDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same, before it came with Python

FOLDER = Path(__file__).parent
FORMAT = 1  # of what a cell's result holds; raising it makes every result stale
Profile = Literal["quick", "cpu", "short", "full"]
"""quick: wiring, not numbers; cpu: a small network that a CPU can bear; short: the full one's network, trained and
attacked for as long as half an hour of a GPU allows; full: the paper's setting."""
EvaluatedSplit = Literal["test", "validation"]
Section = Literal["paper", "suite", "seeds", "certificates", "ablations", "recipes", "figures"]
"""The part of a page that a table stands in; the parts follow each other in this order."""
Form = Literal["comparison", "attacks", "unions", "areas", "points", "step sizes", "iterations"]
"""How cells are shown. As tables: comparison: beside the paper's; attacks: a column an attack; unions: the same,
and what any attack breaks within a radius; areas: the same, and EROC. As figures: points: representations in the plane;
step sizes, iterations: success against these."""
FIGURES: tuple[Form, ...] = ("points", "step sizes", "iterations")
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that determines a trained detector.

    Attributes:
        dataset: see `benchmarks.data.datasets.load`.
        model: a key of `benchmarks.detectors.networks.MODELS`.
        recipe: the `training` of a recipe.
        options: of that recipe.
        seed: of weights, batches and attack.
        epochs: how often to see the training set.
        batch_size: images in a step.
        learning_rate: at the start.
        optimizer: "adam" or "sgd", the latter with momentum 0.9.
        weight_decay: of the optimizer.
        schedule: "constant", "cosine" over all epochs, "step": a tenth after half and after three quarters of them, or
            "one-cycle": up to the learning rate in the first third of all steps, and down again.
        warmup_epochs: epochs without the attack first.
        attack: options of PGD, the training attack.
        augment: random crops and flips.
        cutmix: largest part of an image that another one covers, at most half; its label stays.
        images: train on the first so many; None takes all.
        half: round the trained weights to half precision, so that the checkpoint holds them in half the room.
        mixed_precision: compute training passes in bfloat16.
    """

    dataset: str
    model: str
    recipe: str
    options: Options = field(default_factory=dict)
    seed: int = 0
    epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "step", "one-cycle"] = "constant"
    warmup_epochs: int = 0
    attack: Options
    augment: bool = False
    cutmix: float = 0.0
    images: int | None = None
    half: bool = False
    mixed_precision: bool = False

    @cached_property
    def key(self) -> str:
        """Short name of this training; whatever changes its outcome changes it."""
        definition = asdict(self)
        if not self.cutmix:
            del definition["cutmix"]  # trainings from before there was a choice stay valid
        return digest(definition | {"checksums": CHECKSUMS.get(self.dataset, {}), "format": FORMAT})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One detector under one attack.

    Attributes:
        detector: a key of `RECIPES`.
        training: of the detector.
        surrogate: what a transfer attack is made on, if it is one.
        attack: its name in tables.
        kind: a key of `KINDS`.
        options: of that kind.
        images: how many test images, the first ones.
        rates: false-positive rates to report.
        chunk: how many images to attack at a time; a killed run loses no more than one chunk.
        seed: of the attack.
        points: how many images to keep representations of, for figures.
        variant: what sets an ablation apart, for tables.
        split: "test", or "validation", images kept out of training and of thresholds, for choosing among recipes.
        consistency: options of `ConsistentDetector`, which then stands around the trained detector; {} for none.
    """

    detector: str
    training: Training
    surrogate: "Cell | None" = None
    attack: str
    kind: str
    options: Options
    images: int
    rates: tuple[float, ...]
    chunk: int
    seed: int
    points: int = 0
    variant: str = ""
    split: EvaluatedSplit = "test"
    consistency: Options = field(default_factory=dict)

    @property
    def definition(self) -> Options:
        """All that determines the result, in JSON's types; names that only serve tables are left out."""
        definition = asdict(replace(self, surrogate=None))
        for name in ("attack", "variant", "surrogate", "chunk"):
            del definition[name]
        definition["training"] = self.training.key
        definition["surrogate"] = (
            None if self.surrogate is None else [self.surrogate.detector, self.surrogate.training.key]
        )
        definition["chunk"] = None if KINDS[self.kind].whole else self.chunk
        if self.split == "test":
            del definition["split"]  # results from before there was a choice stay valid
        if not self.consistency:
            del definition["consistency"]
        return definition | {"format": FORMAT, "rates": list(self.rates)}

    @cached_property
    def key(self) -> str:
        """Name of the result's file: everything that determines it is in it."""
        return digest(self.definition)

    @property
    def title(self) -> str:
        """For people: what is attacked, and how."""
        return f"{self.detector}{' ' + self.variant if self.variant else ''}, {self.attack}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells that a page shows together; a figure is one as well.

    Attributes:
        experiment: name of the experiment it belongs to.
        name: its own in that experiment; "" where that has no other.
        title: one line for people.
        profile: see `Profile`.
        dataset: what it is about, and the page it stands on; the quick profile may put other images in its place.
        section: see `Section`.
        form: see `Form`.
        paper: name of the table in benchmarks/reporting/paper.toml that it is compared with; "" if it is not.
        suite: `address` of the table with the worst-case suite on the same detectors, for rows in the comparison; "" if
            there is none.
        detectors: columns, in order.
        attacks: rows, in order.
        variants: of an ablation, in order; [""] if it is none.
        cells: all of it.
    """

    experiment: str
    name: str
    title: str
    profile: Profile
    dataset: str
    section: Section
    form: Form
    paper: str
    suite: str
    detectors: tuple[str, ...]
    attacks: tuple[str, ...]
    variants: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def address(self) -> str:
        """Experiment and own name, if it has one, such as "seeds-mnist/strict"."""
        return "/".join(filter(None, (self.experiment, self.name)))

    @property
    def is_figure(self) -> bool:
        """Whether it is drawn rather than written in rows and columns."""
        return self.form in FIGURES


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run together.

    Attributes:
        name: of its file.
        profile: see `Profile`.
        dataset: see `Table`.
        tables: what is shown of it, in order.
    """

    name: str
    profile: Profile
    dataset: str
    tables: tuple[Table, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Those of all tables, each once."""
        return tuple({cell.key: cell for table in self.tables for cell in table.cells}.values())


def list_experiments() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if not path.stem.startswith("_"))


def load_experiment(name: str, profile: Profile = "full") -> Experiment:
    """An experiment by name.

    Args:
        name: of its file in benchmarks/experiments.
        profile: all but "full" apply the file's table of that name.

    Raises:
        ConfigurationError: no such experiment, or a file that says something unknown.
    """
    if name not in list_experiments():
        raise ConfigurationError(f"expected an experiment among {', '.join(list_experiments())}, got {name!r}")
    shared = _read(FOLDER / f"{name}.toml")
    profiles = {other: shared.pop(other, {}) for other in get_args(Profile)}
    overrides = profiles.get(profile, {})
    limits = overrides.pop("attack", {})
    try:
        parts: list[Options] = shared.pop("tables", [{"name": ""}])  # each says how it differs from what they share
        dataset, names = shared["dataset"], [part["name"] for part in parts]
        if len({*names}) < len(names):
            raise ConfigurationError(f"{name}.toml: expected each table to have a name of its own, got {names}")
        parts = [merge(merge(shared, part), overrides) for part in parts]
        tables = tuple(_expand(name, names, profile, dataset, part, limits) for part in parts)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(f"{name}.toml: {type(error).__name__} {error}") from error
    return Experiment(name=name, profile=profile, dataset=dataset, tables=tables)


def _expand(name: str, tables: Sequence[str], profile: Profile, dataset: str, table: Options, limits: Options) -> Table:
    """A table of an experiment of that name; `tables` are the names of all of them."""
    table = dict(table)
    own_name, title, detectors = table.pop("name"), table.pop("title"), table.pop("detectors")
    section, form = (_choose(name, key, kinds, table) for key, kinds in (("section", Section), ("form", Form)))
    paper, suite = table.pop("paper", ""), table.pop("suite", "")
    if bool(paper) != (form == "comparison") or (suite and not paper):
        raise ConfigurationError(
            f"{name}.toml: expected a comparison with a table of the paper, and a suite in no other form, "
            f"got form {form!r}, paper {paper!r} and suite {suite!r}"
        )
    if suite and suite not in tables and suite not in list_experiments():
        raise ConfigurationError(f"{name}.toml: expected a table of its own or an experiment as suite, got {suite!r}")
    attacks: list[Options] = table.pop("attacks")
    variants: list[Options] = table.pop("variants", [{}])
    cells = []
    for variant in variants:
        merged = merge(table, {key: value for key, value in variant.items() if key != "name"})
        for seed in merged["seeds"][: merged.get("most_seeds")]:
            for detector in detectors:
                cells += [_cell(merged, detector, attack, limits, seed, variant.get("name", "")) for attack in attacks]
    unknown = [detector for detector in detectors if detector not in RECIPES]
    if unknown:
        raise ConfigurationError(f"{name}.toml: expected detectors among {', '.join(RECIPES)}, got {unknown}")
    names = tuple(variant.get("name", "") for variant in variants)
    rows = tuple(dict.fromkeys(attack["name"] for attack in attacks))
    return Table(
        experiment=name,
        name=own_name,
        title=title,
        profile=profile,
        dataset=dataset,
        section=section,
        form=form,
        paper=paper,
        suite=f"{name}/{suite}" if suite and suite in tables else suite,
        detectors=tuple(detectors),
        attacks=rows,
        variants=names,
        cells=tuple(cells),
    )


def _choose(name: str, key: str, choices: Any, table: Options) -> Any:
    """Take a key out of a table; its value must be one of a Literal's."""
    value = table.pop(key)
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}.toml: expected {key} among {', '.join(get_args(choices))}, got {value!r}")
    return value


def _cell(table: Options, detector: str, attack: Options, limits: Options, seed: int, variant: str) -> Cell:
    keys = {"dataset", "model", "images", "rates", "chunk", "seeds", "most_seeds", "points", "split"}
    _check_keys(table, {"training", "training_of", "consistency"} | keys)
    _check_keys(table.get("consistency", {}), {"radius", "steps", "step_size"})
    options = {key: value for key, value in attack.items() if key not in ("name", "kind", "rates", "surrogate")}
    if attack["kind"] not in KINDS:
        raise ConfigurationError(f"expected a kind of attack among {', '.join(KINDS)}, got {attack['kind']!r}")
    for key, limit in limits.items():
        if isinstance(options.get(key), list):
            options[key] = options[key][-limit:]  # the longest steps
        elif key in options:
            options[key] = min(options[key], limit) if isinstance(limit, int) else limit
    shared: Any = {
        "attack": attack["name"],
        "kind": attack["kind"],
        "options": options,
        "images": options.pop("images", table["images"]),
        "rates": tuple(merge(table, attack)["rates"]),
        "points": table.get("points", 0),
        "split": table.get("split", "test"),
        "chunk": table["chunk"],
        "seed": seed,
    }
    other = attack.get("surrogate")
    # A surrogate is another network than the victim, also where both are trained alike.
    surrogate = Cell(detector=other, training=_training(table, other, seed + 1000), **shared) if other else None
    return Cell(
        detector=detector,
        training=_training(table, detector, seed),
        surrogate=surrogate,
        variant=variant,
        consistency=table.get("consistency", {}),
        **shared,
    )


def _check_keys(table: Options, known: set[str]) -> None:
    if set(table) - known:
        raise ConfigurationError(f"expected keys among {', '.join(sorted(known))}, got {sorted(set(table) - known)}")


def _training(table: Options, detector: str, seed: int) -> Training:
    recipe = RECIPES[detector].training
    settings = merge(table["training"], table.get("training_of", {}).get(recipe, {}))
    return Training(dataset=table["dataset"], model=table["model"], recipe=recipe, seed=seed, **settings)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Options:
    """Tables merged key by key, `over` having the last word; lists are replaced whole.

    Example:
        >>> merge({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
        {'a': 1, 'b': {'c': 4, 'd': 3}}
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def digest(definition: Options) -> str:
    """Twelve hexadecimal digits that stand for a definition.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path) -> Options:
    table = tomllib.loads(path.read_text())
    for part in (table, *table.get("tables", [])):
        if rows := part.pop("attacks_of", None):
            part["attacks"] = _read(path.with_name(f"{rows}.toml"))["attacks"]
    base = table.pop("extends", None)
    return merge(_read(path.with_name(f"{base}.toml")), table) if base else table


def all_cells(profile: Profile) -> Iterator[tuple[str, Cell]]:
    """Every cell of every experiment, with the experiment's name; shared ones come once for each."""
    for name in list_experiments():
        for cell in load_experiment(name, profile).cells:
            yield name, cell
