"""What the examples train on: scikit-learn's handwritten digits, 8×8 pixels, and a network with three named stages."""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STAGES = ["stage1", "stage2", "stage3"]


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Batches of training images and of the others."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1200, len(data) - 1200], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, batch_size)


def network(width: int) -> nn.Module:
    def stage(before: int, after: int, stride: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    stages = [stage(1, width, 1), stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(OrderedDict([*zip(STAGES, stages), ("head", head)]))


def trained(model: nn.Module, loader: DataLoader, epochs: int) -> nn.Module:
    """The model after some epochs of cross-entropy: a teacher."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in loader:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    correct = torch.cat([model(images).argmax(dim=1) == labels for images, labels in loader])
    return 100 * correct.float().mean().item()
