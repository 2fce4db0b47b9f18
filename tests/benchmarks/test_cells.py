import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from clusterguard.errors import ConfigurationError
from made_up_results import find, load_table

from benchmarks._support import read_toml
from benchmarks.detectors import RECIPES, build_network, make_recipe
from benchmarks.experiments import _cells as cells
from benchmarks.experiments import list_experiments, load_experiment
from benchmarks.experiments._cells import merge
from benchmarks.running import RESULTS, Store

PAPER = read_toml(Path(cells.__file__).parents[1] / "reporting" / "paper.toml")
TABLES = [f"table{table}-{dataset}" for table in (2, 3, 4) for dataset in ("mnist", "cifar10")]


@pytest.mark.parametrize("name", list_experiments())
@pytest.mark.parametrize("profile", get_args(cells.Profile))
def test_every_experiment_says_what_it_is(name, profile):
    experiment = load_experiment(name, profile)
    assert {cell.key for cell in experiment.cells} == {cell.key for table in experiment.tables for cell in table.cells}
    assert len({cell.key for cell in experiment.cells}) == len(experiment.cells)
    for table in experiment.tables:
        keys = Counter(cell.key for cell in table.cells)
        assert max(keys.values()) == 1
        seeded = {(cell.variant, cell.seed) for cell in table.cells}
        assert {variant for variant, _ in seeded} == set(table.variants)
        assert len(keys) == len(table.detectors) * len(table.attacks) * len(seeded)
        assert table.dataset == experiment.dataset
    for cell in experiment.cells:
        make_recipe(cell.detector, cell.training.options)
        small = cell.training.model in ("tiny-cnn", "wrn-10-1", "wide-cnn")
        assert small == (profile in ("quick", "cpu")) or cell.variant.endswith(cell.training.model)


def test_an_attack_may_take_more_images_than_the_others():
    images = {cell.kind: cell.images for cell in find("certified-mnist/certificates", "cpu")}
    assert images == {"certificate": 10000, "suite": 300}
    assert {cell.images for cell in load_experiment("certified-mnist", "quick").cells} == {60}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_rows_and_columns_of_the_paper(name):
    experiment, printed = load_table(name), dict(PAPER[name])
    assert list(experiment.detectors) == printed.pop("detectors")
    printed.pop("accuracy", None)
    worst = printed.pop("worst case", None)
    assert list(experiment.attacks) == list(printed)
    for row in printed.values():
        for metric, values in row.items():
            assert len(values) == len(experiment.detectors)
            rate = float(metric.removeprefix("ASR-")) / 100 if metric != "EROC" else None
            cell = next(cell for cell in experiment.cells if printed[cell.attack] is row)
            assert rate is None or rate in cell.rates
    if worst is not None:  # the paper's own, from its own rows, to its own two digits
        for column in range(len(experiment.detectors)):
            assert worst["ASR-1"][column] == max(row["ASR-1"][column] for row in printed.values())
            assert worst["EROC"][column] == min(row["EROC"][column] for row in printed.values())


def test_the_papers_own_network_and_schedule_are_there():
    training = load_experiment("wrn-table2-cifar10").cells[0].training
    assert (training.model, training.epochs, training.learning_rate) == ("wrn-34-10", 70, 1e-3)
    assert training.attack == {"norm": "linf", "eps": 0.03, "step_size": 0.007, "steps": 20}
    assert (training.optimizer, training.schedule, training.batch_size) == ("adam", "constant", 128)


def test_an_experiment_may_take_the_attacks_of_another_and_all_else_from_a_third():
    cells = find("recipe-tables-mnist/table2", "cpu")
    attacked = [load_experiment(name, "cpu") for name in ("table2-mnist", "recipe-finalists-mnist")]
    assert {(cell.attack, str(cell.options)) for cell in cells} == {
        (cell.attack, str(cell.options)) for cell in attacked[0].cells
    }
    assert {cell.training.key for cell in cells} < {cell.training.key for cell in attacked[1].cells}


def test_weights_that_ship_are_those_of_tables_and_figures():
    store = Store(RESULTS)
    kinds = "table2", "table3", "table4", "strict", "seeds", "figure2"
    names = {"cpu": [f"{kind}-mnist" for kind in kinds]}
    names["short"] = [*names["cpu"], "certified-deep-mnist"]
    tables = {
        profile: {cell.training.key: cell for name in names[profile] for cell in load_experiment(name, profile).cells}
        for profile in names
    }
    shipped = {path.stem for path in (RESULTS / "models").glob("*.json")}
    assert set(tables["cpu"]) <= shipped <= {*tables["cpu"], *tables["short"]}  # the short profile is being trained
    for key in shipped:
        cell = (tables["cpu"] | tables["short"])[key]
        state, record = store.load_weights(key)
        recipe = make_recipe(cell.detector, cell.training.options)
        recipe.build(build_network(cell.training.model, (1, 28, 28))).load_state_dict(state)
        assert record["record"]["epochs"] == cell.training.epochs


def test_quick_mnist_needs_no_download():
    for name in list_experiments():
        if load_experiment(name).dataset == "mnist":
            assert load_experiment(name, "quick").dataset == "mnist"  # it stands on the page of MNIST all the same
            assert {cell.training.dataset for cell in load_experiment(name, "quick").cells} == {"digits"}


def test_tables_share_what_they_share():
    second, fourth = (load_experiment(name) for name in ("table2-mnist", "table4-mnist"))
    shared = {cell.key for cell in second.cells} & {cell.key for cell in fourth.cells}
    assert len(shared) == 3 * 4  # three rows that Table 4 takes from Table 2, four detectors
    trainings = {cell.training.key for cell in second.cells}
    assert len(trainings) == 6  # FS and LID rest on Vanilla's


def test_whatever_determines_a_result_is_in_its_name():
    cell = load_experiment("table2-mnist").cells[0]
    changes = [
        {"images": 999},
        {"seed": 1},
        {"chunk": 500},
        {"rates": (0.01,)},
        {"kind": "mim"},
        {"detector": "l-ben"},
        {"points": 3},
        {"consistency": {"radius": 0.1}},
        {"options": cell.options | {"steps": 999}},
        *({"training": replace(cell.training, **{name: value})} for name, value in {
            "dataset": "cifar10", "model": "released-cnn", "seed": 1, "epochs": 51, "batch_size": 64, "augment": True,
            "learning_rate": 0.1, "optimizer": "sgd", "weight_decay": 0.1, "schedule": "cosine", "warmup_epochs": 1,
            "options": {"center_scale": 5.0}, "attack": {"steps": 1}, "images": 5, "half": True, "recipe": "vanilla",
            "mixed_precision": True, "cutmix": 0.25,
        }.items()),
        {"surrogate": cell},
    ]  # fmt: skip
    keys = {replace(cell, **change).key for change in changes} | {cell.key}
    assert len(keys) == len(changes) + 1
    assert replace(cell, attack="another name", variant="another").key == cell.key


def test_a_surrogate_is_trained_from_another_seed():
    for cell in load_experiment("table3-mnist").cells:
        if cell.surrogate is not None:
            assert cell.surrogate.training.seed != cell.training.seed
            assert cell.surrogate.training.key != cell.training.key


def write(folder, text):
    said = {"title": "t", "section": "paper", "form": "attacks", "dataset": "digits", "model": "tiny-cnn"}
    said |= {"images": 5, "chunk": 5, "rates": [0.1], "seeds": [0, 1]}
    top = "\n" + text.partition("\n[")[0]
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in said.items() if f"\n{key} = " not in top]
    (folder / "mine.toml").write_text("".join(lines) + text)


TRAINING = "[training]\nepochs = 1\nattack = { eps = 0.1, step_size = 0.1, steps = 1 }\n"
COMPARISON = 'detectors = ["ours"]\nform = "comparison"\npaper = "table2-mnist"\n'
ATTACK = 'attacks = [{ name = "a", kind = "fgsm", norm = "linf", eps = 0.1 }]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('detectors = ["owrs"]\n' + ATTACK + TRAINING, "owrs"),
        ('detectors = ["ours"]\n' + ATTACK.replace("fgsm", "fsgm") + TRAINING, "fsgm"),
        ('detectors = ["ours"]\nimagse = 3\n' + ATTACK + TRAINING, "imagse"),
        ('detectors = ["ours"]\n' + ATTACK + TRAINING + "epoch = 3\n", "epoch"),
        ('detectors = ["ours"]\n' + TRAINING, "attacks"),
        ('detectors = ["ours"]\nconsistency = { radios = 0.1 }\n' + ATTACK + TRAINING, "radios"),
        ('detectors = ["ours"]\nsection = "papers"\n' + ATTACK + TRAINING, "section .* seeds, .* 'papers'"),
        ('detectors = ["ours"]\nform = "tables"\n' + ATTACK + TRAINING, "form .* unions, .* 'tables'"),
        ('detectors = ["ours"]\nform = "comparison"\n' + ATTACK + TRAINING, "comparison with a table of the paper"),
        ('detectors = ["ours"]\npaper = "table2-mnist"\n' + ATTACK + TRAINING, "comparison with a table of the paper"),
        ('detectors = ["ours"]\nsuite = "mine"\n' + ATTACK + TRAINING, "no other form, .* 'mine'"),
        (COMPARISON + 'suite = "yours"\n' + ATTACK + TRAINING, "experiment as suite, .* 'yours'"),
        ('detectors = ["ours"]\n' + ATTACK + "[[tables]]\nimages = 3\n" + TRAINING, "name"),
        ('detectors = ["ours"]\n' + ATTACK + 2 * '[[tables]]\nname = "a"\n' + TRAINING, "a name of its own"),
        ('detectors = ["ours"]\n' + ATTACK + '[[tables]]\nname = "a"\nimagse = 3\n' + TRAINING, "imagse"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message):
        load_experiment("mine")


def test_variants_and_seeds_multiply(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    variants = 'variants = [{ name = "a" }, { name = "b", training.options.center_scale = 5.0 }]\n'
    write(tmp_path, 'detectors = ["ours"]\n' + variants + ATTACK + TRAINING)
    multiplied = load_experiment("mine").cells
    assert [(cell.variant, cell.seed, cell.training.options) for cell in multiplied] == [
        ("a", 0, {}),
        ("a", 1, {}),
        ("b", 0, {"center_scale": 5.0}),
        ("b", 1, {"center_scale": 5.0}),
    ]


def test_a_profile_may_have_fewer_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    write(tmp_path, 'detectors = ["ours"]\n' + ATTACK + TRAINING + "[quick]\nmost_seeds = 1\n")
    assert [cell.seed for profile in ("full", "quick") for cell in load_experiment("mine", profile).cells] == [0, 1, 0]


def test_tables_of_an_experiment_share_what_they_do_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    settings = (
        '[[tables]]\nname = "suite"\nimages = 4\n'
        '[[tables]]\nname = "beside"\n'
        '[tables_named.beside]\nattacks_of = "_more"\n'
        'form = "comparison"\npaper = "table2-mnist"\nsuite = "suite"\n'
        '[tables_named.absent]\nform = "unions"\n'
    )
    write(tmp_path, 'detectors = ["ours"]\n' + ATTACK + settings + TRAINING + "[quick]\nimages = 3\n")
    (tmp_path / "_more.toml").write_text(ATTACK.replace('"a"', '"b"').replace("0.1", "0.2"))
    experiment = load_experiment("mine")
    first, second = experiment.tables
    assert [first.address, second.address, second.suite] == ["mine/suite", "mine/beside", "mine/suite"]
    assert [(table.form, table.title, table.attacks) for table in experiment.tables] == [
        ("attacks", "t", ("a",)),
        ("comparison", "t", ("b",)),
    ]
    assert [(cell.images, cell.seed) for cell in experiment.cells] == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert {cell.images for cell in load_experiment("mine", "quick").cells} == {3}


def test_a_comparison_names_a_table_of_suites_on_its_detectors():
    every = {table.address: table for name in list_experiments() for table in load_experiment(name).tables}
    compared = [table for table in every.values() if table.suite]
    assert len(compared) > 6
    for table in compared:
        suite = every[table.suite]
        assert {cell.kind for cell in suite.cells} == {"suite"}
        trained = ({(cell.detector, cell.training.key) for cell in part.cells} for part in (table, suite))
        assert next(trained) <= next(trained)


def test_an_unknown_experiment_is_named():
    with pytest.raises(ConfigurationError, match="table9"):
        load_experiment("table9")


def test_options_that_a_recipe_does_not_have_are_named():
    for name in RECIPES:
        with pytest.raises(ConfigurationError, match="colour"):
            make_recipe(name, {"colour": "red"})


def test_merging_replaces_lists_and_goes_into_tables():
    assert merge({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": {"d": 2}}) == {"a": [3], "b": {"c": 1, "d": 2}}


def test_the_readme_names_every_experiment():
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in list_experiments() if name not in re.findall(r"[a-z0-9-]+", readme)] == []
