"""Experiments as data: TOML files define cells. A cell is one detector under one attack."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from clusterguard.attacks import CarliniWagner
from clusterguard.errors import ConfigurationError

from benchmarks._support import read_toml
from benchmarks.data import find_data_set
from benchmarks.detectors import RECIPES
from benchmarks.experiments._kinds import KINDS

FOLDER = Path(__file__).parent
RESULT_FORMAT = 1  # version of the contents of a result. A higher number makes every result stale
Profile = Literal["quick", "cpu", "short", "full"]
"""The size of an experiment.

quick only tests that everything runs. cpu takes a small network that a CPU can train. short takes the network of full,
and half an hour on a GPU suffices for training and attacks. full is the setting of the paper.
"""
EvaluatedSplit = Literal["test", "validation"]
"""The images that are attacked. "validation" names images that neither training nor calibration sees."""
Section = Literal["paper", "suite", "seeds", "certificates", "ablations", "recipes", "figures"]
"""The part of a page that a table belongs to. Pages show the parts in this order."""
Form = Literal["comparison", "attacks", "unions", "areas", "points", "step sizes", "iterations"]
"""How cells are shown.

Four forms are tables. comparison shows our figures beside those of the paper. attacks has a column for each attack.
unions adds to that the images that any attack breaks within a radius, and areas adds EROC. Three forms are figures.
points shows representations in the plane. step sizes and iterations plot success against the step size and against the
number of steps.
"""
FIGURES: tuple[Form, ...] = ("points", "step sizes", "iterations")
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that determines a trained detector.

    Attributes:
        dataset: key of `benchmarks.data.DATA_SETS`.
        model: key of `benchmarks.detectors.MODELS`.
        recipe: name in the attribute `training` of a recipe.
        options: options of that recipe, see `Recipe.with_options`.
        seed: seed of the weights, the batches and the training attack.
        epochs: number of passes over the training set.
        batch_size: number of images in a step.
        learning_rate: learning rate at the start.
        optimizer: "adam" or "sgd". The latter has momentum 0.9.
        weight_decay: weight decay of the optimizer.
        schedule: course of the learning rate. "constant" keeps it. "cosine" lowers it over all epochs. "step" divides
            it by ten after half and after three quarters of the epochs. "one-cycle" raises it to `learning_rate` in
            the first third of all steps and then lowers it.
        warmup_epochs: number of epochs at the beginning without the training attack.
        attack: options of PGD, the training attack.
        noise: radius of the random start of N-FGSM as a multiple of the attack's, which then takes one step. 256 images
            are then not trained on, but serve to look for catastrophic overfitting. 0 for PGD.
        augment: whether to crop and flip images at random.
        cutmix: largest share of an image that a part of another image covers, at most one half. The label stays.
        images: number of training images, the first ones. None takes all.
        average_share: share of the steps, the last ones, over which weights are averaged. 0 keeps the last weights.
        half: whether to round the trained weights to half precision, which halves the size of the checkpoint.
        mixed_precision: whether to train in bfloat16, attacks included.
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
    noise: float = 0.0
    average_share: float = 0.0
    images: int | None = None
    half: bool = False
    mixed_precision: bool = False

    @cached_property
    def key(self) -> str:
        """A short name of this training, which depends on everything that can change the outcome."""
        definition = asdict(self)
        for name in ("cutmix", "noise", "average_share"):
            if not definition[name]:
                del definition[name]  # the keys of trainings that are older than this option stay valid
        checksums = dict(find_data_set(self.dataset).checksums)
        return digest(definition | {"checksums": checksums, "format": RESULT_FORMAT})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One detector under one attack.

    Attributes:
        detector: key of `RECIPES`.
        training: training of the detector.
        surrogate: cell of the detector that a transfer attack is computed on. None for other attacks.
        attack: name of the attack in tables.
        kind: key of `KINDS`.
        options: options of that kind.
        images: number of test images, the first ones.
        rates: false-positive rates to report.
        chunk: number of images that are attacked at a time. A killed run loses one chunk at most.
        seed: seed of the attack.
        points: number of images whose representations are kept for figures.
        variant: name of the ablation in tables. "" if the cell belongs to none.
        split: images to attack. "validation" names images that neither training nor calibration sees, and that
            serve to choose among recipes.
        consistency: options of the `ConsistentDetector` that wraps the trained detector. {} for no wrapper.
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
        """Everything that determines the result, in types of JSON. Names that only tables show are left out."""
        definition = asdict(replace(self, surrogate=None))
        for name in ("attack", "variant", "surrogate", "chunk"):
            del definition[name]
        definition["training"] = self.training.key
        definition["surrogate"] = (
            None if self.surrogate is None else [self.surrogate.detector, self.surrogate.training.key]
        )
        definition["chunk"] = None if KINDS[self.kind].whole else self.chunk
        if self.split == "test":
            del definition["split"]  # the keys of results that are older than this option stay valid
        if not self.consistency:
            del definition["consistency"]
        return definition | {"format": RESULT_FORMAT, "rates": list(self.rates)}

    @cached_property
    def key(self) -> str:
        """A short name of the result, which depends on everything that determines the result."""
        return digest(self.definition)

    @property
    def norm(self) -> str:
        """The norm of the attack. Only Carlini & Wagner's has no such option, because it knows one norm."""
        return str(self.options.get("norm", CarliniWagner.norm))

    @property
    def title(self) -> str:
        """A line for people that says what is attacked and how."""
        return f"{self.detector}{' ' + self.variant if self.variant else ''}, {self.attack}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells that a page shows together, as a table or as a figure.

    Attributes:
        experiment: name of the experiment that the table belongs to.
        name: name of the table within that experiment. "" if the experiment has one table only.
        title: heading on the page.
        profile: profile that the cells belong to.
        dataset: data set that the table is about, which also names its page. The cells of the quick profile may take
            other images.
        section: part of the page.
        form: form of the table or figure.
        paper: name of the table in benchmarks/reporting/paper.toml to compare with. "" if there is none.
        suite: `address` of the table with the worst-case suite on the same detectors, whose results the comparison
            adds as rows. "" if there is none.
        detectors: columns, in order.
        attacks: rows, in order.
        variants: names of the variants of an ablation, in order. ("",) if the table is no ablation.
        cells: all cells of the table.
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
        """The name of the experiment, and the name of the table if it has one, such as "seeds-mnist/strict"."""
        return "/".join(filter(None, (self.experiment, self.name)))

    @property
    def is_figure(self) -> bool:
        """Whether the cells are drawn as a figure."""
        return self.form in FIGURES


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Tables of cells that are run together.

    Attributes:
        name: stem of the TOML file.
        profile: profile that the cells belong to.
        dataset: data set that the tables are about, see `Table`.
        tables: tables and figures, in order.
    """

    name: str
    profile: Profile
    dataset: str
    tables: tuple[Table, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of all tables, each once."""
        return tuple({cell.key: cell for table in self.tables for cell in table.cells}.values())


def list_experiments() -> list[str]:
    """The names of all experiments, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if not path.stem.startswith("_"))


def load_experiment(name: str, profile: Profile = "full") -> Experiment:
    """Load an experiment by name.

    Args:
        name: stem of a file in benchmarks/experiments.
        profile: size of the experiment. The table of that name in the file overrides other settings.

    Raises:
        ConfigurationError: there is no such experiment, or its file has an unknown key or value.
    """
    if name not in list_experiments():
        raise ConfigurationError(f"expected an experiment among {', '.join(list_experiments())}, got {name!r}")
    shared = _read(FOLDER / f"{name}.toml")
    profiles = {other: shared.pop(other, {}) for other in get_args(Profile)}
    named = shared.pop("tables_named", {})
    overrides = profiles.get(profile, {})
    limits = overrides.pop("attack", {})
    try:
        parts: list[Options] = shared.pop("tables", [{"name": ""}])  # each overrides what all share
        dataset, names = shared["dataset"], [part["name"] for part in parts]
        if len({*names}) < len(names):
            raise ConfigurationError(f"{name}.toml: expected each table to have a name of its own, got {names}")
        usual = [merge(shared, _with_attacks(named.get(part["name"], {}))) for part in parts]
        parts = [merge(merge(base, _with_attacks(part)), overrides) for base, part in zip(usual, parts, strict=True)]
        tables = tuple(_expand(name, names, profile, dataset, part, limits) for part in parts)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(f"{name}.toml: {type(error).__name__} {error}") from error
    return Experiment(name=name, profile=profile, dataset=dataset, tables=tables)


def _expand(name: str, tables: Sequence[str], profile: Profile, dataset: str, table: Options, limits: Options) -> Table:
    """Make a table with all its cells.

    Args:
        name: name of the experiment.
        tables: names of all tables of the experiment.
        profile: profile of the cells.
        dataset: data set that the experiment is about.
        table: settings of the table, those that it shares with others included.
        limits: largest values of options of attacks in this profile.
    """
    table = dict(table)
    table_name, title, detectors = table.pop("name"), table.pop("title"), table.pop("detectors")
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
        name=table_name,
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
    """Take a key out of a table and check that its value is one of the values of a Literal."""
    value = table.pop(key)
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}.toml: expected {key} among {', '.join(get_args(choices))}, got {value!r}")
    return value


def _cell(table: Options, detector: str, attack: Options, limits: Options, seed: int, variant: str) -> Cell:
    keys = {"dataset", "model", "images", "rates", "chunk", "seeds", "most_seeds", "points", "split", "precision"}
    _check_keys(table, {"training", "training_of", "consistency"} | keys)
    _check_keys(table.get("consistency", {}), {"radius", "steps", "step_size"})
    options = {key: value for key, value in attack.items() if key not in ("name", "kind", "rates", "surrogate")}
    if attack["kind"] not in KINDS:
        raise ConfigurationError(f"expected a kind of attack among {', '.join(KINDS)}, got {attack['kind']!r}")
    for key, limit in limits.items():
        if isinstance(options.get(key), list):
            options[key] = options[key][-limit:]  # the largest step sizes
        elif key in options:
            options[key] = min(options[key], limit) if isinstance(limit, int) else limit
    if "precision" in table and KINDS[attack["kind"]].takes_precision:
        options["precision"] = table["precision"]
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
    # The seeds differ, so that the surrogate is another network than the victim even where both are trained alike.
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
    recipe = RECIPES[detector].training_name
    settings = merge(table["training"], table.get("training_of", {}).get(recipe, {}))
    return Training(dataset=table["dataset"], model=table["model"], recipe=recipe, seed=seed, **settings)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Options:
    """Merge two tables key by key. Values of `over` win, and lists are replaced as a whole.

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
    """Twelve hexadecimal digits that identify a definition.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path) -> Options:
    """Read a definition, together with the files that its keys `extends` and `attacks_of` name."""
    table = _with_attacks(read_toml(path))
    base = table.pop("extends", None)
    return merge(_read(path.with_name(f"{base}.toml")), table) if base else table


def _with_attacks(part: Options) -> Options:
    """A part of a definition, with the attacks of the file that its key `attacks_of` names."""
    rows = part.get("attacks_of")
    if rows is None:
        return part
    others = {key: value for key, value in part.items() if key != "attacks_of"}
    return others | {"attacks": _read(FOLDER / f"{rows}.toml")["attacks"]}


def all_cells(profile: Profile) -> Iterator[tuple[str, Cell]]:
    """Every cell of every experiment, with the name of the experiment. A shared cell comes once for each experiment."""
    for name in list_experiments():
        for cell in load_experiment(name, profile).cells:
            yield name, cell
