"""Data sets by import path: splits, augmentation and trainings as with those that have names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gkd_fast.train import cli
from gkd_fast.train.data import DataConfig, DataError, load_splits
from gkd_fast.train.run import train
from tests.train.conftest import quiet

COUNTS = {True: 120, False: 30}


class Squares:
    """Pictures of 3×16×12 pixels with a bright square whose place says which of three classes they are of."""

    def __init__(self, root, train, download=False):
        assert isinstance(root, str) and not download
        self.length = COUNTS[train]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        pixels = np.full((16, 12, 3), index % 50, dtype=np.uint8)
        label = index % 3
        pixels[4 * label : 4 * label + 4, 2:6] = 255
        return Image.fromarray(pixels), label


class Tensors(Squares):
    """The same as tensors, with names for the classes, labels at hand, a normalisation and an augmentation."""

    classes = ["top", "middle", "bottom", "never"]
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]

    def __init__(self, root, train):
        super().__init__(root, train)
        self.targets = torch.arange(self.length) % 3

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label

    def augment(self, image):
        return (image * torch.rand(3, 1, 1)).to(torch.uint8)


class Uneven(Squares):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.resize((12 + index % 2, 16)), label


class Halves(Squares):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label / 2


def path(kind):
    return f"{__name__}:{kind.__name__}"


def read(images, epoch=0):
    images.set_epoch(epoch)
    return torch.stack([image for image, _ in images.__getitems__(range(len(images)))])


def test_splits_are_those_of_other_data_sets():
    config = DataConfig(path(Squares), validation_share=0.25, train_size=45)
    splits, again = load_splits(config, 0), load_splits(config, 5)
    assert (splits.num_classes, splits.sample_shape) == (3, (3, 16, 12))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [45, 30, 30]
    assert torch.equal(splits.validation.indices, again.validation.indices)
    assert torch.equal(splits.train.indices, again.train.indices)
    assert not set(splits.train.indices.tolist()) & set(splits.validation.indices.tolist())
    assert all(torch.equal(part.labels.bincount(), torch.full((3,), len(part) // 3)) for part in (
        splits.train, splits.validation, splits.test
    ))  # fmt: skip
    image, label = splits.test[4]
    expected = np.asarray(Squares("", False)[4][0]) / 255
    torch.testing.assert_close(image * 0.5 + 0.5, torch.from_numpy(expected).permute(2, 0, 1).float())
    assert label == 1


@pytest.mark.parametrize("kind", [Squares, Tensors])
def test_draws_depend_on_seed_epoch_and_image_alone(kind):
    state = torch.get_rng_state()
    splits = load_splits(DataConfig(path(kind)), 3)
    first = read(splits.train, 2)
    assert torch.equal(torch.get_rng_state(), state)
    again = load_splits(DataConfig(path(kind)), 3).train
    again.set_epoch(2)
    assert torch.equal(torch.stack([again[k][0] for k in reversed(range(len(again)))]).flip(0), first)
    for seed, epoch in ((3, 1), (4, 2)):
        assert not torch.equal(read(load_splits(DataConfig(path(kind)), seed).train, epoch), first)
    plain = read(load_splits(DataConfig(path(kind), augment=False), 3).train)
    assert not torch.equal(plain, first) and plain.shape == first.shape
    assert torch.equal(read(splits.validation, 0), read(splits.validation, 1))


def test_a_class_says_its_classes_normalisation_and_augmentation():
    splits = load_splits(DataConfig(path(Tensors), augment=False), 0)
    assert splits.num_classes == 4
    pixels = torch.stack([Tensors("", False)[k][0] for k in range(30)]) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (Tensors.mean, Tensors.std))
    torch.testing.assert_close(read(splits.test), (pixels - mean) / std)
    plain, augmented = (read(load_splits(DataConfig(path(Tensors), augment=on), 0).train) for on in (False, True))
    scaled = (augmented * std + mean).flatten(2).amax(2)
    assert (scaled < (plain * std + mean).flatten(2).amax(2)).all() and scaled.unique().numel() > 100


def test_what_cannot_be_used_is_told():
    with pytest.raises(
        DataError, match=r"of one shape: that of number \d+ is \(3, 16, 13\), of the first \(3, 16, 12\)"
    ):
        read(load_splits(DataConfig(path(Uneven), augment=False), 0).test)
    with pytest.raises(DataError, match=r"Halves: labels must be integers from 0 to 1, got float64 from 0.0 to 1.0"):
        load_splits(DataConfig(path(Halves)), 0)
    with pytest.raises(ValueError, match="no.such:Thing cannot be imported"):
        load_splits(DataConfig("no.such:Thing"), 0)


def test_a_training_on_them(tiny):
    _, config, _ = cli.read_arguments(["student", "--data.name", path(Squares)])
    assert config.data.name == path(Squares)
    training = replace(tiny.student_training, epochs=8, batch_size=20, milestones=[6])
    result = train(replace(tiny, method="ce", data=config.data, student_training=training), "student", quiet())
    assert result["test_accuracy"] > 90
