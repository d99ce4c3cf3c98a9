"""Image data sets, their splits, and the random draws on them as pure functions of (seed, epoch, image)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gkd_fast.train.sources import DATA_SET_NAMES, Arrays, DataError, Items, open_source, stratified
from gkd_fast.train.streams import AUGMENTATION, FIXED_NOISE, NOISE, ORDER, Stream

__all__ = ["DataConfig", "DataError", "Images", "Splits", "epoch_order", "load_splits"]


@dataclass
class DataConfig:
    """Which images to use, and how.

    Args:
        name: digits, fashion-mnist, cifar10, cifar100, imagefolder, or one's own: MODULE:CLASS, which is called as
            torchvision's data sets are, with data_dir and train=True or False, and download=True where that is wanted.
        data_dir: where the data set lies; for imagefolder the folder that holds train/ and test/ (or val/).
        download: fetch a missing data set into data_dir.
        noise: standard deviation of Gaussian noise on pixels in [0, 1]: new in each epoch on training images, fixed
            per image on validation and test images.
        validation_share: share of the training set that is set aside for choices, stratified by class.
        train_size: use only so many training images, stratified by class, after the validation split.
        augment: random shifts, and flips where they keep the label.
        image_size: height and width of the images of an imagefolder.
        workers: processes that load images; 0 loads in the training process.
        split_seed: draws the splits and the fixed noise, apart from the seed of a run: what one run validates on,
            no other run (its teacher, say) has trained on.
    """

    name: Literal[DATA_SET_NAMES] | str = "digits"
    data_dir: str = ".data"
    download: bool = False
    noise: float = 0.0
    validation_share: float = 0.1
    train_size: int | None = None
    augment: bool = True
    image_size: int = 224
    workers: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in DATA_SET_NAMES and ":" not in self.name:
            raise ValueError(f"data name must be {', '.join(DATA_SET_NAMES)} or MODULE:CLASS, got {self.name!r}")
        if not 0.0 < self.validation_share < 1.0:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        for field, least in (("noise", 0), ("train_size", 1), ("image_size", 1), ("workers", 0), ("split_seed", 0)):
            value = getattr(self, field)
            if value is not None and not value >= least:
                raise ValueError(f"{field} must be at least {least}, got {value}")


@dataclass
class Splits:
    """The three parts of a data set; ``sample_shape`` is (channels, height, width)."""

    train: "Images"
    validation: "Images"
    test: "Images"
    num_classes: int
    sample_shape: tuple[int, int, int]


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Loads a data set and splits its training part in training and validation images.

    Args:
        config: the data set; ``config.split_seed`` alone decides which images are in which split.
        seed: ≥ 0, of the run: draws augmentation and training noise.

    Raises:
        DataError: the data set is missing.
        ValueError: a size does not fit the data set.
    """
    train, test = open_source(config.name, Path(config.data_dir), config.download, config.image_size)
    labels = train.labels
    held_out_size = round(config.validation_share * len(labels))
    rest, held_out = stratified(np.arange(len(labels)), labels, held_out_size, config.split_seed, "validation set")
    if config.train_size is not None and config.train_size != len(rest):
        _, rest = stratified(rest, labels[rest], config.train_size, config.split_seed, "training set")
    return Splits(
        train=Images(train, rest, seed=seed, noise=config.noise, training=True, augment=config.augment),
        validation=Images(train, held_out, seed=config.split_seed, noise=config.noise, training=False),
        # Test images come after the training images in the numbering that the fixed noise follows.
        test=Images(
            test, np.arange(len(test.labels)), config.split_seed, config.noise, training=False, first_number=len(labels)
        ),
        num_classes=train.num_classes,
        sample_shape=train.sample_shape,
    )


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits ``size`` samples: a permutation, drawn from (seed, epoch) alone."""
    return Stream(seed, ORDER).at(epoch).permutation(size).tolist()


class Images(Dataset):
    """Some images of a source, normalised: ``(float32 [C, H, W], label)``.

    On training images, augmentation and noise depend on (seed, epoch, image) and nothing else, so they are the same
    in any process and at any place in the order. On other images the noise is fixed and nothing else is random.
    """

    def __init__(
        self,
        source: Arrays | Items,
        indices: np.ndarray,
        seed: int,
        noise: float,
        training: bool,
        augment: bool = False,
        first_number: int = 0,
    ):
        self.source = source
        self.indices = torch.from_numpy(np.sort(indices))
        self.labels = torch.from_numpy(source.labels)[self.indices]
        self.noise = noise
        self.training = training
        self.augment = augment
        self.first_number = first_number
        self._augmentation_stream = Stream(seed, AUGMENTATION)
        self._noise_stream = Stream(seed, NOISE if training else FIXED_NOISE)
        # Shared memory, so that loader processes which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose draws the next samples show; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} is outside of {len(self)} images")
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several samples at once, which is how a DataLoader asks for a batch."""
        at = torch.as_tensor(positions)
        indices = self.indices[at]
        epoch = int(self._epoch) if self.training else 0
        images = self.source.read(indices, self._augmentation_stream if self.augment else None, epoch)  # [B, C, H, W]
        if self.noise > 0:
            images = images + self.noise * self._draw_noise(indices + self.first_number, images.shape[1:], epoch)
        images = (images - self.source.mean) / self.source.std
        return list(zip(images.unbind(), self.labels[at].tolist()))

    def _draw_noise(self, numbers: Tensor, shape: torch.Size, epoch: int) -> Tensor:
        draws = [
            self._noise_stream.at(epoch, number).standard_normal(shape, dtype=np.float32) for number in numbers.tolist()
        ]
        return torch.from_numpy(np.stack(draws))
