"""Where images come from: arrays in memory, or items of a data set that are read when asked for."""

import gzip
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from gkd_fast.train.own import imported
from gkd_fast.train.streams import Stream

# The embedded digits come in one piece: a third of them, the same for every split seed, is the test set.
DIGITS_TEST_SIZE = 597


class DataError(Exception):
    """A data set is missing or unusable; the message says in one line what to do."""


class Arrays:
    """Images in memory: ``pixels`` uint8 ``[N, C, H, W]``, white being ``white``."""

    def __init__(self, pixels: Tensor, labels: np.ndarray, about: "_InMemory"):
        self.pixels = pixels
        self.labels = labels
        self.num_classes = about.num_classes
        channels, height, width = pixels.shape[1:]
        self.sample_shape = (channels, height, width)
        self.white, self.pad, self.flip = about.white, about.pad, about.flip
        self.mean = torch.tensor(about.mean).view(-1, 1, 1)
        self.std = torch.tensor(about.std).view(-1, 1, 1)
        self._draws: tuple[Stream, int, Tensor] | None = None

    def read(self, indices: Tensor, augmentation: Stream | None, epoch: int) -> Tensor:
        pixels = self.pixels[indices]
        if augmentation is not None:
            pixels = self._shift_and_flip(pixels, self._draw(augmentation, epoch)[indices])
        return pixels.float() / self.white

    def _draw(self, augmentation: Stream, epoch: int) -> Tensor:
        """Row offset, column offset and flip of every image ``[N, 3]``, kept for the epoch."""
        if self._draws is None or self._draws[:2] != (augmentation, epoch):
            span = 2 * self.pad + 1
            draws = augmentation.at(epoch).integers(0, [span, span, 2], size=(len(self.pixels), 3))
            self._draws = augmentation, epoch, torch.from_numpy(draws)
        return self._draws[2]

    def _shift_and_flip(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Each image at its own draws, in one step for the batch; torchvision's crops take one draw for all they get,
        so that they would go image by image."""
        height, width = pixels.shape[-2:]
        rows = draws[:, :1] + torch.arange(height)  # [B, H]
        columns = draws[:, 1:2] + torch.arange(width)  # [B, W]
        if self.flip:
            columns = torch.where(draws[:, 2:] == 1, columns.flip(1), columns)
        padded = F.pad(pixels, [self.pad] * 4)
        image = torch.arange(len(pixels)).view(-1, 1, 1)
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Items:
    """Images of a data set as torchvision's are: ``(image, label)`` by index, decoded when read.

    Args:
        data: the data set; images are PIL images, ``[C, H, W]`` tensors, or ``[H, W, C]`` arrays of NumPy.
        labels: of all its items.
        classes: how many there are.
        fixed: makes an image a float tensor with pixels in [0, 1], ``sample_shape`` for all.
        random: the same, with random augmentation; draws from PyTorch's CPU generator.
        normalization: mean and standard deviation per channel.
    """

    def __init__(
        self,
        data: Any,
        labels: Sequence[int],
        classes: int,
        fixed: Callable[[Any], Tensor],
        random: Callable[[Any], Tensor],
        normalization: tuple[Sequence[float], Sequence[float]],
    ):
        self.data = data
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = classes
        self.fixed, self.random = fixed, random
        self.mean, self.std = (torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in normalization)
        channels, height, width = fixed(data[0][0]).shape
        self.sample_shape = (channels, height, width)

    def read(self, indices: Tensor, augmentation: Stream | None, epoch: int) -> Tensor:
        images = []
        for index in indices.tolist():
            image = self.data[index][0]
            if augmentation is None:
                images.append(self.fixed(image))
            else:
                # torchvision draws from PyTorch's CPU generator: lend it a seed, and give it back as it was.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(int(augmentation.at(epoch, index).integers(2**32)))
                    images.append(self.random(image))
            if images[-1].shape != self.sample_shape:
                shape, first = tuple(images[-1].shape), self.sample_shape
                raise DataError(f"images must be of one shape: that of number {index} is {shape}, of the first {first}")
        return torch.stack([image.as_subclass(Tensor) for image in images])


def stratified(
    indices: np.ndarray, labels: np.ndarray, count: int, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of the indices in every class's proportion: (the others, these)."""
    classes = len(np.unique(labels))
    if not classes <= count <= len(indices) - classes:
        raise ValueError(
            f"{what} of {count} images: {len(indices)} images of {classes} classes are there, "
            "and at least one of each class must be in it and one left"
        )
    others, drawn = train_test_split(indices, test_size=count, stratify=labels, random_state=seed)
    return others, drawn


def open_source(name: str, root: Path, download: bool, image_size: int) -> "tuple[Arrays | Items, Arrays | Items]":
    """Training and test images of a data set; arguments as in :class:`gkd_fast.train.data.DataConfig`."""
    if name == "imagefolder":
        return _open_folders(root, image_size)
    if name in _IN_MEMORY:
        about = _IN_MEMORY[name]
        train, test = about.read(root, download)
        return Arrays(*train, about), Arrays(*test, about)
    return _open_own(name, root, download)


def _open_folders(root: Path, size: int) -> tuple[Items, Items]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise DataError(f"imagefolder needs {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE (or val for test)")
    try:
        train, test = (ImageFolder(folder) for folder in (root / "train", held_out))
    except FileNotFoundError as error:
        raise DataError(f"imagefolder: {str(error).splitlines()[0]}") from None
    if train.classes != test.classes:
        raise DataError(f"imagefolder: {root / 'train'} and {held_out} do not have the same classes")
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    fixed = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_float])
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_float])
    # Of ImageNet's training images, as in torchvision's pre-trained models.
    normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    train, test = (Items(x, x.targets, len(x.classes), fixed, random, normalization) for x in (train, test))
    return train, test


def _open_own(path: str, root: Path, download: bool) -> tuple[Items, Items]:
    """What ``MODULE:CLASS`` gives when it is called as torchvision's data sets are."""
    from torchvision.transforms import v2

    make = imported(path)
    options = {"download": True} if download else {}
    train, test = (make(str(root), train=part, **options) for part in (True, False))
    labels = [x.targets if hasattr(x, "targets") else [x[k][1] for k in range(len(x))] for x in (train, test)]
    labels = [np.asarray(x) for x in labels]
    classes = len(train.classes) if hasattr(train, "classes") else int(labels[0].max()) + 1
    for part in labels:
        if part.dtype.kind not in "iu" or not 0 <= part.min() <= part.max() < classes:
            found = f"{part.dtype} from {part.min()} to {part.max()}"
            raise DataError(f"{path}: labels must be integers from 0 to {classes - 1}, got {found}")
    to_float = v2.ToDtype(torch.float32, scale=True)
    fixed = v2.Compose([v2.ToImage(), to_float])
    channels, *size = fixed(train[0][0]).shape
    shift = v2.RandomCrop(size, padding=max(1, min(size) // 8))
    random = v2.Compose([v2.ToImage(), getattr(train, "augment", shift), to_float])
    normalization = getattr(train, "mean", [0.5] * channels), getattr(train, "std", [0.5] * channels)
    train, test = (Items(x, y, classes, fixed, random, normalization) for x, y in zip((train, test), labels))
    return train, test


# The readers return ((training pixels uint8 [N, C, H, W], labels), (test pixels, labels)). torchvision is imported
# where it is needed: it takes a second, and the embedded digits do without.
_Parts = tuple[tuple[Tensor, np.ndarray], tuple[Tensor, np.ndarray]]


def _read_digits(root: Path, download: bool) -> _Parts:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    train, test = stratified(np.arange(len(pixels)), digits.target, DIGITS_TEST_SIZE, 0, "test set")
    return (pixels[train], digits.target[train]), (pixels[test], digits.target[test])


def _read_fashion_mnist(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    stems = [Path(name).stem for name, _ in FashionMNIST.resources]
    folders = (root, root / "FashionMNIST" / "raw")

    def find() -> list[Path] | None:
        for folder in folders:
            found = [[f for f in (folder / s, folder / f"{s}.gz") if f.is_file()] for s in stems]
            if all(found):
                return [plain_first[0] for plain_first in found]
        return None

    if find() is None and download:
        _fetch("fashion-mnist", lambda: FashionMNIST(root, download=True))
    files = find()
    if files is None:
        raise _missing("fashion-mnist", root, f"put its four idx files ({stems[0]}[.gz], …) into {root}")
    with tempfile.TemporaryDirectory() as unpacked:
        files = [_unpack(file, Path(unpacked)) for file in files]
        images, labels, test_images, test_labels = (
            reader(str(file)) for reader, file in zip([read_image_file, read_label_file] * 2, files)
        )
    return (images.unsqueeze(1), labels.numpy()), (test_images.unsqueeze(1), test_labels.numpy())


def _unpack(file: Path, folder: Path) -> Path:
    if file.suffix != ".gz":
        return file
    with gzip.open(file) as packed, open(folder / file.stem, "wb") as plain:
        shutil.copyfileobj(packed, plain)
    return folder / file.stem


def _read_cifar10(root: Path, download: bool) -> _Parts:
    return _read_cifar("CIFAR10", "cifar10", root, download)


def _read_cifar100(root: Path, download: bool) -> _Parts:
    return _read_cifar("CIFAR100", "cifar100", root, download)


def _read_cifar(class_name: str, name: str, root: Path, download: bool) -> _Parts:
    from torchvision import datasets

    data_set = getattr(datasets, class_name)
    if download:
        _fetch(name, lambda: data_set(root, download=True))
    try:
        train, test = (data_set(root, train=train) for train in (True, False))
    except RuntimeError:
        raise _missing(name, root, f"unpack {data_set.url} there") from None

    def arrays(part: datasets.CIFAR10) -> tuple[Tensor, np.ndarray]:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), np.asarray(part.targets)

    return arrays(train), arrays(test)


def _fetch(name: str, download: Callable[[], object]) -> None:
    try:
        download()
    except (RuntimeError, OSError) as error:
        raise DataError(f"{name} could not be downloaded: {' '.join(str(error).split())}") from None


def _missing(name: str, root: Path, by_hand: str) -> DataError:
    return DataError(
        f"{name} is not (whole) in {root}: name its folder with --data.data_dir, fetch it with --data.download true, "
        f"or {by_hand}"
    )


@dataclass(frozen=True)
class _InMemory:
    read: Callable[[Path, bool], _Parts]
    num_classes: int
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    white: int = 255
    pad: int = 4  # of the random crops
    flip: bool = True


# Means and deviations are those of the training images (all images for digits). CIFAR: pad 4 and flips, the field's
# usual augmentation; smaller shifts for the smaller images, and no flips for digits, which they would change.
_IN_MEMORY = {
    "digits": _InMemory(_read_digits, 10, (0.3053,), (0.3760,), white=16, pad=1, flip=False),
    "fashion-mnist": _InMemory(_read_fashion_mnist, 10, (0.2860,), (0.3530,), pad=2),
    "cifar10": _InMemory(_read_cifar10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _InMemory(_read_cifar100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}

# All that have names of their own.
DATA_SET_NAMES = (*_IN_MEMORY, "imagefolder")
