"""The command line, `clusterguard --help`. Results go to stdout, and everything else goes to stderr.

Exit codes: 0 for success, 1 for an error that says what to do, 2 for wrong usage, and 129, 130 or 143 for an
interruption by SIGHUP, Ctrl-C or SIGTERM.
"""

import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from clusterguard._support import keep_freed_memory
from clusterguard.cli._evidence import file_evidence
from clusterguard.cli._options import (
    BatchSize,
    Channels,
    Commands,
    Data,
    Device,
    Eps,
    GuardFolder,
    ImageSize,
    Json,
    MethodOption,
    NormOption,
    PrecisionOption,
    RateOption,
    ScarceOption,
    Seed,
    SkipUnreadable,
    check_suffixes,
    find_device,
    refuse_uncalibrated,
    say,
    show,
    stderr_is_a_terminal,
    stopped_by_signals,
)

if TYPE_CHECKING:
    from clusterguard.cli._image_folders import Summary
    from clusterguard.cli._pictures import Pictures
    from clusterguard.detectors import DetectorModule

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clusterguard {version('clusterguard')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Put a guard in front of an image classifier: it detects adversarial examples."""
    keep_freed_memory()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the guard, the report and two pictures.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 12,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of training and test images, for a dry run.")] = None,
    as_json: Json = False,
) -> None:
    """Train a classifier and a guard on real digits, attack both, and print a table. Takes minutes on a CPU, offline.

    Example: clusterguard demo --output runs/demo
    """
    import torch
    from clusterguard.cli._demo import run_demo

    torch.set_num_threads(1)  # for such a small network, synchronising a second core costs more than it gains
    report = run_demo(output, epochs=epochs, seed=seed, limit=limit, progress=stderr_is_a_terminal())
    if "pictures" in report:
        say(f"No pictures: {report['pictures']}")
    training, attacks = report["precision"]["training"], " and ".join(report["precision"]["attacks"])
    say(f"Trained in {training}, attacked in {attacks}, judged in float32.")
    say(f"{report['seconds']:.0f} s in all. The guard, report.json and pictures are in {output}")
    show(as_json, report, f"\n{report['table']}\n\n{report['note']}\n")


def _checked_schedule(learning_rate: float, warmup_epochs: int, ramp_epochs: float, epochs: int) -> dict[str, Any]:
    """Check the schedule, and return the trainer's options that say when the attack begins."""
    if not 0 < learning_rate < math.inf:
        raise typer.BadParameter(f"expected a positive learning rate, got {learning_rate}")
    if warmup_epochs >= epochs:
        raise typer.BadParameter(f"expected fewer warmup epochs than epochs, {epochs}, or no epoch would attack")
    return {"warmup_epochs": warmup_epochs, "ramp_epochs": ramp_epochs}


def _introduce(pictures: "Pictures", detector: "DetectorModule") -> "Summary | None":
    """Print facts about images and machine before a training, and return the summary if images are from a folder."""
    from clusterguard.cli._image_folders import summarise
    from clusterguard.cli._pictures import describe_unreadable

    for left_out in describe_unreadable(pictures):
        say(f"warning: {left_out}")
    summary = summarise(pictures.folder, say=say) if pictures.folder else None
    _settle_threads(pictures, detector)
    return summary


def _settle_threads(pictures: "Pictures", detector: "DetectorModule") -> None:
    import torch
    from clusterguard.cli._threads import settle_threads

    images = torch.stack([pictures[index][0] for index in range(min(100, len(pictures)))])
    count = settle_threads(detector, images.to(detector.thresholds.device))
    if images.device == detector.thresholds.device:
        say(f"computing on {count} thread{'s' * (count > 1)}; OMP_NUM_THREADS sets another number")


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the guard and its checkpoint.")],
    data: Data = "digits",
    backbone: Annotated[str, typer.Option(help="Model, timm:NAME or torchvision:NAME.")] = "timm:resnet18",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from downloaded weights.")] = False,
    image_size: ImageSize = None,
    channels: Channels = None,
    skip_unreadable: SkipUnreadable = False,
    norm: NormOption = "linf",
    eps: Eps = 0.1,
    step_size: Annotated[
        float | None, typer.Option(min=0, help="Step size of the attack; by default 2.5 eps / steps.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs in all, including those before --resume.")] = 12,
    warmup_epochs: Annotated[int, typer.Option(min=0, help="Number of first epochs without an attack.")] = 0,
    ramp_epochs: Annotated[
        float, typer.Option(min=0, help="Epochs after the warm-up in which the attack's radius grows.")
    ] = 0,
    batch_size: BatchSize = 100,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    false_positive_rate: RateOption = 0.01,
    scarce: ScarceOption = "error",
    precision: PrecisionOption = "auto",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a guard, calibrate it, and save it as a folder.

    Example: clusterguard train --data photos --backbone timm:resnet18 --pretrained --eps 0.03 --output runs/guard
    """
    import torch
    from clusterguard.attacks import PGD
    from clusterguard.cli._classifiers import make_backbone
    from clusterguard.cli._guard_folders import describe_guard
    from clusterguard.cli._pictures import describe_images, image_options, load_pair, shuffled
    from clusterguard.cli._runs import begin_run
    from clusterguard.detection import Calibrator
    from clusterguard.detectors import ClusterGuard
    from clusterguard.evaluation._internal import to_json_value
    from clusterguard.training import AdversarialClusterTrainer, TrainingOptions
    from torch.utils.data import DataLoader

    schedule = _checked_schedule(learning_rate, warmup_epochs, ramp_epochs, epochs)
    target = find_device(device)
    images = image_options(data, image_size, channels)
    step = 2.5 * eps / steps if step_size is None else step_size
    attack = PGD(norm=norm, eps=eps, step_size=step, steps=steps, keep="last")
    calibrator = Calibrator(false_positive_rate, scarce=scarce)
    pictures, calibration = load_pair(data, seed=seed, skip_unreadable=skip_unreadable, **images)
    depth, classes = images["channels"], pictures.classes
    record: dict[str, Any] = {
        "data": {**describe_images(pictures), "seed": seed, **images},
        **({"skip_unreadable": True} if skip_unreadable else {}),
        "backbone": backbone,
        "pretrained": pretrained,
        "attack": repr(attack),
        **schedule,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "calibrator": repr(calibrator),
        "precision": precision,
    }
    torch.manual_seed(seed)
    network = make_backbone(backbone, num_classes=len(classes), channels=depth, pretrained=pretrained)
    guard = ClusterGuard(network, num_classes=len(classes), class_names=classes).to(target).eval()
    checkpoint = begin_run(output, record, resume=resume)
    summary = _introduce(pictures, guard)
    trainer = AdversarialClusterTrainer(
        guard,
        attack,
        optimizer=torch.optim.Adam(guard.parameters(), lr=learning_rate),
        **schedule,
        calibrator=calibrator,
        options=TrainingOptions(precision=precision),
    )
    with stopped_by_signals(checkpoint, lambda: f"{len(trainer.history)} of {epochs} epochs") as is_asked_to_stop:
        history = trainer.fit(
            shuffled(pictures, batch_size, seed),
            DataLoader(calibration, batch_size),
            epochs=epochs,
            checkpoint=checkpoint,
            checkpoint_every=100,
            stop_when=is_asked_to_stop,
            generator=torch.Generator(target).manual_seed(seed),
        )
    done = {"precision": history[-1].precision, "epochs": len(history), "last_epoch": to_json_value(history[-1])}
    guard.save_pretrained(output, training=record | done)
    result, text = describe_guard(output)
    show(as_json, {**result, "history": history, "images": summary}, text)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 0.49,0.48,0.45, got {text}") from None


@app.command()
def guard(
    output: Annotated[Path, typer.Option(help="Folder for the guard, which is empty or not there.")],
    model: Annotated[str, typer.Option(help="The classifier, timm:NAME or torchvision:NAME.")],
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File of its weights, .safetensors or a state dict of torch."),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download weights; its classes are lost.")] = False,
    mean: Annotated[
        str | None,
        typer.Option(help="Mean that it was trained with, such as 0.5 or 0.49,0.48,0.45; else as its library."),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, in the same form.")] = None,
    fit: Annotated[
        Literal["align", "gaussians"],
        typer.Option(help="Align the last layer with the paper's centres, or fit Gaussians of the features."),
    ] = "align",
    data: Data = "digits",
    image_size: ImageSize = None,
    channels: Channels = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 100,
    false_positive_rate: RateOption = 0.01,
    scarce: ScarceOption = "error",
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Guard a trained classifier without training it: fit its last layer, calibrate it, and save it as a folder.

    Example: clusterguard guard --model timm:resnet18 --weights mine.safetensors --data photos --output runs/guard
    """
    from clusterguard.cli._classifiers import load_weights, make_backbone
    from clusterguard.cli._guard_folders import describe_guard
    from clusterguard.cli._pictures import describe_images, image_options, load_pair
    from clusterguard.cli._runs import check_output
    from clusterguard.detection import Calibrator
    from clusterguard.detectors import ClusterGuard, align, fit_feature_gaussians
    from clusterguard.evaluation._internal import to_json_value
    from torch.utils.data import DataLoader

    if (weights is None) is not pretrained:
        raise typer.BadParameter("expected either --weights FILE or --pretrained, so that the model knows something")
    target, images = find_device(device), image_options(data, image_size, channels)
    calibrator = Calibrator(false_positive_rate, scarce=scarce)
    check_output(output)
    pictures, calibration = load_pair(data, seed=seed, skip_unreadable=skip_unreadable, **images)
    depth, classes = images["channels"], pictures.classes
    network = make_backbone(model, num_classes=len(classes), channels=depth, pretrained=pretrained)
    if weights:
        load_weights(network, weights)
    values = _numbers(mean), _numbers(std)
    wrapped = ClusterGuard(network, len(classes), mean=values[0], std=values[1], class_names=classes).to(target)
    _introduce(pictures, wrapped)
    bar = "fitting" if stderr_is_a_terminal() else ""
    run, key = (align, "alignment") if fit == "align" else (fit_feature_gaussians, "gaussians")
    fitted = run(wrapped, DataLoader(pictures, batch_size), progress=bar)
    say(str(fitted))
    calibrator.fit(wrapped, DataLoader(calibration, batch_size), progress=stderr_is_a_terminal())
    record = {
        "data": {**describe_images(pictures), "seed": seed, **images},
        "backbone": model,
        "weights": "pretrained" if weights is None else weights.name,
        "calibrator": repr(calibrator),
        key: to_json_value(fitted),
    }
    wrapped.save_pretrained(output, training=record)
    result, text = describe_guard(output)
    show(as_json, {**result, key: fitted}, text)


@app.command()
def calibrate(
    guard: GuardFolder,
    data: Data = "digits",
    false_positive_rate: RateOption = 0.01,
    method: MethodOption = "conformal",
    scarce: ScarceOption = "error",
    image_size: ImageSize = None,
    channels: Channels = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 100,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit a guard's thresholds on the calibration part of the data, and save them. Earlier figures are dropped.

    Example: clusterguard calibrate runs/guard --data photos --false-positive-rate 0.01
    """
    from clusterguard.cli._guard_folders import describe_guard, open_guard
    from clusterguard.cli._image_folders import find_copies
    from clusterguard.cli._pictures import describe_unreadable
    from clusterguard.cli._reports import save_again
    from clusterguard.detection import Calibrator
    from torch.utils.data import DataLoader

    calibrator = Calibrator(false_positive_rate, method=method, scarce=scarce)
    detector, config, pictures = open_guard(
        guard,
        data,
        "calibration",
        image_size=image_size,
        channels=channels,
        device=find_device(device),
        skip_unreadable=skip_unreadable,
    )
    for doubt in (*describe_unreadable(pictures), *find_copies(pictures.folder, "calibration")):
        say(f"warning: {doubt}")
    calibrator.fit(detector, DataLoader(pictures, batch_size), progress=stderr_is_a_terminal())
    save_again(detector, guard, config)
    show(as_json, *describe_guard(guard))


@app.command()
def evaluate(
    guard: GuardFolder,
    data: Data = "digits",
    norm: NormOption = "linf",
    eps: Eps = 0.1,
    budget: Annotated[
        Literal["quick", "standard", "thorough", "converge"], typer.Option(help="Budget of the suite.")
    ] = "standard",
    images: Annotated[int, typer.Option(min=1, help="Number of images, drawn from the test part by --seed.")] = 200,
    output: Annotated[
        list[Path] | None, typer.Option(help="Report to write, .json, .md or .html; may be given several times.")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the figures in the guard's folder.")] = False,
    certified: Annotated[bool, typer.Option("--certify", help="Also prove a rate that no attack can exceed.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate results, from which an interrupted evaluation continues."),
    ] = None,
    sanity_images: Annotated[int, typer.Option(min=0, help="Number of images for the sanity report.")] = 100,
    image_size: ImageSize = None,
    channels: Channels = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 100,
    precision: PrecisionOption = "auto",
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Attack a guard on the test part of the data with the whole attack suite, and count the successes.

    Example: clusterguard evaluate runs/guard --data photos --norm linf --eps 0.03 --budget quick --output report.html
    """
    import torch
    from clusterguard._support import check_place
    from clusterguard.attacks import WorstCaseSuite
    from clusterguard.certification import certified_success_rate
    from clusterguard.cli._guard_folders import describe_other_radius, open_guard
    from clusterguard.cli._image_folders import find_copies
    from clusterguard.cli._pictures import describe_unreadable, sample
    from clusterguard.cli._reports import save_again, write_evaluation
    from clusterguard.evaluation import CertifiedBound
    from clusterguard.evaluation import evaluate as run
    from torch.utils.data import DataLoader

    check_suffixes(output or [], ".json", ".md", ".html")
    for path in output or []:
        check_place(path)
    suite = WorstCaseSuite(norm, eps=eps, budget=budget, batch_size=batch_size)
    detector, config, pictures = open_guard(
        guard,
        data,
        "test",
        image_size=image_size,
        channels=channels,
        device=find_device(device),
        skip_unreadable=skip_unreadable,
    )
    doubts = (*describe_unreadable(pictures), *find_copies(pictures.folder, "test"))
    for doubt in (*doubts, *describe_other_radius(config["training"], norm, eps)):
        say(f"warning: {doubt}")
    chosen = DataLoader(sample(pictures, images, seed), batch_size)
    _settle_threads(pictures, detector)
    proved = None
    if certified:
        proved = CertifiedBound(eps, certified_success_rate(detector, chosen, eps=eps, norm=norm), norm)
    result = run(
        detector,
        {f"suite {budget} {norm} {eps:g}": suite},
        chosen,
        generator=torch.Generator(detector.thresholds.device).manual_seed(seed),
        sanity_images=sanity_images,
        checkpoint=checkpoint,
        precision=precision,
        progress=stderr_is_a_terminal(),
    )
    result = replace(result, certified=proved)
    for path in output or []:
        write_evaluation(result, path)
    try:
        if record:
            save_again(detector, guard, config, evaluation=result)
    finally:  # hours of work, which a folder that changed meanwhile must not cost
        show(as_json, result.to_dict(), result.to_markdown())


app.command("evidence")(file_evidence)


@app.command()
def export(
    guard: GuardFolder,
    output: Annotated[list[Path], typer.Option(help="File .onnx, or .pt2 for torch.export; may be given twice.")],
    image_size: ImageSize = None,
    channels: Channels = None,
    as_json: Json = False,
) -> None:
    """Write a guard with its thresholds as one graph: images -> labels, distances, is_adversarial.

    Example: clusterguard export runs/guard --output guard.onnx
    """
    import torch
    from clusterguard._support import check_place
    from clusterguard.cli._guard_folders import load_named_guard, recorded_images
    from clusterguard.deployment import export_onnx, save_program
    from clusterguard.detectors._internal import read_card
    from rich.console import Console

    check_suffixes(output, ".onnx", ".pt2")
    for path in output:
        check_place(path)
    detector, config = load_named_guard(guard)
    refuse_uncalibrated(detector, guard)
    recorded = recorded_images(config["training"])
    size, depth = image_size or recorded.get("image_size"), channels or recorded.get("channels", 3)
    example = torch.zeros(2, depth, size, size) if size else None
    card, doubts = read_card(guard)
    for doubt in doubts:
        say(f"warning: {doubt}")
    with Console(stderr=True).status("exporting"):
        for path in output:
            if path.suffix == ".onnx":
                export_onnx(detector, path, example, card=card)
            else:
                save_program(detector, path, example)
    files = [str(path) for path in output]
    show(as_json, {"files": files}, "\n".join(files))


@app.command()
def inspect(guard: GuardFolder, as_json: Json = False) -> None:
    """Show what a guard's folder holds: backbone, classes, thresholds, training, figures and versions.

    Example: clusterguard inspect runs/guard
    """
    from clusterguard.cli._guard_folders import describe_guard

    show(as_json, *describe_guard(guard))
