import json
from pathlib import Path

import pytest

pytest.importorskip("foolbox")

from benchmarks.studies.peers import PEERS, PEERS_FILE, RADII, SUITE, list_attacks, summarise_peers

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def measured():
    return json.loads(PEERS_FILE.read_text())["norms"]


def test_the_page_shows_what_was_measured(measured):
    assert summarise_peers(measured) in DOCS.read_text()


def test_every_peer_was_measured_and_none_broke_what_the_suite_did_not(measured):
    assert set(measured) == set(RADII)
    for norm, results in measured.items():
        assert {f"{peer.library} {peer.attack}" for peer in PEERS[norm]} < set(results)
        suite = set(results[SUITE]["broken"])
        assert all(suite.issuperset(result["broken"]) for result in results.values())


def test_what_only_a_peer_broke_is_counted():
    result = {"images": 4, "seconds": 1.0}
    results = {
        SUITE: {"broken": [1], **result},
        "clusterguard PGD": {"broken": [], **result},
        "Foolbox X": {"broken": [1, 3], **result},
        "Foolbox Y": {"broken": [3], **result},
    }
    assert summarise_peers({"l2": results}).endswith("0.50 [0.15, 0.85] Foolbox X | 0.25 [0.05, 0.70] | 1 |")
    assert "| Foolbox X | 0.500 [0.150, 0.850] (2/4) | 1 | 1 |" in list_attacks(results)
