"""The command that measures a guard and writes the evidence that a reviewer files."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from clusterguard.cli._options import (
    BatchSize,
    Channels,
    Data,
    Device,
    GuardFolder,
    ImageSize,
    Json,
    Seed,
    SkipUnreadable,
    find_device,
    known_norm,
    say,
    show,
    stderr_is_a_terminal,
)
from clusterguard.errors import ConfigurationError

if TYPE_CHECKING:
    from clusterguard.assurance import FailureCheck
    from clusterguard.attacks import WorstCaseSuite
    from clusterguard.cli._pictures import Pictures
    from clusterguard.detectors import ClusterGuard, DetectorModule
    from clusterguard.evaluation import Evaluation
    from torch import Tensor

_WORTH_TELLING = 10.0  # seconds


def file_evidence(
    guard: GuardFolder,
    output: Annotated[
        Path, typer.Option(help="Folder for evidence.html, evidence.json, sbom.cdx.json and SHA256SUMS.")
    ],
    data: Data = "digits",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Norm and radius, such as linf:0.3; may be given several times. Else as it was trained."),
    ] = None,
    budget: Annotated[
        Literal["quick", "standard", "thorough", "converge"], typer.Option(help="Budget of the suite.")
    ] = "quick",
    images: Annotated[int, typer.Option(min=2, help="Number of images to attack, drawn from the test part.")] = 200,
    certify: Annotated[bool, typer.Option("--certify", help="Also prove a rate that no attack can exceed.")] = False,
    certified_at: Annotated[
        str | None,
        typer.Option(help="Norm and radius of the proof, such as l0:5; else the first attack's, an linf one if any."),
    ] = None,
    proof: Annotated[
        Literal["intervals", "linear", "branching"],
        typer.Option(help="Method of the proof; each is tighter and slower than the one before."),
    ] = "intervals",
    purpose: Annotated[
        str | None, typer.Option(help="What the guard is used for and by whom, in your words, for the first section.")
    ] = None,
    run_length: Annotated[
        float, typer.Option(min=2, help="Mean number of images until a false alarm of the monitor.")
    ] = 1_000_000,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for intermediate results, from which an interrupted run continues.")
    ] = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 100,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a guard, and write what a reviewer, an auditor or a customer files about it. Promises no compliance.

    Example: clusterguard evidence runs/guard --data photos --output evidence
    """
    import torch
    from clusterguard.assurance import assemble_dossier, check_failing_closed
    from clusterguard.attacks import WorstCaseSuite
    from clusterguard.cli._guard_folders import open_guard
    from clusterguard.cli._pictures import sample
    from clusterguard.detection import judge
    from torch.utils.data import DataLoader

    radii = [_norm_and_radius(text) for text in attack or []]
    asked = _norm_and_radius(certified_at) if certified_at is not None else None
    if asked is not None and not certify:
        raise ConfigurationError("expected --certify together with --certified-at, which says where to prove")
    _check_places(output, checkpoint)
    detector, config, pictures = open_guard(
        guard,
        data,
        "test",
        image_size=image_size,
        channels=channels,
        device=find_device(device),
        skip_unreadable=skip_unreadable,
    )
    radii = radii or _trained_radii(guard, config["training"])
    proved_at = (asked or _radius_of_proof(radii)) if certify else None
    suites = {
        f"suite {budget} {norm} {eps:g}": WorstCaseSuite(norm, eps=eps, budget=budget, batch_size=batch_size)
        for norm, eps in radii
    }
    chosen = DataLoader(sample(pictures, images, seed), batch_size)
    first = next(iter(chosen))
    pair = torch.stack([pictures[index][0] for index in range(min(2, len(pictures)))])
    checks = check_failing_closed(detector, pair.to(detector.thresholds.device), guard)
    _warn(pictures, checks)
    benign = judge(detector, DataLoader(pictures, batch_size), progress="judging" * stderr_is_a_terminal())
    _say_how_long(detector, suites, first, min(images, len(pictures)))
    dossier = assemble_dossier(
        detector,
        guard,
        _attack(detector, suites, chosen, seed, checkpoint, proved_at, proof),
        benign,
        checks=checks,
        data=_describe_data(pictures, chosen),
        settings={
            "attacks": [f"{norm}:{eps:g}" for norm, eps in radii],
            "budget": budget,
            "images": images,
            "seed": seed,
            "batch_size": batch_size,
            "certify": certify,
            "proof": _describe_proof(proved_at, proof),
            "device": detector.thresholds.device.type,
            "threads": torch.get_num_threads(),
        },
        purpose=purpose,
        run_length=run_length,
    )
    files = [str(path) for path in dossier.write(output)]
    figures = {name: figure["text"] for name, figure in dossier.content["figures"].items()}
    shown = "\n".join(f"{name:26}{text}" for name, text in figures.items())
    show(as_json, {"files": files, "figures": figures}, "\n".join([shown, "", *files]))


def _check_places(output: Path, checkpoint: Path | None) -> None:
    """Refuse places that cannot be written to, or hold other files, before anything is measured."""
    from clusterguard._support import check_place
    from clusterguard.assurance._internal import BILL, CONTENT, PAGE, SUMS
    from clusterguard.cli._runs import check_output

    check_output(output, PAGE, CONTENT, BILL, SUMS)
    if checkpoint is not None and output.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise ConfigurationError(f"expected a checkpoint outside {output}, which holds the evidence alone")
    check_place(output / SUMS)


def _warn(pictures: "Pictures", checks: "Sequence[FailureCheck]") -> None:
    """Print doubts about the images, and what the guard accepts although it cannot judge it."""
    from clusterguard.cli._image_folders import find_copies
    from clusterguard.cli._pictures import describe_unreadable

    for doubt in (*describe_unreadable(pictures), *find_copies(pictures.folder, "test")):
        say(f"warning: {doubt}")
    for check in checks:
        if not check.holds:
            say(f"warning: the guard does not fail closed: {check.given}")


def _attack(
    detector: "ClusterGuard",
    suites: "Mapping[str, WorstCaseSuite]",
    chosen: Any,
    seed: int,
    checkpoint: Path | None,
    proved_at: tuple[str, float] | None,
    proof: Literal["intervals", "linear", "branching"],
) -> "Evaluation":
    """Prove a bound if it is asked for, which fails early where there is none, and then attack."""
    from dataclasses import replace

    import torch
    from clusterguard.certification import certified_success_rate
    from clusterguard.evaluation import CertifiedBound, evaluate

    proved = None
    if proved_at is not None:
        norm, eps = proved_at
        say(f"proving at {norm} {eps:g}")
        rate = certified_success_rate(detector, chosen, eps=eps, norm=norm, method=proof)
        proved = CertifiedBound(eps, rate, norm)
    generator = torch.Generator(detector.thresholds.device).manual_seed(seed)
    bar = stderr_is_a_terminal()
    result = evaluate(detector, suites, chosen, generator=generator, checkpoint=checkpoint, progress=bar)
    return replace(result, certified=proved)


def _norm_and_radius(text: str) -> tuple[str, float]:
    """The norm and radius of an option such as linf:0.3."""
    name, _, radius = text.partition(":")
    try:
        return known_norm(name), float(radius)
    except ValueError:
        raise typer.BadParameter(f"expected a norm and a radius such as linf:0.3, got {text!r}") from None


def _trained_radii(guard: Path, training: Any) -> list[tuple[str, float]]:
    """The norm and radius that a guard was trained at."""
    from clusterguard.assurance._internal import trained_radius

    trained = trained_radius(training)
    if trained is None:
        raise ConfigurationError(
            f"expected --attack NORM:RADIUS, such as --attack linf:0.03, because {guard} does not tell which attack it "
            "was trained against"
        )
    return [trained]


def _radius_of_proof(radii: list[tuple[str, float]]) -> tuple[str, float]:
    """The attack in l∞, for which every network of known layers has bounds, or else the first one."""
    from clusterguard.attacks import LInf

    return next((pair for pair in radii if pair[0] == LInf.name), radii[0])


def _describe_proof(proved_at: tuple[str, float] | None, proof: str) -> str | None:
    from clusterguard.attacks import LInf

    if proved_at is None:
        return None
    return proof if proved_at[0] == LInf.name else "the worst pixels of its costs"


def _say_how_long(
    detector: "DetectorModule", suites: dict[str, "WorstCaseSuite"], batch: tuple["Tensor", "Tensor"], images: int
) -> None:
    """Say how long the attacks take at most, if it is worth saying.

    The time of one gradient is measured, and multiplied by the number of steps and queries if no image breaks.
    """
    from clusterguard.attacks import Towards
    from clusterguard.cli._threads import seconds_of_gradient
    from clusterguard.training._internal import duration

    inputs, labels = (part.to(detector.thresholds.device) for part in batch)
    single = min(seconds_of_gradient(detector, inputs) for _ in range(2)) / len(inputs)
    plans = [suite.stages(detector, Towards(inputs, labels)).values() for suite in suites.values()]
    steps = sum(_steps(stage, detector.num_classes) for plan in plans for stage in plan)
    if (seconds := single * steps * images) >= _WORTH_TELLING:
        say(f"attacking {images} images: about {duration(seconds)} at most, less as images break")


def _steps(stage: Any, num_classes: int) -> int:
    """About how many gradients a stage of a suite takes of an image; queries cost about a third of one."""
    from clusterguard.attacks import MultiTarget, Polish

    if isinstance(stage, MultiTarget):
        targets = min(stage.max_targets or num_classes, num_classes - 1)
        return targets * _steps(stage.attack, num_classes)
    if isinstance(stage, Polish):
        rounds = stage.rounds * (1 + stage.halvings)
        return rounds * (2 * stage.steps * stage.max_targets + stage.tries * stage.proposals // 3)
    return int(getattr(stage, "steps", 0) * getattr(stage, "searches", 1) or getattr(stage, "queries", 0) // 3)


def _describe_data(pictures: "Pictures", attacked: Any) -> dict[str, Any]:
    """Digests of the attacked images as the guard saw them, and of all images of each part as they are stored."""
    from clusterguard.cli._pictures import divided_by

    seen = hashlib.sha256()
    for images, labels in attacked:
        seen.update(images.numpy().tobytes() + labels.numpy().tobytes())
    return {
        "divided by": divided_by(pictures),
        "attacked images": seen.hexdigest(),
        **{f"{part} part": {"images": count, "sha256": digest} for part, count, digest in _digests(pictures)},
    }


def _digests(pictures: "Pictures") -> Iterator[tuple[str, int, str]]:
    """Name, number of images and digest of each part, whatever the folder is called and wherever it lies."""
    from clusterguard.cli._image_folders import digests_by_class
    from clusterguard.samples import SPLITS, load_digits

    if pictures.folder is None:
        for part in SPLITS:
            images, labels = load_digits(part).tensors
            digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
            yield part, len(images), digest.hexdigest()
        return
    for part in pictures.folder.parts:
        lines = digests_by_class(pictures.folder, part)
        yield part, len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()
