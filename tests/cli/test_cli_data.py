import shutil

import clusterguard
import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.cli._classifiers import make_backbone
from clusterguard.cli._demo import run_demo
from clusterguard.cli._pictures import Pictures, load_part, sample
from clusterguard.cli._runs import begin_run
from clusterguard.errors import ConfigurationError, InputError, PersistenceError
from PIL import Image


def test_a_folder_is_split_into_parts_that_are_disjoint_complete_and_stay_when_images_come(photos, tmp_path):
    def paths(folder):
        parts = {
            part: load_part(str(folder), part, image_size=8, channels=1, seed=3)
            for part in ("train", "calibration", "test")
        }
        return {
            part: {path.removeprefix(str(folder)) for path, _ in pictures.items.samples}
            for part, pictures in parts.items()
        }

    before = paths(photos)
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 3 * 120
    assert 0.5 < len(before["train"]) / 360 < 0.7
    more = shutil.copytree(photos, tmp_path / "more")
    shutil.copy(more / "0" / "0.png", more / "0" / "new.png")
    after = paths(more)
    assert all(before[part] <= after[part] for part in before)


def test_a_folder_with_parts_is_taken_as_it_is(photos, tmp_path):
    for part in ("train", "calibration"):
        shutil.copytree(photos, tmp_path / part)
    train = load_part(str(tmp_path), "train", image_size=8, channels=3, seed=0)
    assert (len(train), train.classes, train[0][0].shape) == (360, ("0", "1", "7"), (3, 8, 8))
    with pytest.raises(InputError, match="test"):
        load_part(str(tmp_path), "test", image_size=8, channels=3, seed=0)


def test_a_file_that_is_no_image_is_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "train")
    (tmp_path / "train" / "7" / "0.png").write_bytes((photos / "7" / "0.png").read_bytes()[:-40])
    pictures = load_part(str(tmp_path), "train", image_size=8, channels=1, seed=0)
    with pytest.raises(InputError, match=r"7/0\.png: it is cut off|7/0\.png, which cannot be read"):
        list(pictures)


def test_images_of_a_folder_are_read_as_people_see_them(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        stored = Image.new("L", (8, 8))
        stored.paste(255, (0, 0, 8, 4))  # bright above, and to the right once it is turned
        exif = Image.Exif()
        exif[0x0112] = 6
        stored.save(tmp_path / "train" / kind / "1.png", exif=exif)
    image, _ = load_part(str(tmp_path), "train", image_size=8, channels=1, seed=0)[0]
    assert (image[0, :, :4].max(), image[0, :, 4:].min()) == (0, 1)


def test_images_come_in_the_size_and_channels_that_are_asked_for():
    image, label = load_part("digits", "test", image_size=20, channels=3, seed=0)[0]
    exact, _ = load_part("digits", "test", image_size=28, channels=1, seed=0)[0]
    assert (image.shape, image.dtype, type(label)) == ((3, 20, 20), torch.float32, int)
    assert torch.equal(exact, clusterguard.samples.load_digits("test").tensors[0][0])


def test_a_sample_is_of_all_classes_and_always_the_same():
    pictures = Pictures([(index, index // 100) for index in range(300)], "abc", lambda index: torch.tensor([index]))
    first, again = sample(pictures, 50, seed=1), sample(pictures, 50, seed=1)
    assert first.indices == again.indices
    assert len(set(first.indices)) == 50
    assert {label for _, label in first} == {0, 1, 2}
    assert len(sample(pictures, 1000, seed=1)) == 300


def test_backbones_of_torchvision_are_found_by_name():
    network = make_backbone("torchvision:resnet18", num_classes=4, channels=3, pretrained=False)
    assert ClusterGuard(network, num_classes=4).num_classes == 4
    with pytest.raises(ConfigurationError, match="got 'fasterrcnn_resnet50_fpn'"):
        make_backbone("torchvision:fasterrcnn_resnet50_fpn", num_classes=4, channels=3, pretrained=False)


@pytest.mark.parametrize("name", ["notes.txt", "training.json", "model.safetensors"])
def test_a_training_begins_in_no_folder_of_another_program(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(PersistenceError, match=rf"{name}.* choose another folder"):
        begin_run(tmp_path, {"calibrator": "Calibrator()"}, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_training_begins_in_a_new_folder_and_again_where_one_was_stopped_at_once(tmp_path):
    begin_run(tmp_path / "new", {"calibrator": "Calibrator(0.1)"}, resume=False)
    (tmp_path / ".DS_Store").touch()
    shutil.rmtree(tmp_path / "new")
    for rate in (0.1, 0.2):
        begin_run(tmp_path, {"calibrator": f"Calibrator({rate})"}, resume=False)
        (tmp_path / "summary.txt").touch()
    assert "0.2" in (tmp_path / "training.json").read_text()


def test_options_of_another_training_are_named_without_those_that_agree(tmp_path):
    begin_run(tmp_path, {"attack": "PGD(norm='linf', eps=0.1, steps=4)", "batch_size": 8}, resume=False)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ConfigurationError, match=r"training\.json: attack eps=0\.1 \(got eps=0\.2\); use these"):
        begin_run(tmp_path, {"attack": "PGD(norm='linf', eps=0.2, steps=4)", "batch_size": 8}, resume=True)
    with pytest.raises(ConfigurationError, match=r"attack PGD\(.*\) \(got None\); batch_size 8 \(got 9\); use"):
        begin_run(tmp_path, {"attack": None, "batch_size": 9}, resume=True)


def test_the_demo_writes_to_no_folder_of_another_program(tmp_path):
    (tmp_path / "report.json").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PersistenceError, match=r"got .* with 'notes\.txt' in it; choose another folder"):
        run_demo(tmp_path)
    with pytest.raises(PersistenceError, match="expected a folder, got the file"):
        run_demo(tmp_path / "notes.txt")
