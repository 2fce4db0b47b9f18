"""Names of classes are taken from where they are known, and used wherever a class is named."""

from inspect import getattr_static

import pytest
import torch
from clusterguard import Calibrator, ClusterGuard, align, errors, evaluate
from clusterguard.detection._class_names import HasClassNames
from clusterguard.evaluation import to_html
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

NAMES = ["low", "middle", "high"]


class Folder(Dataset):
    """Like torchvision's ImageFolder."""

    def __init__(self, data, classes=NAMES):
        self.data, self.classes = data, classes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def nearest():
    """Knows the bands of the blobs."""
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.zero_()
        for index in range(3):
            layer.weight[index, 16 * index : 16 * index + 16] = 1
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize(
    "wrap", [Folder, lambda data: Subset(Folder(data), range(600)), lambda data: ConcatDataset([Folder(data)])]
)
@pytest.mark.parametrize("use", [lambda guard, loader: Calibrator(0.05).fit(guard, loader), align])
def test_a_data_set_tells_the_names(blobs, wrap, use):
    guard = ClusterGuard(nearest(), 3)
    use(guard, DataLoader(wrap(blobs.dataset), 100))
    assert guard.class_names == tuple(NAMES)


def test_python_3_12_finds_what_a_guard_must_have_to_learn_names():
    for name in HasClassNames.__annotations__:
        getattr_static(ClusterGuard(nearest(), 3), name)  # as isinstance looks a protocol's attributes up there


def test_names_that_are_set_or_do_not_fit_stay(blobs):
    for classes, own in ((["a", "b"], None), (NAMES, ("x", "y", "z")), ([0, 1, 2], None), (["a", "a", "b"], None)):
        guard = ClusterGuard(nearest(), 3, class_names=own)
        Calibrator(0.05).fit(guard, DataLoader(Folder(blobs.dataset, classes), 100))
        assert guard.class_names == own


def test_the_same_names_in_another_order_are_said(blobs):
    guard = ClusterGuard(nearest(), 3, class_names=["low", "high", "middle"])
    with pytest.warns(UserWarning, match="label 1 is 'middle' there and 'high' for the detector"):
        align(guard, DataLoader(Folder(blobs.dataset), 100))


def test_answers_and_reports_name_classes(blobs, tmp_path):
    guard = ClusterGuard(nearest(), 3)
    loader = DataLoader(Folder(blobs.dataset), 100)
    with pytest.raises(errors.ConfigurationError, match=r"set detector\.class_names to 3 names"):
        guard.name_labels(guard.detect(next(iter(loader))[0], check=False))
    Calibrator(0.05).fit(guard, loader)
    images, labels = next(iter(loader))
    detection = guard.detect(images)
    expected = [
        None if bad else NAMES[label] for label, bad in zip(detection.labels, detection.is_adversarial, strict=True)
    ]
    assert guard.name_labels(detection) == expected
    assert {*expected} == {None, *NAMES}
    evaluation = evaluate(
        guard, lambda detector, images, labels, generator=None: images, [(images, labels)], sanity_images=0
    )
    assert evaluation.to_dict()["class_names"] == NAMES
    to_html(evaluation, tmp_path / "report.html")
    assert "<td>middle</td>" in (tmp_path / "report.html").read_text()


def test_messages_name_classes(blobs, tmp_path):
    labels = blobs.dataset.tensors[1]
    few = Subset(Folder(blobs.dataset), [*range(100), *(i for i in range(100, 600) if labels[i] != 1)])
    guard = ClusterGuard(nearest(), 3)
    with pytest.raises(errors.TooFewCalibrationExamplesError, match=r"got class 1 \(middle\): 33; add examples"):
        Calibrator(0.01).check_counts(DataLoader(few, 100), 3, class_names=NAMES)
    with pytest.raises(errors.TooFewCalibrationExamplesError, match=r"got class 1 \(middle\): \d+; add"):
        Calibrator(0.01).fit(guard, DataLoader(few, 100))
    with pytest.warns(UserWarning, match=r"classes \['middle'\] have too few"):
        Calibrator(0.01, scarce="pool").fit(guard, DataLoader(few, 100))
    guard.save_pretrained(tmp_path)
    assert "Classes ['middle'] share a pooled" in (tmp_path / "README.md").read_text().replace("\\", "")
    none = DataLoader(Subset(Folder(blobs.dataset), [i for i in range(600) if labels[i] != 1]), 100)
    with pytest.raises(errors.InputError, match=r"got none of class 1 \(middle\)"):
        align(guard, none)
