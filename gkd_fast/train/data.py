"""Image data sets, their splits, and the random draws on them as pure functions of (seed, epoch, image)."""

import gzip
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

# The embedded digits come in one piece: a third of them, the same for every split seed, is the test set.
DIGITS_TEST_SIZE = 597

# What a random stream is for; with the seed it makes the key of a counter-based generator.
_ORDER, _AUGMENTATION, _NOISE, _FIXED_NOISE = range(4)


class DataError(Exception):
    """A data set is missing or unusable; the message says in one line what to do."""


@dataclass
class DataConfig:
    """Which images to use, and how.

    Args:
        name: digits, fashion-mnist, cifar10, cifar100 or imagefolder.
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

    name: str = "digits"
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
        names = (*_DATA_SETS, "imagefolder")
        if self.name not in names:
            raise ValueError(f"data name must be one of {', '.join(names)}, got {self.name!r}")
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
    if config.name == "imagefolder":
        train, validation_from, test, num_classes = _open_folders(config)
        shape = (3, config.image_size, config.image_size)
    else:
        train, test = _open_arrays(config)
        validation_from, num_classes, shape = train, _DATA_SETS[config.name].num_classes, tuple(train.pixels.shape[1:])

    labels = train.labels
    rest, held_out = _stratified(
        np.arange(len(labels)), labels, round(config.validation_share * len(labels)), config.split_seed, "validation set"
    )
    if config.train_size is not None and config.train_size != len(rest):
        _, rest = _stratified(rest, labels[rest], config.train_size, config.split_seed, "training set")
    return Splits(
        train=Images(train, rest, seed=seed, noise=config.noise, training=True, augment=config.augment),
        validation=Images(validation_from, held_out, seed=config.split_seed, noise=config.noise, training=False),
        # Test images come after the training images in the numbering that the fixed noise follows.
        test=Images(
            test, np.arange(len(test.labels)), config.split_seed, config.noise, training=False, first_number=len(labels)
        ),
        num_classes=num_classes,
        sample_shape=shape,
    )


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits ``size`` samples: a permutation, drawn from (seed, epoch) alone."""
    return _Stream(seed, _ORDER).at(epoch).permutation(size).tolist()


class Images(Dataset):
    """Some images of a source, normalised: ``(float32 [C, H, W], label)``.

    On training images, augmentation and noise depend on (seed, epoch, image) and nothing else, so they are the same
    in any process and at any place in the order. On other images the noise is fixed and nothing else is random.
    """

    def __init__(
        self,
        source: "_Arrays | _Folder",
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
        self._augmentation_stream = _Stream(seed, _AUGMENTATION)
        self._noise_stream = _Stream(seed, _NOISE if training else _FIXED_NOISE)
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
        positions = torch.as_tensor(positions)
        indices = self.indices[positions]
        epoch = int(self._epoch) if self.training else 0
        images = self.source.read(indices, self._augmentation_stream if self.augment else None, epoch)  # [B, C, H, W]
        if self.noise > 0:
            images = images + self.noise * self._draw_noise(indices + self.first_number, images.shape[1:], epoch)
        images = (images - self.source.mean) / self.source.std
        return list(zip(images.unbind(), self.labels[positions].tolist()))

    def _draw_noise(self, numbers: Tensor, shape: torch.Size, epoch: int) -> Tensor:
        draws = [
            self._noise_stream.at(epoch, number).standard_normal(shape, dtype=np.float32) for number in numbers.tolist()
        ]
        return torch.from_numpy(np.stack(draws))


class _Stream:
    """Random numbers that can be entered at any (epoch, image): a counter-based generator, Philox."""

    def __init__(self, seed: int, purpose: int):
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._bits = np.random.Philox(key=[seed, purpose])
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, epoch: int, image: int = 0) -> np.random.Generator:
        # Setting the state is six times faster than making a generator. The low half of the counter is the position
        # within one image's numbers.
        self._start["state"]["counter"] = np.array([0, 0, image, epoch], dtype=np.uint64)
        self._bits.state = self._start
        return self._generator


class _Arrays:
    """Images in memory: ``pixels`` uint8 ``[N, C, H, W]``, white being ``white``."""

    def __init__(self, pixels: Tensor, labels: np.ndarray, about: "_DataSet"):
        self.pixels = pixels
        self.labels = labels
        self.white, self.pad, self.flip = about.white, about.pad, about.flip
        self.mean = torch.tensor(about.mean).view(-1, 1, 1)
        self.std = torch.tensor(about.std).view(-1, 1, 1)
        self._draws: tuple[int, Tensor] | None = None

    def read(self, indices: Tensor, augmentation: _Stream | None, epoch: int) -> Tensor:
        pixels = self.pixels[indices]
        if augmentation is not None:
            pixels = self._shift_and_flip(pixels, self._draw(augmentation, epoch)[indices])
        return pixels.float() / self.white

    def _draw(self, augmentation: _Stream, epoch: int) -> Tensor:
        """Row offset, column offset and flip of every image ``[N, 3]``, kept for the epoch."""
        if self._draws is None or self._draws[0] != epoch:
            span = 2 * self.pad + 1
            draws = augmentation.at(epoch).integers(0, [span, span, 2], size=(len(self.pixels), 3))
            self._draws = epoch, torch.from_numpy(draws)
        return self._draws[1]

    def _shift_and_flip(self, pixels: Tensor, draws: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        rows = draws[:, :1] + torch.arange(height)  # [B, H]
        columns = draws[:, 1:2] + torch.arange(width)  # [B, W]
        if self.flip:
            columns = torch.where(draws[:, 2:] == 1, columns.flip(1), columns)
        padded = F.pad(pixels, [self.pad] * 4)
        image = torch.arange(len(pixels)).view(-1, 1, 1)
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Folder:
    """Image files, one folder per class, decoded when read."""

    # Of ImageNet's training images, as in torchvision's pre-trained models.
    mean = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)

    def __init__(self, folder: Path, size: int):
        from torchvision import datasets
        from torchvision.transforms import v2

        try:
            self.files = datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise DataError(f"imagefolder: {str(error).splitlines()[0]}") from None
        self.labels = np.asarray(self.files.targets)
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.fixed = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_float])
        self.random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_float])

    def read(self, indices: Tensor, augmentation: _Stream | None, epoch: int) -> Tensor:
        images = []
        for index in indices.tolist():
            image, _ = self.files[index]
            if augmentation is None:
                images.append(self.fixed(image))
            else:
                # torchvision draws from PyTorch's CPU generator: lend it a seed, and give it back as it was.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(int(augmentation.at(epoch, index).integers(2**32)))
                    images.append(self.random(image))
        return torch.stack([image.as_subclass(Tensor) for image in images])


def _stratified(
    indices: np.ndarray, labels: np.ndarray, count: int, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of the indices in every class's proportion: (the others, these)."""
    classes = len(np.unique(labels))
    if not classes <= count <= len(indices) - classes:
        raise ValueError(f"{what}: {count} of {len(indices)} images cannot be drawn with all {classes} classes on both sides")
    others, drawn = train_test_split(indices, test_size=count, stratify=labels, random_state=seed)
    return others, drawn


def _open_arrays(config: DataConfig) -> tuple[_Arrays, _Arrays]:
    about = _DATA_SETS[config.name]
    parts = about.read(Path(config.data_dir), config.download)
    return tuple(_Arrays(pixels, labels.astype(np.int64), about) for pixels, labels in parts)


def _open_folders(config: DataConfig) -> tuple[_Folder, _Folder, _Folder, int]:
    root = Path(config.data_dir)
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise DataError(f"imagefolder needs {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE (or val for test)")
    train, test = (_Folder(folder, config.image_size) for folder in (root / "train", held_out))
    if train.files.classes != test.files.classes:
        raise DataError(f"imagefolder: {root / 'train'} and {held_out} do not have the same classes")
    return train, train, test, len(train.files.classes)


# The readers return ((training pixels uint8 [N, C, H, W], labels), (test pixels, labels)). torchvision is imported
# where it is needed: it takes a second, and the embedded digits do without.
_Parts = tuple[tuple[Tensor, np.ndarray], tuple[Tensor, np.ndarray]]


def _read_digits(root: Path, download: bool) -> _Parts:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    train, test = _stratified(np.arange(len(pixels)), digits.target, DIGITS_TEST_SIZE, 0, "test set")
    return (pixels[train], digits.target[train]), (pixels[test], digits.target[test])


def _read_fashion_mnist(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    stems = [Path(name).stem for name, _ in FashionMNIST.resources]
    folders = (root, root / "FashionMNIST" / "raw")

    def find() -> list[Path] | None:
        for folder in folders:
            files = [next((f for f in (folder / s, folder / f"{s}.gz") if f.is_file()), None) for s in stems]
            if all(files):
                return files
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
        parts = [data_set(root, train=train) for train in (True, False)]
    except RuntimeError:
        raise _missing(name, root, f"unpack {data_set.url} there") from None
    return tuple(
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), np.asarray(part.targets)) for part in parts
    )


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
class _DataSet:
    read: Callable[[Path, bool], _Parts]
    num_classes: int
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    white: int = 255
    pad: int = 4  # of the random crops
    flip: bool = True


# Means and deviations are those of the training images (all images for digits). CIFAR: pad 4 and flips, the field's
# usual augmentation; smaller shifts for the smaller images, and no flips for digits, which they would change.
_DATA_SETS = {
    "digits": _DataSet(_read_digits, 10, (0.3053,), (0.3760,), white=16, pad=1, flip=False),
    "fashion-mnist": _DataSet(_read_fashion_mnist, 10, (0.2860,), (0.3530,), pad=2),
    "cifar10": _DataSet(_read_cifar10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _DataSet(_read_cifar100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
