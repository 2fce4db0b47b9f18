"""Pages with tables and figures, made from results alone. Cells that have not been run are shown as not run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from clusterguard.attacks import get_norm
from clusterguard.errors import ConfigurationError

from benchmarks._support import read_toml, write_atomically
from benchmarks.data import DATA_SETS, find_data_set
from benchmarks.detectors import RECIPES
from benchmarks.experiments import Cell, Profile, Section, Table, Training, list_experiments, load_experiment
from benchmarks.reporting._estimates import ONE_PERCENT, Result, Results
from benchmarks.reporting._figures import draw_figure
from benchmarks.reporting._tables import (
    area_table,
    attack_table,
    comparison_table,
    list_metrics,
    metric_rate,
    show_attack,
    show_threat,
    stages_table,
    union_table,
)
from benchmarks.reporting._verdicts import explain_verdicts, verdict_table
from benchmarks.running import Store

PAPER: dict[str, Result] = read_toml(Path(__file__).parent / "paper.toml")
REMARKS: dict[Profile, str] = {
    "quick": "quick: wiring, not numbers",
    "cpu": "CPU profile: small network, short training, short attacks",
    "short": "short profile: short training, fewer images, short attacks",
    "full": "",
}
REDUCED = ("cpu", "short")  # profiles that have separate pages and figures
WARNING = "A tiny network, few images, short attacks: nothing here says how good a detector is."

LEGEND = """
**Bold** is measured here; below it its 95 % interval; in parentheses what the paper prints. ASR-p: of the images that
are labelled correctly and accepted before the attack ("images counted"), the share accepted under a wrong label after
it, with thresholds at p % false positives. EROC: ROC AUC per label, averaged. T is targeted, U untargeted. As in the
paper, an attack counts with its worst step size. *Suite* rows are our worst-case suite at the same norm and radius.
"Worst row" is the paper's worst case; "worst per image" counts an image if any row broke it. "≥" and "≤" mean that
cells are missing, which could only move the figure that way.
"""

WITHDRAWN = """
!!! warning "The suite's ℓ2 figures of guards trained for certificates are withdrawn"
    Suite rows are lower bounds, found by the suite of version 0.1. In ℓ2 that suite never tries to change a few pixels
    only, and on guards trained for certificates it misses most of what there is. Sparse-RS with four pixels, whose
    images lie inside ℓ2 2.0, breaks 94 and 95 of the first 100 accepted test digits of the two shipped guards.
    [What is withdrawn](findings.md#withdrawn).
"""


def write_report(store: Store, profile: Profile, pages: Path) -> list[Path]:
    """Write one page for each data set, and its figures.

    A reduced profile gets a page only if it has results, or if the page exists.

    Args:
        store: store of results.
        profile: profile whose results are shown.
        pages: folder of the pages. Figures are written to its folder "figures".

    Returns:
        The files that have been written.

    Raises:
        MissingDependencyError: there are figures to draw, and matplotlib is not installed.
    """
    written = []
    for name, every in read_results(store, profile).items():
        has_results = any(results.finished for results in every)
        if profile in REDUCED and not has_results and not (pages / name).exists():
            continue
        text = render_page(every)
        written.append(write_atomically(pages / name, partial(Path.write_text, data=text, encoding="utf-8")))
        for results in every:
            if results.table.is_figure and results.finished:
                written += draw_figure(results, pages / _figure_path(results), REMARKS[profile])
    return written


def read_results(store: Store, profile: Profile) -> dict[str, list[Results]]:
    """Read the tables of all pages with their results, by the name of the page."""
    read = store.read_cells().get
    pages: dict[str, list[Results]] = {}
    every = [table for name in list_experiments() for table in load_experiment(name, profile).tables]
    if profile in REDUCED:  # an experiment without this profile gives the same cells as in full
        full = [table for name in list_experiments() for table in load_experiment(name).tables]
        every = [table for table, other in zip(every, full, strict=True) if table.cells != other.cells]
    for dataset in DATA_SETS:
        tables = [table for table in every if table.dataset == dataset]
        if tables:
            tables.sort(key=lambda table: get_args(Section).index(table.section))
            pages[f"{dataset}{_suffix(profile)}.md"] = [Results(table, read) for table in tables]
    return pages


def render_page(every: Sequence[Results]) -> str:
    """Render the page of one data set as Markdown."""
    profile = every[0].table.profile
    remark = REMARKS[profile]
    run = [results for results in every if results.finished]
    command = f"python -m benchmarks report{_profile_option(profile)}"
    asked = {cell.key: result is not None for results in every for cell, result in results.cells}
    parts = [
        f"<!-- Generated from results by `{command}`; edits would be lost. -->",
        f"# {find_data_set(every[0].table.dataset).title}" + (f", {remark}" if remark else ""),
    ]
    if profile == "quick":
        parts.append(f'!!! danger "{remark}"\n    {WARNING}')
    parts.append(f"{sum(asked.values())} of {len(asked)} cells are run; a cell is one detector under one attack.")
    parts += _render_verdicts(run)
    if any(asked.values()):
        parts.append(LEGEND.strip())
    if any(map(_has_old_suite, every)):
        parts.append(WITHDRAWN.strip())
    for results in run:
        parts += _render_section(results, every)
    left = dict.fromkeys(results.table.experiment for results in every if not results.finished)
    if left:
        parts.append(f"Not run yet: `python -m benchmarks run {' '.join(left)}{_profile_option(profile)}`.")
    parts += ["## Settings", "\n".join(f"- {line}" for line in _list_settings(run or every))]
    commits = _count_commits(run)
    if commits:
        parts.append(
            '??? note "Commits at which the cells were computed"\n\n' + "\n".join(f"    - {line}" for line in commits)
        )
    return "\n\n".join(parts) + "\n"


def _render_verdicts(run: Sequence[Results]) -> list[str]:
    """The paragraphs that answer in one table, if the paper's main table has results on this page."""
    for results in run:
        table = results.table
        if table.form == "comparison" and table.suite and table.profile != "quick":
            answer = verdict_table(results, _find_paper_table(table), _find_suite(table, run))
            return ["## In one table", _caption(results, "Images broken."), explain_verdicts(), answer]
    return []


def _render_section(results: Results, every: Sequence[Results]) -> Iterator[str]:
    """The paragraphs about one table. `every` has the results of all tables on the page."""
    table = results.table
    yield f"## {show_attack(table.title)}" + (f" ({table.profile})" if REMARKS[table.profile] else "")
    command = f"`python -m benchmarks run {table.experiment}{_profile_option(table.profile)}`"
    if len(results.finished) < len(results.cells):
        yield f"{len(results.finished)} of {len(results.cells)} cells are run, {command} runs the rest."
    if table.form == "comparison":
        yield from _render_comparison(results, _find_paper_table(table), _find_suite(table, every))
    elif table.is_figure:
        figure = _figure_path(results)
        yield f"[![{table.title}]({figure}.png)]({figure}.svg)"
        yield _caption(results, _figure_text(table))
    else:
        yield _caption(results, f"{_describe_rate(ONE_PERCENT)}.")
        yield attack_table(results)
        if table.form == "unions":
            yield from _render_unions(results, every)
        elif table.form == "areas":
            yield _caption(results, "EROC.")
            yield area_table(results)
        elif any(cell.kind == "certificate" for cell in table.cells):
            yield "A certificate's share is of images not proved secure: no attack, known or not, breaks more of them."
    invalid = sum(_count_invalid(result) for result in results.finished)
    if invalid:
        yield f"**{invalid} attacked images left their budget or [0, 1] and were not counted.**"


def _find_paper_table(table: Table) -> Result:
    """The printed table of the paper that a table of ours repeats, perhaps with other networks or seeds."""
    if table.paper not in PAPER:
        raise ConfigurationError(
            f"{table.address}: expected a table of the paper among {', '.join(PAPER)}, got {table.paper!r}"
        )
    return PAPER[table.paper]


def _find_suite(table: Table, every: Sequence[Results]) -> Results | None:
    """The results of the worst-case suite on the detectors of a table. None if they are not on this page."""
    return next((other for other in every if other.table.address == table.suite), None)


def _render_comparison(results: Results, paper: Result, suite: Results | None) -> Iterator[str]:
    """Our results beside a table of the paper: one table of ours for each metric that the paper prints."""
    for metric in list_metrics(paper):
        rate = metric_rate(metric)
        shown = "EROC, the smallest" if rate is None else f"{_describe_rate(rate)}, the largest"
        yield _caption(results, f"{shown} over step sizes.")
        yield comparison_table(results, paper, metric, suite)
    threats = dict.fromkeys(map(results.threat, results.table.attacks))
    for norm, eps in (threat for threat in threats if threat[1] >= get_norm(threat[0]).limit):
        reach = f"With {show_threat(norm, eps)} everything is within reach"
        yield f"{reach}: where fewer than all images are broken, the attack fails."


def _render_unions(results: Results, every: Sequence[Results]) -> Iterator[str]:
    """What any attack within the suite's radii broke, and what the stages of the suite broke one after the other."""
    text = "ASR-1 per image: broken by any attack on this page of the same norm and at most this radius; "
    yield _caption(results, text + '"+k": k of these images the suite had left.')
    yield union_table(results, every)
    detector = results.table.detectors[0]
    text = f"{RECIPES[detector].title}, stage by stage: images that each broke of those left by the stages before it"
    if _has_old_suite(results):
        text += ", also images refused or labelled wrongly to begin with, which ASR does not count"
    yield _caption(results, f"{text}.")
    yield stages_table(results, detector)


def _caption(results: Results, text: str) -> str:
    """The caption of a table: what it shows, and everything that a reader must not overlook."""
    cells, remark = results.table.cells, REMARKS[results.table.profile]
    network, paper = _join_by_or(f"`{cell.training.model}`" for cell in cells), find_data_set(results.table.dataset)
    theirs = f"`{paper.paper_network}`"
    told = f" ({'as in the paper' if network == theirs else f'the paper: {theirs}'})" if paper.paper_network else ""
    images = _join_by_or(cell.points or cell.images for cell in cells)
    warning = f"{remark[0].upper()}{remark[1:]}. " if remark else ""
    split = _join_by_or("test" if cell.split == "test" else "held-out training" for cell in cells)
    rough = " Attacks search in bfloat16, verdicts are in float32." * any(map(_is_in_bfloat16, cells))
    shown = f"The first {images} {split} images, {_describe_seeds(cells)}, network {network}{told}."
    return f"**{warning}{text}** {shown}{rough}"


def _has_old_suite(results: Results) -> bool:
    """Whether results of the worst-case suite are from version 0.1."""
    versions = [
        result["provenance"].get("versions", {}).get("clusterguard", "")
        for cell, result in results.cells
        if cell.kind == "suite" and result is not None
    ]
    return any(version.startswith("0.1.") for version in versions)


def _is_in_bfloat16(cell: Cell) -> bool:
    return cell.options.get("precision") == "bf16"


def _describe_rate(rate: float) -> str:
    return f"ASR-{100 * rate:g}: images broken at {100 * rate:g} % false positives"


def _figure_text(table: Table) -> str:
    if table.form == "points":
        attack = show_attack(table.attacks[0])
        return (
            f"t-SNE of the representations of benign images and of their attacked versions ({attack}); "
            "of class scores where there is no representation. Digits name predicted classes."
        )
    against = "step size" if table.form == "step sizes" else "number of steps"
    titles = " and ".join(RECIPES[detector].title for detector in table.detectors)
    return f"{titles}: ASR-1, with 95 % intervals as bands, and EROC against the {against}."


def _list_settings(every: Sequence[Results]) -> Iterator[str]:
    """Sentences about the data, the networks and the trainings behind the results of a page."""
    cells = [cell for results in every for cell, _ in results.cells]
    data = cells[0].training.dataset
    source, paper = find_data_set(data), find_data_set(every[0].table.dataset)
    images = _join_by_or(cell.images for cell in cells if cell.split == "test")
    seeds = _describe_seeds(cells)
    yield f"Data: {source.title}; attacked are the first {images} test images, unless said otherwise; {seeds}."
    yield f"Network: {_join_by_or(f'`{cell.training.model}`' for cell in cells)}. {paper.paper_training}".rstrip()
    for schedule, trained in _group_by_schedule(every).items():
        yield f"Training of {', '.join(trained)}: {schedule}."
    attack = _join_by_or(_describe_attack(cell.training) for cell in cells)
    yield f"Training attack, where a detector is trained against one: {attack}."
    held_out = source.calibration_images
    yield f"Thresholds: conformal, one a class, from {held_out:,} images held out of training (paper: percentiles)."
    provenances = {
        cell.key: result["provenance"] for results in every for cell, result in results.cells if result is not None
    }
    if provenances:
        yield f"Computed on {_join_counts(Counter(made['device'] for made in provenances.values()))}."


def _count_commits(every: Sequence[Results]) -> list[str]:
    """How many cells were computed at each commit, in lines."""
    commits = {
        cell.key: result["provenance"]["commit"]
        for results in every
        for cell, result in results.cells
        if result is not None
    }
    return [
        f"`{commit.removesuffix('+')}`: {count} cell{'s' * (count > 1)}"
        + ", with changes not committed" * commit.endswith("+")
        for commit, count in sorted(Counter(commits.values()).items())
    ]


def _join_counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name}: {count} cells" if len(counter) > 1 else name for name, count in sorted(counter.items()))


def _join_by_or(values: Iterable[object]) -> str:
    """Join values by "or", each value once and numbers with commas."""
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in dict.fromkeys(values))


def _describe_seeds(cells: Iterable[Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _group_by_schedule(every: Sequence[Results]) -> dict[str, list[str]]:
    """The names of the detectors that are trained with each schedule.

    If experiments train a detector in different ways, the less usual ones are named behind it.
    """
    by_detector: dict[str, dict[str, list[str]]] = {}
    for results in every:
        for detector, schedule in dict.fromkeys(
            (cell.detector, _describe_schedule(cell.training)) for cell, _ in results.cells
        ):
            by_detector.setdefault(detector, {}).setdefault(schedule, []).append(results.table.experiment)
    schedules: dict[str, list[str]] = {}
    for detector, by_schedule in by_detector.items():
        for schedule, names in by_schedule.items():
            usual = len(names) == max(map(len, by_schedule.values()))
            title = RECIPES[detector].title + ("" if usual else f" in {', '.join(dict.fromkeys(names))}")
            schedules.setdefault(schedule, []).append(title)
    return schedules


def _describe_schedule(training: Training) -> str:
    optimizer = {"adam": "Adam", "sgd": "SGD with momentum"}[training.optimizer]
    parts = [
        f"{training.epochs} epochs of {optimizer}, learning rate {training.learning_rate:g}, {training.schedule}",
        f"batches of {training.batch_size}",
        f"weight decay {training.weight_decay:g}" if training.weight_decay else "",
        f"{training.warmup_epochs} of them benign first" if training.warmup_epochs else "",
        f"the radius growing over the next {ramp:g}" if (ramp := training.options.get("ramp_epochs")) else "",
        "random crops and flips" if training.augment else "",
        f"CutMix up to {training.cutmix:g} of an image" if training.cutmix else "",
        f"weights averaged over the last {training.average_share:.0%} of the steps" if training.average_share else "",
        f"{training.images:,} images" if training.images else "",
        "bfloat16" if training.mixed_precision else "",
        "weights rounded to half precision" if training.half else "",
    ]
    return ", ".join(part for part in parts if part)


def _describe_attack(training: Training) -> str:
    attack = training.attack
    if training.noise:
        return f"N-FGSM {show_attack(attack['norm'])} {attack['eps']:g}, noise of {training.noise:g} times the radius"
    name, length = (
        ("APGD", "") if training.options.get("method") == "apgd" else ("PGD", f" step {attack['step_size']:g},")
    )
    return f"{name} {show_attack(attack['norm'])} {attack['eps']:g},{length} {attack['steps']} steps"


def _count_invalid(result: Result) -> int:
    """The number of attacked images that left their budget, and so were not counted.

    Of several false-positive rates the largest number is taken, because the images are mostly the same.
    """
    return sum(max(at["invalid"] for at in verdict["rates"].values()) for verdict in result["results"].values())


def _figure_path(results: Results) -> str:
    table = results.table
    return f"figures/{table.address.replace('/', '-')}{_suffix(table.profile)}"


def _suffix(profile: Profile) -> str:
    return f"-{profile}" if profile in REDUCED else ""


def _profile_option(profile: Profile) -> str:
    return "" if profile == "full" else f" --profile {profile}"
