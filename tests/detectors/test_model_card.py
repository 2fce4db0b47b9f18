import html
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from clusterguard import FGSM, Calibrator, ClusterGuard, WorstCaseSuite, evaluate
from clusterguard.detectors import CardDetails
from clusterguard.detectors._model_card import model_card
from clusterguard.errors import ConfigurationError
from markdown_it import MarkdownIt
from saving import bits, make_guard
from torch import nn


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_card_states_what_is_known_and_no_figure_else(tmp_path):
    guard = make_guard()
    guard.reset_calibration()
    guard.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "clusterguard"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license is None
    assert section(card.text, "Measured").strip() == "Not measured: no evaluation was handed in."
    assert section(card.text, "Training").strip() == "Not recorded."
    assert "until then no image is accepted" in section(card.text, "Thresholds")
    assert not any(
        character.isdigit() for title in ("Thresholds", "Measured") for character in section(card.text, title)
    )
    assert "prove nothing about others" in card.text
    assert "backbone=your_module" in card.text


def test_a_card_shows_the_calibration_and_the_evaluation_of_this_guard(small_guard, blobs, tmp_path, light_suites):
    labels = torch.cat([labels for _, labels in blobs])
    images = small_guard.head.centers.repeat(200, 1)  # a guard that is right on these "images"
    guard = ClusterGuard(nn.Flatten(), 3, representation_dim=6, example=images.view(-1, 1, 2, 3)).eval()
    with torch.no_grad():
        guard.encoder[-1].weight.copy_(10 * torch.eye(6))
        guard.encoder[-1].bias.zero_()
    loader = [((images / 10).view(-1, 1, 2, 3), labels)]
    calibration = Calibrator(0.05).fit(guard, loader)
    report = evaluate(guard, WorstCaseSuite("linf", eps=0.01, budget="quick"), loader, sanity_images=0)
    guard.save_pretrained(tmp_path, model_card_kwargs={"evaluation": report})  # as push_to_hub hands it over
    assert report.to_markdown() in (tmp_path / "README.md").read_text()
    guard.save_pretrained(tmp_path, evaluation=report)
    card = (tmp_path / "README.md").read_text()
    assert report.to_markdown() in card
    assert "rate of 0.05 on 600 benign images. 600 of these are classified correctly, 200 in the smallest" in card
    assert (
        ClusterGuard.from_pretrained(tmp_path, backbone=nn.Flatten(), example=loader[0][0]).calibration == calibration
    )
    weight = guard.encoder[-1].weight.data
    weight[0, 0] += 1
    with pytest.raises(ConfigurationError, match="expected an evaluation of this guard's weights"):
        guard.save_pretrained(tmp_path, evaluation=report)
    with pytest.warns(UserWarning, match="weights have changed since the thresholds were fitted"):
        evaluate(guard, FGSM(eps=0.01), loader, sanity_images=0)
    weight[0, 0] -= 1
    guard.thresholds = guard.thresholds + 1  # neither the record nor the report is about these
    with pytest.raises(ConfigurationError, match="evaluate it again"):
        guard.save_pretrained(tmp_path, evaluation=report)
    guard.save_pretrained(tmp_path)
    assert "nothing is known of their false-positive rate" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] is None


def test_a_card_says_what_its_publisher_knows(tmp_path):
    guard, folder = make_guard(), tmp_path / "guard"
    details = CardDetails(licence="apache-2.0", imports="from saving import network", backbone="network()")
    guard.save_pretrained(folder, card=details)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert "apache-2.0" in section(card.text, "Licence")
    assert "None is stated" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names = {"images": torch.rand(2, 3, 2, 2)}
    exec(code.replace("this folder or id", str(folder)), names)
    assert bits(names["guard"]) == bits(guard)
    assert len(names["labels"]) == 2
    config = json.loads((folder / "config.json").read_text())
    guard.save_pretrained(folder)
    again = json.loads((folder / "config.json").read_text())
    changed = {name for name in config if again[name] != config[name]}
    assert changed == {"card_sha256", "content_sha256"}  # else the format knows nothing of it


def test_each_detail_of_a_card_may_be_left_out(tmp_path):
    make_guard().save_pretrained(tmp_path)
    plain = (tmp_path / "README.md").read_text()
    make_guard().save_pretrained(tmp_path, card=CardDetails())
    assert (tmp_path / "README.md").read_text() == plain
    make_guard().save_pretrained(tmp_path, card=CardDetails(backbone="network()"))
    assert (tmp_path / "README.md").read_text() == plain.replace("your_module", "network()")


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"licence": "mit\nlibrary_name: other"}, "licence"),
        ({"licence": "MIT License"}, "'mit'"),
        ({"licence": ""}, "licence"),
        ({"backbone": "network("}, "expression"),
        ({"backbone": "x = 1"}, "expression"),
        ({"backbone": "network()), print(1"}, "expression"),
        ({"backbone": "network()  # my own"}, "comment"),
        ({"backbone": "len('```')"}, "```"),
        ({"imports": "import"}, "Python"),
        ({"imports": "x = '```'", "backbone": "x"}, "```"),
        ({"imports": "from saving import network"}, "backbone"),
    ],
)
def test_details_that_would_spoil_a_card_are_refused(details, message):
    with pytest.raises(ConfigurationError, match=message):
        CardDetails(**details)


def test_a_guard_is_pushed_to_the_hub_with_its_card(monkeypatch):
    pushed = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> object:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return repo_id

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    guard = make_guard()
    assert isinstance(guard, huggingface_hub.ModelHubMixin)
    details = {"card": CardDetails(licence="mit")}
    assert guard.push_to_hub("someone/guard", config={"epochs": 3}, model_card_kwargs=details) == "someone/guard"
    assert set(pushed) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(pushed["config.json"])["training"] == {"epochs": 3}
    assert b"\nlicense: mit\n" in pushed["README.md"]


def test_no_name_on_a_card_is_markup():
    name, head = "a`b\n# c <i>", "of *mine* | <b>"
    config = {
        "backbone": {"source": "timm", "name": name, "arguments": {"act": "```\n<u>"}},
        "guard": {"num_classes": 2, "head": {"description": head}, "dtype": "float32", "class_names": ["```", "<s>"]},
        "training": {"note": "```\n<hr>"},
        "versions": {},
    }
    page = MarkdownIt("commonmark").render(model_card(config, calibrated=False).split("---", 2)[2])
    assert page.count("<h1>") == 1
    assert not re.findall("<(?:i|b|u|s|hr|em)>", page)
    text = html.unescape(page)
    for piece in ("<code>a`b # c <i></code>", '<code>{"act": "```\\n<u>"}</code>', head, '["```", "<s>"]'):
        assert piece in text
