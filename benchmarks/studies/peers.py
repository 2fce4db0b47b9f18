"""Attacks of other libraries, called peers, and our suite on one guard.

No peer should break an image that the suite did not.

`python -m benchmarks.studies.peers` takes the guard that `make demo` trains. `evaluate` judges the attacked images.
Results are written image by image to benchmarks/results/peers.json. An interrupted run resumes from there.
"""

import hashlib
import json
import platform
import time
import warnings
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from clusterguard import PGD, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.attacks import Attack, Towards, from_art, from_autoattack, from_foolbox, from_torchattacks, get_norm
from clusterguard.detection import Rate, Verdicts, is_broken
from clusterguard.samples import load_digits
from tqdm import tqdm

from benchmarks._support import write_atomically

PEERS_FILE = Path(__file__).parents[1] / "results" / "peers.json"
_PACKAGES = ("torch", "clusterguard", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "pyautoattack")
RADII = {"linf": 0.2, "l2": 2.0, "l1": 15.0, "l0": 25.0}
SUITE, PLAIN = "clusterguard WorstCaseSuite", "clusterguard PGD"


class Peer(NamedTuple):
    """An attack of another library, with settings that a determined user would take.

    Attributes:
        library: "torchattacks", "Foolbox" or "ART".
        attack: name of its class.
        options: arguments for the class.
        aimed: whether the attack can aim at a class. If so, it sees the guard as a classifier with one more class for
            refused images, and it tries all nine wrong classes. Otherwise it sees distances only, at the
            temperature where cross-entropy works best.
        starts: whether the attack has to begin at accepted images of other classes.
    """

    library: str
    attack: str
    options: dict[str, Any]
    aimed: bool = True
    starts: bool = False


ART_PGD = Peer("ART", "ProjectedGradientDescent", {"max_iter": 100})
ART_AUTO_PGD = Peer("ART", "AutoProjectedGradientDescent", {"max_iter": 50})
CARLINI_WAGNER = {"binary_search_steps": 5, "steps": 100, "stepsize": 0.05, "initial_const": 1.0}
ELASTIC_NET = {"binary_search_steps": 4, "steps": 100, "initial_stepsize": 0.05, "initial_const": 1.0}
PEERS = {
    "linf": [
        Peer("torchattacks", "PGD", {"eps": 0.2, "alpha": 0.02, "steps": 100}),
        Peer("torchattacks", "APGD", {"eps": 0.2, "steps": 100}, aimed=False),
        Peer("torchattacks", "FAB", {"eps": 0.2, "steps": 50}, aimed=False),
        Peer("torchattacks", "Square", {"eps": 0.2, "n_queries": 1000}),
        Peer("torchattacks", "AutoAttack", {"eps": 0.2}, aimed=False),
        Peer("Foolbox", "LinfPGD", {"steps": 100}),
        Peer("Foolbox", "LInfFMNAttack", {"steps": 100}),
        ART_PGD,
        ART_AUTO_PGD,
        Peer("ART", "SquareAttack", {"max_iter": 1000}, aimed=False),
    ],
    "l2": [
        Peer("torchattacks", "PGDL2", {"eps": 2.0, "alpha": 0.2, "steps": 100}),
        Peer("torchattacks", "CW", {"c": 10, "lr": 0.05, "steps": 200}),
        Peer("torchattacks", "AutoAttack", {"norm": "L2", "eps": 2.0}, aimed=False),
        Peer("Foolbox", "L2PGD", {"steps": 100}),
        Peer("Foolbox", "L2CarliniWagnerAttack", CARLINI_WAGNER),
        Peer("Foolbox", "DDNAttack", {"steps": 100}),
        Peer("Foolbox", "L2FMNAttack", {"steps": 100}),
        Peer("Foolbox", "BoundaryAttack", {"steps": 1000}, starts=True),
        Peer("Foolbox", "HopSkipJumpAttack", {"steps": 10, "max_gradient_eval_steps": 200}, starts=True),
        ART_PGD,
        ART_AUTO_PGD,
    ],
    "l1": [
        Peer("Foolbox", "L1PGD", {"steps": 100}),
        Peer("Foolbox", "SparseL1DescentAttack", {"steps": 100}),
        Peer("Foolbox", "L1FMNAttack", {"steps": 100}),
        Peer("Foolbox", "EADAttack", ELASTIC_NET),
        ART_PGD,
    ],
    "l0": [
        Peer("torchattacks", "JSMA", {"theta": 1.0, "gamma": 25 / 784}),
        Peer("torchattacks", "OnePixel", {"pixels": 25, "steps": 10, "popsize": 10}),
        Peer("torchattacks", "Pixle", {"max_iterations": 20, "restarts": 10}, aimed=False),
        Peer("Foolbox", "L0FMNAttack", {"steps": 100}),
    ],
}


def build_peer(peer: Peer, norm: str, references: Towards) -> Attack:
    """Wrap a peer so that it can be called like an attack of clusterguard.

    Args:
        peer: attack of another library.
        norm: name of the norm. `RADII` has its radius.
        references: accepted images that some attacks begin at.
    """
    budget: dict[str, Any] = {"norm": norm, "eps": RADII[norm]}
    if peer.library == "Foolbox":
        attack = getattr(import_module("foolbox.attacks"), peer.attack)(**peer.options)
        return from_foolbox(attack, rejecting=peer.aimed, references=references if peer.starts else None, **budget)
    if peer.library == "torchattacks":
        factory = partial(getattr(import_module("torchattacks"), peer.attack), **peer.options)
        return replace(from_torchattacks(factory, rejecting=peer.aimed, **budget), temperature=0.3)
    options: dict[str, Any] = {"verbose": False}
    if not get_norm(norm).grain:
        options |= {"norm": get_norm(norm).order, "eps": RADII[norm]}
    if "PGD" in peer.attack or "ProjectedGradient" in peer.attack:
        options["eps_step"] = RADII[norm] / 10
    factory = partial(getattr(import_module("art.attacks.evasion"), peer.attack), **options, **peer.options)
    return replace(from_art(factory, rejecting=peer.aimed, **budget), temperature=0.3)


def build_all(norm: str, references: Towards) -> dict[str, Attack]:
    """Make our suite, our PGD and all peers for one norm, by name."""
    eps = RADII[norm]
    step_size = get_norm(norm).step_size(eps, (1, 28, 28), share=0.1)
    attacks: dict[str, Attack] = {
        SUITE: WorstCaseSuite(norm, eps=eps, references=(references.images, references.labels)),
        PLAIN: PGD(norm=norm, eps=eps, step_size=step_size, steps=100),
    }
    attacks |= {f"{peer.library} {peer.attack}": build_peer(peer, norm, references) for peer in PEERS[norm]}
    if not get_norm(norm).grain:
        attacks["AutoAttack"] = replace(from_autoattack(norm=norm, eps=eps), temperature=0.3)
    return attacks


def list_attacks(results: dict[str, dict[str, Any]]) -> str:
    """The attacks of one norm as rows of Markdown, the strongest attack first.

    The columns are the success rate, the number of broken images that the suite missed, and the seconds.
    """
    suite = set(results[SUITE]["broken"])
    lines = []
    for name, result in sorted(results.items(), key=lambda item: -len(item[1]["broken"])):
        missed = len(set(result["broken"]) - suite)
        lines.append(
            f"| {name} | {Rate(len(result['broken']), result['images'])} | {missed} | {result['seconds']:.0f} |"
        )
    return "\n".join(lines)


def summarise_peers(norms: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row of Markdown for each norm.

    The columns are our PGD, the strongest peer, our suite, and the number of images that only peers broke.
    """
    lines = []
    for norm, results in norms.items():
        peers = {name: result for name, result in results.items() if name not in (SUITE, PLAIN)}
        strongest = max(peers, key=lambda name: len(peers[name]["broken"]))
        missed = {row for result in peers.values() for row in result["broken"]} - set(results[SUITE]["broken"])
        cells = [f"{norm.replace('l', 'ℓ').replace('inf', '∞')} {RADII[norm]:g}"]
        for name in (PLAIN, strongest, SUITE):
            rate = Rate(len(results[name]["broken"]), results[name]["images"])
            low, high = rate.interval
            cells.append(f"{rate.value:.2f} [{low:.2f}, {high:.2f}]" + (f" {name}" if name == strongest else ""))
        lines.append("| " + " | ".join([*cells, str(len(missed))]) + " |")
    return "\n".join(lines)


def main(
    guard: Annotated[Path, typer.Option(help="Folder of the guard that `make demo` has trained.")] = Path(
        "runs/demo/guard"
    ),
    images: Annotated[int, typer.Option(help="How many accepted test images to attack.", min=1)] = 100,
    only: Annotated[str, typer.Option(help="Norms to run, such as 'l0'.")] = "*",
    output: Annotated[Path, typer.Option(help="The JSON file.")] = PEERS_FILE,
) -> None:
    """Run every peer and our suite on the demo's guard, norm by norm."""
    torch.set_num_threads(1)
    detector = ClusterGuard.from_pretrained(guard)
    pictures, labels = load_digits("test").tensors
    verdict = detector.detect(pictures)
    accepted = ((verdict.labels == labels) & ~verdict.is_adversarial).nonzero().squeeze(1)
    attacked, rest = accepted[:images], accepted[images:]
    references = Towards.accepted(detector, pictures[rest], labels[rest])
    setting = {
        "guard": hashlib.sha256((guard / "model.safetensors").read_bytes()).hexdigest(),
        "images": images,
        "references": len(references.labels),
        "seed": 0,
        "versions": {package: version(package) for package in _PACKAGES},
    }
    content: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if content.get("setting") != setting:
        content = {"setting": setting, "machine": f"{platform.machine()}, 1 thread", "norms": {}}
    for norm in (norm for norm in PEERS if fnmatch(norm, only)):
        results = content["norms"].setdefault(norm, {})
        named = build_all(norm, references)
        for name, attack in (bar := tqdm([item for item in named.items() if item[0] not in results], desc=norm)):
            bar.set_postfix_str(name)
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of the peers
                report = evaluate(
                    detector,
                    {name: attack},
                    [(pictures[attacked], labels[attacked])],
                    generator=torch.Generator().manual_seed(0),
                    sanity_images=0,
                )
            (result,) = report.results
            results[name] = {
                "attack": result.attack,
                "eps": RADII[norm],
                "images": len(attacked),
                "broken": attacked[is_broken(Verdicts(result.verdict, labels[attacked]))].tolist(),
                "invalid": result.invalid,
                "seconds": round(time.perf_counter() - started, 1),
            }
            write_atomically(output, lambda file: file.write_text(json.dumps(content, indent=1) + "\n"))
        print(f"\n{norm} {RADII[norm]:g}\n{list_attacks(results)}")
    print(f"\n{summarise_peers(content['norms'])}")


if __name__ == "__main__":
    typer.run(main)
