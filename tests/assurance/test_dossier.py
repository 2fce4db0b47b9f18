"""What the evidence holds: the figures that were measured, each shown once, escaped, and the same each time."""

import copy
import hashlib
import html
import json
import platform
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from clusterguard import FGSM, Calibrator, ClusterGuard, align, evaluate
from clusterguard.assurance import FailureCheck, assemble_dossier, check_failing_closed
from clusterguard.assurance._frameworks import AI_ACT, ATLAS, ISO_24029, NIST
from clusterguard.detection import Rate, judge
from clusterguard.errors import ConfigurationError, PersistenceError
from clusterguard.evaluation import CertifiedBound
from clusterguard.evaluation._internal import to_json_value
from torch import nn

HOSTILE = "<script>alert('1')</script> & \""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A guard of three classes, each a bright band of the image, with all that is measured of it."""
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    images = torch.rand(120, 1, 8, 8) * 0.3
    for index in range(3):
        images[labels == index, :, 2 * index : 2 * index + 2] += 0.6
    labelled, folder = [(images[:60], labels[:60]), (images[60:], labels[60:])], tmp_path_factory.mktemp("guard")
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), 3, representation_dim=6).eval()
    guard.class_names = [HOSTILE, "two", "three"]
    align(guard, labelled)
    Calibrator(0.2).fit(guard, labelled)
    guard.save_pretrained(folder, training={"attack": repr(FGSM(eps=0.1)), "note": HOSTILE})
    attacks = {HOSTILE: FGSM(eps=0.1)}
    result = evaluate(guard, attacks, labelled, generator=torch.Generator().manual_seed(3), sanity_images=5)
    return guard, folder, result, judge(guard, labelled)


class Page(HTMLParser):
    """The tags, anchors and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.anchors |= {value for name, value in attrs if name == "id"}
        self.links += [value for name, value in attrs if name in ("href", "src")]


def test_page_and_json_have_the_same_content_and_the_page_loads_nothing(measured, tmp_path):
    dossier = assemble_dossier(*measured, purpose=HOSTILE)
    dossier.write(tmp_path / "out")
    text, told = ((tmp_path / "out" / f"evidence.{kind}").read_text() for kind in ("html", "json"))
    assert html.escape(told) in text
    assert json.loads(told, parse_constant=pytest.fail) == dossier.content
    page = Page(text)
    assert {link[1:] for link in page.links} <= page.anchors
    assert {link[0] for link in page.links} == {"#"}
    assert "script" not in page.tags
    assert text.count(html.escape(HOSTILE)) > 5  # purpose, class, attack, and the record of the training


def test_every_figure_is_that_of_the_evaluation(measured):
    guard, folder, result, benign = measured
    content = assemble_dossier(guard, folder, result, benign).content
    told, expected = content["attacks"]["results"][0], to_json_value(result)["results"][0]
    assert {name: told[name] for name in ("success", "cost", "expected_roc_auc")} == {
        name: expected[name] for name in ("success", "cost", "expected_roc_auc")
    }
    assert "seconds" not in told
    record = guard.calibration
    rates = [row["realised"]["calibration"]["value"] for row in content["thresholds"]["by_class"]]
    assert rates == pytest.approx(record.realised_rates)
    assert content["benign"]["images"] == len(benign)
    assert content["figures"]["attack success"]["text"] == f"{HOSTILE}: {result.results[0].success}"


def test_it_holds_no_place_no_machine_and_no_time_and_is_always_the_same(measured, tmp_path):
    guard, folder, result, benign = measured
    first = assemble_dossier(guard, folder, result, benign)
    later = replace(result, results=tuple(replace(one, seconds=1e6, runs=7) for one in result.results))
    again = assemble_dossier(guard, shutil.copytree(folder, tmp_path / "elsewhere"), later, benign)
    assert (first.page, first.content, first.bill) == (again.page, again.content, again.bill)
    for word in (str(tmp_path), str(ROOT), platform.node()):
        assert word not in first.page + json.dumps(first.bill)
    assert not re.search(r"\d\d:\d\d:\d\d", first.page)


def test_what_was_not_measured_says_so(measured, tmp_path):
    guard, _, result, benign = measured
    guard = copy.deepcopy(guard)
    guard.thresholds = guard.thresholds + 1.0  # by hand, so that no calibration describes them
    bare = replace(result, sanity=None, thresholds=tuple(guard.thresholds.tolist()))
    guard.save_pretrained(tmp_path)
    dossier = assemble_dossier(guard, tmp_path, bare, benign)
    content = dossier.content
    assert (content["certificate"], content["monitoring"], content["failure"]["checks"]) == (None, None, [])
    assert content["thresholds"]["guarantee"].startswith("None is known")
    for line in (line for name in ("ai_act", "iso_24029", "atlas", "threat_model") for line in content[name]):
        assert bool(line["section"]) is (line["figure"] != "not measured")
    proof = [line for line in content["iso_24029"] if line["reference"].startswith("24029-2, 5.3")]
    assert proof[0]["figure"] == "not measured"
    assert "clusterguard evidence --certify" in dossier.page


def test_lines_of_frameworks_name_figures_that_there_are(measured):
    guard, folder, result, benign = measured
    whole = replace(result, certified=CertifiedBound(0.1, Rate(1, 2)))
    checks = check_failing_closed(guard, torch.rand(2, 1, 8, 8), folder)
    dossier = assemble_dossier(guard, folder, whole, benign, checks=checks, settings={"budget": "quick"})
    known = {*dossier.content["figures"], "gradient attacks", "gradient-free attacks"}  # those two are of suites
    assert {line.figure for line in (*NIST, *ATLAS, *AI_ACT, *ISO_24029) if line.figure} <= known
    assert dossier.content["figures"]["failing closed"]["text"] == f"{len(checks)} of {len(checks)} checks hold"
    assert "breaks more than 0.500" in dossier.content["figures"]["certificate"]["text"]


def test_a_guard_that_fails_open_is_shown_to(measured):
    checks = [FailureCheck("a <pixel>", "an error", False, "tests/none.py")]
    page = assemble_dossier(*measured, checks=checks).page
    assert "It does not fail closed: a &lt;pixel&gt;." in page
    assert "DOES NOT HOLD" in page


def test_evidence_of_another_guard_is_refused(measured, tmp_path):
    guard, folder, result, benign = measured
    with pytest.raises(ConfigurationError, match="at this guard's thresholds"):
        assemble_dossier(guard, folder, replace(result, thresholds=(1.0, 1.0, 1.0)), benign)
    with pytest.raises(ConfigurationError, match="types that JSON has"):
        assemble_dossier(guard, folder, result, benign, settings={"folder": tmp_path})
    with pytest.raises(PersistenceError, match="found none"):
        assemble_dossier(guard, tmp_path, result, benign)
    again = copy.deepcopy(guard)
    again.thresholds = again.thresholds + 1  # as if it was calibrated again while this one was attacked
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ConfigurationError, match="again with other weights or thresholds"):
        assemble_dossier(guard, tmp_path / "again", result, benign)
    with pytest.raises(ConfigurationError, match="run_length"):
        assemble_dossier(guard, folder, result, benign, run_length=1)


def test_files_belong_together_or_there_are_no_sums(measured, tmp_path, monkeypatch):
    dossier, out = assemble_dossier(*measured), tmp_path / "out"
    dossier.write(out)
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert {*sums} == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())

    write = Path.write_bytes

    def fill_the_disk(file: Path, content: bytes) -> int:
        if file.name == "evidence.json":
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(PersistenceError, match="could not be written"):
        dossier.write(out)
    assert {path.name for path in out.iterdir()} == {*sums}  # whole files, old or new, and no sums


def test_the_bill_of_materials_is_one(measured):
    dossier = assemble_dossier(*measured)
    bill, guard = dossier.bill, dossier.bill["metadata"]["component"]
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert {"timestamp", "serialNumber"}.isdisjoint({*bill, *bill["metadata"]})
    assert guard["hashes"] == [{"alg": "SHA-256", "content": dossier.content["provenance"]["weights_sha256"]}]
    references = [guard["bom-ref"], *(part["bom-ref"] for part in bill["components"])]
    assert len({*references}) == len(references)
    assert [line["ref"] for line in bill["dependencies"]] == references
    assert {one for line in bill["dependencies"] for one in line["dependsOn"]} == {*references[1:]}
    assert {"clusterguard", "torch", "timm", "numpy"} <= {part["name"] for part in bill["components"]}
    assert not {"pytest", "mkdocs", "matplotlib"} & {part["name"] for part in bill["components"]}
    assert all(part["licenses"] for part in bill["components"])
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9-]+@[^+\s]+", part["purl"]) for part in bill["components"])
