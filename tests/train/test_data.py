import copy
import gzip
import hashlib
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from gkd_fast.train.data import DataConfig, DataError, Images, epoch_order, load_splits


def all_images(images):
    return torch.stack([image for image, _ in images.__getitems__(range(len(images)))])


def class_shares(images, num_classes):
    return torch.bincount(images.labels, minlength=num_classes) / len(images)


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder, packed):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 50)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            name, content = f"{part}-{kind}-ubyte", idx_bytes(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Writes a small CIFAR in the layout of torchvision's class, whose checksums are then those of the small files."""

    def write(name):
        data_set = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        classes = int(name.removeprefix("cifar"))
        label_key = "labels" if classes == 10 else "fine_labels"
        folder = tmp_path / data_set.base_folder
        folder.mkdir()
        rng = np.random.default_rng(0)

        def dump(file_name, content):
            (folder / file_name).write_bytes(pickle.dumps(content))
            return [file_name, hashlib.md5((folder / file_name).read_bytes()).hexdigest()]

        def part(file_name, count):
            pixels = rng.integers(0, 256, (count, 3 * 32 * 32)).astype(np.uint8)
            return dump(file_name, {"data": pixels, label_key: [k % classes for k in range(count)]})

        batches = [(file_name, 20 * classes) for file_name, _ in data_set.train_list]
        monkeypatch.setattr(data_set, "train_list", [part(*batch) for batch in batches])
        monkeypatch.setattr(data_set, "test_list", [part(data_set.test_list[0][0], 2 * classes)])
        meta = dict(data_set.meta)
        _, meta["md5"] = dump(meta["filename"], {meta["key"]: [str(k) for k in range(classes)]})
        monkeypatch.setattr(data_set, "meta", meta)
        return tmp_path

    return write


def test_digits_are_normalised_and_labelled():
    splits = load_splits(DataConfig(augment=False), seed=0)
    assert (splits.num_classes, splits.sample_shape) == (10, (1, 8, 8))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [1080, 120, 597]
    image, label = splits.train[3]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and isinstance(label, int)
    everything = torch.cat([all_images(part) for part in (splits.train, splits.validation, splits.test)])
    # The constants are those of all digits.
    assert abs(everything.mean()) < 1e-3 and abs(everything.std() - 1) < 1e-3


def test_splits_are_disjoint_stratified_and_independent_of_the_run():
    one, other = (load_splits(DataConfig(augment=False), seed) for seed in (0, 7))
    whole = load_splits(DataConfig(augment=False, split_seed=1), 0)
    assert torch.equal(one.validation.indices, other.validation.indices)
    assert not torch.equal(one.validation.indices, whole.validation.indices)
    assert torch.equal(all_images(one.test), all_images(whole.test))
    together = torch.cat([one.train.indices, one.validation.indices])
    assert torch.equal(together.sort().values, torch.arange(1200))
    for part in (one.train, one.validation, one.test):
        assert (class_shares(part, 10) - class_shares(one.train, 10)).abs().max() < 0.01
    # Of the embedded images, none is twice in what the splits hold together.
    images = torch.cat([all_images(part) for part in (one.train, one.validation, one.test)])
    assert len(images.unique(dim=0)) == 1797


def test_train_size_keeps_validation_and_class_shares():
    full = load_splits(DataConfig(), 0)
    part = load_splits(DataConfig(train_size=200), 0)
    assert len(part.train) == 200
    assert torch.equal(part.validation.indices, full.validation.indices)
    assert torch.isin(part.train.indices, full.train.indices).all()
    assert (class_shares(part.train, 10) - class_shares(full.train, 10)).abs().max() < 0.01
    assert len(load_splits(DataConfig(train_size=1080), 0).train) == 1080


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_draws_depend_on_seed_epoch_and_image_alone(name, tmp_path):
    if name == "fashion-mnist":
        write_fashion_mnist(tmp_path / "data", packed=False)
    config = DataConfig(name, data_dir=str(tmp_path / "data"), noise=0.3, train_size=100)

    def epoch_images(seed, epoch):
        images = load_splits(config, seed).train
        images.set_epoch(epoch)
        return all_images(images)

    first = load_splits(config, 5).train
    first.set_epoch(4)
    all_images(first)
    first.set_epoch(2)
    expected = all_images(first)
    # Another process of the same run that resumes at epoch 2, reads one by one and backwards.
    resumed = load_splits(config, 5).train
    resumed.set_epoch(2)
    backwards = [resumed[position][0] for position in reversed(range(len(resumed)))]
    assert torch.equal(torch.stack(backwards[::-1]), expected)
    for seed, epoch in ((5, 3), (6, 2)):
        changed = (epoch_images(seed, epoch) != expected).flatten(1).any(1)
        assert changed.all()


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_see_the_same_images(persistent):
    images = load_splits(DataConfig(noise=0.2), 3).train
    order = epoch_order(len(images), 3, 1)
    loader = DataLoader(images, 200, sampler=order, num_workers=2, persistent_workers=persistent)
    images.set_epoch(0)
    before = torch.cat([batch for batch, _ in loader])
    images.set_epoch(1)
    loaded, labels = (torch.cat(parts) for parts in zip(*loader))
    expected = all_images(images)[order]
    assert torch.equal(loaded, expected) and torch.equal(labels, images.labels[order])
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda images: pickle.loads(pickle.dumps(images))])
def test_copies_draw_the_same_independently(copied):
    images = load_splits(DataConfig(noise=0.2), 3).train
    images.set_epoch(2)
    expected = all_images(images)
    other = copied(images)
    other.set_epoch(5)
    assert not torch.equal(all_images(other), expected)
    assert torch.equal(all_images(images), expected)
    other.set_epoch(2)
    assert torch.equal(all_images(other), expected)


def test_runs_on_one_source_do_not_share_draws():
    first = load_splits(DataConfig(), 0).train
    second = Images(first.source, first.indices.numpy(), seed=1, noise=0.0, training=True, augment=True)
    expected = all_images(load_splits(DataConfig(), 1).train)
    all_images(first)
    assert torch.equal(all_images(second), expected)


def test_noise_has_the_asked_deviation_and_is_fixed_on_images_to_judge_by():
    clean = load_splits(DataConfig(augment=False), 1)
    noisy = load_splits(DataConfig(augment=False, noise=0.4), 1)
    for name in ("train", "validation", "test"):
        # In units of [0, 1] pixels.
        noise = (all_images(getattr(noisy, name)) - all_images(getattr(clean, name))) * 0.3760
        bound = 4 / noise.numel() ** 0.5
        assert abs(noise.mean()) < 0.4 * bound and abs(noise.std() / 0.4 - 1) < bound
        assert noise.flatten(1).unique(dim=0).shape[0] == len(noise)
    before = [all_images(part) for part in (noisy.train, noisy.validation, noisy.test)]
    for part in (noisy.train, noisy.validation, noisy.test):
        part.set_epoch(1)
    after = [all_images(part) for part in (noisy.train, noisy.validation, noisy.test)]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    another_run = load_splits(DataConfig(augment=False, noise=0.4), 2)
    assert torch.equal(all_images(another_run.test), after[2])
    # Validation and test images do not share their noise.
    numbers = torch.cat([noisy.validation.indices, noisy.test.indices + noisy.test.first_number])
    assert len(numbers.unique()) == len(numbers)


def find_shifts(config, pad, count=60):
    """Which (position, row, column, flip) make the augmented images out of the originals."""
    plain, shifted = (load_splits(replace(config, augment=augment), 0).train for augment in (False, True))
    mean, std = plain.source.mean, plain.source.std
    originals = F.pad(all_images(plain)[:count] * std + mean, [pad] * 4)
    size = plain[0][0].shape[-1]
    found = set()
    for position in range(count):
        windows = originals[position].unfold(1, size, 1).unfold(2, size, 1)  # [C, rows, columns, size, size]
        image = shifted[position][0] * std + mean
        for flip in (False, True):
            distance = (windows - (image.flip(2) if flip else image)[:, None, None]).abs().amax(dim=(0, 3, 4))
            found |= {(position, row, column, flip) for row, column in (distance < 1e-5).nonzero().tolist()}
    return found


def test_cifar_is_shifted_by_at_most_four_pixels_and_mirrored(cifar):
    found = find_shifts(DataConfig("cifar10", str(cifar("cifar10"))), pad=4)
    assert sorted(position for position, *_ in found) == list(range(60))
    assert {row for _, row, _, _ in found} == {column for _, _, column, _ in found} == set(range(9))
    assert {flip for *_, flip in found} == {False, True}


def test_digits_are_shifted_by_at_most_one_pixel_and_never_mirrored():
    unmirrored = [shift for shift in find_shifts(DataConfig(), pad=1) if not shift[3]]
    assert {position for position, *_ in unmirrored} == set(range(60))
    assert {row for _, row, _, _ in unmirrored} == {0, 1, 2}


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    order = epoch_order(1000, 3, 2)
    assert sorted(order) == list(range(1000)) and order == epoch_order(1000, 3, 2)
    assert len({tuple(epoch_order(1000, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_loading_leaves_the_global_random_state_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    splits = load_splits(DataConfig(noise=0.1), 0)
    splits.train[0]
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_flat_and_packed(folder, packed, tmp_path):
    write_fashion_mnist(tmp_path / "data" / folder, packed)
    splits = load_splits(DataConfig("fashion-mnist", str(tmp_path / "data"), augment=False), 0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [180, 20, 50]
    assert splits.sample_shape == (1, 28, 28)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    image, label = splits.train[0]
    index = int(splits.train.indices[0])
    expected = (torch.from_numpy(pixels[index]) / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(image[0], expected.float())
    assert label == index % 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_through_torchvision(name, cifar):
    root = cifar(name)
    splits = load_splits(DataConfig(name, str(root), augment=False), 0)
    classes = int(name.removeprefix("cifar"))
    assert (splits.num_classes, splits.sample_shape) == (classes, (3, 32, 32))
    counts = {"cifar10": (900, 100, 20), "cifar100": (1800, 200, 200)}[name]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == counts
    part = getattr(datasets, name.upper())(root, train=False)
    image, label = splits.test[7]
    pixels = (image * splits.test.source.std + splits.test.source.mean) * 255
    assert np.array_equal(pixels.permute(1, 2, 0).round().numpy(), np.asarray(part[7][0])) and label == part[7][1]


def make_folders(root, classes=("ant", "bee"), test="test"):
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), (test, 4)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / part / name / f"{k}.png")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_imagefolder_draws_depend_on_seed_epoch_and_image_alone(test, tmp_path):
    config = DataConfig("imagefolder", str(make_folders(tmp_path, test=test)), image_size=32, validation_share=0.2)
    splits = load_splits(config, 0)
    assert (splits.num_classes, splits.sample_shape) == (2, (3, 32, 32))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [16, 4, 8]
    splits.train.set_epoch(1)
    state = torch.get_rng_state()
    images = all_images(splits.train)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (16, 3, 32, 32) and images.dtype == torch.float32
    again = load_splits(config, 0).train
    again.set_epoch(1)
    assert torch.equal(again[5][0], images[5])
    again.set_epoch(2)
    assert not torch.equal(again[5][0], images[5])
    assert torch.equal(splits.test[0][0], load_splits(config, 9).test[0][0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fashion-mnist", "fashion-mnist is not .*--data.data_dir, .*--data.download true, or put its four idx files"),
        ("cifar10", "cifar10 is not .*--data.data_dir, .*--data.download true, or unpack .*cifar-10-python"),
        ("cifar100", "cifar100 is not .*--data.data_dir, .*--data.download true, or unpack .*cifar-100-python"),
        ("imagefolder", r"imagefolder needs .*train/CLASS/IMAGE and .*test/CLASS/IMAGE"),
    ],
)
def test_missing_data_is_told_in_one_line(name, expected, tmp_path):
    with pytest.raises(DataError, match=expected) as raised:
        load_splits(DataConfig(name, str(tmp_path)), 0)
    assert "\n" not in str(raised.value)


def test_a_failed_download_is_told_in_one_line(tmp_path, monkeypatch):
    def unreachable(self):
        raise RuntimeError("Error downloading\ntried everything")

    monkeypatch.setattr(datasets.CIFAR10, "download", unreachable)
    with pytest.raises(DataError, match="^cifar10 could not be downloaded: Error downloading tried everything$"):
        load_splits(DataConfig("cifar10", str(tmp_path), download=True), 0)


def test_imagefolder_with_other_classes_in_test_is_refused(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "cat")
    with pytest.raises(DataError, match="do not have the same classes"):
        load_splits(DataConfig("imagefolder", str(tmp_path), image_size=32), 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "mnist"}, "data name must be digits, .* or MODULE:CLASS, got 'mnist'"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be at least 0, got nan"),
        ({"validation_share": 0.0}, "validation_share must be between 0 and 1, got 0.0"),
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1, got 1.0"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"split_seed": -1}, "split_seed must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        DataConfig(**arguments)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DataConfig(train_size=5), "training set of 5 images: 1080 images of 10 classes are there"),
        (DataConfig(train_size=5000), "training set of 5000 images: 1080 images"),
        (DataConfig(validation_share=0.001), "validation set of 1 images: 1200 images"),
    ],
)
def test_sizes_that_do_not_fit_are_told(config, expected):
    with pytest.raises(ValueError, match=expected):
        load_splits(config, 0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        load_splits(DataConfig(), -1)
