"""Every detector under every kind of attack, and nothing that knows one detector from another."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.attacks import get_norm
from clusterguard.detectors import WithThresholds
from clusterguard.errors import ConfigurationError

import benchmarks
from benchmarks.data import FloatBatches, load_data_set
from benchmarks.detectors import RECIPES
from benchmarks.detectors import _networks as networks
from benchmarks.experiments import KINDS, Scene
from benchmarks.running._judging import count_unproved, to_hex

ROOM = Path(benchmarks.__file__).parent
OPTIONS = {
    "pgd": {"norm": "l1", "eps": 9.0, "steps": 2, "step_sizes": [2.0, 4.0], "targeted": True},
    "mim": {"norm": "linf", "eps": 0.3, "steps": 2, "step_sizes": [0.1]},
    "nes": {"norm": "l2", "eps": 2.0, "steps": 1, "samples": 4, "step_sizes": [0.5]},
    "fgsm": {"norm": "linf", "eps": 0.3},
    "cw": {"eps": 3.0, "searches": 1, "steps": 2},
    "boundary": {"norm": "linf", "eps": 0.9, "queries": 9},
    "transfer": {"norm": "linf", "eps": 0.3, "steps": 2, "step_size": 0.1},
    "suite": {"norm": "l2", "eps": 0.01, "budget": "quick"},
}


@pytest.fixture(scope="module", params=RECIPES)
def case(request):
    """An untrained detector of each recipe, as its finished self, and some digits."""
    recipe, data = RECIPES[request.param], load_data_set("digits")
    torch.manual_seed(0)
    trained = recipe.build(networks.build_network("tiny-cnn", data.image_shape)).eval()
    detector = recipe.finish(trained, FloatBatches(data.train.head(1500), 500)).eval().requires_grad_(False)
    return recipe, WithThresholds(detector, torch.full((10,), 50.0)), data.calibration.head(8).floats()


def scene_of(case, tmp_path):
    recipe, detector, (images, labels) = case
    return Scene(
        detector=detector,
        images=images[:3],
        labels=labels[:3],
        objective=recipe.objective,
        references=(images, labels),
        surrogate=(detector, recipe.objective),
        generator=torch.Generator().manual_seed(0),
        checkpoint=tmp_path / "state",
        on_stage=lambda stage: None,
    )


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_of_attack_runs_on_every_detector(case, kind, tmp_path):
    scene, options = scene_of(case, tmp_path), OPTIONS[kind]
    outcome = KINDS[kind].run(scene, **options)
    assert len(outcome.attacked) == len(options.get("step_sizes", [0]))
    for attacked in outcome.attacked.values():
        assert attacked.shape == scene.images.shape
        assert attacked.isfinite().all()
        size = get_norm(options.get("norm", "l2")).size(attacked - scene.images)
        assert (size <= options["eps"] * (1 + 1e-5)).all()
    if kind in ("pgd", "mim", "fgsm"):  # gradients arrive
        assert all((attacked != scene.images).flatten(1).any(dim=1).all() for attacked in outcome.attacked.values())


@pytest.mark.parametrize("kind", ["pgd", "mim"])
def test_both_goals_in_one_batch_find_what_each_finds_alone(case, kind, tmp_path):
    options = OPTIONS[kind] | {"targeted": True}
    scene = scene_of(case, tmp_path)
    together = KINDS[kind].run_both(scene, **options)
    for targeted, outcome in zip((True, False), together, strict=True):
        alone = KINDS[kind].run(scene_of(case, tmp_path), **options | {"targeted": targeted})
        assert list(outcome.attacked) == list(alone.attacked)
        for name, attacked in alone.attacked.items():
            torch.testing.assert_close(outcome.attacked[name], attacked, rtol=1e-4, atol=1e-4)
    first, second = (torch.stack(list(outcome.attacked.values())) for outcome in together)
    assert not torch.equal(first, second)


def test_a_certificate_is_of_a_guard_and_of_the_thresholds_in_question(case, tmp_path):
    scene, run = scene_of(case, tmp_path), KINDS["certificate"].run
    inner = scene.detector.detector
    if not isinstance(inner, ClusterGuard):
        with pytest.raises(ConfigurationError, match="guard"):
            run(scene, norm="linf", eps=0.1)
        return
    by_intervals = run(scene, norm="linf", eps=0.1).unproved
    assert by_intervals.shape == (3,)
    assert (run(scene, norm="linf", eps=0.1, method="branching").unproved <= by_intervals).all()
    nothing = replace(scene, detector=WithThresholds(inner, torch.full((10,), -1.0)))
    assert not run(nothing, norm="linf", eps=0.1).unproved.any()  # what accepts nothing cannot be broken
    assert not inner.is_calibrated
    with pytest.raises(ConfigurationError, match="linf"):
        run(scene, norm="l2", eps=0.1)


def test_what_is_not_proved_counts_as_broken_where_it_counts_at_all():
    at = {"success": [0, 2], "eligible": to_hex(torch.tensor([True, True, False])), "broken": "0"}
    verdicts = {"": {"eroc": 0.5, "rates": {"0.01": at}}}
    count_unproved(verdicts, torch.tensor([True, False, True]))
    assert verdicts == {"": {"eroc": None, "rates": {"0.01": {"success": [1, 2], "eligible": "c", "broken": "8"}}}}


def literals(path):
    return {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize(
    "path", [*(ROOM / "running").glob("*.py"), *(ROOM / "experiments").glob("*.py")], ids=lambda path: path.stem
)
def test_nothing_knows_one_detector_from_another(path):
    assert not literals(path) & set(RECIPES)


def test_a_detector_of_the_comparison_is_a_short_file():
    for path in (ROOM / "detectors").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 200, path
