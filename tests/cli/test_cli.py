import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import clusterguard
import pytest
import torch
from clusterguard import ClusterGuard, load_onnx
from clusterguard.attacks import NORMS
from clusterguard.cli import app
from clusterguard.cli._pictures import load_part
from torch.utils.data import DataLoader
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("light_suites")
COMMANDS = ("demo", "train", "guard", "calibrate", "evaluate", "evidence", "export", "inspect")
EPOCHS = 8  # of 7 steps
SMALL = ["--backbone", "timm:test_resnet", "--image-size", "16", "--channels", "1", "--steps", "1", "--eps", "0.05"]
SMALL += ["--batch-size", "32", "--learning-rate", "0.003", "--false-positive-rate", "0.1", "--precision", "float32"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(message: str, *arguments: object) -> None:
    """One line of text on stderr, nothing on stdout, exit code 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.match(f"error: .*{message}", result.stderr), result.stderr


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "guard"
    result = run("train", "--data", photos, "--output", folder, "--epochs", EPOCHS, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@pytest.fixture
def guard(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "guard")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: clusterguard {command} " in result.stdout


@pytest.mark.parametrize("command", [("train", "--output", "out"), ("evaluate", "guard")])
def test_commands_take_the_norms_that_attacks_know(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = run(*command, "--norm", "l3")
    assert refused.exit_code == 2
    assert f"expected {', '.join(NORMS)}" in " ".join(refused.stderr.split())
    for norm in NORMS:
        assert norm in " ".join(run(*command, "--help").stdout.split())


def test_the_version_is_shown():
    assert run("--version").stdout == f"clusterguard {clusterguard.__version__}\n"


def test_the_manual_names_options_that_exist():
    known = "".join(CliRunner().invoke(app, [command, "--help"], terminal_width=200).stdout for command in COMMANDS)
    manual = (Path(__file__).parents[2] / "docs" / "how-to" / "command-line.md").read_text()
    named = set(re.findall(r"--[a-z][a-z-]+", manual)) - {"--help"}
    assert len(named) > 10
    assert {name for name in named if f"{name} " not in known} == set()


def test_training_saves_a_calibrated_guard_with_its_record(trained):
    folder, result = trained
    assert result["is_calibrated"]
    recorded = {"classes": ["0", "1", "7"], "divided_by": "content", "seed": 0, "image_size": 16, "channels": 1}
    assert result["training"]["data"] == recorded
    assert [record["epoch"] for record in result["history"]] == list(range(1, EPOCHS + 1))
    assert result["training"]["last_epoch"] == result["history"][-1]
    guard = ClusterGuard.from_pretrained(folder)
    assert guard.thresholds.tolist() == result["thresholds"]
    assert guard.calibration.false_positive_rate == 0.1


@pytest.mark.filterwarnings("ignore:trained, but not calibrated")
def test_the_record_of_a_training_says_which_precision_auto_took(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("clusterguard.training._step_precision.choose_precision", lambda *_: "bf16")
    monkeypatch.setattr("clusterguard.training._resuming.has_bfloat16", lambda device: True)
    options = ["--data", photos, "--output", tmp_path, *SMALL, "--image-size", 28, "--precision", "auto", "--json"]
    for epochs in (1, 2):  # what was asked for is still the same when the training goes on
        result = run("train", *options, "--epochs", epochs, *["--resume"] * (epochs > 1))
        assert result.exit_code == 0, (result.output, result.exception)
        assert json.loads(result.stdout)["training"]["precision"] == "bf16"


def test_training_sums_up_its_images(trained):
    _, result = trained
    images = result["images"]
    assert sum(sum(part.values()) for part in images["counts"].values()) == 360
    assert (images["modes"], images["sizes"], images["warnings"]) == ({"L": 360}, [[28, 28], [28, 28]], [])


def test_class_names_go_from_folders_to_guard_and_graph(guard, tmp_path):
    assert ClusterGuard.from_pretrained(guard).class_names == ("0", "1", "7")
    assert run("export", guard, "--output", tmp_path / "guard.onnx").exit_code == 0
    detector = load_onnx(tmp_path / "guard.onnx")
    assert detector.class_names == ("0", "1", "7")
    assert detector.card == (guard / "README.md").read_text()


def test_only_the_card_of_a_guard_goes_into_its_graph(guard, tmp_path):
    card, graph = guard / "README.md", tmp_path / "guard.onnx"
    card.write_text(card.read_text() + "Edited.")
    result = run("export", guard, "--output", graph)
    assert (result.exit_code, result.stderr.count("README.md was edited, or is of another version")) == (0, 1)
    assert load_onnx(graph).card.endswith("Edited.")
    (tmp_path / "secret").write_text("password")  # where a folder from a stranger may have a link to
    card.unlink()
    card.symlink_to(tmp_path / "secret")
    result = run("export", guard, "--output", graph)
    assert (result.exit_code, result.stderr.count("README.md is left out")) == (0, 1)
    assert load_onnx(graph).card is None


def test_data_of_other_classes_or_in_another_order_is_refused(guard, photos, tmp_path):
    detector = ClusterGuard.from_pretrained(guard)
    detector.class_names = ("1", "0", "7")
    detector.save_pretrained(guard)
    for command in ("calibrate", "evaluate"):
        fails("classes that were trained, 1, 0, 7; got 0, 1, 7", command, guard, "--data", photos)


def test_a_guard_of_an_older_version_has_its_names_from_its_record_and_refuses_its_own_division(
    guard, trained, photos, tmp_path
):
    detector = ClusterGuard.from_pretrained(guard)
    detector.class_names = None
    record = trained[1]["training"]
    older = {key: value for key, value in record["data"].items() if key != "divided_by"}
    detector.save_pretrained(guard, training=record | {"data": older})
    fails("an older version of clusterguard divided it", "calibrate", guard, "--data", photos)
    shutil.copytree(photos, tmp_path / "parts" / "val")
    result = run("calibrate", guard, "--data", tmp_path / "parts", "--false-positive-rate", 0.1)
    assert result.exit_code == 0, result.output
    assert ClusterGuard.from_pretrained(guard).class_names == ("0", "1", "7")


def test_calibrate_and_evaluate_tell_copies_of_training_images(guard, photos, tmp_path):
    for part in ("train", "val", "test"):
        shutil.copytree(photos, tmp_path / "parts" / part)
    result = run("calibrate", guard, "--data", tmp_path / "parts", "--false-positive-rate", 0.1)
    assert "warning: 360 copies of train images among those for calibration" in result.stderr
    options = ("--budget", "quick", "--eps", 0.01, "--images", 2, "--sanity-images", 0)
    result = run("evaluate", guard, "--data", tmp_path / "parts", *options)
    assert "copies of train images among those for test" in result.stderr


def test_names_of_files_cannot_steer_a_terminal(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data" / "train")
    name = os.fsdecode(b"\x1b[31m\xff.png")
    (tmp_path / "data" / "train" / "0" / name).write_bytes(b"no image")
    shutil.copytree(photos, tmp_path / "data" / "val")
    output = tmp_path / "guard"
    fails(r".*\\x1b\[31m\\udcff\.png", "train", "--data", tmp_path / "data", "--output", output, *SMALL)


def test_one_class_is_not_enough(photos, tmp_path):
    shutil.copytree(photos / "0", tmp_path / "data" / "photos")
    fails("at least two classes", "train", "--data", tmp_path / "data", "--output", tmp_path / "guard", *SMALL)


def test_inspect_says_what_is_there(trained):
    text = run("inspect", trained[0]).stdout
    for part in ("timm:test_resnet", "3: 0, 1, 7", "conformal", "0.1", "eps=0.05", "nothing recorded", "torch"):
        assert part in text


def test_inspect_says_that_a_guard_is_not_calibrated_and_export_and_evaluate_refuse_it(guard, photos):
    detector = ClusterGuard.from_pretrained(guard)
    detector.reset_calibration()
    detector.save_pretrained(guard)
    result = run("inspect", guard)
    assert result.exit_code == 0
    assert f"none, so every image is refused; run: clusterguard calibrate {guard}" in result.stdout
    told = json.loads(run("inspect", guard, "--json").stdout)
    assert (told["is_calibrated"], told["thresholds"]) == (False, [None] * 3)
    fails("run: clusterguard calibrate", "evaluate", guard, "--data", photos)
    options = "--output", guard / "guard.pt2", "--image-size", 16, "--channels", 1
    fails("run: clusterguard calibrate", "export", guard, *options)


def test_calibrate_changes_thresholds_and_nothing_else(guard, photos):
    before, weights = json.loads(run("inspect", guard, "--json").stdout), ClusterGuard.from_pretrained(guard)
    options = ("--data", photos, "--false-positive-rate", 0.2, "--method", "quantile")
    after = json.loads(run("calibrate", guard, *options, "--json").stdout)
    assert after["thresholds"] != before["thresholds"]
    assert (after["calibration"]["false_positive_rate"], after["calibration"]["method"]) == (0.2, "quantile")
    assert after["training"] == before["training"]
    again = ClusterGuard.from_pretrained(guard)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in weights.named_parameters())


def test_calibrate_that_fails_leaves_the_guard_as_it_was(guard, photos):
    before = (guard / "model.safetensors").read_bytes()
    fails("needs at least 999", "calibrate", guard, "--data", photos, "--false-positive-rate", 0.001)
    fails("expected images of the classes that were trained, 0, 1, 7", "calibrate", guard)  # on all ten digits
    assert (guard / "model.safetensors").read_bytes() == before


def test_evaluate_reports_and_records(guard, photos, tmp_path):
    outputs = [tmp_path / f"report.{kind}" for kind in ("json", "md", "html")]
    files = [part for path in outputs for part in ("--output", path)]
    options = ("--data", photos, "--budget", "quick", "--eps", 0.05, "--images", 4, "--sanity-images", 0)
    result = run("evaluate", guard, *options, *files, "--record", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["images"] == 4
    assert json.loads(outputs[0].read_text()) == told
    assert "worst case per image" in outputs[1].read_text()
    assert outputs[2].read_text().startswith("<!doctype html>")
    assert "on 4 images" in run("inspect", guard).stdout
    assert "suite quick linf 0.05" in (guard / "README.md").read_text()
    run("calibrate", guard, "--data", photos, "--false-positive-rate", 0.2)
    assert "nothing recorded" in run("inspect", guard).stdout  # figures at other thresholds would be a lie


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_what_another_process_saved_meanwhile_is_not_overwritten(guard, photos, monkeypatch, command):
    class CalibratedMeanwhile(DataLoader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            monkeypatch.setattr("torch.utils.data.DataLoader", DataLoader)
            run("calibrate", guard, "--data", photos, "--false-positive-rate", 0.2)

    monkeypatch.setattr("torch.utils.data.DataLoader", CalibratedMeanwhile)
    options = {
        "calibrate": ("--false-positive-rate", 0.1),
        "evaluate": ("--budget", "quick", "--images", 4, "--sanity-images", 0, "--record"),
    }[command]
    result = run(command, guard, "--data", photos, *options)
    assert (result.exit_code, "was saved by another process" in result.stderr) == (1, True), result.output
    assert ("worst case per image" in result.stdout) == (command == "evaluate")
    assert ClusterGuard.from_pretrained(guard).calibration.false_positive_rate == 0.2


def test_evaluate_says_in_which_precision_it_searched(guard, photos):
    options = ("--data", photos, "--budget", "quick", "--eps", 0.05, "--images", 4, "--sanity-images", 0)
    told = run("evaluate", guard, *options, "--precision", "bf16").stdout
    assert "Attacks searched in bfloat16" in told
    result = run("evaluate", guard, *options, "--precision", "float32", "--json")
    assert json.loads(result.stdout)["results"][0]["precision"] == "float32"
    assert run("evaluate", guard, *options, "--precision", "half").exit_code == 2


def test_evaluate_tells_that_a_guard_was_trained_at_another_radius(guard, photos):
    options = ("--data", photos, "--budget", "quick", "--images", 2, "--sanity-images", 0)
    warning = "warning: attacks at linf 0.02, but the guard was trained at linf 0.05"
    assert warning in run("evaluate", guard, *options, "--eps", 0.02).stderr
    assert "was trained at" not in run("evaluate", guard, *options, "--eps", 0.05).stderr


def test_evaluate_proves_what_no_attack_exceeds(guard, photos, tmp_path):
    options = ("--data", photos, "--budget", "quick", "--eps", 0.01, "--images", 4, "--sanity-images", 0, "--certify")
    report = tmp_path / "report.json"
    result = run("evaluate", guard, *options, "--output", report)
    told = json.loads(report.read_text())
    proved, attacked = told["certified"]["success"], told["results"][0]["success"]
    assert told["certified"]["eps"] == 0.01
    assert attacked["total"] == proved["total"]
    assert attacked["count"] <= proved["count"]
    assert "| proved upper bound, linf 0.01 |" in result.stdout
    other = run("evaluate", guard, *options, "--norm", "l2")
    assert other.exit_code == 1
    assert "no bounds are known for this network in norms other than linf" in other.stderr


def test_an_exported_program_says_what_the_guard_says(guard, photos, tmp_path):
    program = tmp_path / "guard.pt2"  # tests/test_serving.py exports ONNX
    assert json.loads(run("export", guard, "--output", program, "--json").stdout) == {"files": [str(program)]}
    pictures = load_part(str(photos), "test", image_size=16, channels=1, seed=0)
    images = torch.stack([image for image, _ in pictures])
    expected = ClusterGuard.from_pretrained(guard).detect(images)
    labels, distances, is_adversarial = torch.export.load(program).module()(images)
    assert torch.equal(labels, expected.labels)
    assert torch.allclose(distances, expected.distances, atol=1e-4)
    assert torch.equal(is_adversarial, expected.is_adversarial)


def test_errors_are_one_line_and_say_what_to_do(guard, photos, tmp_path):
    train = ("train", "--output", tmp_path / "new")
    fails("checkpoint.pt belongs to an earlier training; go on with --resume", "train", "--output", guard)
    fails("expected the options .* attack .*eps=0.05", "train", "--data", photos, "--output", guard, "--resume")
    fails("'digits' or a folder of images, got 'nowhere'", *train, "--data", "nowhere")
    fails("expected one subfolder of images per class", *train, "--data", tmp_path)
    fails("such as timm:resnet18 or torchvision:resnet50, got 'resnet18'", *train, "--backbone", "resnet18")
    fails("expected a model of timm, got 'resnet'", *train, "--backbone", "timm:resnet")
    fails("take 3 channels, got 1", *train, "--backbone", "torchvision:resnet18")
    fails("expected config.json in", "inspect", tmp_path)
    for checkpoint in guard.glob("checkpoint.pt*"):
        checkpoint.unlink()
    fails("holds a guard already", "train", "--output", guard, "--resume")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("# Mine")
    fails("README.md is not clusterguard's", *train, "--data", photos, *SMALL)  # before hours of training, not after
    config = (guard / "config.json").read_text()
    (guard / "config.json").write_text(config.replace('"counts"', '"count"'))
    fails("config.json was edited", "inspect", guard)
    (guard / "config.json").write_text(config)
    (guard / "model.safetensors").write_bytes(b"cut off")
    fails("damaged, cut off", "inspect", guard)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "--output", "new", "--norm", "l3"),
        ("train", "--output", "new", "--epochs", "2", "--warmup-epochs", "2"),
        ("train", "--output", "new", "--learning-rate", "nan"),
        ("train", "--output", "new", "--device", "abacus"),
        ("inspect", "nowhere"),
        ("export", ".", "--output", "guard.pickle"),
        ("evaluate", ".", "--output", "report.docx"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_leaves_nothing_behind(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


# The command line, but it waits after each epoch for the end of its input. So a signal sent before is in
# time however slow the machine; otherwise it may come after more epochs than there are to be in the end.
WAITING = """
import runpy, sys
from clusterguard import AdversarialClusterTrainer as Trainer

fit = Trainer.fit

def wait_after_epochs(trainer, *loaders, **options):
    def wait(_):
        sys.stdin.read()
    return fit(trainer, *loaders, on_epoch_end=wait, **options)

Trainer.fit = wait_after_epochs
runpy.run_module("clusterguard.cli", run_name="__main__", alter_sys=True)
"""


def test_a_training_that_is_interrupted_goes_on_and_ends_as_if_it_had_not_been(trained, photos, tmp_path):
    _, uninterrupted = trained
    command = ["train", "--data", str(photos), "--output", str(tmp_path), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for epoch, (number, code, options) in enumerate([(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--resume"])], 1):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, *command, "--epochs", "1000", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        )
        assert any(line.startswith(f"epoch {epoch}/1000") for line in process.stderr)  # after the summary of the images
        process.send_signal(number)
        told, said = process.communicate(timeout=60)  # it ends the input
        assert process.returncode == code
        assert told == ""
        assert f"interrupted after {epoch} of 1000 epochs: run the same command with --resume to go on" in said
        assert not (tmp_path / "config.json").exists()

    result = run(*command, "--epochs", EPOCHS, "--resume", "--json")
    assert result.exit_code == 0, result.output
    resumed = json.loads(result.stdout)
    assert len(resumed["history"]) == EPOCHS
    assert resumed["thresholds"] == pytest.approx(uninterrupted["thresholds"], rel=1e-5)


def test_a_training_that_is_interrupted_before_its_first_checkpoint_may_start_again(photos, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clusterguard.AdversarialClusterTrainer.fit", interrupt)
    for _ in range(2):
        result = run("train", "--data", photos, "--output", tmp_path / "guard", *SMALL)
        assert result.exit_code == 130
        assert result.stderr.endswith("\ninterrupted after 0 of 12 epochs: nothing was done yet\n")


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_elsewhere_is_one_line(guard, photos, monkeypatch, number, code):
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(getattr(signal, number))

    if not hasattr(signal, number):
        pytest.skip("this system has no such signal")
    monkeypatch.setattr("clusterguard.Calibrator.fit", interrupt)
    usual = signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL
    of_tests = signal.signal(getattr(signal, number), usual)  # which may ignore it, as nohup does
    try:
        result = run("calibrate", guard, "--data", photos)
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", "interrupted\n")
        assert signal.getsignal(getattr(signal, number)) is usual
    finally:
        signal.signal(getattr(signal, number), of_tests)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no such signal")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("way", ["command", "module"])
def test_a_signal_while_modules_are_imported_is_one_line(tmp_path, number, code, way):
    (tmp_path / "torch.py").write_text(f"import signal; signal.raise_signal(signal.{number})")
    run_it = {
        "command": "from clusterguard_command import main; main()",
        "module": "import os; os.execv(sys.executable, [sys.executable, '-m', 'clusterguard.cli', '--version'])",
    }
    code_of_command = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code_of_command += "signal.signal(signal.SIGHUP, signal.SIG_DFL); " + run_it[way]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", code_of_command], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_version_that_cannot_be_written_is_one_line(monkeypatch):
    def fail(_: str) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("text")

    monkeypatch.setattr(
        "clusterguard.cli._app.typer.echo", lambda text, err=False: print(text, file=sys.stderr) if err else fail(text)
    )
    result = run("--version")
    assert result.exit_code == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_errors_of_the_library_name_options_of_the_command_line():
    from clusterguard.cli._options import _in_options

    message = "got class 1 (cat): 3; add examples, allow a higher rate, or pass scarce='pool'"
    assert _in_options(message).endswith("(cat): 3; add examples, allow a higher rate, or pass --scarce pool")
