"""Evaluate a detector: run attacks, check every image that they return, and count those that get through."""

import hashlib
import inspect
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import torch
from clusterguard._support import (
    check_detector,
    check_tensor,
    evaluation_mode,
    gather,
    is_unicode,
    read_progress,
    save_progress,
)
from clusterguard.attacks import Attack, Precision, get_norm, in_precision
from clusterguard.attacks._internal import (
    check_attack_input,
    check_radius,
    choose_precision,
    precisions_of,
    searches_in_bfloat16,
)
from clusterguard.detection import (
    Detection,
    Detector,
    Loader,
    Pairs,
    Rate,
    Unpack,
    Verdicts,
    accuracy,
    accuracy_after_rejection,
    attack_success_rate,
    decide,
    expected_roc_auc,
    false_positive_rate,
    full_precision,
    is_broken,
    is_eligible,
    judge,
)
from clusterguard.detection._internal import guessing_advice
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.evaluation._batches import Batches, attack_batches
from clusterguard.evaluation._recapture import repeats_that_differ
from clusterguard.evaluation._results import AttackResult, Evaluation, Gallery
from clusterguard.evaluation._sanity import Sanity, examine
from torch import Generator, Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


_Chosen = Literal["float32", "bf16"]
_LONGEST_NAME = 200  # bytes; file systems take 255, and other files add a little to the name
_FOLDER_FILE = "evaluation.seed"  # with the seed and the precision of all attacks; the files of attacks end in .pt


def evaluate(
    detector: Detector,
    attacks: Attack | Mapping[str, Attack],
    loader: Loader,
    *,
    calibration_loader: Loader | None = None,
    generator: Generator | None = None,
    sanity_images: int = 100,
    checkpoint: str | Path | None = None,
    precision: Precision | None = None,
    accelerator: "Accelerator | None" = None,
    unpack: Unpack | None = None,
    progress: bool = False,
) -> Evaluation:
    """Attack a calibrated detector and count the attacked images that get through.

    The evaluation does not rely on an attack's own claim of success. The detector judges each returned image again, as
    it is stored. An image does not count as broken if it lies outside [0, 1] or outside the budget that the attack
    states in its `norm` and `eps`.

    Args:
        detector: calibrated detector, on the device where the computation shall run.
        attacks: one attack or suite, or several by name.
        loader: batches of clean test images (B, C, H, W) in [0, 1] and labels (B,).
        calibration_loader: batches of the benign images that EROC compares with; None takes those of `loader`.
        generator: randomness of the attacks, on the detector's device.
        sanity_images: largest number of images that the sanity probe examines, see `Sanity`; 0 switches it off.
        checkpoint: folder in which suites keep their progress, so that an interrupted run can continue with the same
            seed of the generator.
        precision: precision of the search, "float32", "bf16", or "auto", for all attacks that have this option. "auto"
            decides once for all of them, and a run that continues from a checkpoint keeps the decision. None leaves the
            attacks as they are. Verdicts are in the detector's own precision.
        accelerator: accelerator whose processes take the batches in turn; a suite then runs batch by batch. All
            processes get the same result, whatever their number, if they have the same batches and the same seed of
            the generator.
        unpack: function that takes images and labels from batches of another form, for both loaders.
        progress: whether to show a progress bar.

    Returns:
        The figures, with counts and intervals.

    Raises:
        NotCalibratedError: the detector has no thresholds.
        InputError: images or labels have a wrong shape, dtype or range, or the loader is empty.
        ConfigurationError: there are no attacks; one of them is no attack, has a name that is empty or not UTF-8, or
            has a radius within which every image lies; `sanity_images` is negative; the precision is unknown; or the
            checkpoint was begun with another seed.
        PersistenceError: a checkpoint is damaged or cannot be written.

    Warns:
        UserWarning: no more images are labelled correctly than by guessing, the weights have changed since the
            thresholds were fitted, or attacks should search in bfloat16, in which the detector does not work.

    Reference:
        arXiv 2012.03483, section 5, "Evaluation metric".

    Example:
        >>> from clusterguard import FGSM
        >>> from clusterguard.detectors import ConfidenceDetector
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> detector = ConfidenceDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), 2)
        >>> detector.thresholds = torch.tensor([5.0, 5.0])
        >>> loader = DataLoader(TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 2), batch_size=4)
        >>> evaluate(detector, {"FGSM": FGSM(eps=0.1)}, loader).images
        8
    """
    named = _by_name(attacks, precision)
    check_detector(detector)
    if sanity_images < 0:
        raise ConfigurationError(f"expected sanity_images of at least 0, got {sanity_images}")
    num_classes, weights = len(detector.thresholds), _digest(detector)
    kept = _read_folder(checkpoint, generator)
    batches = _read_batches(detector, named.values(), Pairs(loader, unpack))
    named, kept = _settled(named, detector, *batches[0], accelerator, kept)
    if accelerator is None or accelerator.is_main_process:
        _write_folder(checkpoint, generator, kept)
    clean = judge(detector, batches, accelerator=accelerator, check=False)
    benign, labels, eligible = clean, clean.labels, is_eligible(clean)
    if doubt := guessing_advice(accuracy(clean).count, len(labels), num_classes):
        warnings.warn(doubt, stacklevel=2)
    if calibration_loader is not None:
        benign = judge(detector, calibration_loader, accelerator=accelerator, unpack=unpack)
    results: list[AttackResult] = []
    broken: dict[str, Tensor] = {}
    gallery: Gallery | None = None
    for name, attack in named.items():
        result, attacked = _attack(
            name,
            attack,
            detector,
            batches,
            clean,
            benign,
            generator=generator,
            checkpoint=None if checkpoint is None else Path(checkpoint) / _file_name(name),
            accelerator=accelerator,
            progress=name if progress else "",
        )
        results.append(result)
        hits = is_broken(Verdicts(result.verdict, labels)) & eligible
        budget = result.norm or "attacks without a stated norm"
        broken[budget] = broken.get(budget, torch.zeros_like(hits)) | hits
        ratios = result.verdict.distances / detector.thresholds.cpu()[result.verdict.labels]
        shown = Gallery(_join(batches)[0], attacked, labels, result.verdict.labels, ratios)
        gallery = _worst_broken(gallery, shown, hits)
    total = int(eligible.sum())
    return Evaluation(
        images=len(labels),
        accuracy=accuracy(clean),
        accuracy_after_rejection=accuracy_after_rejection(clean),
        false_positives=false_positive_rate(clean),
        false_positives_by_class=_false_positives_by_class(clean, num_classes),
        results=tuple(results),
        worst_by_norm={norm: Rate(int(hits.sum()), total) for norm, hits in broken.items()},
        worst_case=Rate(int(torch.stack(list(broken.values())).any(dim=0).sum()), total),
        benign_reference="evaluated" if calibration_loader is None else "calibration",
        thresholds=tuple(detector.thresholds.tolist()),
        seed=None if generator is None else generator.initial_seed(),
        sanity=_probe(detector, batches, eligible, sanity_images, results, generator) if sanity_images else None,
        clean=clean.detection,
        labels=labels,
        gallery=gallery,
        weights=weights,
        class_names=None if (names := getattr(detector, "class_names", None)) is None else tuple(names),
    )


def _digest(detector: Any) -> str | None:
    """The digest of a detector's weights; None if it has none. Warn if its thresholds were fitted for other weights."""
    if not hasattr(detector, "current_record"):
        return None
    detector.current_record()
    digest: str | None = detector.digest()
    return digest


def _by_name(attacks: Attack | Mapping[str, Attack], precision: Precision | None) -> dict[str, Attack]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:  # a function has a name of its own
        named = {getattr(attacks, "__name__", type(attacks).__name__): attacks}
    if not named:
        raise ConfigurationError("expected at least one attack, got none")
    for name, attack in named.items():
        if not callable(attack):
            raise ConfigurationError(f"expected an attack, or a dict of attacks by name, got {attack!r:.200}")
        try:
            inspect.signature(attack).bind(None, None, None, generator=None)
        except TypeError as error:
            raise ConfigurationError(
                f"expected attack {name} to take (detector, images, labels, *, targets=None, generator=None), got "
                f"another signature: {error}"
            ) from None
        except ValueError:  # some callables have no signature
            pass
        if not isinstance(name, str) or not name.strip() or not is_unicode(name):
            raise ConfigurationError(
                f"expected a name for each attack, of characters that UTF-8 can write, got {name!r}; rename it"
            )
    if precision is None:
        return named
    return {name: in_precision(attack, precision) for name, attack in named.items()}


def _settled(
    named: dict[str, Attack],
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    accelerator: "Accelerator | None",
    kept: _Chosen | None,
) -> tuple[dict[str, Attack], _Chosen | None]:
    """The attacks, with "auto" replaced by one precision for all of them, and this precision.

    Warns:
        UserWarning: attacks should search in bfloat16, but the detector does not work in it.
    """
    asked = set().union(*(precisions_of(attack) for attack in named.values()))
    if "bf16" in asked and not _works_in_bfloat16(detector, images):
        warnings.warn(
            "the detector's evidence is of no use in bfloat16, so all attacks search in float32", stacklevel=3
        )
        named = {name: in_precision(attack, "float32", instead_of="bf16") for name, attack in named.items()}
    if "auto" in asked:
        kept = _choose_for_all(detector, images, labels, accelerator, kept)
        named = {name: in_precision(attack, kept, instead_of="auto") for name, attack in named.items()}
    return named, kept


def _works_in_bfloat16(detector: Detector, images: Tensor) -> bool:
    with evaluation_mode(detector) as detector:
        return searches_in_bfloat16(detector, images)


def _choose_for_all(
    detector: Detector, images: Tensor, labels: Tensor, accelerator: "Accelerator | None", kept: _Chosen | None
) -> _Chosen:
    """The precision for all processes: what one of them has kept, or what suits all."""
    index = 0 if accelerator is None else accelerator.process_index
    for noted in gather({index: kept}, accelerator):  # not every machine need have the file
        if noted is not None:
            return noted
    with evaluation_mode(detector) as detector:
        choice = choose_precision(detector, images, labels)
    return "bf16" if set(gather({index: choice}, accelerator)) == {"bf16"} else "float32"


def _read_folder(folder: str | Path | None, generator: Generator | None) -> _Chosen | None:
    """The precision that "auto" took when a folder of checkpoints was begun; None without one, or if it took none.

    Raises:
        ConfigurationError: the folder was begun with another seed.
    """
    hint = "delete it if the seed of the generator is the same as before"
    progress = None if folder is None else read_progress(Path(folder) / _FOLDER_FILE, "evaluation", hint=hint)
    if progress is None:
        return None
    seed = None if generator is None else generator.initial_seed()
    if progress.state.get("seed") != seed:
        raise ConfigurationError(
            f"expected the seed of the generator with which the evaluation in {folder} was begun, "
            f"{progress.state.get('seed')!r:.50}, got {seed}; use that seed, or choose another folder as checkpoint"
        )
    kept = progress.state.get("precision")
    return kept if kept in ("float32", "bf16") else None


def _write_folder(folder: str | Path | None, generator: Generator | None, precision: _Chosen | None) -> None:
    """Note the seed and the precision with which a folder of checkpoints was begun, if they are not noted so far."""
    if folder is None:
        return
    file, seed = Path(folder) / _FOLDER_FILE, None if generator is None else generator.initial_seed()
    progress = read_progress(file, "evaluation", hint="delete it")
    if progress is None or progress.state.get("precision") != precision:
        save_progress(file, "evaluation", {"seed": seed, "precision": precision})


def _file_name(name: str) -> str:
    """The file name of an attack's checkpoint, which is different for each attack and never leads out of the folder."""
    quoted = [one if one.isprintable() and one not in '%/\\:*?"<>|' else quote(one, safe="") for one in name]
    text = "".join(quoted)
    if len(text.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()
        text = text.encode()[: _LONGEST_NAME - len(digest) - 1].decode(errors="ignore") + f"-{digest}"
    return f"{text}.pt"


def _attack(
    name: str,
    attack: Attack,
    detector: Detector,
    batches: Batches,
    clean: Verdicts,
    benign: Verdicts,
    **options: Any,
) -> tuple[AttackResult, Tensor]:
    """The result of one attack, and its attacked images (B, C, H, W); `options` are those of `attack_batches`."""
    started = time.perf_counter()
    done = attack_batches(attack, detector, batches, **options)
    attacked = done.images
    seconds = time.perf_counter() - started
    valid = torch.cat([_is_valid(attack, old, new) for (old, _), new in zip(batches, attacked, strict=True)])
    verdict = _judge_attacked(detector, attacked, valid)
    verdicts = Verdicts(verdict, clean.labels)
    result = AttackResult(
        name=name,
        attack=repr(attack),
        norm=getattr(attack, "norm", None),
        eps=getattr(attack, "eps", None),
        success=attack_success_rate(clean, verdicts),
        expected_roc_auc=expected_roc_auc(benign, verdicts, len(detector.thresholds)),
        invalid=int((~valid).sum()),
        cost=done.cost,
        seconds=seconds,
        runs=done.runs,
        stages=done.stages,
        precision=" and ".join(sorted(precisions_of(attack))) or None,
        verdict=verdict,
    )
    return result, torch.cat(attacked)


def _read_batches(detector: Detector, attacks: Iterable[Attack], pairs: Pairs) -> Batches:
    """Read all batches, put them on the detector's device, and check them for all attacks."""
    device = detector.thresholds.device
    batches = [(_moved(images, device), _moved(labels, device)) for images, labels in pairs]
    if not batches:
        raise InputError("expected a loader with at least one batch, got an empty one")
    for batch in batches:
        check_attack_input(detector, *batch)
        for attack in attacks:
            check_radius(attack, batch[0])
    return batches


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Anything else than a tensor with values is returned as it is, for later checks."""
    return tensor.to(device) if isinstance(tensor, Tensor) and not tensor.is_meta else tensor


@torch.no_grad()
def _judge_attacked(detector: Detector, batches: list[Tensor], valid: Tensor) -> Detection:
    """Verdicts on attacked images as they are stored; images that are not `valid` (B,) count as refused."""
    with evaluation_mode(detector) as detector, full_precision():
        verdicts = [decide(detector.evidence(images), detector.thresholds) for images in batches]
    verdict = Detection(*(torch.cat(parts).cpu() for parts in zip(*verdicts, strict=True)))
    return verdict._replace(is_adversarial=verdict.is_adversarial | ~valid)


def _false_positives_by_class(clean: Verdicts, num_classes: int) -> tuple[Rate, ...]:
    return tuple(false_positive_rate(clean[clean.labels == index]) for index in range(num_classes))


def _is_valid(attack: Attack, images: Tensor, attacked: Tensor) -> Tensor:
    """(B,) whether attacked images lie in [0, 1] and within the budget that the attack states."""
    check_tensor(attacked, "attacked images", *images.shape, like=images)
    in_box = ((attacked >= 0) & (attacked <= 1)).flatten(1).all(dim=1)
    norm, eps = getattr(attack, "norm", None), getattr(attack, "eps", None)
    if norm is None or eps is None:
        return in_box.cpu()
    tolerance = 1e-5 * (1 + eps)  # float32 rounding of a few thousand summed pixels
    in_budget: Tensor = get_norm(norm).size(attacked - images) <= eps + tolerance
    return (in_box & in_budget).cpu()


def _join(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels


def _probe(
    detector: Detector,
    batches: Batches,
    eligible: Tensor,
    count: int,
    results: list[AttackResult],
    generator: Generator | None,
) -> Sanity | None:
    """The sanity report on eligible images, which are evenly spaced because a loader may be sorted by class."""
    usable = eligible.nonzero().squeeze(1)
    if not len(usable):
        return None
    rows = usable[torch.linspace(0, len(usable) - 1, min(count, len(usable))).round().long()]
    images, labels = _join(batches)
    probed = [replace(result, verdict=Detection(*(part[rows] for part in result.verdict))) for result in results]
    rows = rows.to(images.device)
    report = examine(detector, images[rows], labels[rows], probed, generator)
    if report is None:
        return None
    return replace(report, warnings=(*report.warnings, *repeats_that_differ(results, labels.cpu())))


def _worst_broken(best: Gallery | None, fresh: Gallery, hits: Tensor, count: int = 12) -> Gallery:
    """The broken images with the smallest ratio of suspicion to threshold.

    They are chosen out of the best so far and those of the new attack.
    """
    broken = Gallery(*(part.cpu()[hits] for part in fresh))
    merged = broken if best is None else Gallery(*(torch.cat(parts) for parts in zip(best, broken, strict=True)))
    order = merged.ratios.argsort()[:count]
    return Gallery(*(part[order] for part in merged))
