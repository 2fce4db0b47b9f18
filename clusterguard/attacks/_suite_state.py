"""The state from which an interrupted suite continues, with a record of each finished stage."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from clusterguard._support import digest_of, read_progress, save_progress
from clusterguard.detection import Detector
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from torch import Generator, Tensor, nn

_KIND = "suite"
_KEYS = {"suite", "clean_margins", "best", "margins", "records", "generator", "runs"}
_OPTIONAL_KEYS = {"cost", "inputs", "precision"}  # which other versions wrote, or did not write


@final
@dataclass(frozen=True)
class StageRecord:
    """The result of one stage of a suite.

    Attributes:
        name: name of the stage.
        attacked: number of images that were unbroken before the stage. Images that are refused or labelled wrongly when
            clean are attacked too but not counted, because they count in no attack success rate.
        broken: number of these images that the stage broke.
        forward: number of images judged.
        backward: number of gradients taken.
    """

    name: str
    attacked: int
    broken: int
    forward: int
    backward: int

    @property
    def broken_per_thousand(self) -> float:
        """The number of images broken for each 1,000 passes; judging an image is one pass, and a gradient another."""
        return 1000 * self.broken / max(1, self.forward + self.backward)


@dataclass
class SuiteState:
    """The state from which an interrupted suite continues.

    Attributes:
        suite: `repr` of the suite.
        clean_margins: (B,) success margins of the clean images, which differ for another detector. They are compared
            with a tolerance, because another device or batch size rounds them differently.
        best: (B, C, H, W) attacked images with the smallest success margins so far.
        margins: (B,) success margins of these images.
        records: records of the finished stages.
        eligible: (B,) whether the clean image is accepted under its true label; it is not saved.
        runs: number of runs, including this one.
        inputs: digest of each input, as `digests_of_inputs` makes them.
        precision: precision of the search, "float32" or "bf16"; None until it is chosen.
    """

    suite: str
    clean_margins: Tensor
    best: Tensor
    margins: Tensor
    records: list[StageRecord]
    eligible: Tensor
    runs: int = 1
    inputs: dict[str, str] = field(default_factory=dict)
    precision: Literal["float32", "bf16"] | None = None

    def save(self, path: str | Path, generator: Generator | None) -> None:
        """Write the state to a file, completely or not at all."""
        state = {
            "suite": self.suite,
            "clean_margins": self.clean_margins,
            "best": self.best,
            "margins": self.margins,
            "records": [asdict(record) for record in self.records],
            "generator": None if generator is None else generator.get_state(),
            "runs": self.runs,
            "inputs": self.inputs,
            "precision": self.precision,
        }
        save_progress(path, _KIND, state)

    def load(self, path: str | Path, generator: Generator | None) -> None:
        """Restore a state that `save` wrote for the same suite, detector, images and labels.

        Raises:
            ConfigurationError: the state belongs to another suite, another detector or other images.
            PersistenceError: the file is damaged, or is not the state of a suite.
        """
        again = f"delete {path} to begin the suite anew, or choose another checkpoint"
        progress = read_progress(path, _KIND, hint=again, device=self.best.device)
        if progress is None:
            return
        state = progress.state
        if set(state) - _OPTIONAL_KEYS != _KEYS or not _is_state(state):
            raise PersistenceError(f"{path} holds no state of a suite; {again}")
        clean = state["clean_margins"]
        if state["suite"] != self.suite or state["best"].shape != self.best.shape:
            raise ConfigurationError(
                f"{path} belongs to {state['suite'][:200]} on {len(clean)} images; use another checkpoint"
            )
        noted = state.get("inputs", self.inputs)
        changed = [name for name in {**self.inputs, **noted} if noted.get(name) != self.inputs.get(name)]
        if changed:
            raise ConfigurationError(
                f"{path} belongs to a run with other {' and '.join(changed)}; use the same, or another checkpoint"
            )
        if not torch.allclose(clean.to(self.clean_margins), self.clean_margins, rtol=1e-3, atol=1e-3):
            raise ConfigurationError(f"{path} belongs to another detector or other images; use another checkpoint")
        if generator is not None and state["generator"] is not None:
            try:
                generator.set_state(state["generator"].cpu())
            except (RuntimeError, TypeError) as error:
                raise PersistenceError(
                    f"{path} holds another generator's state ({in_one_line(error)}); {again}"
                ) from error
        self.best, self.margins = state["best"], state["margins"]
        self.records = [StageRecord(**record) for record in state["records"]]
        self.runs, self.precision = state["runs"] + 1, state.get("precision")


def digests_of_inputs(
    detector: object, inputs: Mapping[str, Any], *, surrogates: Sequence[Detector] = ()
) -> dict[str, str]:
    """Digests of a suite's inputs, and of the weights and thresholds of detectors that are modules.

    Args:
        detector: detector that the suite attacks.
        inputs: tensors, tuples of tensors and None, by name.
        surrogates: detectors whose adversarial images the suite tries.

    Returns:
        A digest by name, which does not depend on the device.
    """
    digests = {name: digest_of(value) for name, value in inputs.items()}
    named = {"the detector": detector, **{f"surrogate {index + 1}": one for index, one in enumerate(surrogates)}}
    for name, one in named.items():
        if isinstance(one, nn.Module):
            tensors = {**dict(one.named_parameters()), **dict(one.named_buffers())}
            weights = [tensor for tensor in tensors.values() if tensor.is_floating_point()]  # others may be counters
            with suppress(RuntimeError, TypeError):  # of sparse weights, for instance; the margins stand for them
                digests[f"weights of {name}"] = digest_of(weights)
    return digests


def _is_state(state: dict[str, Any]) -> bool:
    """Whether an archive has the types and shapes that `SuiteState.save` writes, no NaN margins and finite pixels."""
    clean, best, margins, generator = (state[name] for name in ("clean_margins", "best", "margins", "generator"))
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in (clean, best, margins)):
        return False
    if clean.ndim != 1 or margins.shape != clean.shape or best.ndim != 4 or len(best) != len(clean):
        return False
    if clean.isnan().any() or margins.isnan().any() or not best.isfinite().all():
        return False
    kinds = {"name": str, "attacked": int, "broken": int, "forward": int, "backward": int}
    return (
        isinstance(state["suite"], str)
        and type(state["runs"]) is int
        and (generator is None or isinstance(generator, Tensor))
        and isinstance(state.get("inputs", {}), dict)
        and state.get("precision") in (None, "float32", "bf16")
        and isinstance(state["records"], list)
        and all(
            isinstance(record, dict) and {k: type(v) for k, v in record.items()} == kinds for record in state["records"]
        )
    )
