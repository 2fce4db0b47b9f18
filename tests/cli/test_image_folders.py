"""Folders as people have them: parts, classes, what does not count, and copies."""

import itertools
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from clusterguard.cli._image_folders import digests_by_class, find_copies, open_folder, summarise
from clusterguard.cli._pictures import describe_unreadable, load_part
from clusterguard.errors import InputError
from PIL import Image

OPTIONS = {"image_size": 8, "channels": 1, "seed": 0}
PARTS = ("train", "calibration", "test")
_numbers = itertools.count()


def picture(number=None):
    """One that no other call makes, unless the number is given."""
    seed = next(_numbers) if number is None else 10**6 + number
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def fill(root, *folders, count=3, suffix=".png", kind=None):
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture().save(root / folder / f"{index}{suffix}", kind)
    return root


def paths(root, part, seed=0):
    samples = load_part(str(root), part, **OPTIONS | {"seed": seed}).items.samples
    return {os.path.relpath(path, root) for path, _ in samples}


def look(root):
    told = []
    return summarise(open_folder(root, 0), say=told.append), "\n".join(told)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "calibration", "test"),
        ("Train", "Val", "TEST"),
        ("training", "validation", "testing"),
        ("TRAINING", "valid", "eval"),
        ("train", "dev", "Evaluation"),
        ("training_set", "validation-set", "Test_Set"),
        ("train_data", "val_data", "test_data"),
        ("TrainSet", "ValSet", "TestSet"),
        ("train-images", "calibration-images", "test-images"),
        ("01_train", "02_val", "03_test"),
        ("trn", "vld", "tst"),
        ("train2017", "val2017", "test2017"),
        ("images.train", "Data Dev", "dataset-evaluation_split"),
        ("train_rgb", "val_rgb", "Test_RGB"),
        ("coco train v2", "coco val v2", "coco test v2"),
    ],
)
def test_parts_have_their_usual_names_in_any_case(tmp_path, names):
    fill(tmp_path, *(f"{part}/{kind}" for part in names for kind in ("cat", "dog")))
    for part, name in zip(PARTS, names, strict=True):
        loaded = load_part(str(tmp_path), part, **OPTIONS)
        assert loaded.classes == ("cat", "dog")
        assert {Path(path).parts[0] for path in paths(tmp_path, part)} == {name}


def test_classes_may_be_called_like_parts(tmp_path):
    fill(tmp_path / "direct", "train", "plane", "test", "Val", count=40)
    assert load_part(str(tmp_path / "direct"), "train", **OPTIONS).classes == ("Val", "plane", "test", "train")
    fill(tmp_path / "parts", "train/train", "train/plane", "val/train", "val/plane")
    assert load_part(str(tmp_path / "parts"), "calibration", **OPTIONS).classes == ("plane", "train")
    assert len(load_part(str(tmp_path / "parts"), "train", **OPTIONS)) == 6


def test_images_of_a_class_may_lie_deeper(tmp_path):
    fill(tmp_path, "cat/2023/may", "cat", "dog/2024", count=60)
    train = load_part(str(tmp_path), "train", **OPTIONS)
    assert train.classes == ("cat", "dog")
    assert sum(len(load_part(str(tmp_path), part, **OPTIONS)) for part in PARTS) == 180


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/cat", "val/cat", "calibration/cat"), "one folder for calibration .* got calibration and val"),
        (("train/cat", "Train/cat"), "one folder for train"),
        (("train/steam", "train/diesel", "plane"), "got both: train .* beside plane"),
        (("train/cat", "train"), "got both: move"),
        (("photos/cat", "photos/dog"), "photos alone; pass .*photos instead"),
        (("photos/train/cat", "photos/test/cat"), "photos alone; pass .*photos instead"),
        (("train_1/cat", "train_2/cat"), "one folder for train .* got train_1 and train_2"),
        (("train_data/cat", "extra/cat"), "got both: train_data .* beside extra"),
        (("known/cat", "known/dog", "new/cat", "new/dog"), r"known and new, .*\(cat, dog\); .*rename them to train"),
        (("trainval/cat", "trainval/dog", "b/cat", "b/dog", "c/cat"), "b and trainval, .*rename them to train"),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test"),
            r"cat and dog, .*\(test, train\); .*are classes, move",
        ),
    ],
)
def test_what_may_mean_two_things_is_refused(tmp_path, folders, message):
    fill(tmp_path, *folders)
    with pytest.raises(InputError, match=message):
        load_part(str(tmp_path), "train", **OPTIONS)


def test_names_in_which_a_part_is_only_a_piece_are_classes(tmp_path):
    names = ("trainer", "contest", "devil", "medieval", "train_station", "set", "test_pattern", "latest", "01")
    fill(tmp_path, *(f"{name}/{name} of {year}" for name in names for year in (2023, 2024)), count=20)
    assert load_part(str(tmp_path), "train", **OPTIONS).classes == tuple(sorted(names))


def test_classes_may_each_hold_one_folder_or_images_beside_folders(tmp_path):
    fill(tmp_path / "one", "cat/images", "dog/images", count=40)
    fill(tmp_path / "beside", "cat", "cat/new", "cat/old", "dog", "dog/new", "dog/old", count=40)
    (tmp_path / "one" / "cat" / "empty").mkdir()
    for name in ("one", "beside"):
        assert load_part(str(tmp_path / name), "train", **OPTIONS).classes == ("cat", "dog")


def test_missing_parts_and_empty_classes_are_named(tmp_path):
    fill(tmp_path, "train/cat", "train/dog", "val/cat")
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(InputError, match="no image of dog"):
        load_part(str(tmp_path), "calibration", **OPTIONS)
    with pytest.raises(InputError, match=r"test, testing, tst, eval"):
        load_part(str(tmp_path), "test", **OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image of any class"):
        load_part(str(tmp_path / "empty"), "train", **OPTIONS)
    fill(tmp_path / "flat", "", count=2)
    with pytest.raises(InputError, match="2 images lie directly in the folder"):
        load_part(str(tmp_path / "flat"), "train", **OPTIONS)


def test_hidden_and_foreign_files_do_not_count_and_are_counted(tmp_path):
    fill(tmp_path, "cat", "dog", count=40)
    clean = [paths(tmp_path, part) for part in PARTS]
    for folder in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX/cat", "dog/@eaDir"):
        fill(tmp_path, folder, count=5)
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7")
    for name in ("0.heic", "1.HEIC", "labels.csv", "README"):
        (tmp_path / "dog" / name).write_bytes(b"x")
    picture().save(tmp_path / "overview.png")
    assert [paths(tmp_path, part) for part in PARTS] == clean
    summary, told = look(tmp_path)
    assert summary.passed_over == {"hidden": 23, ".heic": 2, ".csv": 1, "without a suffix": 1, "in no class": 1}
    for part in ("hidden 23", ".heic 2", "in no class 1"):
        assert part in told


def test_every_common_suffix_counts_in_any_case(tmp_path):
    kinds = {".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".PNG": "PNG", ".bmp": "BMP"}
    kinds |= {".webp": "WEBP", ".tif": "TIFF", ".TIFF": "TIFF", ".gif": "GIF", ".ppm": "PPM", ".pgm": "PPM"}
    for suffix, kind in kinds.items():
        fill(tmp_path, "train/a", "train/b", suffix=suffix, kind=kind, count=1)
    train = load_part(str(tmp_path), "train", **OPTIONS)
    assert len(list(train)) == 2 * len(kinds)
    assert look(tmp_path)[0].modes == {"L": 20, "P": 2, "RGB": 2}


def test_links_are_followed_and_loops_end(tmp_path):
    fill(tmp_path / "store", "cat", "dog")
    (tmp_path / "data" / "train").mkdir(parents=True)
    for kind in ("cat", "dog"):
        (tmp_path / "data" / "train" / kind).symlink_to(tmp_path / "store" / kind)
    (tmp_path / "store" / "cat" / "again").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "store" / "cat" / "self").symlink_to("self")
    assert len(load_part(str(tmp_path / "data"), "train", **OPTIONS)) == 6
    (tmp_path / "store" / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png"):
        look(tmp_path / "data")


def test_names_that_are_no_unicode(tmp_path):
    fill(tmp_path, "train/cat", "train/dog")
    name = os.fsdecode(b"\xff\xfe.png")
    picture().save(tmp_path / "train" / "cat" / name)
    assert len(list(load_part(str(tmp_path), "train", **OPTIONS))) == 7
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / os.fsdecode(b"d\xf6g"))
    with pytest.raises(InputError, match="UTF-8"):
        load_part(str(tmp_path), "train", **OPTIONS)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301")])
@pytest.mark.parametrize("parts", [("", ""), ("train/", "test/")])
def test_names_that_people_take_for_the_same_are_refused(tmp_path, names, parts):
    fill(tmp_path, *(part + name for part, name in zip(parts, names, strict=True)), "train/b" if parts[0] else "b")
    with pytest.raises(InputError, match=r"expected classes of different names .*; put their images into one folder"):
        load_part(str(tmp_path), "train", **OPTIONS)


def test_a_link_to_a_pipe_is_passed_over(tmp_path):
    fill(tmp_path, "cat", "dog", count=30)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cat" / "linked.png").symlink_to(tmp_path / "pipe")
    assert sum(len(load_part(str(tmp_path), part, **OPTIONS)) for part in PARTS) == 60


def test_a_division_follows_content_and_seed_alone(tmp_path):
    fill(tmp_path / "one", "cat", "dog", count=60)
    for index, path in enumerate(sorted((tmp_path / "one").rglob("*.png"))):
        target = tmp_path / "two" / path.parent.name / f"{(index * 37) % 120:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

    def contents(root, part, seed=0):
        return sorted((root / path).read_bytes() for path in paths(root, part, seed))

    for part in PARTS:
        assert contents(tmp_path / "one", part) == contents(tmp_path / "two", part)
        assert contents(tmp_path / "one", part) != contents(tmp_path / "one", part, seed=1)


def test_digests_of_a_part_follow_contents_and_classes_and_not_names(tmp_path):
    one = fill(tmp_path / "one", "test/cat", "test/dog")
    two = tmp_path / "two"
    for path in one.rglob("*.png"):
        target = two / "Testing" / path.parent.name / f"other {path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lines = digests_by_class(open_folder(one, 0), "test")
    assert lines == digests_by_class(open_folder(two, 0), "test")
    assert len({*lines}) == 6
    (two / "Testing" / "cat" / "other 0.png").rename(two / "Testing" / "dog" / "moved.png")
    assert len({*lines} - {*digests_by_class(open_folder(two, 0), "test")}) == 1


def test_copies_stay_in_one_part_whatever_their_name_or_class(tmp_path):
    fill(tmp_path, "cat", "dog", count=60)
    for path in sorted((tmp_path / "cat").iterdir()):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
        shutil.copy(path, tmp_path / "dog" / f"cat {path.name}")
    contents = [{(tmp_path / path).read_bytes() for path in paths(tmp_path, part)} for part in PARTS]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 120
    _, told = look(tmp_path)
    assert "60 copies of images in another class" in told
    assert "among those for" not in told


def test_a_class_of_copies_alone_is_divided_and_told(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for index in range(40):
            picture(len(kind)).save(tmp_path / kind / f"{index}.png")
    parts = [paths(tmp_path, part) for part in PARTS]
    assert all(parts)
    assert sum(map(len, parts)) == 80
    assert "copies of train images among those for calibration" in look(tmp_path)[1]


def test_copies_of_training_images_are_found_in_other_parts(tmp_path):
    fill(tmp_path, *(f"{part}/{kind}" for part in ("Train", "Val", "Test") for kind in ("cat", "dog")))
    assert not look(tmp_path)[0].warnings
    shutil.copy(tmp_path / "Train" / "cat" / "0.png", tmp_path / "Val" / "cat" / "x.png")
    Image.open(tmp_path / "Train" / "dog" / "1.png").save(tmp_path / "Test" / "dog" / "x.bmp")  # other bytes
    summary, told = look(tmp_path)
    assert len(summary.warnings) == 2
    for pattern in ("Val/cat/x.png", "Train/cat/0.png", "Test/dog/x.bmp", "Train/dog/1.png"):
        assert pattern in told
    folder = open_folder(tmp_path, 0)
    assert "Val/cat/x.png" in find_copies(folder, "calibration")[0]
    assert find_copies(folder, "test") == []  # only equal files are looked for here
    assert find_copies(None, "test") == []


def test_the_summary_tells_classes_counts_sizes_and_modes(tmp_path):
    fill(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "train" / "dog" / "large.png")
    summary, told = look(tmp_path)
    assert summary.counts == {"train": {"cat": 3, "dog": 4}, "calibration": {"cat": 3, "dog": 3}}
    assert summary.sizes == ((8, 8), (30, 20))
    assert summary.modes == {"L": 12, "RGB": 1}
    for part in ("7 images: cat 3, dog 4", "8×8 to 30×20", "L 12, RGB 1"):
        assert part in told


def test_damaged_images_are_named_before_a_training(tmp_path):
    fill(tmp_path, "train/cat", "train/dog")
    for name in ("1.png", "2.png"):
        (tmp_path / "train" / "dog" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"dog/1\.png.*2 of 6 images are not read.*dog/2\.png"):
        look(tmp_path)


def spoil(folder):
    """A broken link, a JPEG without an end, one in inks without a profile, and a profile that is none."""
    red = Image.new("RGB", (8, 8), "red")
    (folder / "link.png").symlink_to(folder / "gone.png")
    red.save(folder / "end.jpg")
    (folder / "end.jpg").write_bytes((folder / "end.jpg").read_bytes()[:-2])
    red.convert("CMYK").save(folder / "inks.jpg")
    red.save(folder / "profile.png", icc_profile=b"no profile at all")
    return {str(folder / name) for name in ("link.png", "end.jpg", "inks.jpg", "profile.png")}


def test_images_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path):
    fill(tmp_path, "train/cat", "train/dog")
    bad = spoil(tmp_path / "train" / "dog")
    with pytest.raises(InputError, match=r"4 of 10 images are not read, the others: .*--skip-unreadable leaves them"):
        look(tmp_path)
    with pytest.raises(InputError, match="--skip-unreadable"):
        list(load_part(str(tmp_path), "train", **OPTIONS))
    folder, told = open_folder(tmp_path, 0, skip_unreadable=True), []
    assert set(folder.unreadable) == bad
    assert summarise(folder, say=told.append).counts == {"train": {"cat": 3, "dog": 3}}
    assert "unreadable 4" in told[0]
    pictures = load_part(str(tmp_path), "train", skip_unreadable=True, **OPTIONS)
    assert len(list(pictures)) == 6
    (warning,) = describe_unreadable(pictures)
    assert "4 images" in warning
    assert all(path in warning for path in bad)
    assert describe_unreadable(load_part("digits", "test", **OPTIONS)) == []


def test_images_that_are_left_out_change_no_part_of_the_others(tmp_path):
    fill(tmp_path, "cat", "dog", count=40)
    before = [paths(tmp_path, part) for part in PARTS]
    spoil(tmp_path / "cat")
    folder = open_folder(tmp_path, 0, skip_unreadable=True)
    after = [{os.path.relpath(path, tmp_path) for path, _ in folder.samples(part)} for part in PARTS]
    assert after == before


def test_a_long_list_of_damaged_images_names_ten(tmp_path):
    fill(tmp_path, "train/cat", count=12)
    for file in (tmp_path / "train" / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"12 of 12") as raised:
        look(tmp_path)
    assert len(set(re.findall(r"cat/\d+\.png", str(raised.value)))) == 10
    assert "…" in str(raised.value)


def test_dark_images_of_sixteen_bits_are_told(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        values = np.random.default_rng(len(kind)).integers(0, 4096, (8, 8), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "train" / kind / f"{kind}.png")
    dark = look(tmp_path)[1]
    assert "almost black" in dark
    Image.fromarray(values * 16).save(tmp_path / "train" / "cat" / "white.png")
    assert "almost black" not in look(tmp_path)[1]
